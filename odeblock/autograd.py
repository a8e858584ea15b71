"""The ``torch.autograd.Function`` that ties the forward op to the adjoint backward op."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from . import ops, reference


class DriftWarning(RuntimeWarning):
    """The adjoint could not reconstruct the activations to rounding: its gradients are not to be trusted."""


class DriftError(RuntimeError):
    """What ``strict=True`` raises in the place of a ``DriftWarning``."""


Drift = dict[str, float]
"""Report of an adjoint backward: estimate (largest relative last change of a state in its reconstruction),
drift (largest relative distance of the reconstructed h_0 from the input), evaluations (of a step's f, on
average over steps and rows), order (of the prediction that the reconstruction starts from)."""

PREDICTION_ORDER = 2  # Δ_k ≈ 2Δ_{k+1} - Δ_{k+2}

DRIFT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""What estimate and drift of an adjoint backward may reach, per storage dtype, before it warns.

Reconstruction adds about one rounding error a step, a random walk over L steps: 1e-5 is 80 ulp of a
float32 state. Half-precision products make f itself jump by an ulp of the storage dtype times 1/L.
"""


class DeepResidual(torch.autograd.Function):
    """y = h_L for h [B, q], with the states saved that ``save_every`` and ``save_final`` ask for.

    An adjoint backward (``save_every`` = 0) fills ``record`` with its report, and raises where ``strict``.
    """

    @staticmethod
    def forward(
        h: Tensor,
        V: Tensor,
        W: Tensor,
        hidden_bias: Tensor | None,
        output_bias: Tensor | None,
        activation: str,
        scale: float,
        save_every: int,
        save_final: bool,
        strict: bool,
        record: Drift,
    ) -> tuple[Tensor, Tensor]:
        y, states = ops.forward(h, V, W, hidden_bias, output_bias, activation, scale, save_every, save_final)
        return y, states

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        h, V, W, hidden_bias, output_bias, ctx.activation, ctx.scale, ctx.save_every, _, *rest = inputs
        ctx.strict, ctx.record = rest
        states = output[1]
        ctx.mark_non_differentiable(states)
        ctx.save_for_backward(h, V, W, hidden_bias, output_bias, states)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 11
        *inputs, states = ctx.saved_tensors
        if torch.is_grad_enabled():
            gradients = _differentiable_gradients(ctx, grad, inputs)
        else:
            h, *weights = inputs
            need_weights = any(ctx.needs_input_grad[1:5])
            *gradients, report = ops.backward(
                grad,
                h if not ctx.save_every else None,  # where the adjoint measures its drift
                *weights,
                states,
                ctx.activation,
                ctx.scale,
                ctx.save_every,
                need_weights,
            )
            if not ctx.save_every:
                _judge_drift(report, grad.dtype, ctx.strict, ctx.record)
        needed = (g if need else None for g, need in zip(gradients, ctx.needs_input_grad, strict=False))
        return (*needed, *(None,) * 6)


def _differentiable_gradients(ctx: Any, grad: Tensor, inputs: list[Any]) -> list[Tensor | None]:
    """Under ``create_graph=True``: gradients that can be differentiated again, through the reference.

    It runs the block again and stores every state, whatever the strategy.
    """
    y = reference.deep_residual(*inputs, activation=ctx.activation, scale=ctx.scale)
    wanted = [tensor for tensor, need in zip(inputs, ctx.needs_input_grad, strict=False) if need]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    return [next(found) if need else None for need in ctx.needs_input_grad[: len(inputs)]]


def _judge_drift(report: Tensor, dtype: torch.dtype, strict: bool, record: Drift) -> None:
    estimate, drift, evaluations = report.tolist()
    record.update(estimate=estimate, drift=drift, evaluations=evaluations, order=PREDICTION_ORDER)
    tolerance = DRIFT_TOLERANCE[dtype]
    if estimate <= tolerance and drift <= tolerance:  # false where either is NaN
        return
    message = (
        f"the adjoint reconstructed the activations with an error above {tolerance:g} (last change "
        f"{estimate:.1e}, drift of the input {drift:.1e}, relative): its gradients are unreliable. The "
        'residual steps are too large to be inverted at this depth; use backward="auto" or "checkpoint".'
    )
    if strict:
        raise DriftError(message)
    warnings.warn(message, DriftWarning, stacklevel=2)
