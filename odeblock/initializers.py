"""Initial weights as functions of depth: smooth, tied, i.i.d., and the paper's V = 0.

Each initializer fills V [L, q, m] and W [L, m, q] in place. Entries of W have variance 1/q and entries
of V variance 1/m at every depth, so that initializers differ only in how layers depend on each other.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

LENGTH_SCALE = 0.25  # of the Gaussian process in s = k/L


class Initializer(Protocol):
    """Fills V [L, q, m] and W [L, m, q] in place, drawing from ``generator`` (default: torch's own)."""

    def __call__(self, V: Tensor, W: Tensor, *, generator: torch.Generator | None = None) -> None: ...


def _kernel_factor(depth: int, length_scale: float) -> Tensor:
    """A factor R [L, r] in float64 with R Rᵀ = K, K_ij = exp(-(s_i - s_j)² / 2ℓ²), s_k = k/L.

    Cholesky with diagonal pivoting (Harbrecht, Peters & Schneider 2012), stopped when no diagonal
    entry of K - R Rᵀ exceeds 1e-10: the kernel's spectrum decays faster than exponentially, so a rank r
    of about 20 is exact to 1e-5 in a weight's standard deviation, at a cost of O(L r²) for any depth.
    """
    s = torch.arange(1, depth + 1, dtype=torch.float64) / depth
    remaining = torch.ones(depth, dtype=torch.float64)
    columns: list[Tensor] = []
    while len(columns) < depth:
        pivot = int(remaining.argmax())
        if remaining[pivot] < 1e-10:
            break
        column = torch.exp(-((s - s[pivot]) ** 2) / (2 * length_scale**2))
        for previous in columns:
            column = column - previous[pivot] * previous
        column = column / remaining[pivot].sqrt()
        columns.append(column)
        remaining = (remaining - column**2).clamp_min(0.0)
    return torch.stack(columns, dim=1)


def _smooth_stack(stack: Tensor, std: float, length_scale: float, generator: torch.Generator | None) -> None:
    """stack_k = std · Σ_r R_kr ξ_r with ξ independent standard normal: each entry a Gaussian process."""
    dtype = torch.promote_types(stack.dtype, torch.float32)  # half-precision sums would roughen the process
    factor = _kernel_factor(stack.shape[0], length_scale).to(device=stack.device, dtype=dtype)
    noise = torch.randn(
        factor.shape[1], stack[0].numel(), device=stack.device, dtype=dtype, generator=generator
    )
    stack.copy_(((std * factor) @ noise).view_as(stack))


@torch.no_grad()
def smooth_(
    V: Tensor, W: Tensor, *, length_scale: float = LENGTH_SCALE, generator: torch.Generator | None = None
) -> None:
    """Independent Gaussian processes in depth with kernel exp(-(s - s')² / 2ℓ²), ℓ = ``length_scale``.

    V_k = 𝒱(k/L), W_k = 𝒲(k/L) for smooth random functions 𝒱, 𝒲: the setting in which the network
    discretises a neural ODE (Marion, Wu, Sander & Biau, ICLR 2024).
    """
    if not (math.isfinite(length_scale) and length_scale > 0):
        raise ValueError(f"length_scale: expected a finite number > 0, got {length_scale!r}")
    _smooth_stack(W, W.shape[2] ** -0.5, length_scale, generator)
    _smooth_stack(V, V.shape[2] ** -0.5, length_scale, generator)


@torch.no_grad()
def tied_(V: Tensor, W: Tensor, *, generator: torch.Generator | None = None) -> None:
    """The same Gaussian V and W at every depth."""
    W.copy_(torch.empty_like(W[0]).normal_(0.0, W.shape[2] ** -0.5, generator=generator).expand_as(W))
    V.copy_(torch.empty_like(V[0]).normal_(0.0, V.shape[2] ** -0.5, generator=generator).expand_as(V))


@torch.no_grad()
def iid_(V: Tensor, W: Tensor, *, generator: torch.Generator | None = None) -> None:
    """Independent Gaussian entries at every depth: the usual initialization, rough in depth."""
    W.normal_(0.0, W.shape[2] ** -0.5, generator=generator)
    V.normal_(0.0, V.shape[2] ** -0.5, generator=generator)


@torch.no_grad()
def zero_v_(V: Tensor, W: Tensor, *, generator: torch.Generator | None = None) -> None:
    """V = 0 and W the same at every depth: the paper's long-time setting; the block starts as identity."""
    tied_(V, W, generator=generator)
    V.zero_()


INITIALIZERS: dict[str, Initializer] = {"smooth": smooth_, "tied": tied_, "iid": iid_, "zero_v": zero_v_}


def get_initializer(name: str) -> Initializer:
    """Look an initializer up by name; ValueError lists the known ones."""
    if not isinstance(name, str):
        raise TypeError(f"init: expected a name (str), got {type(name).__name__}")
    if name not in INITIALIZERS:
        raise ValueError(f"init: expected one of {', '.join(INITIALIZERS)}; got {name!r}")
    return INITIALIZERS[name]
