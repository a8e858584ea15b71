"""``deep_residual``: check the arguments, choose the backward strategy, apply the Function."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import ops
from .autograd import DeepResidual, Drift
from .validation import check_arguments


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

            - ``"store"``: every state is kept. Least arithmetic, memory O(L).
            - ``"checkpoint"``: every √L-th state is kept, the others run again. Exact, memory O(√L).
            - ``"adjoint"``: only the last state is kept, the others are reconstructed from it by solving
              each step for its input. Memory O(1); exact to rounding where the steps are small (L large);
              a ``DriftWarning`` says when they were not.
            - ``"auto"``: exact and never above O(√L): ``store`` for a few layers, else ``checkpoint``.
        strict: whether an adjoint backward that cannot be trusted raises ``DriftError``, not only warns.

    Returns:
        h_L, with the shape, dtype and device of ``h``.

    Raises:
        TypeError: an argument is of the wrong type, or tensors of different dtypes.
        ValueError: shapes that do not fit, L = 0, tensors on different devices, a non-finite scale, an
            unknown activation or strategy.
        DriftError: in the backward, with ``strict``.

    Source: Marion, Wu, Sander & Biau, "Implicit regularization of deep residual networks towards neural
    ODEs", ICLR 2024, arXiv 2309.01213.
    """
    return recorded({}, h, V, W, hidden_bias, output_bias, activation, scale, backward, strict)


def recorded(record: Drift, *arguments: Any) -> Tensor:
    """``deep_residual`` of its arguments in order; an adjoint backward leaves its report in ``record``."""
    h, V, W, hidden_bias, output_bias, activation, _, backward, strict = arguments
    scale = check_arguments(*arguments)
    rows = h.reshape(-1, h.shape[-1])
    tensors = (rows, V, W, hidden_bias, output_bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        save_every, save_final = saved_states(backward, V.shape[0])
        y, _ = DeepResidual.apply(  # type: ignore[no-untyped-call]
            *tensors, activation, scale, save_every, save_final, strict, record
        )
    else:
        y, _ = ops.forward(*tensors, activation, scale, 0, False)
    result: Tensor = y.view(h.shape)
    return result


def saved_states(backward: str, depth: int) -> tuple[int, bool]:
    """(K, final): the forward saves h_0, h_K, h_2K, ... (none for K = 0), and h_L if ``final``."""
    if backward == "adjoint":
        return 0, True
    root = math.isqrt(depth - 1) + 1  # ⌈√L⌉
    if backward == "store" or (backward == "auto" and depth <= 2 * root):
        # 2√L states are what checkpointing holds at its peak: √L saved, √L run again.
        return 1, False
    return root, False
