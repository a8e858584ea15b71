"""Calls that no graph compiler sees: the ``torch.autograd.Function`` of one as usual, that of one under
transforms of ``torch.func``, and that of gradients that can be differentiated again.

Gradients come from the native backward, wherever they are asked for. Their own derivatives, and forward mode,
are those of the loop in PyTorch (``reference``), whatever the strategy: it stores every state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import members, ops, reference
from .autocast import without
from .autograd import pull_back
from .checkpointing import NOTHING, Plan
from .drift import DriftRecord, judge_drift


class Call(NamedTuple):
    """What a call has besides tensors. An adjoint backward leaves its report in ``record``."""

    activation: str
    scale: float
    backward: str
    strict: bool
    anchors: int
    memory_budget: int | None
    record: DriftRecord

    def plan(self, h: Any, V: Any, *_: Any) -> Plan:
        """What its strategy stores."""
        return ops.plan(h, V, self.activation, self.backward, self.anchors, self.memory_budget)

    def forward(self, plan: Plan, *tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
        """y, states and checks, of h, V, W, hidden_bias and output_bias."""
        save_every, reconstruct, _, keep_hidden = plan
        found: tuple[Tensor, Tensor, Tensor] = ops.forward(
            *tensors, self.activation, self.scale, save_every, reconstruct, keep_hidden
        )
        return found

    def gradients(
        self, plan: Plan, grad: Any, h: Any, *rest: Any, weights: bool, record: DriftRecord
    ) -> tuple[Tensor, ...]:
        """Those of h and, where asked for, of the weights; rest: weights, states and checks."""
        save_every, reconstruct, slots, keep_hidden = plan
        below = h if reconstruct else None  # where the adjoint measures its drift
        options = (self.activation, self.scale, save_every, reconstruct, slots, keep_hidden, weights)
        found: tuple[Tensor, ...] = ops.backward(grad, below, *rest, *options, self.strict, record.number)
        return found

    def loop(self, *tensors: Any) -> Tensor:
        """y by PyTorch operators, which have derivatives of every order."""
        return reference.loop(*tensors, activation=self.activation, scale=self.scale)

    def moving(self, *both: Any) -> Tensor:
        """ẏ by PyTorch operators, of the tangents of h, V, ... and then these themselves."""
        h, V, W, hidden_bias, output_bias = both[5:]
        options = self.activation, self.scale
        with without(h.device.type):
            return reference.jvp(both[:5], h, V, W, hidden_bias, output_bias, *options)


class Reports(DriftRecord):
    """Of the members of a call, whose adjoint backwards are judged together."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def judge(self, report: Tensor, tolerance: float, strict: bool = False) -> None:
        self.wait_for(report, tolerance)

    def wait_for(self, report: Tensor, tolerance: float) -> None:
        self.found.append(report)
        self.tolerance = tolerance

    def read(self) -> dict[str, float] | None:
        """Of the last member, for who counts operations."""
        return {"evaluations": float(self.found[-1][2])} if self.found else None

    def judge_all(self, gradients: Sequence[Tensor], strict: bool, record: DriftRecord) -> None:
        """By the errors of the worst, and means of the rest."""
        every = torch.stack(self.found)
        report = torch.cat([every[:, :2].amax(0), every[:, 2:].mean(0)])
        judge_drift(report, gradients, self.tolerance, strict, record)


