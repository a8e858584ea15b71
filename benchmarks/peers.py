"""Other ways to run the same network, to compare with ours: the eager loop (plain, compiled step by step,
with ``torch.utils.checkpoint``, with a 16-bit state, of maps with channels last), the adjoint of 2022, and
torchdiffeq.

Each is called like ``deep_residual`` or ``deep_conv_residual`` (h, V, W, no biases) behind a ``record``, in
which a backward leaves "evaluations", of f a step, and "states", the reconstructed h_{L-1}, ..., h_0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchdiffeq import odeint_adjoint

from odeblock.activations import Activation, get_activation
from odeblock.experiments.gradients import Record, adjoint_2022, product, residual
from odeblock.reference import state_dtype

__all__ = [
    "Record",
    "adjoint_2022",
    "channels_last",
    "checkpointed",
    "compiled_step",
    "eager",
    "eager_low_state",
    "residual",
    "torchdiffeq_adjoint",
]


def eager(
    record: Record, h: Tensor, V: Tensor, W: Tensor, *biases: None, activation: str, scale: float | None
) -> Tensor:
    """The loop as an expert writes it: weights unbound once, the step added in one operation."""
    sigma, scale = get_activation(activation), 1 / len(V) if scale is None else scale
    for V_k, W_k in zip(V.unbind(), W.unbind(), strict=True):
        h = torch.add(h, residual(h, V_k, W_k, sigma), alpha=scale)
    return h


def channels_last(
    record: Record, h: Tensor, V: Tensor, W: Tensor, *biases: None, activation: str, scale: float | None
) -> Tensor:
    """The eager loop of maps as PyTorch advises for convolutions: channels last, of maps and of kernels."""
    sigma, scale = get_activation(activation), 1 / len(V) if scale is None else scale
    h = h.contiguous(memory_format=torch.channels_last)
    for V_k, W_k in zip(V.unbind(), W.unbind(), strict=True):
        last = (x.contiguous(memory_format=torch.channels_last) for x in (V_k, W_k))
        h = torch.add(h, residual(h, *last, sigma), alpha=scale)
    return h


def compiled_step(
    record: Record, h: Tensor, V: Tensor, W: Tensor, *biases: None, activation: str, scale: float | None
) -> Tensor:
    """``torch.compile`` of one step, called L times. Compiling the loop takes minutes and is no faster.

    ``torch.compiler.reset()`` before other shapes, or the compiler gives up after some.
    """
    sigma, scale = get_activation(activation), 1 / len(V) if scale is None else scale
    for V_k, W_k in zip(V.unbind(), W.unbind(), strict=True):
        h = _compiled_step(h, V_k, W_k, scale, sigma.function)
    return h


@torch.compile
def _compiled_step(h: Tensor, V_k: Tensor, W_k: Tensor, scale: float, sigma: Callable[..., Tensor]) -> Tensor:
    # Not torch.add(h, f, alpha=scale): inductor 2.13 drops alpha on the CPU.
    return h + scale * product(sigma(product(h, W_k)), V_k)


def checkpointed(
    record: Record, h: Tensor, V: Tensor, W: Tensor, *biases: None, activation: str, scale: float | None
) -> Tensor:
    """The eager loop in ⌈√L⌉ segments under ``torch.utils.checkpoint``."""
    scale, size = 1 / len(V) if scale is None else scale, math.isqrt(len(V) - 1) + 1
    for V_s, W_s in zip(V.split(size), W.split(size), strict=True):
        arguments = ({}, h, V_s, W_s)
        h = checkpoint(eager, *arguments, activation=activation, scale=scale, use_reentrant=False)
    return h


def eager_low_state(
    record: Record, h: Tensor, V: Tensor, W: Tensor, *biases: None, activation: str, scale: float | None
) -> Tensor:
    """The loop as one writes it, autograd of it: the state has the dtype of the input."""
    sigma, scale = get_activation(activation), 1 / len(V) if scale is None else scale
    for V_k, W_k in zip(V.unbind(), W.unbind(), strict=True):
        h = h + scale * residual(h, V_k, W_k, sigma)
    return h


def torchdiffeq_adjoint(
    record: Record,
    h: Tensor,
    V: Tensor,
    W: Tensor,
    *biases: None,
    activation: str,
    scale: float | None,
    perturb: bool,
) -> Tensor:
    """``torchdiffeq.odeint_adjoint(method="euler")`` of dh/ds = f(s, h) on [0, 1], layer k on [k/L, (k+1)/L).

    Two output times and a step of 1/L: with every s = k/L an output time, torchdiffeq would keep every state.
    The forward evaluates at s = k/L. The backward steps from s = (k+1)/L and evaluates there: at layer k + 1
    (k = L - 1: the last again) where layer k was applied. ``perturb`` is torchdiffeq's option for fields
    that jump: times are moved into the step by one ulp, so that the backward of step k has layer k too.
    k/L must be exact in binary.
    """

    assert scale is None
    assert not len(V) & (len(V) - 1), f"depth: expected a power of 2, got {len(V)}"
    state = h.to(state_dtype(h.dtype))  # times are cast to the state's dtype: 8 bits do not tell layers apart
    field = _Field(V, W, get_activation(activation), record)
    path = odeint_adjoint(
        field,
        state,
        torch.tensor([0.0, 1.0], dtype=state.dtype),
        method="euler",
        options={"step_size": 1 / len(V), "perturb": perturb},
        adjoint_params=(V, W),
    )
    y: Tensor = path[-1].to(h.dtype)
    return y


class _Field(nn.Module):
    """f(s, h), constant in s between layers."""

    def __init__(self, V: Tensor, W: Tensor, sigma: Activation, record: Record) -> None:
        super().__init__()
        self.V, self.W, self.sigma, self.record = V, W, sigma, record
        record.update(evaluations=0.0, states=[])

    def forward(self, s: Tensor, h: Tensor) -> Tensor:
        depth = len(self.V)
        k = min(int(s.item() * depth), depth - 1)
        f = residual(h, self.V[k], self.W[k], self.sigma)
        if torch.is_grad_enabled():  # in the backward
            self.record["evaluations"] += 1 / depth
            self.record["states"].append((h - f / depth).detach())
        return f
