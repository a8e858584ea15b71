"""The custom ops ``odeblock::deep_conv_normalised`` and its backward: the block with batch normalisation in
training on the native core, for ``store`` and ``checkpoint``.

Tensors are those of ``deep_residual`` on maps (``ops.py``), and γ and β after a step's first convolution,
[L, M], and after its second, [L, C]. Mean and variance have the same shapes, as computed (float32, or
float64 for float64), and so have the gradients of γ and β. ``normalised.py`` decides what runs here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checkpointing, native
from .ops import _empty, _library, _sizes
from .products import flat_sizes
from .reference import padded_rows, state_dtype, states_shape
from .validation import check_affine, check_devices, check_op, check_saved

EPS = 1e-5
"""ε of ``nn.BatchNorm2d``."""

AFFINE = ("hidden_weight", "hidden_shift", "output_weight", "output_shift")
"""What the ops call γ and β."""

STATISTICS = ("hidden_mean", "hidden_var", "output_mean", "output_var")
"""And what they are made by."""

_library.define(
    "deep_conv_normalised(Tensor h, Tensor V, Tensor W, Tensor? hidden_bias, Tensor? output_bias, "
    "Tensor hidden_weight, Tensor hidden_shift, Tensor output_weight, Tensor output_shift, str activation, "
    "float scale, int save_every) -> (Tensor y, Tensor states, Tensor hidden_mean, Tensor hidden_var, "
    "Tensor output_mean, Tensor output_var)"
)
_library.define(
    "deep_conv_normalised_backward(Tensor grad, Tensor V, Tensor W, Tensor? hidden_bias, "
    "Tensor? output_bias, Tensor hidden_weight, Tensor hidden_shift, Tensor output_weight, "
    "Tensor output_shift, Tensor hidden_mean, Tensor hidden_var, Tensor output_mean, Tensor output_var, "
    "Tensor states, str activation, float scale, int save_every, int slots, bool weight_gradients) -> "
    "(Tensor dh, Tensor dV, Tensor dW, Tensor dhidden_bias, Tensor doutput_bias, Tensor dhidden_weight, "
    "Tensor dhidden_shift, Tensor doutput_weight, Tensor doutput_shift)"
)


def plan(h: Tensor, V: Tensor, backward: str, anchors: int, memory_budget: int | None) -> checkpointing.Plan:
    """What a strategy stores. A slot of the backward is a state of the whole batch, as it is stored."""
    state = 0
    if memory_budget is not None:
        batch, dim, _ = flat_sizes(h, V)
        state = padded_rows(batch) * dim * torch.finfo(state_dtype(h.dtype)).bits // 8
    return checkpointing.plan(backward, V.shape[0], anchors, memory_budget, state, state)


def _computed(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [tensor.to(state_dtype(dtype)).contiguous() for tensor in tensors]


def _pairs(tensors: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Addresses of the first and third, and of the second and fourth."""
    pointers = [native.pointer(tensor) for tensor in tensors]
    return pointers[::2], pointers[1::2]


def _check(
    name: str,
    h: Tensor,
    V: Tensor,
    W: Tensor,
    hidden_bias: Tensor | None,
    output_bias: Tensor | None,
    affine: Sequence[Tensor],
    activation: str,
    save_every: int,
    slots: int | None,
) -> None:
    """Refuse what must not come to the core; ``name`` of h, and ``slots``, as of ``check_op``."""
    check_op(h, V, W, hidden_bias, output_bias, activation, save_every, False, slots, name)
    if V.dim() != 5 or len(h) == 0:
        raise ValueError(f"{name}: expected maps of at least one sample, got {list(h.shape)}")
    if not native.runs_natively(h):
        raise ValueError(f"{name}: expected a tensor on the CPU, and the native core; got one on {h.device}")
    for i, key in enumerate(AFFINE):
        check_affine(key, affine[i], V, hidden=i < 2)


def _forward(
    h: Tensor,
    V: Tensor,
    W: Tensor,
    hidden_bias: Tensor | None,
    output_bias: Tensor | None,
    hidden_weight: Tensor,
    hidden_shift: Tensor,
    output_weight: Tensor,
    output_shift: Tensor,
    activation: str,
    scale: float,
    save_every: int,
) -> tuple[Tensor, ...]:
    affine: Sequence[Tensor] = (hidden_weight, hidden_shift, output_weight, output_shift)
    _check("h", h, V, W, hidden_bias, output_bias, affine, activation, save_every, None)
    h, V, W = h.contiguous(), V.contiguous(), W.contiguous()
    hidden_bias, output_bias = native.contiguous(hidden_bias), native.contiguous(output_bias)
    affine = _computed(affine, h.dtype)
    statistics = [torch.empty(shape, dtype=state_dtype(h.dtype)) for shape in _statistics_shapes(V)]
    y, states = torch.empty_like(h), _empty(_states_shape(h, V, save_every), state_dtype(h.dtype))
    sizes, threads = _sizes(h, V, activation), torch.get_num_threads()
    workspace = _empty((native.core.normalised_forward_workspace(*sizes, threads),), torch.uint8)
    native.core.normalised_forward(
        *sizes,
        scale,
        *(native.pointer(tensor) for tensor in (h, V, W, hidden_bias, output_bias)),
        EPS,
        *_pairs(affine),
        *_pairs(statistics),
        native.pointer(y),
        native.pointer(states),
        save_every,
        native.pointer(workspace),
        threads,
    )
    return y, states, *statistics


def _statistics_shapes(V: Tensor) -> list[tuple[int, int]]:
    depth, dim, hidden = V.shape[:3]
    return [(depth, hidden)] * 2 + [(depth, dim)] * 2


