"""Blocks of convolutions on a GPU against the eager loop, plain and under CUDA graphs, at the paper's size.

``python benchmarks/gpu_maps.py [--quick] [--rounds N] [--output FILE]`` prints a table and writes JSON:
times of interleaved rounds of a forward and of training steps, errors against float64, and operations a
second (4BHWCMk²L a forward).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu import graphed, measure, provenance
from torch import Tensor

from odeblock import initializers
from odeblock.functional import deep_conv_residual

BATCHES = (64, 256, 1024)
CHANNELS, SIZE, KERNEL, DEPTH = 16, 10, 3, 256
KINDS = {"bfloat16": torch.bfloat16, "tf32": torch.float32, "float32": torch.float32}


def allow_tf32(allowed: bool) -> None:
    if hasattr(torch.backends.cudnn, "conv"):  # torch >= 2.9
        torch.backends.cudnn.conv.fp32_precision = "tf32" if allowed else "ieee"
    else:
        torch.backends.cudnn.allow_tf32 = allowed


def eager(h: Tensor, V: Tensor, W: Tensor) -> Tensor:
    """The loop as an expert writes it: weights unbound once, the step added in one operation."""
    for V_k, W_k in zip(V.unbind(), W.unbind(), strict=True):
        s = F.gelu(F.conv2d(h, W_k, padding=KERNEL // 2))
        h = torch.add(h, F.conv2d(s, V_k, padding=KERNEL // 2), alpha=1 / len(V))
    return h


def case(kind: str, batch: int, rounds: int) -> dict[str, Any]:
    V = torch.empty(DEPTH, CHANNELS, CHANNELS, KERNEL, KERNEL)
    W = torch.empty_like(V)
    initializers.smooth_(V, W)
    h = torch.randn(batch, CHANNELS, SIZE, SIZE)
    h, V, W = (x.to("cuda", KINDS[kind]) for x in (h, V, W))
    leaves = [x.clone().requires_grad_() for x in (h, V, W)]
    grad = torch.randn_like(h)

    def step(function: Callable[..., Tensor], **options: str) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(function(*leaves, **options), leaves, grad)

    truth = eager(h[:64].double(), V.double(), W.double())
    found = {"odeblock": deep_conv_residual(h, V, W), "eager": eager(h, V, W)}
    errors = {name: float((y[:64].double() - truth).abs().max()) for name, y in found.items()}
    works: dict[str, Callable[[], Any]] = {
        "forward": lambda: deep_conv_residual(h, V, W),
        "forward, eager": lambda: eager(h, V, W),
        "forward, graphed": graphed(lambda: deep_conv_residual(h, V, W)),
        "forward, eager graphed": graphed(lambda: eager(h, V, W)),
        "step, store": step(deep_conv_residual, backward="store"),
        "step, auto": step(deep_conv_residual, backward="auto"),
        "step, eager": step(eager),
    }
    times = measure(works, rounds)
    operations = 4 * batch * SIZE**2 * CHANNELS**2 * KERNEL**2 * DEPTH
    return {
        "products": kind,
        "batch": batch,
        "seconds": times,
        "errors": errors,
        "operations_per_second": operations / times["forward"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three rounds, the first batch of each type")
    parser.add_argument("--rounds", type=int, help="of a measurement; default: 15, with --quick 3")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<gpu>-maps.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error(f"PyTorch {torch.__version__} sees no GPU here")
    name = torch.cuda.get_device_name()
    output = arguments.output or Path(__file__).parent / "results" / f"{name.replace(' ', '_')}-maps.json"
    rounds = arguments.rounds or (3 if arguments.quick else 15)
    cases: list[dict[str, Any]] = []
    heads = ["products, B", "forward: ms", "x eager", "x graphed", "TFLOP/s", "step store, auto: x eager"]
    print(f"| {' | '.join([*heads, 'error: ours, eager'])} |\n|{' --- |' * 7}")
    for kind in KINDS:
        allow_tf32(kind == "tf32")
        for batch in BATCHES[:1] if arguments.quick else BATCHES:
            found = case(kind, batch, rounds)
            cases.append(found)
            output.write_text(json.dumps({**provenance(rounds), "cases": cases}, indent=1) + "\n")
            times, errors = found["seconds"], found["errors"]
            row = [
                f"{kind}, {batch}",
                f"{1e3 * times['forward']:.2f}",
                f"{times['forward, eager'] / times['forward']:.1f}",
                f"{times['forward, eager graphed'] / times['forward, graphed']:.1f}",
                f"{found['operations_per_second'] / 1e12:.0f}",
                ", ".join(f"{times['step, eager'] / times[f'step, {s}']:.1f}" for s in ("store", "auto")),
                f"{errors['odeblock']:.1e}, {errors['eager']:.1e}",
            ]
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
