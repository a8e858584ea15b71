"""The layers of a block as the CUDA kernels run them: of rows here, of maps in ``gpu_maps``.

A sweep of rows leaves for each layer the factors of the weights' gradients, which are matrix products over
rows, PyTorch's. All runs on the current stream; nothing is waited for.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import gpu_adjoint, native
from .activations import ACTIVATIONS
from .reconstruction import check_every
from .reference import checks_shape, state_dtype, states_shape


def tf32(dtype: torch.dtype, maps: bool = False) -> bool:
    """Whether products of this dtype on a GPU are of float32 that PyTorch lets be rounded to tf32: those of
    matrices, or convolutions of ``maps``, for which that is another setting."""
    if dtype != torch.float32:
        return False
    cudnn: Any = torch.backends.cudnn
    products: Any = getattr(cudnn, "conv", cudnn) if maps else torch.backends.cuda.matmul
    if hasattr(products, "fp32_precision"):  # torch >= 2.9, where reading the other may raise
        return bool(products.fp32_precision == "tf32")
    return bool(products.allow_tf32)


WORKSPACE = 512 << 20
"""Bytes of what a sweep leaves for the gradients, and of the adjoint's states, at any depth."""

Factors = list[Tensor]
"""What a sweep leaves for the gradients of its weights, here a, h, s, g; empty where not asked for."""


class Layers:
    """The layers of a block, for kernels to run some of them. States are [B, q]."""

    def __init__(
        self,
        V: Tensor,
        W: Tensor,
        hidden_bias: Tensor | None,
        output_bias: Tensor | None,
        activation: str,
        scale: float,
    ) -> None:
        self.V, self.W = V.contiguous(), W.contiguous()
        self.hidden_bias, self.output_bias = native.contiguous(hidden_bias), native.contiguous(output_bias)
        self.depth, self.dim, self.hidden = V.shape[:3]
        self.activation, self.scale = ACTIVATIONS[activation].native_id, scale
        self.tf32 = tf32(V.dtype, V.dim() == 5)
        self.device = V.device

    def _sizes(self, batch: int, bottom: int, top: int) -> tuple[int, ...]:
        dtype = native.NATIVE_DTYPES[self.V.dtype]
        return dtype, self.activation, batch, self.dim, self.hidden, top - bottom, 0, 0, 0  # no maps

    @functools.cached_property
    def _padded(self) -> tuple[Tensor | None, ...]:
        """V, W and biases as kernels read them."""
        return tuple(
            None if t is None else padded(t) for t in (self.V, self.W, self.hidden_bias, self.output_bias)
        )

    def _weights(self, bottom: int) -> tuple[int, ...]:
        return addresses(bottom, *self._padded)

    def _place(self) -> tuple[bool, int, int]:
        stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
        return self.tf32, self.device.index or 0, stream

    def fuse(self, batch: int, backward: bool = False, reconstruct: bool = False) -> bool:
        """Whether the kernels take a batch."""
        sizes = self._sizes(batch, 0, self.depth)
        flags = backward, reconstruct, self.tf32
        return bool(native.core.cuda_fuses(*sizes, *flags, self.device.index or 0))

    def run(self, h: Tensor, save_every: int, reconstruct: bool) -> tuple[Tensor, Tensor, Tensor]:
        """y, the states and the projections that are asked for."""
        batch, y = len(h), torch.empty_like(h)
        states = self._states(batch, self.depth, save_every, reconstruct)
        checks = states.new_empty(checks_shape(batch, self.depth, reconstruct))
        given: dict[str, Tensor] = {}
        if reconstruct:
            given["end"] = states[-1]
            if checks.numel():
                given["directions"] = gpu_adjoint.directions(self.W, check_every(self.depth), states)
                given["checks"] = checks
        self._run(batch, 0, self.depth, save_every, reconstruct, h=h, y=y, states=states, **given)
        return y, states, checks

    def advance(self, state: Tensor, bottom: int, top: int) -> Tensor:
        """h_top [B, q] from ``state`` = h_bottom."""
        end = torch.empty_like(state)
        self._run(len(state), bottom, top, 0, start=state, end=end)
        return end

    def states(self, state: Tensor, bottom: int, top: int) -> Tensor:
        """h_k for k = bottom .. top-1, from the first of them."""
        states = self._states(len(state), top - bottom, 1, False)
        self._run(len(state), bottom, top, 1, start=state, states=states)
        return states

    def _states(self, batch: int, depth: int, save_every: int, reconstruct: bool) -> Tensor:
        shape = states_shape(batch, self.dim, self.hidden, depth, save_every, reconstruct, False)
        return torch.empty(shape, dtype=state_dtype(self.V.dtype), device=self.device)

    def _run(
        self,
        batch: int,
        bottom: int,
        top: int,
        save_every: int,
        reconstruct: bool = False,
        *,
        h: Tensor | None = None,
        start: Tensor | None = None,
        y: Tensor | None = None,
        end: Tensor | None = None,
        states: Tensor | None = None,
        directions: Tensor | None = None,
        checks: Tensor | None = None,
    ) -> None:
        native.core.cuda_forward(
            *self._sizes(batch, bottom, top),
            self.scale,
            *self._weights(bottom),
            *(native.pointer(t) for t in (h, start, y, end, states, directions, checks)),
            save_every,
            reconstruct,
            *self._place(),
        )

    def factor_bytes(self, batch: int) -> int:
        """Of the factors of one layer."""
        return 2 * batch * (self.dim + self.hidden) * self.V.dtype.itemsize

    def new_factors(self, batch: int, layers: int, wanted: bool) -> Factors:
        """Room for those of so many layers."""
        rounds = state_dtype(self.V.dtype) != self.V.dtype  # or states are factors as they are
        widths = (self.dim, self.dim if rounds else 0, self.hidden, self.hidden) if wanted else (0, 0, 0, 0)
        return [self.V.new_empty((layers, batch, width)) for width in widths]

    def gradients(self, factors: Factors, states: Tensor, batch: int) -> tuple[Tensor | None, ...]:
        """dV, dW, dhidden_bias and doutput_bias of the layers with these states, before they are scaled."""
        a, h, s, g = (t[: len(states)] for t in factors)
        if h.shape[2] == 0:
            h = states[:, :batch]
        return product(a, s), product(g, h), *self._bias_gradients(g, a)

    def _bias_gradients(self, g: Tensor, a: Tensor) -> tuple[Tensor | None, Tensor | None]:
        dtype = state_dtype(g.dtype)
        return (
            None if self.hidden_bias is None else g.sum(1, dtype=dtype),
            None if self.output_bias is None else a.sum(1, dtype=dtype),
        )

    def sweep(self, a: Tensor, states: Tensor, bottom: int, top: int, factors: Factors) -> None:
        """From a = dℓ/dh_top to dℓ/dh_bottom, in place; factors to be written."""
        native.core.cuda_sweep(
            *self._sizes(len(a), bottom, top),
            self.scale,
            *self._weights(bottom)[:3],
            0,  # the output bias, on which nothing here depends
            native.pointer(states),
            native.pointer(a),
            0,  # of maps
            *(native.pointer(t) for t in factors),
            *self._place(),
        )

    def reconstruct(
        self,
        batch: int,
        bottom: int,
        top: int,
        ring: Tensor,
        visible: Tensor,
        sight: Tensor,
        direction: Tensor,
        checks: Tensor,
        rows: Tensor,
        limit: float,
    ) -> None:
        """h_k for k = top-1 .. bottom into the ring, which has h_top (``ReconstructionProblem``)."""
        native.core.cuda_reconstruct(
            *self._sizes(batch, bottom, top),
            self.scale,
            *self._weights(bottom),
            *(native.pointer(t) for t in (ring, visible, sight, direction, checks, rows)),
            *(len(ring), bottom, self.depth, limit),
            *self._place(),
        )


