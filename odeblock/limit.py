"""The neural ODE of a block: weights as functions of s in [0, 1], the ODE's field and solution, other depths.

A block of depth L and step ``scale`` is the explicit Euler method, with step 1/L, for

    dh/ds = T (𝒱(s) σ(𝒲(s) h + b(s)) + c(s)),   T = scale · L (1 by default),   0 <= s <= 1,

where Z_k = 𝒵(k/L) for each of the weights Z = V, W, b, c (Marion, Wu, Sander & Biau, ICLR 2024). Between its
layers 𝒵 is taken to be linear, or cubic if asked, and constant below s = 1/L.
"""

from __future__ import annotations

import copy
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .activations import get_activation
from .products import products
from .validation import check_layers, check_number

if TYPE_CHECKING:
    from .base import ResBlock


INTERPOLATIONS = ("linear", "cubic")


def interpolate(weights: Tensor, position: Tensor, kind: str = "linear") -> Tensor:
    """𝒵(position / L): the stack Z_1 .. Z_L as a function of depth.

    Differentiable in both arguments.

    Arguments:
        weights: shape [L, ...] with L >= 1, Z_k at position k.
        position: shape [n]; below 1 it counts as 1, above L as L.
        kind: ``"linear"`` between two layers, or ``"cubic"``, the polynomial of Lagrange through the four
            nearest (of lower degree where L < 4). For a smooth 𝒵 the error is O(1/L²), or O(1/L⁴);
            independent layers are better left to ``"linear"``, which never leaves the range of two
            neighbours.

    Returns:
        shape [n, ...], of the dtype of ``weights``; half precision is interpolated in float32. A whole
        position k gives Z_k itself, and linear interpolation of equal neighbours gives exactly themselves.

    Raises:
        ValueError: an unknown ``kind``, or no layer.
    """
    _check_kind("kind", kind)
    check_layers("weights", weights)
    depth = weights.shape[0]
    dtype = torch.promote_types(weights.dtype, torch.float32)
    offset = (position.to(torch.float64) - 1).clamp(0, depth - 1)
    below = offset.detach().floor().long().clamp(0, max(depth - 2, 0))  # of NaN 0

    def layers(index: Tensor) -> Tensor:
        return weights.index_select(0, index).to(dtype)

    def factor(values: Tensor) -> Tensor:
        return values.to(dtype).view(-1, *[1] * (weights.dim() - 1))

    if kind == "linear":
        low, high = layers(below), layers((below + 1).clamp(max=depth - 1))
        return torch.lerp(low, high, factor(offset - below)).to(weights.dtype)
    points = min(4, depth)
    first = (below - 1).clamp(0, depth - points)
    x = offset - first  # of the stencil 0 .. points - 1
    total = torch.zeros((), dtype=dtype, device=weights.device)
    for i in range(points):
        basis = torch.ones_like(x)
        for j in range(points):
            if j != i:
                basis = basis * (x - j) / (i - j)
        total = total + factor(basis) * layers(first + i)
    return total.to(weights.dtype)


def _check_kind(name: str, kind: str) -> None:
    if kind not in INTERPOLATIONS:
        raise ValueError(f"{name}: expected one of {', '.join(INTERPOLATIONS)}; got {kind!r}")


@dataclass(frozen=True, eq=False)
class Field:
    """s -> 𝒵(s) on 0 <= s <= 1, from ``weights``, shape [L, ...]: what ``fields`` returns."""

    weights: Tensor
    interpolation: str = "linear"

    def __call__(self, s: float) -> Tensor:
        position = torch.tensor([s * len(self.weights)], dtype=torch.float64, device=self.weights.device)
        return interpolate(self.weights, position, self.interpolation)[0]

    def __repr__(self) -> str:
        return f"Field({list(self.weights.shape)}, {self.interpolation!r})"


