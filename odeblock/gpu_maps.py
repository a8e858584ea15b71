"""The layers of a block of convolutions as the CUDA kernels run them: maps stay on chip through all layers.

What they read of weights, and leave of their gradients, is laid out here (``csrc/cuda/maps.cuh`` and
``map_gradients.cuh``).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import native
from .gpu_layers import WORKSPACE, Factors, Layers, addresses
from .reference import state_dtype

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


def pack_transposed(weights: Tensor) -> Tensor:
    """Of the transposed convolution: channels exchanged, taps turned round."""
    return pack(weights.transpose(1, 2).flip(3, 4), None)


def _round_up(channels: int) -> int:
    return -(-channels // CHANNELS) * CHANNELS


class MapLayers(Layers):
    """Those of a block of convolutions, of maps of ``size`` = (H, W). States are flattened, [B, C·H·W].

    The only factor is what each block of threads has summed of the gradients, [layers, blocks, numbers].
    """

    def __init__(
        self,
        size: tuple[int, int],
        V: Tensor,
        W: Tensor,
        hidden_bias: Tensor | None,
        output_bias: Tensor | None,
        activation: str,
        scale: float,
    ) -> None:
        super().__init__(V, W, hidden_bias, output_bias, activation, scale)
        self.channels, self.kernel = (self.dim, self.hidden), V.shape[-1]
        self.size, area = size, size[0] * size[1]
        self.dim, self.hidden = self.dim * area, self.hidden * area

    @functools.cached_property
    def forward_weights(self) -> tuple[Tensor, Tensor]:
        """V and W, packed."""
        return pack(self.V, self.output_bias), pack(self.W, self.hidden_bias)

    @functools.cached_property
    def backward_weights(self) -> tuple[Tensor, Tensor]:
        """In their places the transposed W; W and the transposed V by turns, 16 rows of each."""
        both = (self.forward_weights[1], pack_transposed(self.V))
        by_turns = torch.stack([t.unflatten(1, (-1, CHANNELS)) for t in both], 2)
        return pack_transposed(self.W), by_turns

    def _sizes(self, batch: int, bottom: int, top: int) -> tuple[int, ...]:
        dtype = native.NATIVE_DTYPES[self.V.dtype]
        return dtype, self.activation, batch, *self.channels, top - bottom, *self.size, self.kernel

    def _weights(self, bottom: int) -> tuple[int, ...]:
        return addresses(bottom, *self.forward_weights, None, None)

    def _blocks(self, batch: int) -> int:
        """Of threads, that a sweep of a batch has."""
        sizes = self._sizes(batch, 0, self.depth)
        return int(native.core.cuda_map_blocks(*sizes, self.tf32, self.device.index or 0))

    @property
    def numbers(self) -> tuple[int, ...]:
        """Of a block's sums for a layer: dV and dW, doutput_bias, dhidden_bias; channels are padded."""
        dim, hidden = (_round_up(channels) for channels in self.channels)
        weights = dim * hidden * self.kernel**2
        return weights, weights, dim, hidden

    def fuse(self, batch: int, backward: bool = False, reconstruct: bool = False) -> bool:
        """Whether the kernels take a batch: not where what a sweep leaves of one layer has no room, which is
        so for many samples of wide layers."""
        fits = super().fuse(batch, backward, reconstruct)
        return fits and (not backward or self.factor_bytes(batch) <= WORKSPACE)

    def factor_bytes(self, batch: int) -> int:
        return self._blocks(batch) * sum(self.numbers) * state_dtype(self.V.dtype).itemsize

    def new_factors(self, batch: int, layers: int, wanted: bool) -> Factors:
        size = (layers, self._blocks(batch), sum(self.numbers)) if wanted else (0,)
        return [self.V.new_empty(size, dtype=state_dtype(self.V.dtype))]

    def sweep(self, a: Tensor, states: Tensor, bottom: int, top: int, factors: Factors) -> None:
        native.core.cuda_sweep(
            *self._sizes(len(a), bottom, top),
            self.scale,
            *addresses(bottom, *self.backward_weights, None, None),
            *(native.pointer(t) for t in (states, a, *factors)),
            *(0, 0, 0, 0),  # of rows
            *self._place(),
        )

    def gradients(self, factors: Factors, states: Tensor, batch: int) -> tuple[Tensor | None, ...]:
        sums = factors[0][: len(states)].sum(1)
        dV, dW, doutput, dhidden = sums.split(self.numbers, 1)
        dim, hidden = self.channels
        return (
            self._unpack(dV, dim, hidden),
            self._unpack(dW, hidden, dim),
            None if self.hidden_bias is None else dhidden[:, :hidden],
            None if self.output_bias is None else doutput[:, :dim],
        )

    def _unpack(self, sums: Tensor, out: int, into: int) -> Tensor:
        """As blocks of threads leave them, [L, N'/16, K'/16, k, k, 16, 16] -> [L, N, K, k, k]."""
        taps = (self.kernel, self.kernel)
        blocks = sums.view(len(sums), -1, _round_up(into) // CHANNELS, *taps, CHANNELS, CHANNELS)
        rows = blocks.permute(0, 1, 5, 2, 6, 3, 4)
        return rows.flatten(3, 4).flatten(1, 2)[:, :out, :into]
