"""The mathematics of the block in plain PyTorch: the oracle of the tests, and the fallback.

``deep_residual`` is the differentiable loop; ordinary autograd of it in float64 is what every kernel is
judged by. ``forward`` and ``backward`` are the two ops of ``ops.py`` written with PyTorch operators: the
same recursion, saved states and adjoint as the native core, for the devices that it does not cover and for
an installation without it.

Shapes: h, y, a [B, q]; V [L, q, m]; W [L, m, q]; hidden_bias [L, m]; output_bias [L, q]. States are kept
in float32 (float64 for float64) whatever the storage dtype; products are taken in the storage dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import Activation, get_activation
from .validation import check_arguments

ROW_PADDING = 16
"""Saved states hold B rounded up to this many rows, so that vectors of any instruction set fit."""

MAX_EVALUATIONS = 100
"""The adjoint gives up on a state that this many fixed-point evaluations did not settle, and says so."""


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
    """The block as a loop of PyTorch operators, differentiated by ordinary autograd.

    Same arguments, result and errors as ``odeblock.functional.deep_residual``. ``backward`` and
    ``strict`` are checked and otherwise without effect: the gradients of a stored loop are those that every
    strategy must give.
    """
    scale = check_arguments(h, V, W, hidden_bias, output_bias, activation, scale, backward, strict)
    sigma = get_activation(activation)
    state = h.to(state_dtype(h.dtype))
    hidden = hidden_bias.unbind(0) if hidden_bias is not None else [None] * V.shape[0]
    output = output_bias.unbind(0) if output_bias is not None else [None] * V.shape[0]
    # unbind once: indexing V[k] in the loop would make autograd accumulate a full-size gradient per step.
    for V_k, W_k, b_k, c_k in zip(V.unbind(0), W.unbind(0), hidden, output, strict=True):
        _, _, f = _residual(state, V_k, W_k, b_k, c_k, sigma)
        state = state + scale * f
    return state.to(h.dtype)


def state_dtype(storage: torch.dtype) -> torch.dtype:
    """States are kept in float32, and in float64 for float64."""
    return torch.promote_types(storage, torch.float32)


def _residual(
    h: Tensor, V_k: Tensor, W_k: Tensor, b_k: Tensor | None, c_k: Tensor | None, sigma: Activation
) -> tuple[Tensor, Tensor, Tensor]:
    """z = W h + b, s = sigma(z), f = V s + c; f in the dtype of the state h."""
    z = F.linear(h.to(W_k.dtype), W_k, b_k)
    s = sigma.function(z)
    return z, s, F.linear(s, V_k, c_k).to(h.dtype)


def states_shape(batch: int, dim: int, depth: int, save_every: int, save_final: bool) -> tuple[int, int, int]:
    """Shape of the saved states: [n, B rounded up to ROW_PADDING, q].

    save_every = K > 0 keeps h_0, h_K, h_2K, ... below L; save_final keeps h_L behind them.
    """
    saved = (-(-depth // save_every) if save_every else 0) + int(save_final)
    return saved, -(-batch // ROW_PADDING) * ROW_PADDING, dim


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
) -> tuple[Tensor, Tensor]:
    """y = h_L, and the states that the backward strategy asked for (see ``states_shape``)."""
    sigma = get_activation(activation)
    batch, depth = h.shape[0], V.shape[0]
    state = h.to(state_dtype(h.dtype))
    states = state.new_zeros(states_shape(batch, h.shape[1], depth, save_every, save_final))
    for k in range(depth):
        if save_every and k % save_every == 0:
            states[k // save_every, :batch] = state
        _, _, f = _residual(state, V[k], W[k], _layer(hidden_bias, k), _layer(output_bias, k), sigma)
        state = state + scale * f
    if save_final:
        states[-1, :batch] = state
    return state.to(h.dtype, copy=True), states


def backward(
    grad: Tensor,
    h: Tensor | None,
    V: Tensor,
    W: Tensor,
    hidden_bias: Tensor | None,
    output_bias: Tensor | None,
    states: Tensor,
    activation: str,
    scale: float,
    save_every: int,
    weight_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dh, dV, dW, dhidden_bias, doutput_bias (empty where not asked for), and the adjoint's report.

    save_every = K > 0: states h_0, h_K, ... are exact, those between are run forward again from the one
    below. save_every = 0: ``states`` holds h_L alone and every state is reconstructed from the one above;
    ``h`` (the block's input) then measures the drift.

    The report is float64 [3]: the largest relative change in a last fixed-point evaluation, the drift
    max |h_0 reconstructed - h_0| / max(|h_0|, |h_L|) over rows (maximum norms), and the mean number of
    evaluations per step. All zero where nothing was reconstructed.
    """
    sigma = get_activation(activation)
    batch, depth = grad.shape[0], V.shape[0]
    dtype = state_dtype(grad.dtype)
    a = grad.to(dtype)
    dV, dW, dhidden, doutput = (
        torch.zeros_like(p, dtype=dtype) if weight_gradients and p is not None else grad.new_empty(0)
        for p in (V, W, hidden_bias, output_bias)
    )

    segment: list[Tensor] = []  # checkpoint: the states of the current segment, lowest first
    above, reconstruction = states[-1, :batch], _Reconstruction(grad.dtype)
    for k in reversed(range(depth)):
        layer = (V[k], W[k], _layer(hidden_bias, k), _layer(output_bias, k))
        if save_every:
            if not segment:
                segment = [states[k // save_every, :batch]]
                for j in range(k // save_every * save_every, k):
                    _, _, f = _residual(
                        segment[-1], V[j], W[j], _layer(hidden_bias, j), _layer(output_bias, j), sigma
                    )
                    segment.append(segment[-1] + scale * f)
            state = segment.pop()
        else:
            state = above = reconstruction.step(above, layer, sigma, scale)

        # u = scale Vᵀa, g = u ⊙ σ'(z); dV = scale Σ a sᵀ, dW = Σ g hᵀ; a ← a + Wᵀg
        low_state, low_a = state.to(V.dtype), a.to(V.dtype)
        z = F.linear(low_state, W[k], _layer(hidden_bias, k))
        u = scale * (low_a @ V[k]).to(dtype)
        s = sigma.function(z)
        g = sigma.backward(u, z.to(dtype), s.to(dtype))
        low_g = g.to(V.dtype)
        if weight_gradients:
            dV[k] = scale * (low_a.t() @ s).to(dtype)
            dW[k] = low_g.t() @ low_state
            if hidden_bias is not None:
                dhidden[k] = g.sum(0)
            if output_bias is not None:
                doutput[k] = scale * a.sum(0)
        a = a + (low_g @ W[k]).to(dtype)

    report = torch.zeros(3, dtype=torch.float64)
    if not save_every:
        assert h is not None, "the adjoint needs the block's input to measure its drift"
        report = reconstruction.report(above, h.to(dtype), states[-1, :batch])
    low = V.dtype
    return a.to(grad.dtype, copy=True), dV.to(low), dW.to(low), dhidden.to(low), doutput.to(low), report


def _layer(bias: Tensor | None, k: int) -> Tensor | None:
    return None if bias is None else bias[k]


class _Reconstruction:
    """Solves h_k = h_{k+1} - Δ_k, Δ_k = scale f_k(h_k), downwards from h_L, each row by itself.

    Start from the linear extrapolation Δ_k ≈ 2Δ_{k+1} - Δ_{k+2} (weights that are smooth in depth make Δ
    smooth in depth), then iterate Δ ← scale f_k(h_{k+1} - Δ) until a row's change is at rounding level.
    """

    def __init__(self, storage: torch.dtype) -> None:
        self.storage = storage
        self.increments: list[Tensor] = []  # Δ_{k+1}, Δ_{k+2}
        self.estimate = 0.0
        self.evaluations = 0.0
        self.steps = 0

    def step(
        self,
        above: Tensor,
        layer: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
        sigma: Activation,
        scale: float,
    ) -> Tensor:
        if len(self.increments) == 2:
            delta = 2 * self.increments[0] - self.increments[1]
        else:
            delta = self.increments[0] if self.increments else torch.zeros_like(above)
        state_eps, storage_eps = torch.finfo(above.dtype).eps, torch.finfo(self.storage).eps
        norm = _row_norm(above)
        change = torch.full_like(norm, torch.inf)
        active = torch.ones_like(norm, dtype=torch.bool)
        for _ in range(MAX_EVALUATIONS):
            new = scale * _residual(above - delta, *layer, sigma)[2]
            change = torch.where(active, _row_norm(new - delta), change)
            delta = torch.where(active, new, delta)
            self.evaluations += active.double().mean().item() if active.numel() else 0.0
            active = active & ~(change <= 2 * state_eps * norm + storage_eps * _row_norm(delta))
            if not active.any():
                break
        self.steps += 1
        self.increments = [delta, *self.increments[:1]]
        self.estimate = _largest(self.estimate, _relative(change, torch.maximum(norm, _row_norm(delta))))
        return above - delta

    def report(self, bottom: Tensor, true_bottom: Tensor, top: Tensor) -> Tensor:
        norm = torch.maximum(_row_norm(true_bottom), _row_norm(top))
        drift = _largest(0.0, _relative(_row_norm(bottom - true_bottom), norm))
        return torch.tensor([self.estimate, drift, self.evaluations / self.steps], dtype=torch.float64)


def _row_norm(x: Tensor) -> Tensor:
    """The maximum norm of each row: [B, q] -> [B, 1]."""
    return x.abs().amax(dim=1, keepdim=True)


def _relative(error: Tensor, norm: Tensor) -> float:
    """The largest error / norm over rows; 0 where both vanish, NaN if any is."""
    ratio = error / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    return float(ratio.max()) if ratio.numel() else 0.0


def _largest(a: float, b: float) -> float:
    """max that keeps NaN."""
    return a if a >= b or a != a else b
