"""The mathematics of the blocks in plain PyTorch: the oracle of the tests, and the fallback.

``deep_residual`` and ``deep_conv_residual`` are the differentiable loop; ordinary autograd of it in float64
is what every kernel is judged by. ``forward`` and ``backward`` are the two ops of ``ops.py`` written with
PyTorch operators: the same recursion, saved states and adjoint as the native core, for the devices that it
does not cover and for an installation without it.

Rows: h, y, a [B, q]; V [L, q, m]; W [L, m, q]; hidden_bias [L, m]; output_bias [L, q]. Maps: h, y, a
[B, C, H, W]; V [L, C, M, k, k]; W [L, M, C, k, k]; hidden_bias [L, M]; output_bias [L, C]; what is said of
rows holds for samples flattened, q = C·H·W and m = M·H·W (``products.py``). States are kept in float32
(float64 for float64) whatever the storage dtype; products are taken in the storage dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checkpointing
from .activations import Activation, get_activation
from .products import Products, flat_sizes, products
from .reconstruction import REPORT_SIZE, Reconstruction, check_count, check_every, probe, rounding_unit
from .validation import check_arguments

ROW_PADDING = 16
"""Saved states hold B rounded up to this many rows, so that vectors of any instruction set fit; 4 of 3, and
no other than they have where they are 1, 2 or 4."""


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
    """The block as a loop of PyTorch operators, differentiated by ordinary autograd.

    Same arguments, result and errors as ``odeblock.functional.deep_residual``. ``backward`` and the options
    after it are checked and otherwise without effect: the gradients of a stored loop are those that every
    strategy must give.
    """
    options = (backward, strict, anchors, memory_budget)
    scale = check_arguments(h, V, W, hidden_bias, output_bias, activation, scale, *options)
    return loop(h, V, W, hidden_bias, output_bias, activation=activation, scale=scale)


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
    """The same for maps: arguments, result and errors of ``odeblock.functional.deep_conv_residual``."""
    options = (backward, strict, anchors, memory_budget)
    scale = check_arguments(h, V, W, hidden_bias, output_bias, activation, scale, *options, maps=True)
    maps = h if h.dim() == 4 else h[None]
    return loop(maps, V, W, hidden_bias, output_bias, activation=activation, scale=scale).view(h.shape)


def loop(
    h: Tensor,
    V: Tensor,
    W: Tensor,
    hidden_bias: Tensor | None,
    output_bias: Tensor | None,
    *,
    activation: str,
    scale: float,
) -> Tensor:
    """The differentiable loop, of arguments that were checked."""
    sigma, of = get_activation(activation), products(V)
    state = h.to(state_dtype(h.dtype))
    hidden = hidden_bias.unbind(0) if hidden_bias is not None else [None] * V.shape[0]
    output = output_bias.unbind(0) if output_bias is not None else [None] * V.shape[0]
    # unbind once: indexing V[k] in the loop would make autograd accumulate a full-size gradient per step.
    for V_k, W_k, b_k, c_k in zip(V.unbind(0), W.unbind(0), hidden, output, strict=True):
        _, _, f = _residual(of, state, V_k, W_k, b_k, c_k, sigma)
        state = state + scale * f
    return state.to(h.dtype)


def state_dtype(storage: torch.dtype) -> torch.dtype:
    """States are kept in float32, and in float64 for float64."""
    return torch.float32 if storage.itemsize == 2 else storage


def _residual(
    of: Products,
    h: Tensor,
    V_k: Tensor,
    W_k: Tensor,
    b_k: Tensor | None,
    c_k: Tensor | None,
    sigma: Activation,
) -> tuple[Tensor, Tensor, Tensor]:
    """z = W h + b, s = sigma(z), f = V s + c; f in the dtype of the state h."""
    z = of.apply(h.to(W_k.dtype), W_k, b_k)
    s = sigma.function(z)
    return z, s, of.apply(s, V_k, c_k).to(h.dtype)


def states_shape(
    batch: int, dim: int, hidden: int, depth: int, save_every: int, reconstruct: bool, keep_hidden: bool
) -> tuple[int, int, int]:
    """Shape of the saved states: [n, padded rows, q], or [n, padded rows, q + m] where all states are stored
    and hidden values with them.

    save_every = K > 0 keeps h_0, h_K, h_2K, ... below L. With ``reconstruct`` it is h_K, h_2K, ... below L
    (none for K = 0) and, behind them, h_L.
    """
    if reconstruct:
        saved = ((depth - 1) // save_every if save_every else 0) + 1
    else:
        saved = (depth - 1) // save_every + 1 if save_every else 0
    saves_hidden = keep_hidden and save_every == 1 and not reconstruct
    return saved, padded_rows(batch) if saved else 0, dim + hidden if saves_hidden else dim


def padded_rows(batch: int) -> int:
    """Rows of the saved states of a batch."""
    if isinstance(batch, torch.SymInt):
        return padded_symbol(batch)
    if batch <= 4:
        return 4 if batch == 3 else batch
    return _round_up(batch)


def padded_symbol(batch: int) -> int:
    """The same without a branch on the batch, so that one graph serves all."""
    few, many = torch.sym_min(batch, 3), torch.sym_min(batch // 5, 1)
    rows: int = torch.sym_max(few + few // 3, many * _round_up(batch))
    return rows


def checks_shape(batch: int, depth: int, reconstruct: bool) -> tuple[int, int]:
    """Shape of the projections of states that the forward leaves for the adjoint: [n, B rounded up]."""
    return check_count(depth) if reconstruct else 0, _round_up(batch)


def _round_up(batch: int) -> int:
    return (batch + ROW_PADDING - 1) // ROW_PADDING * ROW_PADDING


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
    keep_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = h_L, and what the backward strategy asked for: states and checks (see ``*_shape``).

    keep_hidden, where all states are stored: with every h_k, behind it, z = W_k h_k + b_k.
    """
    sigma, of = get_activation(activation), products(V)
    depth, (batch, dim, hidden) = V.shape[0], flat_sizes(h, V)
    state = h.to(state_dtype(h.dtype)).contiguous()
    states = state.new_zeros(states_shape(batch, dim, hidden, depth, save_every, reconstruct, keep_hidden))
    saves_hidden = states.shape[2] > dim
    checks = state.new_zeros(checks_shape(batch, depth, reconstruct))
    for k in range(depth):
        if save_every and k % save_every == 0 and (k > 0 or not reconstruct):
            states[k // save_every - int(reconstruct), :batch, :dim] = state.flatten(1)
        if reconstruct and k > 0 and k % check_every(depth) == 0:
            direction = probe(dim, state.dtype).to(state.device) * of.visible(W[k], h)
            checks[k // check_every(depth) - 1, :batch] = state.flatten(1) @ direction
        z, _, f = _residual(of, state, V[k], W[k], _layer(hidden_bias, k), _layer(output_bias, k), sigma)
        if saves_hidden:
            states[k, :batch, dim:] = z.flatten(1)
        state = state + scale * f
    if reconstruct:
        states[-1, :batch] = state.flatten(1)
    return state.to(h.dtype, copy=True), states, checks


def backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dh, dV, dW, dhidden_bias, doutput_bias (empty where not asked for), and the adjoint's report.

    States h_0, h_K, ... are exact, K = save_every; those between are run forward again from the one below,
    ``slots`` of them held at a time (``checkpointing.py``). With ``reconstruct`` every state is reconstructed
    from the one above (``reconstruction.py``); ``checks``, and ``h``, the block's input, then measure the
    drift.

    The report is float64 [REPORT_SIZE]: estimate, drift, evaluations and order per step; zero where nothing
    was reconstructed.
    """
    sigma, of = get_activation(activation), products(V)
    depth, (batch, dim, _) = V.shape[0], flat_sizes(grad, V)
    dtype = state_dtype(grad.dtype)
    a = grad.to(dtype).contiguous()
    dV, dW, dhidden, doutput = (
        torch.zeros_like(p, dtype=dtype) if weight_gradients and p is not None else grad.new_empty(0)
        for p in (V, W, hidden_bias, output_bias)
    )

    def shaped(rows: Tensor) -> Tensor:
        """States [B, q] or hidden values [B, m] as they are in a layer: the same, or maps. Dense, for layouts
        may make a difference in the last bit."""
        return rows.unflatten(1, (-1, *grad.shape[2:])).contiguous() if grad.dim() > 2 else rows.contiguous()

    def layer(k: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return V[k], W[k], _layer(hidden_bias, k), _layer(output_bias, k)

    def advance(state: Tensor, k: int) -> Tensor:
        return state + scale * _residual(of, state, *layer(k), sigma)[2]

    def adjoint_step(state: Tensor, k: int, z: Tensor) -> None:
        """u = scale Vᵀa, g = u ⊙ σ'(z); dV = scale Σ a sᵀ, dW = Σ g hᵀ; a ← a + Wᵀg."""
        nonlocal a
        low_state, low_a = state.to(V.dtype), a.to(V.dtype)
        u = scale * of.transposed(low_a, V[k]).to(dtype)
        s = sigma.function(z)
        g = sigma.backward(u, z.to(dtype), s.to(dtype))
        low_g = g.to(V.dtype)
        if weight_gradients:
            dV[k] = scale * of.weight_gradient(low_a, s, V[k]).to(dtype)
            dW[k] = of.weight_gradient(low_g, low_state, W[k])
            if hidden_bias is not None:
                dhidden[k] = of.bias_gradient(g)
            if output_bias is not None:
                doutput[k] = scale * of.bias_gradient(a)
        a = a + of.transposed(low_g, W[k]).to(dtype)

    def visit(state: Tensor, k: int) -> None:
        if states.shape[2] > dim:
            z = shaped(states[k, :batch, dim:].to(W.dtype))
        else:
            z = of.apply(state.to(W.dtype), W[k], _layer(hidden_bias, k))
        adjoint_step(state, k, z)

    def solver(k: int) -> tuple[Any, Any, Any]:
        """evaluate, keep and correct of ``Reconstruction.step`` for layer k; hidden values: z flattened."""

        def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
            z, _, f = _residual(of, shaped(x), *layer(k), sigma)
            return z.flatten(1), scale * f.flatten(1)

        def correct(z: Tensor, e: Tensor) -> Tensor:
            return z + of.apply(shaped(e).to(W.dtype), W[k], None).flatten(1)

        return evaluate, torch.where, correct

    report = grad.new_zeros(REPORT_SIZE, dtype=torch.float64)
    if reconstruct:
        assert h is not None, "the adjoint needs the block's input to measure its drift"
        top = state = states[-1, :batch]
        # Products are taken in the storage dtype here, so f jumps by its rounding.
        sweep = Reconstruction(
            batch, depth, rounding_unit(grad.dtype), torch.finfo(grad.dtype).eps, state, sigma.smooth
        )
        direction = probe(dim, dtype).to(state.device)
        for k in reversed(range(depth)):
            visible = of.visible(W[k], grad)
            sweep.enter(visible)
            state, z = sweep.step(state, *solver(k))
            if k > 0 and k % check_every(depth) == 0:
                error = state @ (direction * visible) - checks[k // check_every(depth) - 1, :batch]
                sweep.compare(error.abs(), (visible * state).norm(dim=1))
            adjoint_step(shaped(state), k, shaped(z))
            if save_every and k > 0 and k % save_every == 0:
                anchor = states[k // save_every - 1, :batch]
                sweep.compare_state(state, anchor, top)
                state = anchor
        sweep.compare_state(state, h.to(dtype).flatten(1), top)
        report = sweep.report()
    else:
        for n in reversed(range(states.shape[0])):
            bottom = n * save_every
            top_layer = min(bottom + save_every, depth)
            checkpointing.sweep(
                shaped(states[n, :batch, :dim]),
                bottom,
                top_layer,
                slots,
                *checkpointing.by_layers(advance, visit),
            )
    low = V.dtype
    return a.to(grad.dtype, copy=True), dV.to(low), dW.to(low), dhidden.to(low), doutput.to(low), report


def jvp(
    tangents: tuple[Tensor | None, ...],
    h: Tensor,
    V: Tensor,
    W: Tensor,
    hidden_bias: Tensor | None,
    output_bias: Tensor | None,
    activation: str,
    scale: float,
) -> Tensor:
    """The derivative of y along ``tangents`` of h, V, W, hidden_bias, output_bias (None: zero), in one pass:

    ḣ ← ḣ + scale (V̇ s + V (σ'(z) ⊙ (Ẇ h + W ḣ + ḃ)) + ċ).
    """
    sigma, of = get_activation(activation), products(V)
    state = h.to(state_dtype(h.dtype))
    dh, dV, dW, db, dc = tangents
    moving = torch.zeros_like(state) if dh is None else dh.to(state.dtype)
    for k in range(V.shape[0]):
        z, s, f = _residual(of, state, V[k], W[k], _layer(hidden_bias, k), _layer(output_bias, k), sigma)
        dz = of.apply(moving.to(W.dtype), W[k], _layer(db, k))
        if dW is not None:
            dz = dz + of.apply(state.to(W.dtype), dW[k], None)
        df = of.apply(sigma.backward(dz, z, s), V[k], _layer(dc, k))
        if dV is not None:
            df = df + of.apply(s, dV[k], None)
        state, moving = state + scale * f, moving + scale * df.to(state.dtype)
    return moving.to(h.dtype)


def _layer(bias: Tensor | None, k: int) -> Tensor | None:
    return None if bias is None else bias[k]
