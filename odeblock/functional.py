"""``deep_residual`` of rows and ``deep_conv_residual`` of maps: check the arguments, choose the backward
strategy, apply the Function.

``residual_scan`` (``scan.py``) is the same for any residual.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import checkpointing, reference
from .autocast import autocasted, is_any_autocast_enabled
from .autograd import DeepResidual
from .drift import DriftRecord
from .eager import Call, EagerDeepResidual, transformed
from .products import shaped
from .scan import is_exporting, residual_scan
from .validation import check_arguments, plain_sizes

__all__ = ["deep_conv_residual", "deep_residual", "residual_scan"]


def deep_residual(
    h: Tensor,
    V: Tensor,
    W: Tensor,
    hidden_bias: Tensor | None = None,
    output_bias: Tensor | None = None,
    *,
    activation: str = "gelu",
    scale: float | None = None,
    backward: str = "auto",
    strict: bool = False,
    anchors: int = 0,
    memory_budget: int | None = None,
) -> Tensor:
    r"""All L steps of ``h ← h + scale · (V_k σ(W_k h + hidden_bias_k) + output_bias_k)`` in one call.

    Arguments:
        h: input, shape [..., q]; leading dimensions are batch. float32, float64, bfloat16 or float16.
        V: output weights, shape [L, q, m], each layer laid out like ``nn.Linear.weight``.
        W: hidden weights, shape [L, m, q].
        hidden_bias: shape [L, m], or None.
        output_bias: shape [L, q], or None.
        activation: identity, relu, leaky_relu, tanh, sigmoid, softplus, silu, gelu (exact) or gelu_tanh.
        scale: step size, 1/L by default.
        backward: where the activations of the backward come from. All give the gradients of the discrete
            network; they differ in memory (B rows of q numbers a state) and in arithmetic.

            - ``"store"``: every state is kept, and its hidden values. Least arithmetic, memory O(L).
            - ``"checkpoint"``: every √L-th state is kept, or what ``memory_budget`` allows, the others run
              again. Exact.
            - ``"adjoint"``: only the last state is kept, the others are reconstructed from it by solving
              each step for its input. Memory O(1); exact to rounding where the steps are small (L large);
              a ``DriftWarning`` says when they were not. On a GPU nothing waits for that: gradients are NaN
              then, and the warning comes with a later call of the block. See docs/adjoint.md.
            - ``"auto"``: exact and never above O(√L), or the ``memory_budget``: ``store`` where that is
              enough, else ``checkpoint``.
        strict: whether an adjoint backward that cannot be trusted raises ``DriftError``, not only warns; on a
            GPU every such backward waits for the device.
        anchors: states that ``"adjoint"`` keeps besides, at most, evenly in depth; the reconstruction starts
            afresh at each, and is compared with it. Memory: anchors · B · q numbers.
        memory_budget: bytes of states that ``"auto"`` and ``"checkpoint"`` may hold, those kept between
            forward and backward and those run again together; None for O(√L). With less than 2√L states some
            steps run more than once more, as few as possible (Griewank & Walther 2000). On a GPU a backward
            holds up to 512 MiB besides, for the gradients of V and W, whatever the depth.

    Every transform of ``torch.func`` applies. Gradients come from the native backward; forward mode and
    derivatives of gradients take PyTorch operators, which store every state. ``torch.vmap`` over ``h`` is one
    call with more rows, whose states a ``memory_budget`` counts together; over weights, an ensemble, it is a
    call for each member. The members of an adjoint are judged together, by the worst.

    Returns:
        h_L, with the shape, dtype and device of ``h``. Under ``torch.autocast`` all tensors but those of
        float64 are cast to its dtype first, once a call, as by ``nn.Linear``.

    Raises:
        TypeError: an argument is of the wrong type, or tensors of different dtypes.
        ValueError: shapes that do not fit, L = 0, tensors on different devices, a non-finite scale, an
            unknown activation or strategy, anchors without ``"adjoint"``, a budget for a strategy without one
            or below two states.
        DriftError: in the backward, with ``strict``.
        RuntimeError: within ``torch.jit.trace``; ``torch.export`` and ``torch.compile`` take it.

    Source: Marion, Wu, Sander & Biau, "Implicit regularization of deep residual networks towards neural
    ODEs", ICLR 2024, arXiv 2309.01213.
    """
    options = (activation, scale, backward, strict, anchors, memory_budget)
    if not torch.compiler.is_compiling():
        _record.settle()
    return recorded(_record, h, V, W, hidden_bias, output_bias, *options)


def deep_conv_residual(
    h: Tensor,
    V: Tensor,
    W: Tensor,
    hidden_bias: Tensor | None = None,
    output_bias: Tensor | None = None,
    *,
    activation: str = "gelu",
    scale: float | None = None,
    backward: str = "auto",
    strict: bool = False,
    anchors: int = 0,
    memory_budget: int | None = None,
) -> Tensor:
    r"""All L steps of ``h ← h + scale · (V_k * σ(W_k * h + hidden_bias_k) + output_bias_k)`` in one call.

    ``*`` is the product of ``nn.Conv2d``, of stride 1 and with zeros around the map, so that its size stays.
    On flattened maps it is a matrix: all said of ``deep_residual`` holds, with q = C·H·W and m = M·H·W.

    Arguments:
        h: input maps, shape [B, C, H, W], or [C, H, W] of one. float32, float64, bfloat16 or float16; any
            memory format.
        V: output kernels, shape [L, C, M, k, k], each layer laid out like ``nn.Conv2d.weight``; k odd.
        W: hidden kernels, shape [L, M, C, k, k].
        hidden_bias: shape [L, M], or None.
        output_bias: shape [L, C], or None.
        activation, scale, backward, strict, anchors, memory_budget: see ``deep_residual``. The adjoint
            decides for each sample by itself.

    Returns:
        h_L, with the shape, dtype and device of ``h``; contiguous. ``torch.autocast`` casts as it does for
        ``deep_residual``.

    Raises:
        TypeError, ValueError, DriftError, RuntimeError: as ``deep_residual``; kernels that are not square, of
            even size, or of another size for V than for W; maps without a pixel.

    Source: as ``deep_residual``.
    """
    options = (activation, scale, backward, strict, anchors, memory_budget)
    if not torch.compiler.is_compiling():
        _record.settle()
    return conv_recorded(_record, h, V, W, hidden_bias, output_bias, *options)


_record = DriftRecord()
"""Of all calls that have no block, for what GPUs report later."""


def recorded(record: DriftRecord, *arguments: Any) -> Tensor:
    """``deep_residual`` of its arguments in order; an adjoint backward leaves its report in ``record``."""
    if is_any_autocast_enabled():
        arguments = autocasted(*arguments)
    scale = check_arguments(*arguments)
    h, *others = arguments
    if h.dim() == 2:
        return _apply(record, scale, *arguments)
    return shaped(_apply(record, scale, h.reshape(-1, h.shape[-1]), *others), h)


def conv_recorded(record: DriftRecord, *arguments: Any) -> Tensor:
    """The same of ``deep_conv_residual``."""
    if is_any_autocast_enabled():
        arguments = autocasted(*arguments)
    scale = check_arguments(*arguments, maps=True)
    h, *others = arguments
    if h.dim() == 4:
        return _apply(record, scale, *arguments)
    return shaped(_apply(record, scale, h[None], *others), h)


def _apply(record: DriftRecord, step: float, *arguments: Any) -> Tensor:
    """Of checked arguments, h with one dimension of batch; ``step``: the scale to take."""
    h, V, W, hidden_bias, output_bias, activation, _, backward, strict, anchors, memory_budget = arguments
    tensors = (h, V, W, hidden_bias, output_bias)
    anchors, memory_budget = plain_sizes(anchors, memory_budget)
    plan, compiling = checkpointing.NOTHING, torch.compiler.is_compiling()
    call = Call(activation, step, backward, strict, anchors, memory_budget, record)
    transforms = torch._C._are_functorch_transforms_active()
    if compiling and (
        transforms or forward_ad._current_level >= 0
    ):  # a graph compiler differentiates operators
        return reference.loop(*tensors, activation=activation, scale=step)
    if transforms:
        return transformed(call, *tensors)
    trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if trains and not (compiling and is_exporting()):  # what torch.export makes has no backward
        plan = call.plan(h, V)
    y: Tensor
    if not trains and (compiling or forward_ad._current_level < 0):
        y, *_ = call.forward(plan, *tensors)  # no derivative: nothing to prepare
    elif compiling:
        y, *_ = DeepResidual.apply(*tensors, activation, step, *plan, strict, record)  # type: ignore[no-untyped-call]
    else:
        y = EagerDeepResidual.apply(call, plan, *tensors)  # type: ignore[no-untyped-call]
    return y
