"""The one rule by which a kernel passes: its error against float64 autograd of the reference.

At most twice the baseline, the largest error of 8 eager runs in the same dtype with hidden units and features
permuted (an exact symmetry of the block; where rounding is amplified single runs differ much in luck), and
never asked below a floor of a few ulp. The eager runs of bfloat16 and float16 keep a float32 state: a 16-bit
state is tens of percent wrong at depth and would excuse anything.
"""

from __future__ import annotations

from collections.abc import Callable
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
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).double()

    if smooth:
        s = torch.arange(1, depth + 1, dtype=torch.float64)[:, None, None] / depth
        V = torch.cos(3 * s) * randn(1, dim, hidden) + torch.sin(2 * s) * randn(1, dim, hidden)
        W = torch.cos(2 * s) * randn(1, hidden, dim) + torch.sin(3 * s) * randn(1, hidden, dim)
    else:
        V, W = randn(depth, dim, hidden), randn(depth, hidden, dim)
    tensors = {
        "h": randn(batch, dim),
        "V": V / hidden**0.5,
        "W": W / dim**0.5,
        "hidden_bias": randn(depth, hidden) if hidden_bias else None,
        "output_bias": randn(depth, dim) if output_bias else None,
    }
    return Case(tensors, randn(batch, dim), activation, scale)


def make_map_case(
    batch: int,
    channels: int,
    hidden: int,
    depth: int,
    height: int,
    width: int,
    kernel: int = 3,
    *,
    activation: str = "gelu",
    biases: bool = True,
    scale: float | None = None,
    seed: int = 0,
) -> Case:
    """Convolutions of maps [B, C, H, W]."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).double()

    tensors = {
        "h": randn(batch, channels, height, width),
        "V": randn(depth, channels, hidden, kernel, kernel) / (kernel * hidden**0.5),
        "W": randn(depth, hidden, channels, kernel, kernel) / (kernel * channels**0.5),
        "hidden_bias": randn(depth, hidden) if biases else None,
        "output_bias": randn(depth, channels) if biases else None,
    }
    return Case(tensors, randn(batch, channels, height, width), activation, scale)


Permutation = tuple[Tensor, Tensor]


def _permute(name: str, tensor: Tensor, permutation: Permutation) -> Tensor:
    """Features (channels) and hidden units follow the batch, or the layer."""
    features, units = permutation
    if name in ("h", "output_bias", "y"):
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
    """y, y - h and every gradient, in float64 and in the case's own order of features."""
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
        inverse = (permutation[0].argsort(), permutation[1].argsort())
        results = {name: _permute(name, value, inverse) for name, value in results.items()}
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


def plain(case: Case) -> Callable[..., Tensor]:
    """The block in plain PyTorch, of rows or of maps."""
    V = case.tensors["V"]
    assert V is not None
    return reference.deep_residual if V.dim() == 3 else reference.deep_conv_residual


def baseline(case: Case, dtype: torch.dtype, truth: dict[str, Tensor]) -> dict[str, float]:
    dim, hidden = case.tensors["V"].shape[1:3]
    generator = torch.Generator().manual_seed(1)
    worst = dict.fromkeys(truth, 0.0)
    for _ in range(RUNS):
        permutation = (torch.randperm(dim, generator=generator), torch.randperm(hidden, generator=generator))
        found = errors(run(plain(case), case, dtype, permutation), truth)
        worst = {name: max(worst[name], found[name]) for name in worst}
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
    """Assert the rule for ``function`` (called like ``deep_residual``) on one case."""
    case = rounded(case, dtype)
    check_results(run(function, case, dtype, **options), case, dtype, rebuilt=rebuilt, **options)


def check_results(
    results: dict[str, Tensor], case: Case, dtype: torch.dtype, *, rebuilt: bool = False, **options: str
) -> None:
    """Assert the rule for the results of a run on a case that ``dtype`` holds exactly."""
    truth = run(plain(case), case, torch.float64)
    allowed = baseline(case, dtype, truth)
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
        assert error <= max(2 * allowed[name], least), (
            f"{name}: error {error:.2e}, eager {allowed[name]:.2e}, floor {least:.2e} ({options})"
        )
