"""The one rule by which a kernel passes: its error against float64 autograd of the reference.

At most twice the baseline, the largest error of 8 eager runs in the same dtype with hidden units, features
(of maps: channels) and rows permuted (exact symmetries of the block; where rounding is amplified single runs
differ much in luck), and never asked below a floor of a few ulp. Rows count because the gradients of weights
are sums over them: with one feature and one hidden unit all eager runs would otherwise be the same, and of
float64 the truth itself. The eager runs of bfloat16 and float16 keep a float32 state: a 16-bit state is tens
of percent wrong at depth and would excuse anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from odeblock import reference

NAMES = ("h", "V", "W", "hidden_bias", "output_bias")
RUNS = 8
FLOOR_ULP = {torch.float64: 4, torch.float32: 4, torch.bfloat16: 1, torch.float16: 1}
FLOOR_REBUILT = 1e-14  # of float64 where states are reconstructed


@dataclass
class Case:
    """Inputs in float64 and the gradient of the loss with respect to y."""

    tensors: dict[str, Tensor | None]
    grad: Tensor
    activation: str
    scale: float | None

    @property
    def reference(self) -> Callable[..., Tensor]:
        """The eager loop for rows or for maps."""
        maps = self.tensors["V"].dim() == 5
        return reference.deep_conv_residual if maps else reference.deep_residual


def make_case(
    batch: int,
    dim: int,
    hidden: int,
    depth: int,
    *,
    activation: str = "gelu",
    hidden_bias: bool = True,
    output_bias: bool = True,
    scale: float | None = None,
    smooth: bool = False,
    seed: int = 0,
    maps: tuple[int, int] | None = None,
    kernel: int = 3,
) -> Case:
    """Of rows; with ``maps`` = (H, W), of maps with ``dim`` channels and kernels k x k."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).double()

    taps, pixels = ((kernel, kernel), maps) if maps else ((), ())
    if smooth:
        s = torch.arange(1, depth + 1, dtype=torch.float64).view(-1, *[1] * (2 + len(taps))) / depth
        V = torch.cos(3 * s) * randn(1, dim, hidden, *taps) + torch.sin(2 * s) * randn(1, dim, hidden, *taps)
        W = torch.cos(2 * s) * randn(1, hidden, dim, *taps) + torch.sin(3 * s) * randn(1, hidden, dim, *taps)
    else:
        V, W = randn(depth, dim, hidden, *taps), randn(depth, hidden, dim, *taps)
    tensors = {
        "h": randn(batch, dim, *pixels),
        "V": V / V.shape[2:].numel() ** 0.5,
        "W": W / W.shape[2:].numel() ** 0.5,
        "hidden_bias": randn(depth, hidden) if hidden_bias else None,
        "output_bias": randn(depth, dim) if output_bias else None,
    }
    return Case(tensors, randn(batch, dim, *pixels), activation, scale)


Permutation = tuple[Tensor, Tensor, Tensor]  # of rows, features and hidden units


def _permute(name: str, tensor: Tensor, permutation: Permutation) -> Tensor:
    rows, features, units = permutation
    if name in ("h", "y"):
        return tensor[rows][:, features]
    if name == "output_bias":
        return tensor[:, features]
    if name == "hidden_bias":
        return tensor[:, units]
    return tensor[:, features][:, :, units] if name == "V" else tensor[:, units][:, :, features]


def run(
    function: Callable[..., Tensor],
    case: Case,
    dtype: torch.dtype,
    permutation: Permutation | None = None,
    **options: str,
) -> dict[str, Tensor]:
    """y, y - h and every gradient, in float64 and in the case's own order."""
    inputs: dict[str, Tensor | None] = {}
    for name, tensor in case.tensors.items():
        if tensor is not None and permutation is not None:
            tensor = _permute(name, tensor, permutation)
        inputs[name] = None if tensor is None else tensor.to(dtype, copy=True).contiguous().requires_grad_()
    grad = case.grad if permutation is None else _permute("y", case.grad, permutation)
    y = function(*inputs.values(), activation=case.activation, scale=case.scale, **options)
    given = [name for name in NAMES if inputs[name] is not None]
    gradients = torch.autograd.grad(y, [inputs[name] for name in given], grad.to(dtype))
    results = {"y": y.detach(), **dict(zip(given, gradients, strict=True))}
    if permutation is not None:
        rows, features, units = (order.argsort() for order in permutation)
        results = {name: _permute(name, value, (rows, features, units)) for name, value in results.items()}
    results = {name: value.double() for name, value in results.items()}
    results["increment"] = results["y"] - case.tensors["h"]
    return results


