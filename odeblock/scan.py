"""``residual_scan``: the backward strategies of the block, for any residual f written in PyTorch.

    h_{k+1} = h_k + scale f(h_k, Z_k),      a_k = a_{k+1} + scale (∂f/∂h)ᵀ a_{k+1},   k = 0 .. L-1
    dZ_k = scale (∂f/∂Z)ᵀ a_{k+1}

with a_k = dℓ/dh_k: the general setting of Marion, Wu, Sander & Biau (ICLR 2024). The vector-Jacobian products
are autograd's, of one step at a time. Which states the forward keeps and how the backward gets the others is
decided and done by ``checkpointing.py`` and ``reconstruction.py``, as for the block.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from . import checkpointing
from .autocast import autocasts, without
from .autograd import pull_back
from .drift import DriftRecord, drift_tolerance
from .purity import check_purity
from .reconstruction import Reconstruction, check_every, probe, rounding_unit
from .reference import state_dtype
from .validation import check_options, check_scale, check_tensor

GATHERED, GATHERED_BYTES = 32, 1 << 20
"""Layers whose gradients are put in their places together, fewer where they have that many bytes."""

is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # torch >= 2.7

SIGHT = 16
"""A feature counts in full as long as the adjoint sees it at least 1/16 as well as the best one."""


def residual_scan(
    f: Callable[[Tensor, Any], Tensor],
    h: Tensor,
    params: Any,
    *,
    scale: float | None = None,
    backward: str = "auto",
    strict: bool = False,
    anchors: int = 0,
    memory_budget: int | None = None,
) -> Tensor:
    r"""All L steps of ``h ← h + scale · f(h, Z_k)`` for any residual ``f`` written in PyTorch.

    Of a list of equal modules, ``params, _ = torch.func.stack_module_state(modules)`` are stacked parameters
    and ``lambda h, Z: torch.func.functional_call(modules[0], Z, (h,))`` is the residual.

    Arguments:
        f: called as f(h_k, Z_k), Z_k with the structure of ``params`` and the k-th slices in place of the
            stacked tensors; returns a tensor of the shape and dtype of ``h`` (under autocast also of
            autocast's dtype). The backward calls it again, so it must be a pure function of its arguments:
            no random numbers, no running statistics, no change of an argument in place, and no captured
            tensor that needs a gradient (it belongs in ``params``) or changes before the backward. Where
            gradients are needed, one more call checks this as far as it can be seen (two on the CPU);
            ``torch.func`` asks for none of this.
        h: input, any shape [B, ...] with at least one dimension; float32, float64, bfloat16 or float16.
            States are kept in float32 (float64 for float64), f sees them in the dtype of ``h``.
        params: a tensor, or lists, tuples and dicts of tensors, each stacked over depth: [L, ...] with the
            same L >= 1, of any dtype. Those of integers and booleans are not differentiated.
        scale: step size, 1/L by default.
        backward: where the states of the backward come from; ``functional.deep_residual`` says more.

            - ``"store"``: every state is kept, memory O(L). f is evaluated once more per step, for its graph:
              the graph of one step is all that is ever held.
            - ``"checkpoint"``: every √L-th state is kept, or what ``memory_budget`` allows, the others run
              again. The gradients have the bits of ``"store"``.
            - ``"adjoint"``: only the last state is kept, the others are reconstructed from it: memory O(1),
              and for large L with parameters that are smooth in depth about one evaluation per step.
              Exact to rounding where the steps are small; a ``DriftWarning`` says when they were not, at
              once: the backward waits for a GPU, and leaves the gradients as they are.
              Each index of the first dimension is a row that settles by itself; a vector is one row. Where f
              mixes rows of very different size, ``h[None]`` makes them one.
            - ``"auto"``: ``store`` where its states fit O(√L) or the ``memory_budget``, else ``checkpoint``.
        strict, anchors, memory_budget: see ``functional.deep_residual``.

    Returns:
        h_L, with the shape, dtype and device of ``h``. Forward mode takes one pass and keeps nothing;
        gradients that can be differentiated again (``create_graph=True``), and all derivatives and ``vmap``
        of ``torch.func``, are those of the plain loop, whatever the strategy, and keep the graph of all
        steps; ``is_grads_batched`` is not supported. ``torch.compile`` leaves training to run eagerly:
        compile f itself.

    Raises:
        TypeError: an argument is of the wrong type, ``params`` holds something else than tensors, f returns
            something else than a tensor or one of another dtype.
        ValueError: shapes that do not fit, L = 0, f returns another shape or is seen not to be pure, a
            non-finite scale, an unknown strategy, options that do not go with it, a budget below two states.
        DriftError: in the backward, with ``strict``.

    Source: Marion, Wu, Sander & Biau, "Implicit regularization of deep residual networks towards neural
    ODEs", ICLR 2024, arXiv 2309.01213.
    """
    leaves, spec, depth = _check_arguments(f, h, params)
    anchors, memory_budget = check_options(backward, strict, anchors, memory_budget)
    scale = 1.0 / depth if scale is None else check_scale(scale)
    device = h.device.type
    autocast = torch.get_autocast_dtype(device) if autocasts(device) else None
    steps = FunctionSteps(depth, scale, h.dtype, device, autocast, f, spec)
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in (h, *leaves))
    if not trains or is_exporting():  # what torch.export makes has no backward
        return steps.run(h, leaves)
    train = _train
    if torch.compiler.is_compiling():  # it would unroll the loops
        train = torch.compiler.disable(_train)
    return train(steps, plan_for(h, depth, backward, anchors, memory_budget), strict, h, leaves)


def _train(
    steps: FunctionSteps, plan: checkpointing.Plan, strict: bool, h: Tensor, leaves: Sequence[Tensor]
) -> Tensor:
    """h_L, with what its derivatives need.

    Those of ``torch.func`` are the plain loop's anyway; taken of the loop itself they are also by what f
    captures, at any level of nested transforms.
    """
    if torch._C._are_functorch_transforms_active():
        return steps.run(h, leaves)
    check_purity(steps, h, leaves)
    y, *_ = ResidualScan.apply(steps, plan, strict, DriftRecord(), h, *leaves)  # type: ignore[no-untyped-call]
    result: Tensor = y
    return result


def plan_for(
    h: Tensor, depth: int, backward: str, anchors: int, memory_budget: int | None
) -> checkpointing.Plan:
    """The plan of a strategy for states of the shape of h."""
    state_bytes = h.numel() * torch.finfo(state_dtype(h.dtype)).bits // 8
    plan = checkpointing.plan(backward, depth, anchors, memory_budget, state_bytes, state_bytes)
    return plan if h.numel() else checkpointing.Plan(1, False, 0)  # nothing to reconstruct, or to store


@dataclass(frozen=True)
class Steps:
    """What steps need besides state and parameters, the same in forward and backward.

    dtype: of h, in which a residual is computed. device: its type. autocast: the dtype that it computes in
    where autocast was on in the forward.
    """

    depth: int
    scale: float
    dtype: torch.dtype
    device: str
    autocast: torch.dtype | None

    roundings: ClassVar[int] = 1
    """Units of rounding by which a residual may jump, relative to its largest number."""

    measures: ClassVar[int] = 0
    """How many tensors ``measure`` finds in a step; they follow the parameters in what the backward takes as
    a layer."""

    def residual(self, state: Tensor, layer: Sequence[Tensor]) -> Tensor:
        """f(h_k, Z_k) in the dtype of h, from the state in any."""
        raise NotImplementedError

    def advance(self, state: Tensor, layer: Sequence[Tensor]) -> Tensor:
        """h_{k+1} from h_k."""
        return self.add(state, self.residual(state, layer))

    def add(self, x: Tensor, f: Tensor) -> Tensor:
        """x + scale f in the dtype of x, which is no coarser than that of f."""
        held = abs(self.scale) <= torch.finfo(x.dtype).max  # what is not, PyTorch refuses as alpha
        return torch.add(x, f, alpha=self.scale if held else math.copysign(math.inf, self.scale))

    def measure(self, state: Tensor, layer: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        """The same in the forward, and what it finds that the backward must not find anew."""
        return self.advance(state, layer), ()

    def forward(self, plan: checkpointing.Plan, h: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What ``ResidualScan`` returns."""
        state = h.to(state_dtype(h.dtype))
        measured, checks, states = [], [], []
        for k in range(self.depth):
            if k > 0 and plan.save_every and k % plan.save_every == 0:
                states.append(state)
            if k > 0 and plan.reconstruct and k % check_every(self.depth) == 0:
                checks.append(_projection(state))
            state, found = self.measure(state, [leaf[k] for leaf in leaves])
            measured.append(found)
        if plan.reconstruct:
            states.append(state)
        # A copy where the state is kept: y may be changed in place.
        y = state.to(h.dtype, copy=plan.reconstruct)
        stacked = [torch.stack(tensors) for tensors in zip(*measured, strict=True)]
        return y, *stacked, torch.stack(checks) if checks else state.new_empty(0), *states

    def backward(
        self,
        plan: checkpointing.Plan,
        strict: bool,
        record: DriftRecord,
        grad: Tensor,
        tensors: Sequence[Tensor],
        needed: Sequence[bool],
        kept: Sequence[Tensor],
    ) -> Sequence[Tensor | None]:
        """dh and gradients of the leaves, None where not needed. kept: what the forward returned after y."""
        h, *leaves = tensors
        measured, (checks, *states) = kept[: self.measures], kept[self.measures :]
        wanted = [*needed[1:], *[False] * len(measured)]
        adjoint = Adjoint(self, grad, h, [*leaves, *measured], wanted, plan.reconstruct)

        def advance(state: Tensor, k: int) -> Tensor:
            return self.advance(state, adjoint.layer(k))

        def visit(state: Tensor, k: int) -> None:
            adjoint.evaluate(state, k)
            adjoint.descend(k)

        if plan.reconstruct:
            report = _reconstruct(adjoint, plan, h, checks, states)
            record.judge(report, drift_tolerance(self.precision, rounded=True), strict)
        else:
            known = [h.to(state_dtype(h.dtype)), *states]
            for n in reversed(range(len(known))):
                bottom = n * plan.save_every
                top = min(bottom + plan.save_every, self.depth)
                checkpointing.sweep(
                    known[n], bottom, top, plan.slots, *checkpointing.by_layers(advance, visit)
                )
        return [adjoint.a.to(h.dtype) if needed[0] else None, *adjoint.gradients[: len(leaves)]]

    def run(self, h: Tensor, leaves: Sequence[Tensor]) -> Tensor:
        """The plain loop over all steps."""
        state = h.to(state_dtype(h.dtype))
        # unbind once: indexing in the loop would make autograd accumulate a full-size gradient per step.
        for layer in zip(*(leaf.unbind(0) for leaf in leaves), strict=True):
            state = self.advance(state, layer)
        return state.to(h.dtype)

    @property
    def precision(self) -> torch.dtype:
        """The coarsest dtype that f rounds to."""
        if self.autocast is None or self.dtype == torch.float64:  # which autocast leaves alone
            return self.dtype
        return max(self.dtype, self.autocast, key=lambda dtype: torch.finfo(dtype).eps)

    def in_autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast as it was in the forward. Without its cache, which would keep a copy of every Z_k."""
        if self.autocast is None:
            return without(self.device)
        return torch.autocast(self.device, self.autocast, cache_enabled=False)


@dataclass(frozen=True)
class FunctionSteps(Steps):
    """Those of a residual ``f``; ``spec``: the structure of its parameters."""

    f: Callable[[Tensor, Any], Tensor]
    spec: pytree.TreeSpec

    def residual(self, state: Tensor, layer: Sequence[Tensor]) -> Tensor:
        with self.in_autocast():
            found = self.f(state.to(self.dtype), pytree.tree_unflatten(list(layer), self.spec))
        if not isinstance(found, Tensor):
            raise TypeError(f"f: expected a torch.Tensor from it, got {type(found).__name__}")
        if found.shape != state.shape:
            expected = f"the shape of h, {list(state.shape)}"
            raise ValueError(f"f: expected a result with {expected}; got {list(found.shape)}")
        if found.dtype not in (self.dtype, self.autocast):
            raise TypeError(f"f: expected a result with the dtype of h, {self.dtype}; got {found.dtype}")
        return found.to(self.dtype)


class ResidualScan(torch.autograd.Function):
    """y = h_L; what the steps measured, stacked over depth; and what the plan asks for: projections of states
    (``reconstruct``), and states in the order of depth, h_K, h_2K, ... below L and with ``reconstruct`` h_L.
    h_0 is the input. An adjoint backward leaves its report in ``record``, and raises where ``strict``."""

    @staticmethod
    def forward(
        steps: Steps,
        plan: checkpointing.Plan,
        strict: bool,
        record: DriftRecord,
        h: Tensor,
        *leaves: Tensor,
    ) -> tuple[Tensor, ...]:
        return steps.forward(plan, h, leaves)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.steps, ctx.plan, ctx.strict, ctx.record, *tensors = inputs
        _, *kept = output
        ctx.outputs = len(output)
        ctx.mark_non_differentiable(*kept)
        ctx.save_for_backward(*tensors, *kept)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[4:]
        if grad is None:
            return (None,) * (4 + len(needed))
        saved = ctx.saved_tensors  # once: hooks on saved tensors bring them back at every look
        tensors, kept = saved[: len(needed)], saved[len(needed) :]
        if torch.is_grad_enabled():
            gradients = _differentiable_gradients(ctx.steps, grad, tensors, needed)
        else:
            plan = ctx.plan
            if (
                plan == checkpointing.NOTHING
            ):  # under torch.func.jvp the forward does not see who needs gradients
                plan = checkpointing.Plan(1, False, 0)
                _, *kept = ctx.steps.forward(plan, tensors[0], tensors[1:])
            gradients = ctx.steps.backward(plan, ctx.strict, ctx.record, grad, tensors, needed, kept)
        return None, None, None, None, *gradients

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """The derivative of the plain loop along ``tangents``, by dual numbers: one pass, nothing kept."""
        # PyTorch turns forward mode off around jvp, and hands the inputs over with their tangents.
        with forward_ad._set_fwd_grad_enabled(True):
            duals = [
                x if t is None else forward_ad.make_dual(forward_ad.unpack_dual(x).primal, t)
                for x, t in zip(ctx.saved_tensors, tangents[4:], strict=True)
            ]
            y, moving = forward_ad.unpack_dual(ctx.steps.run(duals[0], duals[1:]))
        return torch.zeros_like(y) if moving is None else moving, *(None,) * (ctx.outputs - 1)


class Adjoint:
    """a = dℓ/dh_{k+1} on its way down, in the layout of h, and the gradients of the leaves, layer by layer.

    senses: whether to keep how well a shows each feature.
    """

    def __init__(
        self,
        steps: Steps,
        grad: Tensor,
        h: Tensor,
        leaves: Sequence[Tensor],
        needed: Sequence[bool],
        senses: bool,
    ) -> None:
        self.steps, self.leaves, self.needed = steps, leaves, needed
        self.a = torch.empty_like(h, dtype=state_dtype(grad.dtype)).copy_(grad)
        # Largest |(∂f/∂h)ᵀ a| of each feature so far.
        self.sensitivity = torch.zeros_like(_rows(self.a)) if senses else None
        self.gradients = [
            torch.empty_like(leaf) if need else None for leaf, need in zip(leaves, needed, strict=True)
        ]
        self.products: list[Sequence[Tensor]] = []  # dZ_k / scale of the last layers, the lowest at the end
        self.graph: tuple[Tensor, list[Tensor], Tensor] | None = None  # h_k, Z_k, f(h_k, Z_k)

    def layer(self, k: int) -> list[Tensor]:
        return [leaf[k] for leaf in self.leaves]

    def evaluate(self, state: Tensor, k: int) -> Tensor:
        """f(state, Z_k) detached, in its dtype; its graph stays until ``descend``."""
        self.graph = None  # that of an older evaluation goes before the new one comes
        point = state.detach().to(self.steps.dtype).requires_grad_()
        layer = [z.detach().requires_grad_(need) for z, need in zip(self.layer(k), self.needed, strict=True)]
        with torch.enable_grad():
            found = self.steps.residual(point, layer)
        self.graph = point, layer, found
        return found.detach()

    def descend(self, k: int) -> None:
        """dZ_k = scale (∂f/∂Z)ᵀ a;  a ← a + scale (∂f/∂h)ᵀ a, at the last evaluation.

        The factor comes after the product: 1/L would push a float16 cotangent below its smallest numbers.
        """
        assert self.graph is not None
        point, layer, found = self.graph
        self.graph = None
        wanted = [z for z, need in zip(layer, self.needed, strict=True) if need]
        products: Sequence[Tensor | None] = [None] * (1 + len(wanted))
        if found.requires_grad:  # not so where f is constant
            products = torch.autograd.grad(found, [point, *wanted], self.a.to(found.dtype), allow_unused=True)
        da, *dZ = products
        if da is not None:
            self.a = self.steps.add(self.a, da)
            if self.sensitivity is not None:
                self.sensitivity = torch.maximum(self.sensitivity, _rows(da.abs()).to(self.a.dtype))
        self.products.append(
            [torch.zeros_like(z) if dz is None else dz for z, dz in zip(wanted, dZ, strict=True)]
        )
        count = len(self.products)
        if k == 0 or count == GATHERED or count * sum(z.nbytes for z in wanted) >= GATHERED_BYTES:
            self._gather(k)

    def _gather(self, k: int) -> None:
        """The products into the gradients of layers k, k + 1, ...: one kernel for many."""
        stacked = (gradient for gradient in self.gradients if gradient is not None)
        for gradient, products in zip(stacked, zip(*reversed(self.products), strict=True), strict=True):
            part = gradient[k : k + len(products)]
            torch.stack(products, out=part).mul_(self.steps.scale)
        self.products.clear()


def _reconstruct(
    adjoint: Adjoint, plan: checkpointing.Plan, h: Tensor, checks: Tensor, states: Sequence[Tensor]
) -> Tensor:
    """The sweep down from h_L, every state from the one above; the report of ``Reconstruction``."""
    steps = adjoint.steps
    top = state = _rows(states[-1])
    floor = steps.roundings * torch.finfo(steps.precision).eps  # f jumps by its rounding
    sweep = Reconstruction(len(top), steps.depth, rounding_unit(steps.precision), floor, top)

    def evaluate(k: int, x: Tensor) -> tuple[Adjoint, Tensor]:
        return adjoint, steps.scale * _rows(adjoint.evaluate(x.reshape(h.shape), k).to(x.dtype))

    def keep(_active: Tensor, new: Adjoint, _old: Adjoint) -> Adjoint:
        # A row that is settled keeps its x, so the last evaluation, whose graph alone is left, holds for all.
        return new

    assert adjoint.sensitivity is not None
    for k in reversed(range(steps.depth)):
        if k < steps.depth - 1:  # f's Jacobian is not known; what a showed of it is
            seen = SIGHT * adjoint.sensitivity
            largest = adjoint.sensitivity.amax(dim=1, keepdim=True)
            sweep.enter(torch.where(seen < largest, seen / largest, 1))
        state, _ = sweep.step(state, functools.partial(evaluate, k), keep, None)
        if k > 0 and k % check_every(steps.depth) == 0:
            error = (_projection(state) - checks[k // check_every(steps.depth) - 1]).abs()
            sweep.compare(error, state.norm(dim=1))
        adjoint.descend(k)
        if plan.save_every and k > 0 and k % plan.save_every == 0:
            anchor = _rows(states[k // plan.save_every - 1])
            sweep.compare_state(state, anchor, top)
            state = anchor
    sweep.compare_state(state, _rows(h.to(state.dtype)), top)
    return sweep.report()


def _differentiable_gradients(
    steps: Steps, grad: Tensor, tensors: Sequence[Tensor], needed: Sequence[bool]
) -> list[Tensor | None]:
    """Under ``create_graph=True``: gradients that can be differentiated again, of the plain loop."""
    return pull_back(lambda h, *leaves: steps.run(h, leaves), tensors, needed, grad)


def _rows(x: Tensor) -> Tensor:
    """[B, ...] as [B, q], what ``Reconstruction`` decides by; a vector is one row."""
    return x[None] if x.dim() == 1 else x.flatten(1)


def _projection(state: Tensor) -> Tensor:
    """rᵀh_k of every row, [B], in the state's dtype, also under autocast."""
    rows = _rows(state)
    with without(rows.device.type):
        return rows @ probe(rows.shape[1], rows.dtype).to(rows.device)


def _check_arguments(f: Any, h: Any, params: Any) -> tuple[list[Tensor], pytree.TreeSpec, int]:
    """The leaves of params, their structure and L."""
    if not callable(f):
        raise TypeError(f"f: expected a function f(h, Z_k), got {type(f).__name__}")
    check_tensor("h", h)
    if h.dim() < 1:
        raise ValueError(f"h: expected shape [B, ...] with at least one dimension, got {list(h.shape)}")
    located, spec = pytree.tree_flatten_with_path(params)
    if not located:
        raise TypeError(f"params: expected at least one tensor, got {params!r}")
    depth, first = 0, ""
    for path, leaf in located:
        name = "params" + pytree.keystr(path)
        if not isinstance(leaf, Tensor):
            expected = "a torch.Tensor, in lists, tuples and dicts if there are several"
            raise TypeError(f"{name}: expected {expected}; got {type(leaf).__name__}")
        if leaf.layout is not torch.strided:
            raise TypeError(f"{name}: expected a dense (strided) tensor, got {leaf.layout}; call .to_dense()")
        if leaf.dim() < 1 or leaf.shape[0] < 1:
            raise ValueError(f"{name}: expected shape [L, ...] with L >= 1, got {list(leaf.shape)}")
        depth, first = depth or leaf.shape[0], first or name
        if leaf.shape[0] != depth:
            raise ValueError(f"{name}: expected shape [{depth}, ...] (L of {first}), got {list(leaf.shape)}")
    return [leaf for _, leaf in located], spec, depth
