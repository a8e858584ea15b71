"""The neural ODE of a block: weights as functions of s in [0, 1], and the field that an ODE solver takes.

A block of depth L and step ``scale`` is the explicit Euler method, with step 1/L, for

    dh/ds = T (𝒱(s) σ(𝒲(s) h + b(s)) + c(s)),   T = scale · L (1 by default),   0 <= s <= 1,

where Z_k = 𝒵(k/L) for each of the weights Z = V, W, b, c (Marion, Wu, Sander & Biau, ICLR 2024). Between its
layers 𝒵 is taken to be linear, and constant below s = 1/L.
"""

from __future__ import annotations

import numbers
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .activations import get_activation

if TYPE_CHECKING:
    from .block import DeepResBlock


def interpolate(weights: Tensor, position: Tensor) -> Tensor:
    """𝒵(position / L): the stack Z_1 .. Z_L as a function of depth, linear between layers.

    Differentiable in both arguments.

    Arguments:
        weights: shape [L, ...], Z_k at position k.
        position: shape [n]; below 1 it counts as 1, above L as L.

    Returns:
        shape [n, ...], of the dtype of ``weights``; half precision is interpolated in float32. A whole
        position k gives Z_k itself, and equal neighbours give exactly themselves.
    """
    depth = weights.shape[0]
    dtype = torch.promote_types(weights.dtype, torch.float32)
    offset = (position.to(torch.float64) - 1).clamp(0, depth - 1)
    below = offset.detach().floor().clamp(max=max(depth - 2, 0)).long()
    fraction = (offset - below).to(dtype).view(-1, *[1] * (weights.dim() - 1))
    low = weights.index_select(0, below).to(dtype)
    high = weights.index_select(0, (below + 1).clamp(max=depth - 1)).to(dtype)
    return torch.lerp(low, high, fraction).to(weights.dtype)


class VectorField(nn.Module):
    """f(s, h) = T (𝒱(s) σ(𝒲(s) h + b(s)) + c(s)), the right-hand side of a block's limiting ODE.

    What ``DeepResBlock.vector_field()`` returns: a callable for any ODE solver that takes dh/ds = f(s, h) on
    0 <= s <= 1, such as ``torchdiffeq.odeint``. Its parameters are those of the block itself.

    Arguments:
        block: a ``DeepResBlock``.
    """

    def __init__(self, block: DeepResBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, s: Tensor | float, h: Tensor) -> Tensor:
        """s: time, a number or a tensor of one element; h [..., q] -> dh/ds [..., q], of h's dtype.

        Raises TypeError or ValueError, naming the argument, for anything else.
        """
        block = self.block
        if not isinstance(h, Tensor) or not h.is_floating_point():
            got = h.dtype if isinstance(h, Tensor) else type(h).__name__
            raise TypeError(f"h: expected a floating-point torch.Tensor, got {got}")
        if h.dim() < 1 or h.shape[-1] != block.dim:
            raise ValueError(f"h: expected shape [..., {block.dim}], got {list(h.shape)}")
        if not isinstance(s, (Tensor, numbers.Real)):
            raise TypeError(f"s: expected a number or a tensor of one element, got {type(s).__name__}")
        time = torch.as_tensor(s, dtype=torch.float64, device=h.device)
        if time.numel() != 1:
            raise ValueError(f"s: expected one number, got a tensor of shape {list(time.shape)}")
        V, W, hidden_bias, output_bias = (
            None if p is None else interpolate(p, time.reshape(1) * block.depth)[0].to(h.dtype)
            for p in (block.V, block.W, block.hidden_bias, block.output_bias)
        )
        assert isinstance(V, Tensor)
        assert isinstance(W, Tensor)
        z = nn.functional.linear(h, W, hidden_bias)
        f = nn.functional.linear(get_activation(block.activation).function(z), V, output_bias)
        return (block.scale * block.depth) * f
