"""Forward and training step on a GPU against the eager loop (plain, under CUDA graphs, checkpointed) and a
compiled step.

``python benchmarks/gpu.py [--quick] [--only forward,step,depth] [--rounds N] [--seconds S] [--output FILE]``
prints tables and writes JSON: times of interleaved rounds, errors against float64, peak memory, rows times
layers a second, and the share of the measured rate of a large matrix product of the same type (4BqmL
operations a forward, 16BqmL a step).
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import torch
from torch import Tensor

from odeblock import initializers
from odeblock.functional import deep_residual

Shape = tuple[int, int, int, int]  # B, q, m, L

LARGE = [(65536, 64, 64, 256), (65536, 128, 128, 256)]
SMALL = [(32, 64, 64, 1024)]
OTHERS = [
    (4096, 64, 64, 256),
    (65536, 256, 256, 128),
    (65536, 99, 101, 64),
    (65536, 32, 64, 256),
    (1, 64, 64, 1024),
]
# Types of products, with the shapes and activations that they are measured at.
CASES: dict[str, tuple[torch.dtype, list[Shape], list[str]]] = {
    "bfloat16": (torch.bfloat16, LARGE + SMALL + OTHERS, ["gelu_tanh", "gelu"]),
    "float16": (torch.float16, LARGE + SMALL, ["gelu_tanh"]),
    "tf32": (torch.float32, LARGE + SMALL, ["gelu_tanh"]),
    "float32": (torch.float32, LARGE + SMALL, ["gelu_tanh"]),
    "float64": (torch.float64, [(8192, 64, 64, 64), (8192, 128, 128, 64)], ["gelu_tanh"]),
}
STEPS: dict[str, tuple[torch.dtype, list[Shape]]] = {
    "bfloat16": (torch.bfloat16, [*LARGE, *SMALL, (4096, 64, 64, 256), (65536, 256, 256, 64)]),
    "float32": (torch.float32, [(16384, 64, 64, 256)]),
}
DEPTHS = (64, 256, 1024, 4096, 8192)  # at B, q, m = 4096, 64, 64
STRATEGIES = ("store", "auto", "adjoint")
CHECKED_ROWS = 128


def seconds(work: Callable[[], Any], calls: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(calls):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / calls


def measure(works: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Medians of interleaved rounds of some milliseconds; the first call of each warms it."""
    calls = {}
    for name, work in works.items():
        seconds(work, 1)
        calls[name] = max(1, min(100, round(5e-3 / seconds(work, 1))))
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(seconds(work, calls[name]))
    return {name: statistics.median(found) for name, found in times.items()}


def matrix_rate(dtype: torch.dtype, rounds: int) -> float:
    """Operations a second of a large matrix product."""
    size = 4096 if dtype == torch.float64 else 8192
    a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    return 2 * size**3 / measure({"product": lambda: a @ b}, rounds)["product"]


def graphed(work: Callable[[], Tensor]) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def case(kind: str, dtype: torch.dtype, shape: Shape, activation: str, rounds: int) -> dict[str, Any]:
    batch, dim, hidden, depth = shape
    V, W = torch.empty(depth, dim, hidden), torch.empty(depth, hidden, dim)
    initializers.smooth_(V, W)
    h, V, W = (x.to("cuda", dtype) for x in (torch.randn(batch, dim), V, W))
    options: dict[str, Any] = {"activation": activation, "scale": None}

    def eager() -> Tensor:
        return peers.eager({}, h, V, W, None, None, **options)

    def compiled() -> Tensor:
        return peers.compiled_step({}, h, V, W, None, None, **options)

    def ours() -> Tensor:
        return deep_residual(h, V, W, **options)

    def ends(rows: Tensor) -> Tensor:
        return torch.cat((rows[:CHECKED_ROWS], rows[-CHECKED_ROWS:])).double()

    truth = peers.eager({}, ends(h), V.double(), W.double(), None, None, **options)
    works: dict[str, Callable[[], Any]] = {"odeblock": ours, "eager": eager}
    errors = {name: float((ends(work()) - truth).abs().max()) for name, work in works.items()}
    works["graphed eager"] = graphed(eager)
    works["graphed odeblock"] = graphed(ours)
    torch.compiler.reset()
    try:
        compiled()
        works["compiled step"] = compiled
    except Exception as error:  # a peer that does not run here is no reason to lose the others
        errors["compiled step"] = str(error)[:200]
    times = measure(works, rounds)
    operations = 4 * batch * dim * hidden * depth
    return {
        "products": kind,
        "shape": shape,
        "activation": activation,
        "seconds": times,
        "operations_per_second": operations / times["odeblock"],
        "errors": errors,
    }


