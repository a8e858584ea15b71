"""The ``torch.autograd.Function`` that ties the forward op to the adjoint backward op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from . import ops, reference
from .autocast import without
from .drift import DriftRecord


class DeepResidual(torch.autograd.Function):
    """y = h_L for h [B, q] or maps [B, C, H, W], with what the backward's plan asks for saved
    (``checkpointing.Plan``).

    An adjoint backward (``reconstruct``) leaves its report in ``record``, and raises where ``strict``.
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
        keep_hidden: bool,
        strict: bool,
        record: DriftRecord,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, states, checks = ops.forward(
            h, V, W, hidden_bias, output_bias, activation, scale, save_every, reconstruct, keep_hidden
        )
        return y, states, checks

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        *tensors, ctx.activation, ctx.scale = inputs[:7]
        ctx.save_every, ctx.reconstruct, ctx.slots, ctx.keep_hidden, ctx.strict, ctx.record = inputs[7:]
        _, states, checks = output
        ctx.mark_non_differentiable(states, checks)
        ctx.save_for_backward(*tensors, states, checks)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 13
        *inputs, states, checks = ctx.saved_tensors
        need = ctx.needs_input_grad  # made anew each time
        if torch.is_grad_enabled():
            gradients: Sequence[Tensor | None] = _differentiable_gradients(ctx, grad, inputs)
        else:
            h, *weights = inputs
            save_every = ctx.save_every
            if not (save_every or ctx.reconstruct):  # nothing was saved: torch.export sees gradients taken
                save_every = 1
                _, states, checks = ops.forward(*inputs, ctx.activation, ctx.scale, save_every, False, False)
            gradients = ops.backward(
                grad,
                h if ctx.reconstruct else None,  # where the adjoint measures its drift
                *weights,
                states,
                checks,
                ctx.activation,
                ctx.scale,
                save_every,
                ctx.reconstruct,
                ctx.slots,
                ctx.keep_hidden,
                any(need[1:5]),
                ctx.strict,
                ctx.record.number if ctx.reconstruct else -1,  # one graph for all blocks that have no adjoint
            )
        needed = (gradients[i] if need[i] else None for i in range(5))
        return (*needed, *(None,) * 8)


def _differentiable_gradients(ctx: Any, grad: Tensor, inputs: list[Any]) -> list[Tensor | None]:
    """Under ``create_graph=True``: gradients that can be differentiated again, through the reference.

    It runs the block again and stores every state, whatever the strategy.
    """

    def run(*inputs: Any) -> Tensor:
        return reference.loop(*inputs, activation=ctx.activation, scale=ctx.scale)

    return pull_back(run, inputs, ctx.needs_input_grad[: len(inputs)], grad)


def pull_back(
    run: Callable[..., Any], inputs: Sequence[Any], needed: Sequence[bool], grad: Any
) -> list[Tensor | None]:
    """(∂run/∂input)ᵀ grad for the ``needed`` inputs, None for the others; differentiable in all of them. With
    a tuple from ``run``, grad is one, too.

    Also within ``torch.func`` transforms, and after them: the function that ``torch.func.vjp`` returns is
    called when the level of what was saved is over.
    """
    unwrap = torch._C._functorch.unwrap_if_dead
    grad, inputs = tree_map(unwrap, grad), [x if x is None else unwrap(x) for x in inputs]
    places = [i for i, need in enumerate(needed) if need]

    def of_needed(*wanted: Tensor) -> Any:
        arguments = list(inputs)
        for i, x in zip(places, wanted, strict=True):
            arguments[i] = x
        return run(*arguments)

    with without(inputs[0].device.type):  # also what autograd runs there
        found = iter(torch.func.vjp(of_needed, *(inputs[i] for i in places))[1](grad))
    return [next(found) if need else None for need in needed]
