"""Accuracy of gradients: every strategy, and its peers, against float64 autograd, from 16 to 4096 steps.

    python benchmarks/accuracy.py --output DIR            # gradient_error.json, .md and .png, minutes
    python benchmarks/accuracy.py --output DIR --docs     # and the copies that the documentation shows

Rounding is what is measured, so nothing here depends on the speed of the machine. Cases, baseline and measure
of error are those of the tests, ``tests/oracle.py``.
"""

from __future__ import annotations

import argparse
import math
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # the oracle is no part of the package, and must not exist twice

import accuracy_report  # noqa: E402
import oracle  # noqa: E402
import peers  # noqa: E402

from odeblock import DriftWarning, functional, reference  # noqa: E402
from odeblock.activations import Activation, get_activation  # noqa: E402
from odeblock.drift import DriftRecord  # noqa: E402
from odeblock.experiments.config import TrainConfig  # noqa: E402
from odeblock.experiments.digits import load_digits  # noqa: E402
from odeblock.experiments.gradients import random_inputs  # noqa: E402
from odeblock.experiments.loop import Training, cross_entropy  # noqa: E402
from odeblock.experiments.networks import build_network  # noqa: E402
from odeblock.experiments.outputs import save_json  # noqa: E402
from odeblock.reconstruction import Reconstruction, rounding_unit  # noqa: E402

DEPTHS = (16, 64, 128, 256, 512, 1024, 2048, 4096)
QUICK_DEPTHS = (16, 64)
BATCH, DIM, HIDDEN = 16, 32, 32
"""B, q and m of every case: small, for torchdiffeq carries 2Lqm gradients through each of L steps."""
SEEDS, SEEDS_UP_TO = 3, 256
"""Seeds of weights, data and training up to this depth; one seed above it."""
QUICK_EPOCHS = 2
ACTIVATION = "gelu"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WEIGHTS = ("smooth", "iid", "trained")
STRATEGIES = ("store", "checkpoint", "auto", "adjoint")
TORCHDIFFEQ_DEPTH = 1024
TOO_DEEP = "not run, its backward carries the gradients of all layers through every step, O(L²) in time"
SAME_NETWORK = 1e-12
"""Error of y in float64 up to which a method is one of the same network."""
PACKAGES = ("odeblock", "torch", "torchdiffeq", "numpy")


def make_case(weights: str, depth: int, seed: int, epochs: int) -> oracle.Case:
    """Inputs and the gradient of a loss: random ones, or a trained network's on digits that it never saw."""
    if weights == "trained":
        return trained_case(TrainConfig(depth=depth, dim=DIM, hidden_dim=HIDDEN, epochs=epochs, seed=seed))
    return _case(**random_inputs(weights, BATCH, DIM, HIDDEN, depth, seed))


def trained_case(config: TrainConfig) -> oracle.Case:
    """The block of ``python -m odeblock train``, trained from smooth weights; h = A x, grad = dℓ/dh_L."""
    data = load_digits()
    network = build_network(config, "smooth")
    Training(network, data, config).run(lambda loss: None)
    h = network.A(data.test_x[:BATCH])
    y = network.block(h)
    (grad,) = torch.autograd.grad(cross_entropy(network.B(y), data.test_y[:BATCH]), y)
    return _case(h, network.block.V, network.block.W, grad)


def _case(h: Tensor, V: Tensor, W: Tensor, grad: Tensor) -> oracle.Case:
    tensors = {"h": h, "V": V, "W": W}
    inputs = {name: tensor.detach().double() for name, tensor in tensors.items()}
    return oracle.Case({**inputs, "hidden_bias": None, "output_bias": None}, grad.double(), ACTIVATION, None)


def ours(
    record: peers.Record, *tensors: Tensor | None, activation: str, scale: None, backward: str
) -> Tensor:
    """``deep_residual``, with the report of an adjoint backward in ``record``."""
    options = (activation, scale, backward, False, 0, None)
    y: Tensor = functional.recorded(DriftRecord(record), *tensors, *options)
    return y