def errors(results: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Largest absolute error of each result, relative to its largest entry."""
    return {
        name: float((results[name] - value).abs().max() / value.abs().max().clamp_min(1e-300))
        if value.numel()
        else 0.0
        for name, value in truth.items()
    }


def eager_errors(
    case: Case, dtype: torch.dtype, truth: dict[str, Tensor], nudges: int = 0, unit: float | None = None
) -> Iterator[dict[str, float]]:
    """The largest errors of one eager run, of two, .. of all: the last is the baseline.

    nudges: so many runs more are the float64 one with inputs that are off by about ``unit``, an ulp of the
    type that is computed in: what that makes of a result is its condition, and no luck of a rounding.
    """
    batch, (dim, hidden) = len(case.tensors["h"]), case.tensors["V"].shape[1:3]
    generator = torch.Generator().manual_seed(1)
    unit = torch.finfo(reference.state_dtype(dtype)).eps if unit is None else unit
    worst = dict.fromkeys(truth, 0.0)
    for _ in range(RUNS):
        rows, features, units = (torch.randperm(n, generator=generator) for n in (batch, dim, hidden))
        permutation = (rows, features, units)
        found = errors(run(case.reference, case, dtype, permutation), truth)
        worst = {name: max(worst[name], found[name]) for name in worst}
        yield worst
    for _ in range(nudges):
        found = errors(run(case.reference, _nudged(case, unit, generator), torch.float64), truth)
        worst = {name: max(worst[name], found[name]) for name in worst}
        yield worst


def _nudged(case: Case, unit: float, generator: torch.Generator) -> Case:
    def nudge(x: Tensor) -> Tensor:
        return x * (1 + unit * torch.randn(x.shape, generator=generator, dtype=torch.float64))

    tensors = {name: None if x is None else nudge(x) for name, x in case.tensors.items()}
    return replace(case, tensors=tensors, grad=nudge(case.grad))


def baseline(case: Case, dtype: torch.dtype, truth: dict[str, Tensor]) -> dict[str, float]:
    *_, worst = eager_errors(case, dtype, truth)
    return worst


def rounded(case: Case, dtype: torch.dtype) -> Case:
    """The case with inputs that ``dtype`` holds exactly, so that every run starts from the same numbers."""
    tensors = {
        name: None if tensor is None else tensor.to(dtype).double() for name, tensor in case.tensors.items()
    }
    return replace(case, tensors=tensors, grad=case.grad.to(dtype).double())


def check_rule(
    function: Callable[..., Tensor], case: Case, dtype: torch.dtype, *, rebuilt: bool = False, **options: str
) -> None:
    """Assert the rule for ``function`` (called like ``deep_residual`` or its twin) on one case."""
    case = rounded(case, dtype)
    check_results(run(function, case, dtype, **options), case, dtype, rebuilt=rebuilt, **options)


def check_strategies(
    function: Callable[..., Tensor],
    case: Case,
    dtype: torch.dtype,
    strategies: Sequence[str],
    nudges: int = 0,
) -> None:
    """The same for several backward strategies, which share truth and baseline."""
    case = rounded(case, dtype)
    truth = run(case.reference, case, torch.float64)
    eager = Eager(case, dtype, truth, nudges)
    for strategy in strategies:
        found = run(function, case, dtype, backward=strategy)
        rebuilt = strategy == "adjoint"
        check_against(found, case, dtype, truth, eager, rebuilt, backward=strategy)


def check_results(
    results: dict[str, Tensor], case: Case, dtype: torch.dtype, *, rebuilt: bool = False, **options: str
) -> None:
    """Assert the rule for the results of a run on a case that ``dtype`` holds exactly."""
    truth = run(case.reference, case, torch.float64)
    check_against(results, case, dtype, truth, Eager(case, dtype, truth), rebuilt, **options)


class Eager:
    """The baseline, as far as it is asked for: a run more can only raise it, so what passes needs none."""

    def __init__(
        self,
        case: Case,
        dtype: torch.dtype,
        truth: dict[str, Tensor],
        nudges: int = 0,
        unit: float | None = None,
    ) -> None:
        self.worst = dict.fromkeys(truth, 0.0)
        self._runs = eager_errors(case, dtype, truth, nudges, unit)

    def allows(self, name: str, error: float, least: float) -> bool:
        """Whether an error is at most twice the baseline, or ``least``."""
        while not error <= max(2 * self.worst[name], least):
            following = next(self._runs, None)
            if following is None:
                return False
            self.worst = following
        return True


def check_against(
    results: dict[str, Tensor],
    case: Case,
    dtype: torch.dtype,
    truth: dict[str, Tensor],
    eager: Eager,
    rebuilt: bool,
    **options: str,
) -> None:
    """The same against a truth and a baseline that are known."""
    found = errors(results, truth)
    floor = FLOOR_ULP[dtype] * torch.finfo(dtype).eps
    if rebuilt and dtype == torch.float64:
        floor = max(floor, FLOOR_REBUILT)
    # y - h is the difference of numbers of the size of y, each rounded once.
    y, h, increment = truth["y"], case.tensors["h"], truth["increment"]
    if y.numel():
        size = float(torch.maximum(y.abs().max(), h.abs().max()) / increment.abs().max().clamp_min(1e-300))
    for name, error in found.items():
        least = floor * (max(1.0, size) if name == "increment" and y.numel() else 1.0)
        assert eager.allows(name, error, least), (
            f"{name}: error {error:.2e}, eager {eager.worst[name]:.2e}, floor {least:.2e} ({options})"
        )
