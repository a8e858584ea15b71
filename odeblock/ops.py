"""The custom ops ``odeblock::deep_residual`` and its backward: schemas, fake versions, kernels.

h [B, q] with V [L, q, m] are rows; h [B, C, H, W] with V [L, C, M, k, k] are maps, whose states and checks
are those of flattened samples (``products.py``).

Tensors on the CPU go to the native core, and on a GPU what its kernels take (``gpu``); everything else (other
devices, a build without the core) runs the same op in plain PyTorch (``reference``).
The low-level ``torch.library`` interface is used because its calls cost a few microseconds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import autocast, checkpointing, gpu, native, reference
from .activations import ACTIVATIONS
from .drift import DriftRecord, drift_tolerance, judge_drift
from .gpu_layers import tf32
from .products import flat_sizes
from .reconstruction import REPORT_SIZE, probe
from .reference import checks_shape, state_dtype, states_shape
from .validation import check_devices, check_op, check_saved

LARGE = 64 << 10
"""Bytes from which on memory is kept for the next tensor; the system's allocator would give it back."""

_tags = [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []  # torch >= 2.9
"""The CUDA graphs of ``torch.compile`` allow no memory that outlives a call: reports of adjoints do, and what
is copied to a GPU once. (Graphs that a user captures do.)"""

_library = torch.library.Library("odeblock", "DEF")
_library.define(
    "deep_residual(Tensor h, Tensor V, Tensor W, Tensor? hidden_bias, Tensor? output_bias, str activation, "
    "float scale, int save_every, bool reconstruct, bool keep_hidden) -> "
    "(Tensor y, Tensor states, Tensor checks)",
    tags=_tags,
)
_library.define(
    "deep_residual_backward(Tensor grad, Tensor? h, Tensor V, Tensor W, Tensor? hidden_bias, "
    "Tensor? output_bias, Tensor states, Tensor checks, str activation, float scale, int save_every, "
    "bool reconstruct, int slots, bool keep_hidden, bool weight_gradients, bool strict, int record) -> "
    "(Tensor dh, Tensor dV, Tensor dW, Tensor dhidden_bias, Tensor doutput_bias)",
    tags=_tags,
)


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A new tensor on the CPU, for the core to fill. If it is large, the core keeps its memory for others."""
    size = math.prod(shape) * dtype.itemsize
    if size < LARGE:
        return torch.empty(*shape, dtype=dtype)  # faster than of a tuple
    return torch.frombuffer(native.core.memory(size), dtype=dtype, count=size // dtype.itemsize).view(shape)


def _sizes(h: Tensor, V: Tensor, activation: str) -> tuple[int, ...]:
    """What the core calls dtype, activation, batch, dim, hidden, depth, height, width and kernel."""
    depth, dim, hidden, *kernel = V.shape
    height, width, size = (*h.shape[2:], kernel[0]) if kernel else (0, 0, 0)
    kind = (native.NATIVE_DTYPES[h.dtype], ACTIVATIONS[activation].native_id)
    return (*kind, h.shape[0], dim, hidden, depth, height, width, size)


@functools.lru_cache(maxsize=256)
def _forward_sizes(
    dtype: torch.dtype,
    h_shape: torch.Size,
    V_shape: torch.Size,
    activation: str,
    save_every: int,
    reconstruct: bool,
    keep_hidden: bool,
    threads: int,
) -> tuple[tuple[int, ...], int, tuple[int, ...], tuple[int, ...], int]:
    """Of a forward on the core: ``_sizes``, q, the shapes of states and checks, and bytes of workspace.

    Found anew they are a twelfth of a small call.
    """
    h, V = (torch.empty(shape, dtype=dtype, device="meta") for shape in (h_shape, V_shape))
    depth, (batch, dim, hidden) = V.shape[0], flat_sizes(h, V)
    sizes = _sizes(h, V, activation)
    states = states_shape(batch, dim, hidden, depth, save_every, reconstruct, keep_hidden)
    workspace = native.core.forward_workspace(*sizes, reconstruct, threads)
    return sizes, dim, states, checks_shape(batch, depth, reconstruct), workspace


def slot_bytes(h: Tensor, V: Tensor, activation: str, keep_hidden: bool) -> int:
    """What one slot of the backward (``checkpointing.Plan``) takes on the native core, of all threads."""
    sizes, threads = _sizes(h, V, activation), torch.get_num_threads()
    none, one = (
        native.core.backward_workspace(*sizes, 2, False, slots, keep_hidden, threads) for slots in (0, 1)
    )
    return int(one - none)


def plan(
    h: Tensor, V: Tensor, activation: str, backward: str, anchors: int, memory_budget: int | None
) -> checkpointing.Plan:
    """What a strategy stores.

    With a budget it depends on the bytes of a state of the whole batch, and of what the CPU's kernels hold of
    one at a time, a tile of rows or a group of maps for each thread; then on those of the hidden values of
    either. (Not on a GPU, where another product takes less time than its memory.)
    """
    state = held = both = held_both = 0
    if memory_budget is not None:
        number = torch.finfo(state_dtype(h.dtype)).bits // 8
        rows, dim, hidden = flat_sizes(h, V)
        compiling = torch.compiler.is_compiling()
        padded = reference.padded_symbol if compiling else reference.padded_rows
        batch = padded(rows) * number
        held = state = batch * dim
        held_both = both = batch * (dim + hidden)
        if native.runs_natively(h) and not compiling:
            # A compiler cannot ask for the threads. What fills the vectors of few samples is not counted.
            held = min(state, slot_bytes(h, V, activation, keep_hidden=False))
            held_both = min(both, slot_bytes(h, V, activation, keep_hidden=True))
    hidden_bytes = None if h.is_cuda else (both - state, held_both - held)
    # A compiler looks through the cache, and would say so.
    make = checkpointing.plan.__wrapped__ if torch.compiler.is_compiling() else checkpointing.plan
    return make(backward, V.shape[0], anchors, memory_budget, state, held, hidden_bytes)


def _forward(
    h: Tensor,
    V: Tensor,
    W: Tensor,
    hidden_bias: Tensor | None,
    output_bias: Tensor | None,
    activation: str,
    scale: float,
    save_every: int,
    reconstruct: bool,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_op(h, V, W, hidden_bias, output_bias, activation, save_every, reconstruct)
    if h.is_cuda and not keep_hidden and gpu.has_kernels_for(h):
        found = gpu.forward(h, V, W, hidden_bias, output_bias, activation, scale, save_every, reconstruct)
        if found is not None:
            return found
    if not native.runs_natively(h):
        with autocast.without(h.device.type):
            return reference.forward(
                h, V, W, hidden_bias, output_bias, activation, scale, save_every, reconstruct, keep_hidden
            )
    h, V, W = h.contiguous(), V.contiguous(), W.contiguous()
    hidden_bias, output_bias = native.contiguous(hidden_bias), native.contiguous(output_bias)
    threads = torch.get_num_threads()
    sizes, dim, states_like, checks_like, workspace_size = _forward_sizes(
        h.dtype, h.shape, V.shape, activation, save_every, reconstruct, keep_hidden, threads
    )
    y = torch.empty_like(h)
    computed = state_dtype(h.dtype)
    states, checks = _empty(states_like, computed), _empty(checks_like, computed)
    workspace = _empty((workspace_size,), torch.uint8)
    direction = probe(dim, computed) if reconstruct else None
    native.core.forward(
        *sizes,
        scale,
        native.pointer(h),
        native.pointer(V),
        native.pointer(W),
        native.pointer(hidden_bias),
        native.pointer(output_bias),
        native.pointer(y),
        native.pointer(states),
        native.pointer(direction),
        native.pointer(checks),
        save_every,
        reconstruct,
        keep_hidden,
        native.pointer(workspace),
        threads,
    )
    return y, states, checks


def _check_saved(
    grad: Tensor,
    V: Tensor,
    states: Tensor,
    checks: Tensor,
    save_every: int,
    reconstruct: bool,
    keep_hidden: bool,
) -> None:
    depth, (batch, dim, hidden) = V.shape[0], flat_sizes(grad, V)
    like = (state_dtype(grad.dtype), grad.device)
    shape = states_shape(batch, dim, hidden, depth, save_every, reconstruct, keep_hidden)
    check_saved("states", states, shape, *like)
    check_saved("checks", checks, checks_shape(batch, depth, reconstruct), *like)


def _gradients(
    grad: Tensor,
    h: Tensor | None,
    V: Tensor,
    W: Tensor,
    hidden_bias: Tensor | None,
    output_bias: Tensor | None,
    states: Tensor,
    checks: Tensor,
    activation: str,
    scale: float,
    save_every: int,
    reconstruct: bool,
    slots: int,
    keep_hidden: bool,
    weight_gradients: bool,
) -> tuple[Tensor, ...]:
    check_op(grad, V, W, hidden_bias, output_bias, activation, save_every, reconstruct, slots, "grad")
    if reconstruct:
        check_saved("h", h, grad.shape, grad.dtype, grad.device)
    else:
        h = None  # drift alone is measured by it
    on_a_gpu = grad.is_cuda and not keep_hidden and gpu.has_kernels_for(grad)
    if on_a_gpu or native.runs_natively(grad):
        _check_saved(grad, V, states, checks, save_every, reconstruct, keep_hidden)
    if on_a_gpu:
        gradients = gpu.backward(
            *(grad, h, V, W, hidden_bias, output_bias, states, checks),
            *(activation, scale, save_every, reconstruct, slots, weight_gradients),
        )
        if gradients is not None:
            return gradients
    if not native.runs_natively(grad):
        tensors = (grad, h, V, W, hidden_bias, output_bias, states, checks)
        options = (activation, scale, save_every, reconstruct, slots, keep_hidden, weight_gradients)
        with autocast.without(grad.device.type):
            return reference.backward(*tensors, *options)
    grad, V, W = grad.contiguous(), V.contiguous(), W.contiguous()
    h, hidden_bias, output_bias = (
        native.contiguous(h),
        native.contiguous(hidden_bias),
        native.contiguous(output_bias),
    )
    dim = flat_sizes(grad, V)[1]
    states, checks = states.contiguous(), checks.contiguous()
    threads = torch.get_num_threads()
    sizes = _sizes(grad, V, activation)
    dh = torch.empty_like(grad)
    dV, dW, dhidden, doutput = (
        _empty(p.shape if weight_gradients and p is not None else (0,), grad.dtype)
        for p in (V, W, hidden_bias, output_bias)
    )
    report = torch.zeros(REPORT_SIZE, dtype=torch.float64)
    size = native.core.backward_workspace(*sizes, save_every, reconstruct, slots, keep_hidden, threads)
    workspace = _empty((size,), torch.uint8)
    direction = probe(dim, state_dtype(grad.dtype)) if reconstruct else None
    native.core.backward(
        *sizes,
        scale,
        native.pointer(grad),
        native.pointer(h),
        native.pointer(V),
        native.pointer(W),
        native.pointer(hidden_bias),
        native.pointer(output_bias),
        native.pointer(states),
        native.pointer(direction),
        native.pointer(checks),
        native.pointer(dh),
        native.pointer(dV),
        native.pointer(dW),
        native.pointer(dhidden),
        native.pointer(doutput),
        native.pointer(report),
        save_every,
        reconstruct,
        slots,
        keep_hidden,
        native.pointer(workspace),
        threads,
    )
    return dh, dV, dW, dhidden, doutput, report


def _backward(
    grad: Tensor,
    h: Tensor | None,
    V: Tensor,
    W: Tensor,
    hidden_bias: Tensor | None,
    output_bias: Tensor | None,
    states: Tensor,
    checks: Tensor,
    activation: str,
    scale: float,
    save_every: int,
    reconstruct: bool,
    slots: int,
    keep_hidden: bool,
    weight_gradients: bool,
    strict: bool,
    record: int,
) -> tuple[Tensor, ...]:
    """The gradients. An adjoint's are judged here, where a compiled graph calls, too: its report goes to the
    ``DriftRecord`` of that number."""
    *gradients, report = _gradients(
        *(grad, h, V, W, hidden_bias, output_bias, states, checks),
        *(activation, scale, save_every, reconstruct, slots, keep_hidden, weight_gradients),
    )
    if reconstruct:
        # tf32 has the 11 bits of float16.
        rounds = grad.is_cuda and tf32(grad.dtype, grad.dim() == 4)
        dtype = torch.float16 if rounds else grad.dtype
        tolerance = drift_tolerance(dtype, not native.runs_natively(grad))
        judge_drift(report, gradients, tolerance, strict, DriftRecord.numbered(record))
    return tuple(gradients)


# One kernel for every backend: it decides by itself between the native core and PyTorch operators.
_library.impl("deep_residual", _forward, "CompositeExplicitAutograd")
_library.impl("deep_residual_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("odeblock::deep_residual", lib=_library)
def _forward_fake(
    h: Tensor,
    V: Tensor,
    W: Tensor,
    hidden_bias: Tensor | None,
    output_bias: Tensor | None,
    activation: str,
    scale: float,
    save_every: int,
    reconstruct: bool,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_devices({"hidden_bias": hidden_bias, "output_bias": output_bias}, h=h, V=V, W=W)
    depth, (batch, dim, hidden) = V.shape[0], flat_sizes(h, V)
    computed = state_dtype(h.dtype)
    shape = states_shape(batch, dim, hidden, depth, save_every, reconstruct, keep_hidden)
    states = h.new_empty(shape, dtype=computed)
    checks = h.new_empty(checks_shape(batch, depth, reconstruct), dtype=computed)
    return h.new_empty(h.shape), states, checks


@torch.library.register_fake("odeblock::deep_residual_backward", lib=_library)
def _backward_fake(
    grad: Tensor,
    h: Tensor | None,
    V: Tensor,
    W: Tensor,
    hidden_bias: Tensor | None,
    output_bias: Tensor | None,
    states: Tensor,
    checks: Tensor,
    activation: str,
    scale: float,
    save_every: int,
    reconstruct: bool,
    slots: int,
    keep_hidden: bool,
    weight_gradients: bool,
    strict: bool,
    record: int,
) -> tuple[Tensor, ...]:
    optional = {"h": h, "hidden_bias": hidden_bias, "output_bias": output_bias}
    check_devices(optional, grad=grad, V=V, W=W, states=states, checks=checks)
    dV, dW, dhidden, doutput = (
        p.new_empty(p.shape) if weight_gradients and p is not None else grad.new_empty(0)
        for p in (V, W, hidden_bias, output_bias)
    )
    return grad.new_empty(grad.shape), dV, dW, dhidden, doutput


forward = torch.ops.odeblock.deep_residual.default
backward = torch.ops.odeblock.deep_residual_backward.default
