"""The adjoint's states on a GPU: from h_L down, each solved for from the one above by the core's kernels.

``docs/adjoint.md`` derives the method (section 8: what a GPU does otherwise than the CPU), (n) is its
equation n. ``csrc/cuda/reconstruction.cuh`` decides for each row; here are the parts of depth that a launch
takes, what is compared with states that are known, and the report. Nothing is waited for.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .reconstruction import PEAK_SHARE, REPORT_SIZE, probe, rounding_unit, state_limit, visibility

if TYPE_CHECKING:
    from .gpu_layers import Layers

SIGHT_WIDTH = 256
"""Features that a row of ``sight`` has room for, as ``csrc/problem.h`` has it; zero from q on."""

# What a row remembers, as csrc/cuda/reconstruction.cuh numbers it.
DOUBT, SQUARES, UNSETTLED, PEAK, EVALUATIONS, ORDERS, DRIFT, SPREAD = 1, 3, 4, 5, 6, 7, 8, 9


def most_order(dtype: torch.dtype) -> int:
    """Highest order of the prediction (2)."""
    return 2 if dtype.itemsize == 2 else 4


def _sight(W: Tensor) -> Tensor:
    """c of (5) for each layer of W [n, m, q] alone: [n, SIGHT_WIDTH]."""
    return F.pad(visibility(W), (0, SIGHT_WIDTH - W.shape[2]))


@functools.cache  # and held: CUDA graphs have its address
def _direction(dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The direction of (15): [SIGHT_WIDTH]. Copied there once, which waits."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"a CUDA graph captures the first adjoint of {dim} features on {device}, which has to copy a "
            "tensor there; call the block once before"
        )
    return F.pad(probe(dim, dtype), (0, SIGHT_WIDTH - dim)).to(device)


def directions(W: Tensor, every: int, like: Tensor) -> Tensor:
    """What the forward projects the states of the layers every, 2 every, .. on (15): [n, SIGHT_WIDTH]."""
    return _sight(W[every::every]) * _direction(W.shape[2], like.dtype, like.device)


class Descent:
    """The states of a block from the top, as many at a time as a sweep takes.

    states [n, padded rows, q]: what the forward left, anchors h_K, h_2K, .. (K = save_every) and h_L; checks:
    its projections.
    """

    def __init__(
        self, layers: Layers, batch: int, states: Tensor, checks: Tensor, save_every: int, most: int
    ) -> None:
        """most: layers that a sweep takes, at most."""
        self.layers, self.batch = layers, batch
        *self.anchors, self.top = states.unbind()
        self.checks, self.save_every, self.most = checks, save_every, most
        # A part of depth lies in the ring as one, with the states above it that predictions look at.
        self.ring = states.new_empty(
            ring_length(most, layers.V.dtype) if layers.depth > most else most + 1, *states.shape[1:]
        )
        self.rows = states.new_zeros(SPREAD + most_order(layers.V.dtype) + 1, batch)
        self.rows[DOUBT] = 1
        self.rows[SPREAD:] = -1  # not measured yet
        self.visible = states.new_zeros(SIGHT_WIDTH)
        self.direction = _direction(layers.dim, states.dtype, states.device)
        # A step can be solved to what its products see of a state; tf32 has the 11 bits of float16.
        unit = rounding_unit(torch.float16 if layers.tf32 else layers.V.dtype)
        self.limit = state_limit(layers.depth, unit)

    def parts(self) -> Iterator[tuple[Tensor, int, int]]:
        """States h_low .. h_{top-1} [top - low, padded rows, q], low and top, from the last layers on down.

        They are there until the next part.
        """
        layers, length = self.layers, len(self.ring)
        top = layers.depth
        self.ring[top % length] = self.top
        while top > 0:
            low = max(0, top - self.most, (top - 1) // length * length)
            if self.save_every:
                low = max(low, (top - 1) // self.save_every * self.save_every)
            sight = _sight(layers.W[low:top])
            visible = torch.maximum(sight.flip(0).cummax(0).values.flip(0), self.visible)
            self.visible = visible[0]
            layers.reconstruct(
                self.batch,
                low,
                top,
                *(self.ring, visible, sight, self.direction, self.checks, self.rows),
                self.limit,
            )
            states = self.ring[low % length : low % length + top - low]
            yield states, low, top
            if self.save_every and low > 0 and low % self.save_every == 0:
                anchor = self.anchors[low // self.save_every - 1]
                self._compare(states[0, : self.batch], anchor[: self.batch])
                states[0] = anchor
            top = low

    def finish(self, h: Tensor) -> Tensor:
        """The report, float64 [REPORT_SIZE]; h: the block's input, which h_0 should be."""
        depth = self.layers.depth
        if self.batch == 0:
            return self.rows.new_zeros(REPORT_SIZE, dtype=torch.float64)
        self._compare(self.ring[0, : self.batch], h.to(self.ring.dtype))
        rows = self.rows.double()
        estimate = torch.maximum((rows[SQUARES] / depth).sqrt(), rows[UNSETTLED]).max()
        steps = self.batch * depth
        return torch.stack(
            [estimate, rows[DRIFT].max(), rows[EVALUATIONS].sum() / steps, rows[ORDERS].sum() / steps]
        )

    def _compare(self, found: Tensor, true: Tensor) -> None:
        """(14), row by row."""
        tiny = torch.finfo(true.dtype).tiny
        visible = self.visible[: true.shape[1]]
        share = min(1.0, PEAK_SHARE * math.sqrt(self.layers.depth))
        error, size = (found - true).abs(), true.abs()
        seen = torch.maximum((visible * size).amax(1), share * self.rows[PEAK]).clamp_min(tiny)
        whole = torch.maximum(size.amax(1), self.top[: self.batch].abs().amax(1)).clamp_min(tiny)
        drift = torch.maximum((visible * error).amax(1) / seen, error.amax(1) / whole)
        torch.maximum(self.rows[DRIFT], drift, out=self.rows[DRIFT])
        self.rows[PEAK].zero_()


def ring_length(most: int, dtype: torch.dtype) -> int:
    """States that the ring has room for: a part of ``most`` layers and those above it that are looked at, in
    whole parts."""
    return most + -(-(most_order(dtype) + 1) // most) * most
