"""Blocks on a GPU: the native core's CUDA kernels where a GPU has them right, and the backward made of them.

The backward is a sweep of kernels through the layers, down states that were stored, are run again from those
(``checkpointing``) or solved for from the one above (``gpu_adjoint``). It leaves for each layer the factors
of the weights' gradients: matrix products over rows, PyTorch's.
All runs on the current stream; nothing is waited for.
"""

from __future__ import annotations

import functools
import math
import warnings

import torch
from torch import Tensor

from . import checkpointing, gpu_adjoint, native, reference
from .activations import ACTIVATIONS
from .reconstruction import REPORT_SIZE, check_every
from .reference import checks_shape, state_dtype, states_shape

WORKSPACE, MOST_LAYERS = 512 << 20, 64
"""Bytes of the factors that a sweep leaves for the products, and of the adjoint's states; layers at most.
Neither grows with depth."""

BATCHES = (40, 64, 70, 20_000)
"""Rows that kernels are compared with PyTorch on, for each way to launch: a warp a block, four, two blocks
of four, as many as a block takes."""

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""dh, dV, dW, dhidden_bias, doutput_bias; empty where not asked for. And the adjoint's report."""


@functools.cache
def has_kernels(index: int) -> bool:
    """Whether the native core has kernels for that GPU; says once if it has not."""
    if native.core is None or not native.core.build_info()["cuda_architectures"]:
        return False
    reason = native.core.cuda_unsupported(index)
    if reason is not None:
        capability = "".join(map(str, torch.cuda.get_device_capability(index)))
        built = ", ".join(native.core.build_info()["cuda_architectures"])
        warnings.warn(
            f"odeblock has no kernels for {torch.cuda.get_device_name(index)} (sm_{capability}; built for "
            f"{built}): {reason}. Blocks run there correctly, but on slower PyTorch operators",
            RuntimeWarning,
            stacklevel=2,
        )
    return reason is None


_agreed: dict[tuple[torch.device, torch.dtype, bool], bool] = {}


def has_kernels_for(tensor: Tensor) -> bool:
    """Whether the GPU of a tensor has kernels for rows of its dtype that are right there (asked once); maps
    [B, C, H, W] have none."""
    device, dtype = tensor.device, tensor.dtype
    if tensor.dim() != 2 or dtype not in native.NATIVE_DTYPES or not has_kernels(device.index):
        return False
    key = (device, dtype, tf32(dtype))
    if key not in _agreed:
        with torch.cuda.device(device):
            capturing = torch.cuda.is_current_stream_capturing()
        if capturing:  # which nothing may wait for
            warnings.warn(
                f"a CUDA graph captures odeblock's first call with {dtype} on {device}, before its kernels "
                "could be compared with PyTorch: it will replay slower PyTorch operators; call the block "
                "once before",
                RuntimeWarning,
                stacklevel=2,
            )
            return False
        _agreed[key] = kernels_agree(device, dtype)
    return _agreed[key]