def fields(block: ResBlock, interpolation: str = "linear") -> dict[str, Field]:
    """The weights of a block as functions of depth: 𝒱 by the name "V", 𝒲 by "W", and biases where there are.

    Each is a function s -> 𝒵(s) on 0 <= s <= 1, [q, m] for 𝒱 and [m, q] for 𝒲 (of maps kernels; and
    parameters of a normalisation by their names), differentiable in the block's parameters.
    ``initializers.Fields(found["V"], found["W"])`` starts a block of any depth from them; it can be pickled
    and copied with that block, and holds these two parameters as long as that block lives.

    Arguments:
        block: a ``DeepResBlock`` or ``DeepConvResBlock``.
        interpolation: ``"linear"`` or ``"cubic"``, see ``interpolate``.

    Raises:
        ValueError: an unknown ``interpolation``.
    """
    _check_kind("interpolation", interpolation)
    stacks = zip(block.stacks, block._current_stacks(), strict=True)
    return {
        name: Field(weights, interpolation)
        for name, weights in stacks
        if weights is not None and name not in block._buffers
    }


class VectorField(nn.Module):
    """f(s, h) = T (𝒱(s) σ(𝒲(s) h + b(s)) + c(s)), the right-hand side of a block's limiting ODE.

    What ``block.vector_field()`` returns: a callable for any ODE solver that takes dh/ds = f(s, h) on
    0 <= s <= 1, such as ``torchdiffeq.odeint``. Its parameters are those of the block itself. Of a block with
    batch normalisation it is the field of evaluation, by running statistics, which are interpolated linearly.

    Arguments:
        block: a ``DeepResBlock`` or ``DeepConvResBlock``.
        interpolation: of the weights in depth, ``"linear"`` or ``"cubic"``, see ``interpolate``.

    Raises:
        ValueError: an unknown ``interpolation``.
        TypeError, ValueError: at a call, as ``forward``.
    """

    def __init__(self, block: ResBlock, interpolation: str = "linear") -> None:
        super().__init__()
        _check_kind("interpolation", interpolation)
        self.block, self.interpolation = block, interpolation

    def forward(self, s: Tensor | float, h: Tensor) -> Tensor:
        """s: time, a number or a tensor of one element; h [..., q] or maps -> dh/ds, of h's shape and dtype.

        Raises TypeError or ValueError, naming the argument, for anything else.
        """
        block = self.block
        if not isinstance(h, Tensor) or not h.is_floating_point():
            got = h.dtype if isinstance(h, Tensor) else type(h).__name__
            raise TypeError(f"h: expected a floating-point torch.Tensor, got {got}")
        block._check_shape(h)
        if not isinstance(s, (Tensor, numbers.Real)):
            raise TypeError(f"s: expected a number or a tensor of one element, got {type(s).__name__}")
        s = s if isinstance(s, Tensor) else check_number("s", s)
        time = torch.as_tensor(s, dtype=torch.float64, device=h.device)
        if time.numel() != 1:
            raise ValueError(f"s: expected one number, got a tensor of shape {list(time.shape)}")
        position = time.reshape(1) * block.depth
        stacks = block._current_stacks()
        at_time = (
            # A cubic through variances may be negative between them.
            None if p is None else interpolate(p, position, "linear" if fixed else self.interpolation)
            for p, fixed in zip(stacks, (name in block._buffers for name in block.stacks), strict=True)
        )
        V, W, hidden_bias, output_bias = (
            None if p is None else p[0].to(h.dtype) for p in block._weights(*at_time)
        )
        assert isinstance(V, Tensor)
        assert isinstance(W, Tensor)
        of = products(stacks[0])
        f = of.apply(get_activation(block.activation).function(of.apply(h, W, hidden_bias)), V, output_bias)
        return (block.scale * block.depth) * f


# ---- the solution ----------------------------------------------------------------------------------------