def training_case(
    kind: str, dtype: torch.dtype, shape: Shape, rounds: int, strategies: tuple[str, ...]
) -> dict[str, Any]:
    """A step, forward and backward, of every strategy and of peers."""
    batch, dim, hidden, depth = shape
    V, W = torch.empty(depth, dim, hidden), torch.empty(depth, hidden, dim)
    initializers.smooth_(V, W)
    h, V, W = (x.to("cuda", dtype).requires_grad_() for x in (torch.randn(batch, dim), V, W))
    grad = torch.randn_like(h)
    options: dict[str, Any] = {"activation": "gelu_tanh", "scale": None}

    def of(function: Callable[..., Tensor], *record: Any, **more: Any) -> Callable[[], tuple[Tensor, ...]]:
        def step() -> tuple[Tensor, ...]:
            y = function(*record, h, V, W, None, None, **options, **more)
            return torch.autograd.grad(y, (h, V, W), grad)

        return step

    works: dict[str, Callable[[], Any]] = {name: of(deep_residual, backward=name) for name in strategies}
    works |= {"eager": of(peers.eager, {}), "checkpointed": of(peers.checkpointed, {})}
    if kind == "bfloat16":
        works["compiled step"] = of(peers.compiled_step, {})
    torch.compiler.reset()
    peaks: dict[str, int] = {}
    faults: dict[str, str] = {}
    for name, work in list(works.items()):
        before = torch.cuda.memory_allocated()
        try:
            work()  # once before, for what is kept
            torch.cuda.reset_peak_memory_stats()
            work()
            peaks[name] = torch.cuda.max_memory_allocated() - before
        except Exception as error:  # out of memory, or a peer that does not run here
            faults[name] = str(error)[:200]
            del works[name]
            torch.cuda.empty_cache()
    for name in ("eager", "auto"):
        if name in works:
            try:
                works[f"graphed {name}"] = graphed(works[name])
            except RuntimeError as error:
                faults[f"graphed {name}"] = str(error)[:200]
    times = measure(works, rounds)
    operations = 16 * batch * dim * hidden * depth
    return {
        "products": kind,
        "shape": shape,
        "activation": "gelu_tanh",
        "seconds": times,
        "peak_bytes": peaks,
        "faults": faults,
        "operations_per_second": {name: operations / times[name] for name in times},
        "row_layers_per_second": {name: batch * depth / times[name] for name in times},
    }