def _states_shape(h: Tensor, V: Tensor, save_every: int) -> tuple[int, ...]:
    depth, (batch, dim, hidden) = V.shape[0], flat_sizes(h, V)
    return states_shape(batch, dim, hidden, depth, save_every, False, False)


def _check_saved(
    grad: Tensor, V: Tensor, statistics: Sequence[Tensor], states: Tensor, save_every: int
) -> None:
    like = (state_dtype(grad.dtype), grad.device)
    for name, tensor, shape in zip(STATISTICS, statistics, _statistics_shapes(V), strict=True):
        check_saved(name, tensor, shape, *like)
    check_saved("states", states, _states_shape(grad, V, save_every), *like)


def _backward(
    grad: Tensor,
    V: Tensor,
    W: Tensor,
    hidden_bias: Tensor | None,
    output_bias: Tensor | None,
    hidden_weight: Tensor,
    hidden_shift: Tensor,
    output_weight: Tensor,
    output_shift: Tensor,
    hidden_mean: Tensor,
    hidden_var: Tensor,
    output_mean: Tensor,
    output_var: Tensor,
    states: Tensor,
    activation: str,
    scale: float,
    save_every: int,
    slots: int,
    weight_gradients: bool,
) -> tuple[Tensor, ...]:
    statistics = [hidden_mean, hidden_var, output_mean, output_var]
    affine: Sequence[Tensor] = (hidden_weight, hidden_shift, output_weight, output_shift)
    _check("grad", grad, V, W, hidden_bias, output_bias, affine, activation, save_every, slots)
    _check_saved(grad, V, statistics, states, save_every)
    statistics = _computed(statistics, grad.dtype)
    grad, V, W, states = grad.contiguous(), V.contiguous(), W.contiguous(), states.contiguous()
    hidden_bias, output_bias = native.contiguous(hidden_bias), native.contiguous(output_bias)
    affine = _computed(affine, grad.dtype)
    dh = torch.empty_like(grad)
    weights = [
        _empty(p.shape if weight_gradients and p is not None else (0,), grad.dtype)
        for p in (V, W, hidden_bias, output_bias)
    ]
    daffine = [_empty(p.shape if weight_gradients else (0,), p.dtype) for p in affine]
    sizes, threads = _sizes(grad, V, activation), torch.get_num_threads()
    size = native.core.normalised_backward_workspace(*sizes, save_every, slots, threads)
    workspace = _empty((size,), torch.uint8)
    native.core.normalised_backward(
        *sizes,
        scale,
        *(native.pointer(tensor) for tensor in (grad, V, W, hidden_bias, output_bias)),
        EPS,
        *_pairs(affine),
        *_pairs(statistics),
        *(native.pointer(tensor) for tensor in (states, dh, *weights)),
        *_pairs(daffine),
        save_every,
        slots,
        native.pointer(workspace),
        threads,
    )
    return dh, *weights, *daffine


_library.impl("deep_conv_normalised", _forward, "CompositeExplicitAutograd")
_library.impl("deep_conv_normalised_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("odeblock::deep_conv_normalised", lib=_library)
def _forward_fake(
    h: Tensor,
    V: Tensor,
    W: Tensor,
    hidden_bias: Tensor | None,
    output_bias: Tensor | None,
    hidden_weight: Tensor,
    hidden_shift: Tensor,
    output_weight: Tensor,
    output_shift: Tensor,
    activation: str,
    scale: float,
    save_every: int,
) -> tuple[Tensor, ...]:
    affine = (hidden_weight, hidden_shift, output_weight, output_shift)
    named = dict(zip(AFFINE, affine, strict=True))
    check_devices({"hidden_bias": hidden_bias, "output_bias": output_bias}, h=h, V=V, W=W, **named)
    computed = state_dtype(h.dtype)
    states = h.new_empty(_states_shape(h, V, save_every), dtype=computed)
    return h.new_empty(h.shape), states, *(p.new_empty(p.shape, dtype=computed) for p in affine)


@torch.library.register_fake("odeblock::deep_conv_normalised_backward", lib=_library)
def _backward_fake(
    grad: Tensor,
    V: Tensor,
    W: Tensor,
    hidden_bias: Tensor | None,
    output_bias: Tensor | None,
    hidden_weight: Tensor,
    hidden_shift: Tensor,
    output_weight: Tensor,
    output_shift: Tensor,
    hidden_mean: Tensor,
    hidden_var: Tensor,
    output_mean: Tensor,
    output_var: Tensor,
    states: Tensor,
    activation: str,
    scale: float,
    save_every: int,
    slots: int,
    weight_gradients: bool,
) -> tuple[Tensor, ...]:
    def like(p: Tensor | None, dtype: torch.dtype) -> Tensor:
        return grad.new_empty(p.shape if weight_gradients and p is not None else (0,), dtype=dtype)

    affine = (hidden_weight, hidden_shift, output_weight, output_shift)
    statistics = (hidden_mean, hidden_var, output_mean, output_var)
    named = dict(zip((*AFFINE, *STATISTICS), (*affine, *statistics), strict=True), states=states)
    check_devices({"hidden_bias": hidden_bias, "output_bias": output_bias}, grad=grad, V=V, W=W, **named)
    weights = [like(p, grad.dtype) for p in (V, W, hidden_bias, output_bias)]
    return grad.new_empty(grad.shape), *weights, *(like(p, state_dtype(grad.dtype)) for p in affine)


forward = torch.ops.odeblock.deep_conv_normalised.default
backward = torch.ops.odeblock.deep_conv_normalised_backward.default
