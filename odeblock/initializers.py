"""Initial weights as functions of depth: smooth, tied, i.i.d., the paper's V = 0, and any function of k/L.

Each initializer fills V [L, q, m] and W [L, m, q] in place. Entries of W have variance 1/q and entries
of V variance 1/m at every depth, so that initializers differ only in how layers depend on each other. Of
kernels, V [L, C, M, k, k] and W [L, M, C, k, k], C k² and M k² take the place of q and m: what a number of
the result is summed over.

Those that a block knows by name are functions (``INITIALIZERS``). Those with settings are objects, and
``DeepResBlock(init=...)`` takes them as well:

    DeepResBlock(64, 256, init=GaussianProcess("matern32", length_scale=0.1))
    DeepResBlock(64, 256, init=Fourier(modes=4))
    DeepResBlock(64, 256, init=Fields(lambda s: torch.zeros(64, 64), lambda s: (1 - s) * W0 + s * W1))

How large the steps may be goes with the initialisation: see ``depth_scale``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .validation import check_number, check_size

LENGTH_SCALE = 0.25  # of the Gaussian process in s = k/L

JITTER = 1e-10  # variance by which a kernel may be off, 1e-5 of a weight's standard deviation
UNIT = 1e-6  # by which a kernel's value at 0 may differ from 1: it may come in float32


class Initializer(Protocol):
    """Fills V [L, q, m] and W [L, m, q], or kernels, in place, from ``generator`` (default: torch's own)."""

    def __call__(self, V: Tensor, W: Tensor, *, generator: torch.Generator | None = None) -> None: ...


def depth_scale(depth: int, beta: float = 1.0) -> float:
    """The step 1/L^β, for ``DeepResBlock(scale=...)`` (Marion, Fermanian, Biau & Vert 2022).

    What the output of the block does as L grows, at initialisation, depends on how layers depend on each
    other: for weights smooth in depth β = 1 gives an ODE, for independent ones β = 1/2 gives a stochastic
    differential equation; with a larger β the block becomes the identity, with a smaller one it explodes.

    Arguments:
        depth: L, >= 1.
        beta: β, any finite number; 1 is what ``DeepResBlock`` takes by default.

    Raises:
        TypeError, ValueError: ``depth`` is not a whole number >= 1; ``beta`` is not a finite number.
        OverflowError, ZeroDivisionError: L^β is beyond a float, or 0 in it.
    """
    return 1.0 / math.pow(check_size("depth", depth), check_number("beta", beta))


# ---- by name ---------------------------------------------------------------------------------------------


@torch.no_grad()
def smooth_(
    V: Tensor, W: Tensor, *, length_scale: float = LENGTH_SCALE, generator: torch.Generator | None = None
) -> None:
    """Independent Gaussian processes in depth with kernel exp(-(s - s')² / 2ℓ²), ℓ = ``length_scale``.

    V_k = 𝒱(k/L), W_k = 𝒲(k/L) for smooth random functions 𝒱, 𝒲: the setting in which the network
    discretises a neural ODE (Marion, Wu, Sander & Biau, ICLR 2024).
    """
    GaussianProcess(length_scale=length_scale)(V, W, generator=generator)


@torch.no_grad()
def tied_(V: Tensor, W: Tensor, *, generator: torch.Generator | None = None) -> None:
    """The same Gaussian V and W at every depth."""
    W.copy_(torch.empty_like(W[0]).normal_(0.0, _fan_in(W) ** -0.5, generator=generator).expand_as(W))
    V.copy_(torch.empty_like(V[0]).normal_(0.0, _fan_in(V) ** -0.5, generator=generator).expand_as(V))


@torch.no_grad()
def iid_(V: Tensor, W: Tensor, *, generator: torch.Generator | None = None) -> None:
    """Independent Gaussian entries at every depth: the usual initialization, rough in depth.

    With the default step 1/L the block tends to the identity as L grows; ``depth_scale(L, 0.5)`` is the step
    at which it neither vanishes nor explodes.
    """
    W.normal_(0.0, _fan_in(W) ** -0.5, generator=generator)
    V.normal_(0.0, _fan_in(V) ** -0.5, generator=generator)


@torch.no_grad()
def zero_v_(V: Tensor, W: Tensor, *, generator: torch.Generator | None = None) -> None:
    """V = 0 and W the same at every depth: the paper's long-time setting; the block starts as identity."""
    tied_(V, W, generator=generator)
    V.zero_()


INITIALIZERS: dict[str, Initializer] = {"smooth": smooth_, "tied": tied_, "iid": iid_, "zero_v": zero_v_}


def get_initializer(init: str | Initializer) -> Initializer:
    """The initializer itself, or the one of that name; ValueError lists the known ones."""
    if not isinstance(init, str):
        if callable(init):
            return init
        raise TypeError(f"init: expected a name (str) or an initializer, got {type(init).__name__}")
    if init not in INITIALIZERS:
        raise ValueError(f"init: expected one of {', '.join(INITIALIZERS)}; got {init!r}")
    return INITIALIZERS[init]


# ---- with settings ---------------------------------------------------------------------------------------

Kernel = Callable[[Tensor], Tensor]
KERNELS: dict[str, Kernel] = {
    "squared_exponential": lambda r: torch.exp(-(r**2) / 2),
    "matern52": lambda r: (1 + 5**0.5 * r + 5 * r**2 / 3) * torch.exp(-(5**0.5) * r),
    "matern32": lambda r: (1 + 3**0.5 * r) * torch.exp(-(3**0.5) * r),
    "exponential": lambda r: torch.exp(-r),
}
"""K as a function of r = |s - s'| / ℓ. Paths: analytic; twice differentiable; once; continuous only, with
neighbours that differ like L^-1/2, so that no Lipschitz function of depth is their limit."""


@dataclass(frozen=True)
class GaussianProcess:
    """Every entry an independent Gaussian process in s = k/L of variance 1/q (W) or 1/m (V).

    Arguments:
        kernel: a name of ``KERNELS``, or a function of r = |s - s'| / ℓ (a tensor [L, L] in float64) with
            value 1 at 0 that is positive definite; ValueError at use where it is not.
        length_scale: ℓ, > 0.

    Raises:
        TypeError, ValueError: ``kernel`` is no function or known name; ``length_scale`` no finite number > 0.

    The default is ``init="smooth"``. A named squared exponential is factored in O(L r²) time, where the rank
    r is about 20 for the default and grows like 1/ℓ, up to L; every other kernel takes a Cholesky factor
    [L, L].
    """

    kernel: str | Kernel = "squared_exponential"
    length_scale: float = LENGTH_SCALE

    def __post_init__(self) -> None:
        _keep(self, "length_scale", check_number("length_scale", self.length_scale, above=0))
        expected = f"kernel: expected a function or one of {', '.join(KERNELS)}"
        if not isinstance(self.kernel, str) and not callable(self.kernel):
            raise TypeError(f"{expected}; got {type(self.kernel).__name__}")
        if isinstance(self.kernel, str) and self.kernel not in KERNELS:
            raise ValueError(f"{expected}; got {self.kernel!r}")

    def __call__(self, V: Tensor, W: Tensor, *, generator: torch.Generator | None = None) -> None:
        depth = V.shape[0]
        if self.kernel == "squared_exponential":
            factor = _low_rank_factor(depth, self.length_scale)
        else:
            kernel = KERNELS[self.kernel] if isinstance(self.kernel, str) else self.kernel
            factor = _cholesky(kernel, depth, self.length_scale)
        _combine(V, W, factor, generator)


@dataclass(frozen=True)
class Fourier:
    """Every entry a random trigonometric polynomial, of period 1 in s = k/L:

    Σ_{j=0}^{J} c_j (a_j cos 2πjs + b_j sin 2πjs), with a_j, b_j independent normal, c_j ∝ max(j, 1)^-p.

    Arguments:
        modes: J, >= 0; 0 is tied weights.
        decay: p, any finite number; the larger, the smoother.

    Raises:
        TypeError, ValueError: ``modes`` is not a whole number >= 0; ``decay`` is not a finite number.

    The factors c_j are scaled such that the variance is 1/q (W) and 1/m (V) at every depth.
    """

    modes: int = 3
    decay: float = 1.0

    def __post_init__(self) -> None:
        _keep(self, "modes", check_size("modes", self.modes, least=0))
        _keep(self, "decay", check_number("decay", self.decay))

    def __call__(self, V: Tensor, W: Tensor, *, generator: torch.Generator | None = None) -> None:
        j = torch.arange(self.modes + 1, dtype=torch.float64, device="cpu")
        largest = self.modes if self.decay < 0 else 1  # whose c_j is 1, so that none overflows
        c = (j.clamp(min=1) / max(largest, 1)) ** -self.decay
        c = c / c.norm()
        angle = 2 * math.pi * _layers(V.shape[0])[:, None] * j
        _combine(V, W, torch.cat([c * angle.cos(), (c * angle.sin())[:, 1:]], 1), generator)


@dataclass(frozen=True)
class Polynomial:
    """Every entry a random polynomial in s = k/L: Σ_{j=0}^{n} a_j √(2j+1) P_j(2s - 1), P_j of Legendre.

    Arguments:
        degree: n, >= 0.

    Raises:
        TypeError, ValueError: ``degree`` is not a whole number >= 0.

    The coefficients a_j are independent and such that the variance is 1/q (W) and 1/m (V) on average over
    0 <= s <= 1, and so on average over layers if these are many; it is larger at both ends.
    """

    degree: int = 3

    def __post_init__(self) -> None:
        _keep(self, "degree", check_size("degree", self.degree, least=0))

    def __call__(self, V: Tensor, W: Tensor, *, generator: torch.Generator | None = None) -> None:
        x = 2 * _layers(V.shape[0]) - 1
        columns = [
            torch.special.legendre_polynomial_p(x, j) * math.sqrt((2 * j + 1) / (self.degree + 1))
            for j in range(self.degree + 1)
        ]
        _combine(V, W, torch.stack(columns, 1), generator)


@dataclass(frozen=True)
class Fields:
    """The user's own V_k = 𝒱(k/L), W_k = 𝒲(k/L), as they are: nothing is drawn, nothing scaled.

    Arguments:
        V: s -> [q, m], of a float 0 < s <= 1; a block of convolutions wants kernels, [C, M, k, k].
        W: s -> [m, q], or [M, C, k, k].

    Raises:
        TypeError: V or W is not a function.
        ValueError: at use, where one returns no tensor, or one of another shape.
    """

    V: Callable[[float], Tensor]
    W: Callable[[float], Tensor]

    def __post_init__(self) -> None:
        for name, field in (("V", self.V), ("W", self.W)):
            if not callable(field):
                raise TypeError(f"{name}: expected a function of s, got {type(field).__name__}")

    @torch.no_grad()
    def __call__(self, V: Tensor, W: Tensor, *, generator: torch.Generator | None = None) -> None:
        for name, field, stack in (("V", self.V, V), ("W", self.W, W)):
            for k, layer in enumerate(stack, start=1):
                value = field(k / len(stack))
                if not isinstance(value, Tensor) or value.shape != layer.shape:
                    got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                    raise ValueError(f"{name}: expected a function of s -> {list(layer.shape)}, got {got}")
                layer.copy_(value)


# ---- inside ----------------------------------------------------------------------------------------------


def _keep(setting: Any, name: str, value: float) -> None:
    """What a check made of an argument, in its place: short types of other libraries overflow later."""
    object.__setattr__(setting, name, value)


def _fan_in(stack: Tensor) -> int:
    """Entries of a layer that a number of its result is summed over."""
    return stack.shape[2:].numel()


def _layers(depth: int) -> Tensor:
    """s_k = k/L for k = 1 .. L, in float64, on the CPU whatever the default device is."""
    return torch.arange(1, depth + 1, dtype=torch.float64, device="cpu") / depth


@torch.no_grad()
def _combine(V: Tensor, W: Tensor, factor: Tensor, generator: torch.Generator | None) -> None:
    """Z_k = std · Σ_r R_kr ξ_r with ξ independent standard normal, R = ``factor`` [L, r]; W first."""
    for stack in (W, V):
        dtype = torch.promote_types(stack.dtype, torch.float32)  # sums in half precision would roughen it
        R = factor.to(device=stack.device, dtype=dtype)
        noise = torch.randn(
            R.shape[1], stack[0].numel(), device=stack.device, dtype=dtype, generator=generator
        )
        stack.copy_(((_fan_in(stack) ** -0.5 * R) @ noise).view_as(stack))


def _cholesky(kernel: Kernel, depth: int, length_scale: float) -> Tensor:
    """The factor R [L, L] in float64 with R Rᵀ = K, K_ij = kernel(|s_i - s_j| / ℓ); refuses what is none."""
    s = _layers(depth)
    r = ((s[:, None] - s[None, :]).abs() / length_scale).clamp(max=1e100)  # whose square is finite
    values = kernel(r)
    if not isinstance(values, Tensor) or values.shape != r.shape:
        got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"kernel: expected a function of r [L, L] -> {list(r.shape)}, got {got}")
    at_zero = float(values[0, 0])
    if not abs(at_zero - 1) <= UNIT:
        raise ValueError(f"kernel: expected a function with value 1 at 0, got {at_zero:.6g}")
    factor: Tensor
    identity = torch.eye(depth, dtype=torch.float64, device="cpu")
    factor, failed = torch.linalg.cholesky_ex(values + JITTER * identity)
    if failed:
        raise ValueError(
            f"kernel: expected a positive definite function, got one whose matrix of the first {int(failed)} "
            f"of {depth} layers is not"
        )
    return factor


def _low_rank_factor(depth: int, length_scale: float) -> Tensor:
    """A factor R [L, r] in float64 with R Rᵀ = K, K_ij = exp(-(s_i - s_j)² / 2ℓ²), s_k = k/L.

    Cholesky with diagonal pivoting (Harbrecht, Peters & Schneider 2012), stopped when no diagonal
    entry of K - R Rᵀ exceeds 1e-10 (``JITTER``): the kernel's spectrum decays faster than exponentially, so
    a rank r of about 20 is exact to 1e-5 in a weight's standard deviation, at a cost of O(L r²) for any
    depth.
    """
    s = _layers(depth)
    remaining = torch.ones_like(s)
    columns: list[Tensor] = []
    while len(columns) < depth:
        pivot = int(remaining.argmax())
        if remaining[pivot] < JITTER:
            break
        column = torch.exp(-(((s - s[pivot]) / length_scale) ** 2) / 2)
        for previous in columns:
            column = column - previous[pivot] * previous
        column = column / remaining[pivot].sqrt()
        columns.append(column)
        remaining = (remaining - column**2).clamp_min(0.0)
    return torch.stack(columns, dim=1)
