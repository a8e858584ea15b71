"""Residuals f(h, Z_k) of several kinds with parameters for them, the plain loop, and gradients to compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

Residual = Callable[[Tensor, Any], Tensor]


def smooth(depth: int, *shape: int) -> Tensor:
    """Weights [L, *shape] that are smooth in depth, of unit spectral scale, in float64."""
    s = torch.arange(1, depth + 1).double().view(-1, *[1] * len(shape)) / depth
    a, b = torch.randn(2, *shape).double() / max(1, torch.Size(shape[1:]).numel()) ** 0.5
    return torch.cos(3 * s) * a + torch.sin(2 * s) * b


def mlp(h: Tensor, Z: Any) -> Tensor:
    return F.linear(torch.tanh(F.linear(h, Z["W"], Z["b"])), Z["V"])


def attention(h: Tensor, Z: Any) -> Tensor:
    """[B, T, q], two heads; parameters in a tuple."""
    q, k, v = F.linear(F.layer_norm(h, h.shape[-1:]), Z[0]).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    v = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1) @ v
    return F.linear(v.transpose(1, 2).flatten(2), *Z[1])


def gated(h: Tensor, Z: Any) -> Tensor:
    """Integers among the parameters: a gate per step, and which features are let through."""
    return torch.sigmoid(h @ Z["gate"]) * torch.tanh(h @ Z["value"])[..., Z["order"]] * Z["open"]


def convolution(h: Tensor, Z: Any) -> Tensor:
    """[B, C, H, W], normalised over groups."""
    z = F.group_norm(F.conv2d(h, Z["W"], padding=1), 2)
    return F.conv2d(F.silu(z), *Z["V"], padding=1)


def case(name: str, depth: int, batch: int = 3) -> tuple[Residual, Tensor, Any]:
    """f, h and params in float64."""
    if name == "mlp":
        Z = {"W": smooth(depth, 9, 6), "b": smooth(depth, 9), "V": smooth(depth, 6, 9)}
        return mlp, torch.randn(batch, 6).double(), Z
    if name == "attention":
        return (
            attention,
            torch.randn(batch, 5, 8).double(),
            (
                smooth(depth, 24, 8),
                [smooth(depth, 8, 8), smooth(depth, 8)],
            ),
        )
    if name == "gated":
        return (
            gated,
            torch.randn(batch, 6).double(),
            {
                "gate": smooth(depth, 6, 6),
                "value": smooth(depth, 6, 6),
                "order": torch.randperm(6).expand(depth, 6),
                "open": torch.ones(depth, dtype=torch.bool),
            },
        )
    return (
        convolution,
        torch.randn(batch, 3, 5, 4).double(),
        {
            "W": smooth(depth, 4, 3, 3, 3),
            "V": [smooth(depth, 3, 4, 3, 3), smooth(depth, 3)],
        },
    )


CASES = ("mlp", "attention", "gated", "convolution")


def cast(tree: Any, dtype: torch.dtype) -> Any:
    """A copy, with gradients where that is possible."""

    def leaf(x: Tensor) -> Tensor:
        return x.detach().to(dtype, copy=True).requires_grad_() if x.is_floating_point() else x

    return tree_map(leaf, tree)


def plain(f: Residual, h: Tensor, params: Any, *, scale: float | None = None, **_: Any) -> Tensor:
    """The loop that residual_scan stands for."""
    depth = len(tree_flatten(params)[0][0])
    for k in range(depth):
        Z = tree_map(lambda leaf, k=k: leaf[k], params)
        h = h + (1 / depth if scale is None else scale) * f(h, Z)
    return h


def results(
    scan: Callable[..., Tensor],
    f: Residual,
    h: Tensor,
    params: Any,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> list[Tensor]:
    """y, dh and the gradients of the parameters."""
    h, params = cast(h, dtype), cast(params, dtype)
    y = scan(f, h, params, **options)
    leaves = [leaf for leaf in tree_flatten(params)[0] if leaf.requires_grad]
    weights = torch.linspace(-1, 2, y.numel(), dtype=dtype).view_as(y)
    return [y.detach(), *torch.autograd.grad(y, [h, *leaves], weights)]


def errors(found: list[Tensor], truth: list[Tensor]) -> list[float]:
    """Largest absolute error of each result, relative to its largest entry."""
    return [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, truth, strict=True)]


def counted(f: Residual) -> tuple[Residual, list[int]]:
    calls = [0]

    def g(h: Tensor, Z: Any) -> Tensor:
        calls[0] += 1
        return f(h, Z)

    return g, calls
