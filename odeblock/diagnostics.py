"""Measures of a block's weights along depth."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def smoothness(weights: Tensor) -> dict[str, float]:
    """How smooth stacked weights Z_1 .. Z_L are as a function of s = k/L.

    Arguments:
        weights: shape [L, ...], one layer after another.

    Returns:
        ``"max"``: L · max_k ‖Z_{k+1} - Z_k‖, the Lipschitz constant of the piecewise linear interpolation;
        ``"total_variation"``: Σ_k ‖Z_{k+1} - Z_k‖, its length. Both in the Frobenius norm, per root of the
        number of entries of a layer, so that they read as the change of a typical coefficient. As L grows
        they stay bounded for weights that are smooth in depth and grow like L for independent ones.
        Both 0 for L = 1.
    """
    if weights.dim() < 1 or weights.shape[0] < 1:
        raise ValueError(f"weights: expected shape [L, ...] with L >= 1, got {list(weights.shape)}")
    flat = weights.detach().reshape(weights.shape[0], -1).double()
    steps = (flat[1:] - flat[:-1]).norm(dim=1) / flat.shape[1] ** 0.5
    if steps.numel() == 0:
        return {"max": 0.0, "total_variation": 0.0}
    return {"max": float(steps.max()) * weights.shape[0], "total_variation": float(steps.sum())}