def import_torchdiffeq() -> Any:
    """The module ``torchdiffeq``; ImportError with the remedy where it is not installed."""
    try:
        import torchdiffeq
    except ModuleNotFoundError:
        raise ImportError("torchdiffeq is not installed, please run: pip install 'odeblock[ode]'") from None
    return torchdiffeq


def solve(
    block: ResBlock,
    h: Tensor,
    *,
    rtol: float = 1e-6,
    atol: float = 1e-8,
    method: str = "dopri5",
    interpolation: str = "linear",
) -> Tensor:
    """H(1) of the block's limiting ODE from H(0) = h, by ``torchdiffeq.odeint``: the network's limit.

    Differentiable, by autograd through the solver's steps.

    Arguments:
        block: a ``DeepResBlock`` or ``DeepConvResBlock``.
        h: shape [..., q], or maps. In float32 rounding makes tolerances below 1e-6 unreachable: use float64
            (the block's weights are cast to the dtype of h).
        rtol, atol, method: of ``torchdiffeq.odeint``.
        interpolation: of the weights in depth, ``"linear"`` or ``"cubic"``.

    Raises:
        ImportError: torchdiffeq is not installed.
        TypeError, ValueError: as ``VectorField``.
    """
    field = VectorField(block, interpolation)
    field(0.0, h)  # refuses what cannot be solved, before the solver does in its own words
    ends = torch.tensor([0.0, 1.0], dtype=h.dtype, device=h.device)
    path = import_torchdiffeq().odeint(field, h, ends, rtol=rtol, atol=atol, method=method)
    result: Tensor = path[-1]
    return result


@torch.no_grad()
def ode_gap(block: ResBlock, h: Tensor, *, interpolation: str = "linear", tol: float = 1e-8) -> float:
    """How far the block is from its own ODE: ‖h_L - H(1)‖ / ‖H(1)‖, computed in float64.

    Like 1/L for weights that are smooth in depth. For independent ones the ODE of the interpolated weights
    is no limit of anything, and the gap need not fall.

    Arguments:
        block: a ``DeepResBlock`` or ``DeepConvResBlock``.
        h: inputs, shape [..., q] or maps, of any floating-point dtype.
        interpolation: see ``interpolate``.
        tol: rtol and atol of the solver.

    Raises:
        ImportError, TypeError, ValueError: as ``solve``.
    """
    exact = block.resample(block.depth).double().eval()  # a copy, also of weights that are computed
    truth = solve(exact, h.double(), rtol=tol, atol=tol, interpolation=interpolation)
    return float((exact(h.double()) - truth).norm() / truth.norm())


class Resampled(NamedTuple):
    """``model`` is new; ``before`` and ``after`` are the loss of the model as it was, and of the new one."""

    model: nn.Module
    before: float
    after: float


def resample(model: nn.Module, depth: int, loss: Callable[[nn.Module], Tensor | float]) -> Resampled:
    """A copy of a model with every block at another depth, and what that does to the loss.

    Train at L = 32, run at L = 1024, and back. For weights smooth in depth the loss hardly changes, as both
    are discretisations of one ODE; for independent ones it is another network's.

    Arguments:
        model: any module; itself a block, or with blocks within. It is left as it is. A block that
            it holds under several names is one block under these names in the copy too.
        depth: of every block of the copy, >= 1; see the block's ``resample``.
        loss: model -> its loss, or any other number to compare, a float or a scalar tensor.

    Raises:
        TypeError, ValueError: ``depth`` is not a whole number >= 1; the model has no block.
    """
    from .base import ResBlock

    if isinstance(model, ResBlock):
        other: nn.Module = model.resample(depth)
    else:
        blocks = {
            id(block): block.resample(depth) for block in model.modules() if isinstance(block, ResBlock)
        }
        if not blocks:
            raise ValueError("model: expected one that holds a DeepResBlock or DeepConvResBlock, found none")
        other = copy.deepcopy(model, dict(blocks))  # which takes these for copies that it has made
    with torch.no_grad():
        return Resampled(other, float(loss(model)), float(loss(other)))
