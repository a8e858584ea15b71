"""Gradients of one block by several methods, and how far they are from float64: what two measurements share.

``reproduce adjoint-error`` draws them for the reader of the paper, ``benchmarks/accuracy.py`` asks more of
them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import initializers
from ..activations import Activation, get_activation
from ..reference import state_dtype

Record = dict[str, Any]
"""For a backward to leave "evaluations", of f a step, and "states", reconstructed h_{L-1}, ..., h_0, in."""


def random_inputs(
    weights: str, batch: int, dim: int, hidden: int, depth: int, seed: int
) -> dict[str, Tensor]:
    """Normal h and grad = dℓ/dy [B, q]; V [L, q, m], W [L, m, q] of the initializer ``weights``; float32."""
    generator = torch.Generator().manual_seed(seed)
    V, W = torch.empty(depth, dim, hidden), torch.empty(depth, hidden, dim)
    initializers.get_initializer(weights)(V, W, generator=generator)
    h, grad = torch.randn(2, batch, dim, generator=generator)
    return {"h": h, "V": V, "W": W, "grad": grad}


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Of rows with a matrix; of maps, the convolution that keeps their size."""
    return F.linear(x, weight) if weight.dim() == 2 else F.conv2d(x, weight, padding=weight.shape[-1] // 2)


def residual(h: Tensor, V_k: Tensor, W_k: Tensor, sigma: Activation) -> Tensor:
    """f_k(h) = V_k σ(W_k h): products in the weights' dtype, the result in that of the state h."""
    return product(sigma.function(product(h.to(W_k.dtype), W_k)), V_k).to(h.dtype)


def adjoint_2022(
    record: Record, h: Tensor, V: Tensor, W: Tensor, *biases: None, activation: str, scale: float | None
) -> Tensor:
    """Sander, Ablin & Peyré, "Do residual neural networks discretize neural ODEs?", NeurIPS 2022."""
    scale = 1 / len(V) if scale is None else scale
    sigma = get_activation(activation)
    y: Tensor = _Adjoint2022.apply(h, V, W, sigma, scale, record)  # type: ignore[no-untyped-call]
    return y


class _Adjoint2022(torch.autograd.Function):
    """Keeps h_L alone; the backward takes, from the top,

    h_k = h_{k+1} - scale f_k(h_{k+1}),    a ← a + scale ∂f_k(h_k)ᵀ a.
    """

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, V: Tensor, W: Tensor, sigma: Activation, scale: float, record: Record
    ) -> Tensor:
        state = h.to(state_dtype(h.dtype))
        for V_k, W_k in zip(V, W, strict=True):
            state = state + scale * residual(state, V_k, W_k, sigma)
        ctx.save_for_backward(state, V, W)
        ctx.options = sigma, scale, record
        return state.to(h.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        state, V, W = ctx.saved_tensors
        sigma, scale, record = ctx.options
        a = grad.to(state.dtype)
        dV, dW = torch.empty_like(V), torch.empty_like(W)
        record.update(evaluations=2.0, states=[])
        for k in reversed(range(len(V))):
            state = state - scale * residual(state, V[k], W[k], sigma)
            record["states"].append(state)
            h, V_k, W_k = (tensor.detach().requires_grad_() for tensor in (state, V[k], W[k]))
            with torch.enable_grad():
                f = residual(h, V_k, W_k, sigma)
            da, dV[k], dW[k] = torch.autograd.grad(f, (h, V_k, W_k), scale * a)
            a = a + da
        return a.to(grad.dtype), dV, dW, None, None, None
