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
"""Report of an adjoint backward. Relative errors of the worst row: estimate (of the states that activations
were differentiated at, root mean square over depth), drift (of reconstructed states where the forward's are
known: h_0, anchors, up to 16 projections between). Means over steps and rows: evaluations (of a step's f; a
correction of W h alone counts one half), order (of the prediction it starts from). See docs/adjoint.md."""

DRIFT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 5e-4}
"""What estimate and drift of an adjoint backward may reach, per storage dtype, before it warns.

Rounding alone gives about one unit a step, a random walk over L steps: 1e-5 is 80 units of a float32 state.
Half-precision blocks round their gradients to 2^-8 and 2^-11; an error of their states may come out 20 times
as large in a gradient.
"""


class DeepResidual(torch.autograd.Function):
    """y = h_L for h [B, q], with what the backward's plan asks for saved (``checkpointing.Plan``).

    An adjoint backward (``reconstruct``) fills ``record`` with its report, and raises where ``strict``.
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
        reconstruct: bool,
        slots: int,
        strict: bool,
        record: Drift,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, states, checks = ops.forward(
            h, V, W, hidden_bias, output_bias, activation, scale, save_every, reconstruct
        )
        return y, states, checks

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        *tensors, ctx.activation, ctx.scale, ctx.save_every, ctx.reconstruct, ctx.slots = inputs[:10]
        ctx.strict, ctx.record = inputs[10:]
        _, states, checks = output
        ctx.mark_non_differentiable(states, checks)
        ctx.save_for_backward(*tensors, states, checks)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 12
        *inputs, states, checks = ctx.saved_tensors
        if torch.is_grad_enabled():
            gradients = _differentiable_gradients(ctx, grad, inputs)
        else:
            h, *weights = inputs
            need_weights = any(ctx.needs_input_grad[1:5])
            *gradients, report = ops.backward(
                grad,
                h if ctx.reconstruct else None,  # where the adjoint measures its drift
                *weights,
                states,
                checks,
                ctx.activation,
                ctx.scale,
                ctx.save_every,
                ctx.reconstruct,
                ctx.slots,
                need_weights,
            )
            if ctx.reconstruct:
                judge_drift(report, grad.dtype, ctx.strict, ctx.record, not ops.runs_natively(grad))
        needed = (g if need else None for g, need in zip(gradients, ctx.needs_input_grad, strict=False))
        return (*needed, *(None,) * 7)


class DualDeepResidual(DeepResidual):
    """The same with forward-mode derivatives, for which the graph compiler has no way."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        DeepResidual.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:5])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, None, None]:
        """The derivative along ``tangents``, by PyTorch operators: it can be differentiated again."""
        h, V, W, hidden_bias, output_bias = ctx.saved_tensors[:5]
        moving = reference.jvp(
            tangents[:5], h, V, W, hidden_bias, output_bias, activation=ctx.activation, scale=ctx.scale
        )
        return moving, None, None


def _differentiable_gradients(ctx: Any, grad: Tensor, inputs: list[Any]) -> list[Tensor | None]:
    """Under ``create_graph=True``: gradients that can be differentiated again, through the reference.

    It runs the block again and stores every state, whatever the strategy.
    """
    y = reference.deep_residual(*inputs, activation=ctx.activation, scale=ctx.scale)
    wanted = [tensor for tensor, need in zip(inputs, ctx.needs_input_grad, strict=False) if need]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    return [next(found) if need else None for need in ctx.needs_input_grad[: len(inputs)]]


def judge_drift(report: Tensor, dtype: torch.dtype, strict: bool, record: Drift, rounded: bool) -> None:
    """Keep the report of an adjoint backward in ``record``; warn or raise where it cannot be trusted.

    rounded: whether products were rounded to ``dtype``, as PyTorch's are. In half precision the states then
    drift by the rounding of f, and 4 times the tolerance is allowed.
    """
    estimate, drift, evaluations, order = report.tolist()
    record.update(estimate=estimate, drift=drift, evaluations=evaluations, order=order)
    tolerance = DRIFT_TOLERANCE[dtype] * (4 if rounded and dtype.itemsize == 2 else 1)
    if estimate <= tolerance and drift <= tolerance:  # false where either is NaN
        return
    message = (
        f"the adjoint reconstructed the activations with an error above {tolerance:g} (relative; estimate "
        f"{estimate:.1e}, drift {drift:.1e}): its gradients are unreliable. The residual steps are too large "
        'to be inverted at this depth; use backward="auto" or "checkpoint", or more anchors.'
    )
    if strict:
        raise DriftError(message)
    warnings.warn(message, DriftWarning, stacklevel=2)