def methods(dtype: torch.dtype) -> dict[str, Callable[..., Tensor]]:
    """Functions called like ``deep_residual`` with a ``record`` before; plain eager autograd apart."""
    found: dict[str, Callable[..., Tensor]] = {s: partial(ours, backward=s) for s in STRATEGIES}
    found["adjoint_2022"] = peers.adjoint_2022
    found["torchdiffeq"] = partial(peers.torchdiffeq_adjoint, perturb=True)
    found["torchdiffeq_default"] = partial(peers.torchdiffeq_adjoint, perturb=False)
    if reference.state_dtype(dtype) != dtype:
        found["eager_low_state"] = peers.eager_low_state
    return found


def measure(case: oracle.Case, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """An entry a method: errors of y, dx (h), dV, dW and reconstructed states, a report; or a reason."""
    case = oracle.rounded(case, dtype)
    truth = oracle.run(reference.deep_residual, case, torch.float64)
    states = forward_states(case, torch.float64)
    baseline = oracle.baseline(case, dtype, truth)
    kept = oracle.errors({"states": forward_states(case, dtype).double()}, {"states": states})
    yield _entry("eager", {**baseline, "forward_states": kept["states"]})
    for name, function in methods(dtype).items():
        if name.startswith("torchdiffeq") and len(states) > TORCHDIFFEQ_DEPTH:
            yield {"method": name, "reason": TOO_DEEP}
            continue
        record: peers.Record = {}
        check_network(name, partial(function, {}), case, truth)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", DriftWarning)
            results = oracle.run(partial(function, record), case, dtype)
        found = oracle.errors(results, truth)
        floor = oracle.FLOOR_ULP[dtype] * torch.finfo(dtype).eps
        if name != "eager_low_state" and not found["y"] <= max(2 * baseline["y"], floor):
            raise AssertionError(f"{name}: y has an error of {found['y']:.1e}, eager {baseline['y']:.1e}")
        rebuilt = record.pop("states", [])
        if name == "adjoint":
            rebuilt = reconstructed_states(case, dtype)
            record["warned"] = any(issubclass(w.category, DriftWarning) for w in caught)
        if rebuilt:
            stack = torch.stack(rebuilt[::-1]).double()
            found.update(oracle.errors({"states": stack}, {"states": states}))
        yield _entry(name, found, record)


def _entry(method: str, errors: dict[str, float], report: peers.Record | None = None) -> dict[str, Any]:
    errors = {name: value for name, value in errors.items() if name != "increment"}
    if not all(map(math.isfinite, (*errors.values(), *(report or {}).values()))):
        return {"method": method, "reason": "not finite"}
    return {"method": method, "errors": errors, **(report or {})}


@torch.no_grad()
def check_network(
    name: str, function: Callable[..., Tensor], case: oracle.Case, truth: dict[str, Tensor]
) -> None:
    """In float64 the method's y is that of the network: what it computes differs by rounding alone."""
    y = function(*case.tensors.values(), activation=case.activation, scale=case.scale)
    error = oracle.errors({"y": y}, {"y": truth["y"]})["y"]
    if not error <= SAME_NETWORK:
        raise AssertionError(f"{name}: another network, y differs by {error:.1e} in float64")


def forward_states(case: oracle.Case, dtype: torch.dtype) -> Tensor:
    """h_0 .. h_{L-1} [L, B, q] of the forward."""
    h, V, W = (_cast(case, name, dtype) for name in ("h", "V", "W"))
    _, states, _ = reference.forward(h, V, W, None, None, case.activation, 1 / len(V), 1, False, False)
    found: Tensor = states[:, : len(h)]
    return found


def reconstructed_states(case: oracle.Case, dtype: torch.dtype) -> list[Tensor]:
    """h_{L-1}, ..., h_0 as ``adjoint`` has them: by its PyTorch twin, for the kernels keep none."""
    h, V, W = (_cast(case, name, dtype) for name in ("h", "V", "W"))
    sigma, depth = get_activation(case.activation), len(V)
    _, kept, _ = reference.forward(h, V, W, None, None, case.activation, 1 / depth, 0, True, False)
    state = kept[-1, : len(h)]
    floor = torch.finfo(dtype).eps
    sweep = Reconstruction(len(h), depth, rounding_unit(dtype), floor, state, sigma.smooth)
    states = []
    for V_k, W_k in zip(V.flip(0), W.flip(0), strict=True):
        evaluate, correct = _step(V_k, W_k, 1 / depth, sigma)
        state, _ = sweep.step(state, evaluate, torch.where, correct)
        states.append(state)
    return states


def _step(V_k: Tensor, W_k: Tensor, scale: float, sigma: Activation) -> tuple[Callable[..., Any], ...]:
    """What ``Reconstruction.step`` asks for: z and the increment at x, and z after x changed by e."""

    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(x.to(W_k.dtype), W_k)
        return z, scale * F.linear(sigma.function(z), V_k).to(x.dtype)

    return evaluate, lambda z, e: z + F.linear(e.to(W_k.dtype), W_k)


def _cast(case: oracle.Case, name: str, dtype: torch.dtype) -> Tensor:
    tensor = case.tensors[name]
    assert tensor is not None
    return tensor.to(dtype)


def run(depths: tuple[int, ...], quick: bool) -> dict[str, Any]:
    """All cases of all depths; what ``gradient_error.json`` holds."""
    epochs = QUICK_EPOCHS if quick else TrainConfig.epochs
    seeds = {depth: SEEDS if depth <= SEEDS_UP_TO and not quick else 1 for depth in depths}
    entries = []
    for weights in WEIGHTS:
        for depth in depths:
            for seed in range(seeds[depth]):
                print(f"{weights}, L = {depth}, seed {seed}", file=sys.stderr, flush=True)
                case = make_case(weights, depth, seed, epochs)
                for name, dtype in DTYPES.items():
                    where = {"weights": weights, "dtype": name, "depth": depth, "seed": seed}
                    entries += [{**where, **entry} for entry in measure(case, dtype)]
    training = asdict(replace(TrainConfig(), dim=DIM, hidden_dim=HIDDEN, epochs=epochs))
    return {
        "quick": quick,
        "commit": commit(),
        "machine": {"cpu": cpu(), "system": platform.platform()},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "case": {"batch": BATCH, "dim": DIM, "hidden": HIDDEN, "activation": ACTIVATION},
        "training": {key: training[key] for key in ("epochs", "batch_size", "lr")},
        "eager_runs": oracle.RUNS,
        "seeds": {str(depth): list(range(count)) for depth, count in seeds.items()},
        "entries": entries,
    }


def commit() -> str | None:
    """The commit of this checkout, "-dirty" behind it where its files differ; None outside of one."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Error of gradients and of reconstructed states against float64 autograd."
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the files")
    parser.add_argument("--depths", type=int, nargs="+", metavar="L", help="powers of 2")
    parser.add_argument("--quick", action="store_true", help="depths 16 and 64, one seed, little training")
    parser.add_argument("--docs", action="store_true", help="also renew the documentation's copies")
    arguments = parser.parse_args()
    depths = tuple(sorted(set(arguments.depths or (QUICK_DEPTHS if arguments.quick else DEPTHS))))
    if any(depth < 1 or depth & (depth - 1) for depth in depths):
        parser.error("--depths: expected powers of 2, for which torchdiffeq's times k/L are exact")
    if arguments.docs and (arguments.quick or depths != DEPTHS):
        parser.error("--docs: the documentation shows the whole run")
    # The matrices are small, and idle threads that spin would cost more than they give.
    torch.set_num_threads(1)
    results = run(depths, arguments.quick)
    arguments.output.mkdir(parents=True, exist_ok=True)
    save_json(arguments.output / accuracy_report.JSON, results)
    accuracy_report.write(results, arguments.output)
    print(accuracy_report.headline(results) or "", f"saved in {arguments.output}", sep="\n")
    if arguments.docs:
        save_json(accuracy_report.DOCS_JSON, results)
        accuracy_report.write_docs(results)


if __name__ == "__main__":
    main()