def provenance(rounds: int) -> dict[str, Any]:
    """For the head of a JSON: what was measured, on what, how often."""
    commit = ""
    if shutil.which("git"):
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": commit,
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three rounds, the first shape of each type")
    parser.add_argument("--only", default="forward,step,depth", help="which parts, by commas; default: all")
    parser.add_argument("--rounds", type=int, help="of a measurement; default: 15, with --quick 3")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no case begins")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<gpu>.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error(f"PyTorch {torch.__version__} sees no GPU here")
    name = torch.cuda.get_device_name()
    output = arguments.output or Path(__file__).parent / "results" / f"{name.replace(' ', '_')}.json"
    rounds = arguments.rounds or (3 if arguments.quick else 15)
    end = time.monotonic() + arguments.seconds
    results: dict[str, Any] = {
        **provenance(rounds),
        "complete": True,  # not ended by --seconds
        "matrix_product": {},
        "cases": [],
        "steps": [],
    }
    parts = arguments.only.split(",")
    with torch.inference_mode():
        for kind, (dtype, _, _) in CASES.items():
            torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
            results["matrix_product"][kind] = matrix_rate(dtype, rounds)
    if "forward" in parts:
        forwards(results, rounds, arguments.quick, end, output)
    torch.backends.cuda.matmul.allow_tf32 = False
    if "step" in parts:
        print_head("products, B, q, m, L", "of matrix product: ours, eager")
        for kind, (dtype, shapes) in STEPS.items():
            for shape in shapes[:1] if arguments.quick else shapes:
                if time.monotonic() > end:
                    results["complete"] = False
                    break
                found = training_case(kind, dtype, shape, rounds, STRATEGIES)
                report_step(results, found, output)
    if "depth" in parts:
        print_head("B, q, m, L", "of matrix product: ours, eager")
        for depth in DEPTHS[:2] if arguments.quick else DEPTHS:
            if time.monotonic() > end:
                results["complete"] = False
                break
            found = training_case("bfloat16", torch.bfloat16, (4096, 64, 64, depth), 3, STRATEGIES)
            report_step(results, found, output)
    output.write_text(json.dumps(results, indent=1) + "\n")


def print_head(first: str, last: str) -> None:
    peak = "peak MiB: ours, eager, checkpointed"
    heads = [first, "x eager", "x graphed", "x checkpointed", "x compiled", peak, last, "faults"]
    print(f"\n| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")


def report_step(results: dict[str, Any], found: dict[str, Any], output: Path) -> None:
    """A row of the table for each strategy, and the results so far."""
    results["steps"].append(found)
    output.write_text(json.dumps(results, indent=1) + "\n")
    times, peaks, rates = found["seconds"], found["peak_bytes"], found["operations_per_second"]
    rate = results["matrix_product"][found["products"]]
    for name in STRATEGIES:
        if name in times:
            ratios = [
                f"{times[peer] / times[name]:.2f}" if peer in times else "-"
                for peer in ("eager", "graphed eager", "checkpointed", "compiled step")
            ]
            memory = ", ".join(
                f"{peaks[peer] / 2**20:.0f}" if peer in peaks else "-"
                for peer in (name, "eager", "checkpointed")
            )
            share = ", ".join(
                f"{rates[peer] / rate:.0%}" if peer in rates else "-" for peer in (name, "eager")
            )
            head = f"{found['products']}, {found['shape']}, {name}"
            faults = "; ".join(f"{peer}: {fault[:60]}" for peer, fault in found["faults"].items())
            print(f"| {head} | {' | '.join(ratios)} | {memory} | {share} | {faults} |", flush=True)


def forwards(results: dict[str, Any], rounds: int, quick: bool, end: float, output: Path) -> None:
    head = ["products, B, q, m, L, activation", "x eager", "x graphed", "x compiled", "of matrix product"]
    print(f"| {' | '.join([*head, 'error: ours, eager'])} |\n|{' --- |' * 6}")
    with torch.inference_mode():
        for kind, (dtype, shapes, activations) in CASES.items():
            torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
            rate = results["matrix_product"][kind]
            for shape in shapes[:1] if quick else shapes:
                for activation in activations:
                    if time.monotonic() > end:
                        results["complete"] = False
                        return
                    found = case(kind, dtype, shape, activation, rounds)
                    results["cases"].append(found)
                    times = found["seconds"]
                    ratios = [
                        f"{times[peer] / times['odeblock']:.2f}" if peer in times else "-"
                        for peer in ("eager", "graphed eager", "compiled step")
                    ]
                    share = f"{found['operations_per_second'] / rate:.0%}"
                    error = f"{found['errors']['odeblock']:.1e}, {found['errors']['eager']:.1e}"
                    print(
                        f"| {kind}, {shape}, {activation} | {' | '.join(ratios)} | {share} | {error} |",
                        flush=True,
                    )
                    output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
