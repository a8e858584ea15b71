"""What a layer's weights do to a state: matrices to rows, or convolutions to maps.

Rows: h [B, q], V [L, q, m], W [L, m, q]. Maps: h [B, C, H, W], V [L, C, M, k, k], W [L, M, C, k, k], with k
odd, zeros around the map (k//2 of them) and stride 1. Flattened, maps are rows of q = C·H·W features and
m = M·H·W hidden units, and saved as such.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from .reconstruction import visibility


class Products(NamedTuple):
    """The products of a layer; x its input, g the gradient of the loss with respect to its output.

    apply: (x, weight, bias or None) -> weight x + bias.
    transposed: (g, weight) -> weightᵀ g.
    weight_gradient: (g, x, weight) -> Σ g xᵀ, of the shape of ``weight``.
    bias_gradient: g -> Σ g, one number for each output feature or channel.
    visible: (W_k, h) -> how well the layer sees each feature of a flattened state, [q].
    """

    apply: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    transposed: Callable[[Tensor, Tensor], Tensor]
    weight_gradient: Callable[[Tensor, Tensor, Tensor], Tensor]
    bias_gradient: Callable[[Tensor], Tensor]
    visible: Callable[[Tensor, Tensor], Tensor]


LINEAR = Products(
    F.linear,
    lambda g, weight: g @ weight,
    lambda g, x, weight: g.t() @ x,
    lambda g: g.sum(0),
    lambda W, h: visibility(W),
)


def _transposed(g: Tensor, weight: Tensor) -> Tensor:
    shape = (g.shape[0], weight.shape[1], *g.shape[2:])
    return conv2d_input(shape, weight, g, padding=weight.shape[-1] // 2)  # type: ignore[no-any-return]


def _weight_gradient(g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return conv2d_weight(x, weight.shape, g, padding=weight.shape[-1] // 2)  # type: ignore[no-any-return]


def _visible(W: Tensor, h: Tensor) -> Tensor:
    """A channel's, over all taps, at each of its pixels: W [M, C, k, k], h [B, C, H, W] -> [C·H·W]."""
    return visibility(W.movedim(1, -1).flatten(0, -2)).repeat_interleave(h.shape[2] * h.shape[3])


CONVOLUTION = Products(
    lambda x, weight, bias: F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2),
    _transposed,
    _weight_gradient,
    lambda g: g.sum((0, 2, 3)),
    _visible,
)


def products(V: Tensor) -> Products:
    """Those of a block with these weights."""
    return LINEAR if V.dim() == 3 else CONVOLUTION


def flat_sizes(h: Tensor, V: Tensor) -> tuple[int, int, int]:
    """B, q and m; a state's flattened features and hidden units where it is of maps."""
    if V.dim() == 3:
        return h.shape[0], V.shape[1], V.shape[2]
    pixels = h.shape[2] * h.shape[3]
    return h.shape[0], V.shape[1] * pixels, V.shape[2] * pixels


def shaped(y: Tensor, h: Tensor) -> Tensor:
    """y, which nothing else holds, in the shape of h. It is no view for autograd, so that hooks on a block's
    output (FSDP's, which gather the weights for its backward) survive a change of the output in place."""
    if y.shape == h.shape:
        return y
    found: Tensor = torch.ops.aten._unsafe_view(y, h.shape)
    return found