class EagerDeepResidual(torch.autograd.Function):
    """y = h_L for h [B, q] or maps [B, C, H, W].

    Without ``setup_context``, which takes PyTorch longer to prepare (it binds the arguments to the signature
    of ``forward``) than all the rest of a call; no transform of ``torch.func`` takes it so.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, plan: Plan, *tensors: Tensor | None) -> Tensor:
        y, states, checks = call.forward(plan, *tensors)
        ctx.call, ctx.plan = call, plan
        ctx.save_for_backward(*tensors, states, checks)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        needed = ctx.needs_input_grad[2:]
        transforms = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
        if torch.is_grad_enabled() or transforms:
            *tensors, states, checks = ctx.saved_tensors
            if torch._C._functorch.is_legacy_batchedtensor(grad):  # is_grads_batched: autograd is below these
                return (None, None, *pull_back(ctx.call.loop, tensors, needed, grad))
            gradients = _differentiable(ctx.call, ctx.plan, needed, states, checks, grad, *tensors)
            return (None, None, *gradients)
        call, weights = ctx.call, any(needed[1:])
        found = call.gradients(ctx.plan, grad, *ctx.saved_tensors, weights=weights, record=call.record)
        return (None, None, *(g if need else None for g, need in zip(found, needed, strict=True)))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        """The derivative along ``tangents``, by PyTorch operators: it can be differentiated again."""
        moving: Tensor = _pushed(ctx.call.moving, tangents[2:], ctx.saved_tensors[:5])
        return moving


def transformed(call: Call, *tensors: Tensor | None) -> Tensor:
    """y of a call under transforms of ``torch.func``, of tensors that may have members."""
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    y: Tensor = TransformedDeepResidual.apply(call, keep, *tensors)[0]  # type: ignore[no-untyped-call]
    return y


class TransformedDeepResidual(torch.autograd.Function):
    """y, [E, B, q] of E members; with ``keep`` the states and checks of each for the backward.

    What is kept stays between the two: a ``vmap`` between them has neither, and the backward runs the forward
    again, by the plan for what it then has to do.
    """

    @staticmethod
    def forward(call: Call, keep: bool, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        parts = members.split(tensors)
        plan = call.plan(*parts[0]) if keep else NOTHING
        return tuple(members.join(tensors, [call.forward(plan, *part) for part in parts]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, keep, *tensors = inputs
        ctx.plan = ctx.call.plan(*members.first(tensors)) if keep else NOTHING
        _, states, checks = output
        ctx.mark_non_differentiable(states, checks)
        ctx.save_for_backward(*tensors, states, checks)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        *tensors, states, checks = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:]
        # With members; of a tensor that all share autograd takes the sum.
        gradients = _differentiable(ctx.call, ctx.plan, needed, states, checks, grad, *tensors)
        return (None, None, *gradients)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, None, None]:
        return _pushed(ctx.call.moving, tangents[2:], ctx.saved_tensors[:5]), None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], call: Call, keep: bool, *tensors: Tensor | None
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        dims = in_dims[-len(tensors) :]
        rows = all(dim is None for dim in dims[1:])
        inner, restore = (members.into_rows if rows else members.into_members)(info.batch_size, dims, tensors)
        y, at = restore(transformed(call, *inner))
        return (y, y.new_empty(0), y.new_empty(0)), (at, None, None)


def _differentiable(
    call: Call, plan: Plan, needed: Sequence[bool], states: Tensor, checks: Tensor, *tensors: Tensor | None
) -> list[Tensor | None]:
    """Gradients that can be differentiated and mapped over, of ``tensors`` = grad, h, V, ...; None where not
    needed.

    After the transforms, too: the function that ``torch.func.vjp`` returns is called when the level of what
    was saved is over.
    """
    unwrap = torch._C._functorch.unwrap_if_dead
    inputs = [x if x is None else unwrap(x) for x in (states, checks, *tensors)]
    found = iter(Gradients.apply(call, plan, tuple(needed), *inputs))  # type: ignore[no-untyped-call]
    return [next(found) if need else None for need in needed]


class Gradients(torch.autograd.Function):
    """The ``needed`` gradients of h, V, W, hidden_bias and output_bias, each with members if any tensor has.

    states and checks: of the forward with that ``plan``; empty where it kept none.
    """

    @staticmethod
    def forward(
        call: Call,
        plan: Plan,
        needed: tuple[bool, ...],
        states: Tensor,
        checks: Tensor,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        parts = members.split(tensors)
        kept = states.numel() > 0
        if not kept:
            plan = call.plan(*parts[0][1:])
        record = call.record if members.count(tensors) is None else Reports()
        results = []
        for e, (grad, *part) in enumerate(parts):
            if kept:
                saved = (states[e], checks[e]) if states.dim() > 3 else (states, checks)
            else:
                saved = call.forward(plan, *part)[1:]
            found = call.gradients(plan, grad, *part, *saved, weights=any(needed[1:]), record=record)
            results.append([g for g, need in zip(found, needed, strict=True) if need])
        gradients = members.join(tensors, results)
        if isinstance(record, Reports) and record.found:
            record.judge_all(gradients, call.strict, call.record)
        return tuple(gradients)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, _, ctx.needed, _, _, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Through the loop in PyTorch, run again."""
        call, needed, tensors = ctx.call, ctx.needed, ctx.saved_tensors

        def gradients(grad: Tensor, *inputs: Tensor | None) -> tuple[Tensor, ...]:
            return tuple(g for g in pull_back(call.loop, inputs, needed, grad) if g is not None)

        needs = ctx.needs_input_grad[-len(tensors) :]
        return (*(None,) * 5, *pull_back(members.mapped(gradients, tensors), tensors, needs, grads))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        """Of ∂⟨g, y(x)⟩/∂x along (ġ, ẋ): the gradient of ⟨ġ, y(x)⟩ + ⟨g, ẏ(x; ẋ)⟩."""
        call, needed, tensors = ctx.call, ctx.needed, ctx.saved_tensors

        def moving(*both: Any) -> tuple[Tensor, ...]:
            (dgrad, *along), (grad, *inputs) = both[:6], both[6:]

            def run(*x: Any) -> tuple[Tensor, Tensor]:
                return call.loop(*x), call.moving(*along, *x)

            weight = torch.zeros_like(grad) if dgrad is None else dgrad
            return tuple(g for g in pull_back(run, inputs, needed, (weight, grad)) if g is not None)

        found: tuple[Tensor, ...] = _pushed(moving, tangents[-len(tensors) :], tensors)
        return found

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        call: Call,
        plan: Plan,
        needed: tuple[bool, ...],
        states: Tensor,
        checks: Tensor,
        *tensors: Tensor | None,
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        dims = in_dims[-len(tensors) :]
        rows = all(dim is None for dim in dims[2:]) and not any(needed[1:])
        inner, restore = (members.into_rows if rows else members.into_members)(info.batch_size, dims, tensors)
        if rows or any(dim is not None for dim in dims[1:]) or members.count(tensors[1:]) is not None:
            # Not kept so: the rows or members are others.
            states = checks = states.new_empty(0)
        found = Gradients.apply(call, plan, needed, states, checks, *inner)  # type: ignore[no-untyped-call]
        restored = [restore(g) for g in found]
        return tuple(g for g, _ in restored), tuple(at for _, at in restored)


def _pushed(function: Callable[..., Any], tangents: Sequence[Any], tensors: Sequence[Any]) -> Any:
    """function(*tangents, *tensors) of every member, within ``jvp``, with a derivative in forward mode.

    PyTorch turns that off there, and hands the inputs over with their tangents.
    """
    with forward_ad._set_fwd_grad_enabled(True):
        primals = [x if x is None else forward_ad.unpack_dual(x).primal for x in tensors]
        return members.mapped(function, tensors)(*tangents, *primals)
