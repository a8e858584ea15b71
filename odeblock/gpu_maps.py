"""Blocks of convolutions on a GPU, as ``gpu`` is for rows: maps stay on chip through all layers."""

from __future__ import annotations

from torch import Tensor

CHANNELS, GAP = 16, 8
"""Channels of a product on chip, which weights are padded to, and numbers that end a row of them
(``csrc/cuda/maps.cuh``)."""


def pack(weights: Tensor, bias: Tensor | None) -> Tensor:
    """The weights of all layers as kernels read them, [L, N, K, k, k] (bias [L, N]) -> [L, N', k²K' + 8].

    A row for each channel n that is computed: taps, channels of each (N and K up to multiples of 16 by
    zeros), then n's bias and 7 zeros.
    """
    depth, out, into, size, _ = weights.shape
    rows, columns = _round_up(out), _round_up(into)
    packed = weights.new_zeros(depth, rows, size * size * columns + GAP)
    taps = packed[:, :out, :-GAP].unflatten(2, (size, size, columns))
    taps[..., :into] = weights.permute(0, 1, 3, 4, 2)
    if bias is not None:
        packed[:, :out, -GAP] = bias
    return packed


def _round_up(channels: int) -> int:
    return -(-channels // CHANNELS) * CHANNELS
