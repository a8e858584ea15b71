"""The layers of a block of convolutions as the CUDA kernels run them: maps stay on chip through all layers.

What kernels read and leave is numbered as ``csrc/cuda/map_kernels.h`` says: rows of W + r positions,
r = k//2, and r rows below each map; what is of no map is zero, so that a tap is one step from any position.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import native
from .gpu_layers import Factors, Layers, addresses, products

CHANNELS, GAP = 16, 8
"""Channels of a product on chip, which weights are padded to, and numbers that end a row of them
(``csrc/cuda/maps.cuh``)."""


POSITIONS = {2: 1024, 4: 128, 8: 64}
"""That one product sums over, as ``gpu_layers.ROWS``; fewer, for a convolution of PyTorch's sums each sample
apart."""


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

    Factors are [margin + layers · positions + margin, channels]: a layer has those of B samples, and zeros up
    to equal parts for the products over them.
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
        radius = self.kernel // 2
        self.pitch = size[1] + radius
        self.sample_positions = (size[0] + radius) * self.pitch
        self.margin = radius * (self.pitch + 1)

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

    def _parts(self, batch: int) -> tuple[int, int]:
        """Of a layer's positions: their number, and the positions of one."""
        positions = batch * self.sample_positions
        parts = max(1, -(-positions // POSITIONS[self.V.dtype.itemsize]))
        return parts, -(-positions // parts)

    def factor_bytes(self, batch: int) -> int:
        parts, rows = self._parts(batch)
        return 2 * parts * rows * sum(self.channels) * self.V.dtype.itemsize

    def new_factors(self, batch: int, layers: int, wanted: bool) -> Factors:
        parts, rows = self._parts(batch)
        positions = layers * parts * rows + 2 * self.margin if wanted else 0
        return [self.V.new_zeros((positions, self.channels[i])) for i in (0, 0, 1, 1)]

    def sweep(self, a: Tensor, states: Tensor, bottom: int, top: int, factors: Factors) -> None:
        parts, rows = self._parts(len(a))
        native.core.cuda_sweep(
            *self._sizes(len(a), bottom, top),
            self.scale,
            *addresses(bottom, *self.backward_weights, None, None),
            native.pointer(states),
            native.pointer(a),
            *(native.pointer(t[self.margin :]) for t in factors),
            parts * rows,
            *self._place(),
        )

    def gradients(self, factors: Factors, states: Tensor, batch: int) -> tuple[Tensor | None, ...]:
        parts, rows = self._parts(batch)
        layers, positions = len(states), parts * rows

        def at(t: Tensor, step: int) -> Tensor:
            """What a factor has a step away from each position, in equal parts."""
            first = self.margin + step
            return t[first : first + layers * positions].view(layers * parts, rows, t.shape[1])

        def taps(x: Tensor, y: Tensor) -> Tensor:
            """Σ over positions of x there and y at each tap of it: [layers, p, r, k, k]."""
            reach = range(-(self.kernel // 2), self.kernel // 2 + 1)
            steps = [row * self.pitch + column for row in reach for column in reach]
            # The parts of a layer are summed apart, as those of rows are (``gpu_layers.product``).
            sums = [products(at(x, 0), at(y, step)).unflatten(0, (layers, parts)).sum(1) for step in steps]
            return torch.stack(sums, 3).view(*sums[0].shape, self.kernel, self.kernel)

        a, h, s, g = factors
        sums = (at(t, 0).unflatten(0, (layers, parts)).flatten(1, 2) for t in (g, a))
        return taps(a, s), taps(g, h), *self._bias_gradients(*sums)