def _rounded(size: int, weights: Tensor) -> int:
    """To numbers that fill pieces of 16 bytes."""
    piece = 16 // weights.element_size()
    return -(-size // piece) * piece


def padded(weights: Tensor) -> Tensor:
    """Weights [L, p, r] or biases [L, p], as kernels copy them: with zeros up to p and r that fill pieces of
    16 bytes, at a multiple of which all begins."""
    more = [_rounded(size, weights) - size for size in weights.shape[1:]]
    if not any(more) and weights.data_ptr() % 16 == 0:
        return weights
    return F.pad(weights, [end for size in reversed(more) for end in (0, size)])


def addresses(bottom: int, *tensors: Tensor | None) -> tuple[int, ...]:
    """Where that layer's part of each begins."""
    return tuple(0 if t is None else t.data_ptr() + bottom * t.stride(0) * t.element_size() for t in tensors)


ROWS = {2: 1024, 4: 256, 8: 256}
"""Rows that one product sums over, by the size of a number: so few that parts fill a GPU, for there are few
layers at a time, and that sums of float32 in a chain are as exact as those of a blocked product."""


def product(x: Tensor, y: Tensor) -> Tensor:
    """xᵀy of each layer, [n, B, p] and [n, B, r] -> [n, p, r], summed in float (double for float64)."""
    count, batch = x.shape[:2]
    rows = _rows_of_a_part(batch, ROWS[x.element_size()])
    if rows == batch:
        return products(x, y)
    parts = batch // rows
    if batch % rows == 0 and x.is_contiguous() and y.is_contiguous():
        partial = products(x.view(count * parts, rows, -1), y.view(count * parts, rows, -1))
        return partial.view(count, parts, *partial.shape[1:]).sum(1)
    whole = parts * rows
    layers = [
        products(x_k[:whole].view(parts, rows, -1), y_k[:whole].view(parts, rows, -1)).sum(0)
        for x_k, y_k in zip(x.unbind(), y.unbind(), strict=True)
    ]
    sums = torch.stack(layers)
    return sums if whole == batch else sums + products(x[:, whole:], y[:, whole:])


@functools.lru_cache(maxsize=256)
def _rows_of_a_part(batch: int, most: int) -> int:
    """At most so many; if a number near it divides the batch, that one."""
    if batch <= most:
        return batch
    return next((rows for rows in range(most, most // 4, -1) if batch % rows == 0), most)


def products(x: Tensor, y: Tensor) -> Tensor:
    x = x.transpose(1, 2)
    if x.element_size() > 2:
        return torch.bmm(x, y)
    if x.is_cuda and hasattr(torch.ops.aten.bmm, "dtype"):  # torch >= 2.8
        return torch.bmm(x, y, out_dtype=torch.float32)
    return torch.bmm(x, y).float() if x.is_cuda else torch.bmm(x.float(), y.float())