def kernels_agree(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a GPU's kernels find what PyTorch finds on small problems, so that a GPU or a driver on which
    they never ran makes a block slow, not wrong. Says if they do not."""
    tolerance = 2e-3 if tf32(dtype) else {2: 4, 4: 100, 8: 100}[dtype.itemsize] * torch.finfo(dtype).eps
    generator = torch.Generator().manual_seed(0)
    # One for each number of features that kernels are compiled for, rows of every alignment among them, and
    # more hidden units than fit on chip.
    for dim, hidden in ((13, 72), (32, 64), (61, 70), (64, 67), (40, 8), (64, 264), (96, 328), (200, 72)):
        rows = (BATCHES[-1], dim)
        sizes = (rows, (2, dim, hidden), (2, hidden, dim), (2, hidden), (2, dim), rows)
        made = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
        made[1] /= hidden**0.5
        made[2] /= dim**0.5
        with torch.inference_mode():
            tensors = [tensor.to(dtype).to(device) for tensor in made]
            for batch in BATCHES:
                try:
                    error = max(_errors(batch, *tensors), default=0.0)
                    fault = None if error <= tolerance else f"error {error:.1e}"
                except RuntimeError as raised:
                    fault = str(raised)
                if fault is not None:
                    warnings.warn(
                        f"odeblock's kernels do not find on {device} what PyTorch finds ({dtype}, {batch} "
                        f"rows of {dim} features: {fault}): please report it. Blocks run there correctly, "
                        "but on slower PyTorch operators",
                        RuntimeWarning,
                        stacklevel=2,
                    )
                    return False
    return True


def _errors(
    batch: int, h: Tensor, V: Tensor, W: Tensor, hidden_bias: Tensor, output_bias: Tensor, grad: Tensor
) -> list[float]:
    """Of what kernels make of the first rows, relative to the largest number; infinite for NaN. None of what
    is more than this GPU's kernels take."""
    h, grad = h[:batch], grad[:batch]
    weights = (V, W, hidden_bias, output_bias)
    exact = (V.double(), W.double(), hidden_bias.double(), output_bias.double())
    errors: list[float] = []

    def compare(ours: Tensor, theirs: Tensor, weight: float) -> None:
        error = weight * float((ours.double() - theirs).abs().max() / theirs.abs().max())
        errors.append(math.inf if math.isnan(error) else error)

    # All states stored, one of them, and none, for which steps must be small.
    for scale, save_every, reconstruct in ((0.5, 1, False), (0.5, 2, False), (0.05, 0, True)):
        y, states, _ = reference.forward(h.double(), *exact, "tanh", scale, 1, False, False)
        found = forward(h, *weights, "tanh", scale, save_every, reconstruct)
        if found is None:
            continue
        compare(found[0], y, 1)
        if save_every == 1:
            compare(found[1][:, :batch], states[:, :batch], 1)
        if reconstruct:
            checks = reference.forward(h.double(), *exact, "tanh", scale, save_every, True, False)[2]
            compare(found[2][:, :batch], checks[:, :batch], 1)
        tensors = (grad, h, *weights, *found[1:])
        gradients = backward(*tensors, "tanh", scale, save_every, reconstruct, 1, True)
        if gradients is None:
            continue
        exactly = (grad.double(), None, *exact, states, states)
        right = reference.backward(*exactly, "tanh", scale, 1, False, 0, False, True)
        for ours, theirs in zip(gradients[:5], right[:5], strict=True):
            compare(ours, theirs, 0.25)  # a gradient is a chain of several roundings
    return errors


def tf32(dtype: torch.dtype) -> bool:
    """Whether products of this dtype on a GPU are of float32 that PyTorch lets be rounded to tf32."""
    if dtype != torch.float32:
        return False
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # torch >= 2.9, where reading the other may raise
        return bool(matmul.fp32_precision == "tf32")
    return bool(matmul.allow_tf32)


class Layers:
    """The layers of a block, for kernels to run some of them."""

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
        self.depth, self.dim, self.hidden = V.shape
        self.activation, self.scale = ACTIVATIONS[activation].native_id, scale
        self.tf32 = tf32(V.dtype)
        self.device = V.device

    def _sizes(self, batch: int, bottom: int, top: int) -> tuple[int, ...]:
        dtype = native.NATIVE_DTYPES[self.V.dtype]
        return dtype, self.activation, batch, self.dim, self.hidden, top - bottom, 0, 0, 0  # no maps

    def _weights(self, bottom: int) -> tuple[int, ...]:
        tensors = (self.V, self.W, self.hidden_bias, self.output_bias)
        return tuple(
            0 if t is None else t.data_ptr() + bottom * t.stride(0) * t.element_size() for t in tensors
        )

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

    def sweep(self, a: Tensor, states: Tensor, bottom: int, top: int, factors: list[Tensor]) -> None:
        """From a = dℓ/dh_top to dℓ/dh_bottom, in place; factors: a, h, s, g of each layer, to be written
        unless empty."""
        native.core.cuda_sweep(
            *self._sizes(len(a), bottom, top),
            self.scale,
            *self._weights(bottom)[:3],
            0,  # the output bias, on which nothing here depends
            native.pointer(states),
            native.pointer(a),
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
) -> tuple[Tensor, Tensor, Tensor] | None:
    """y, the saved states and the checks of the op; None where the kernels do not take the problem."""
    layers = Layers(V, W, hidden_bias, output_bias, activation, scale)
    if not layers.fuse(len(h), reconstruct, reconstruct):
        return None
    return layers.run(h.contiguous(), save_every, reconstruct)


ROWS = {2: 1024, 4: 256, 8: 256}
"""Rows that one product sums over, by the size of a number: so few that parts fill a GPU, for there are few
layers at a time, and that sums of float32 in a chain are as exact as those of a blocked product."""


def _product(x: Tensor, y: Tensor) -> Tensor:
    """xᵀy of each layer, [n, B, p] and [n, B, r] -> [n, p, r], summed in float (double for float64)."""
    count, batch = x.shape[:2]
    rows = _rows_of_a_part(batch, ROWS[x.element_size()])
    if rows == batch:
        return _products(x, y)
    parts = batch // rows
    if batch % rows == 0 and x.is_contiguous() and y.is_contiguous():
        partial = _products(x.view(count * parts, rows, -1), y.view(count * parts, rows, -1))
        return partial.view(count, parts, *partial.shape[1:]).sum(1)
    whole = parts * rows
    layers = [
        _products(x_k[:whole].view(parts, rows, -1), y_k[:whole].view(parts, rows, -1)).sum(0)
        for x_k, y_k in zip(x.unbind(), y.unbind(), strict=True)
    ]
    sums = torch.stack(layers)
    return sums if whole == batch else sums + _products(x[:, whole:], y[:, whole:])


@functools.lru_cache(maxsize=256)
def _rows_of_a_part(batch: int, most: int) -> int:
    """At most so many; if a number near it divides the batch, that one."""
    if batch <= most:
        return batch
    return next((rows for rows in range(most, most // 4, -1) if batch % rows == 0), most)


def _products(x: Tensor, y: Tensor) -> Tensor:
    x = x.transpose(1, 2)
    if x.element_size() > 2:
        return torch.bmm(x, y)
    if x.is_cuda and hasattr(torch.ops.aten.bmm, "dtype"):  # torch >= 2.8
        return torch.bmm(x, y, out_dtype=torch.float32)
    return torch.bmm(x, y).float() if x.is_cuda else torch.bmm(x.float(), y.float())


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
    weight_gradients: bool,
) -> Gradients | None:
    """The op's backward; None where the kernels do not take the problem. The report is on the device."""
    layers = Layers(V, W, hidden_bias, output_bias, activation, scale)
    batch, dim, hidden = len(grad), layers.dim, layers.hidden
    if not layers.fuse(batch, True, reconstruct):
        return None
    states, checks = states.contiguous(), checks.contiguous()
    a = grad.to(states.dtype, copy=True, memory_format=torch.contiguous_format)
    dV, dW, dhidden, doutput = (
        torch.empty_like(p, memory_format=torch.contiguous_format)
        if weight_gradients and p is not None
        else grad.new_empty(0)
        for p in (V, W, hidden_bias, output_bias)
    )
    most = _layers_at_once(layers, batch, reconstruct)
    rounds = states.dtype != grad.dtype  # states are no factors as they are
    widths = (dim, dim if rounds else 0, hidden, hidden) if weight_gradients else (0, 0, 0, 0)
    factors = [grad.new_empty((most, batch, width)) for width in widths]

    @torch.autocast(a.device.type, enabled=False)
    def back(known: Tensor, bottom: int, top: int) -> None:
        """Through layers top-1 .. bottom, whose states are known [top - bottom, rows, q]."""
        while top > bottom:
            low = max(bottom, top - most)
            held = known[low - bottom : top - bottom]
            layers.sweep(a, held, low, top, factors)
            if weight_gradients:
                layer_a, layer_h, s, g = (t[: top - low] for t in factors)
                layer_h = layer_h if rounds else held[:, :batch]
                dV[low:top] = scale * _product(layer_a, s)
                dW[low:top] = scale * _product(g, layer_h)
                if dhidden.numel():
                    dhidden[low:top] = scale * g.sum(1, dtype=states.dtype)
                if doutput.numel():
                    doutput[low:top] = scale * layer_a.sum(1, dtype=states.dtype)
            top = low

    report = states.new_zeros(REPORT_SIZE, dtype=torch.float64)
    if reconstruct:
        assert h is not None, "the adjoint needs the block's input to measure its drift"
        descent = gpu_adjoint.Descent(layers, batch, states, checks, save_every, most)
        for part in descent.parts():
            back(*part)
        report = descent.finish(h)
    elif save_every == 1:
        back(states, 0, layers.depth)
    else:
        for n in reversed(range(len(states))):
            bottom = n * save_every
            checkpointing.sweep(
                states[n, :batch],
                bottom,
                min(bottom + save_every, layers.depth),
                slots,
                layers.advance,
                lambda state, low, top: back(layers.states(state, low, top), low, top),
            )
    return a.to(grad.dtype), dV, dW, dhidden, doutput, report


def _layers_at_once(layers: Layers, batch: int, reconstruct: bool) -> int:
    """Layers that a sweep takes: what it leaves of each, and the adjoint's states, fit the workspace."""
    dtype = layers.V.dtype
    factors = 2 * batch * (layers.dim + layers.hidden) * dtype.itemsize
    state = reference.padded_rows(batch) * layers.dim * state_dtype(dtype).itemsize

    def size(most: int) -> int:
        return most * factors + (gpu_adjoint.ring_length(most, dtype) * state if reconstruct else 0)

    most = min(MOST_LAYERS, layers.depth)
    while most > 1 and size(most) > WORKSPACE:
        most -= 1
    return most
