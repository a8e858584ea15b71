"""Blocks on a GPU: the native core's CUDA kernels where a GPU has them right, and the backward made of them.

The backward is a sweep of kernels through the layers (``gpu_layers``), down states that were stored, are run
again from those (``checkpointing``) or solved for from the one above (``gpu_adjoint``).
All runs on the current stream; nothing is waited for.
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import torch
from torch import Tensor

from . import checkpointing, gpu_adjoint, native, reference
from .gpu_layers import WORKSPACE, Layers, tf32
from .gpu_maps import MapLayers
from .reconstruction import REPORT_SIZE
from .reference import state_dtype

MOST_LAYERS = 64
"""That a sweep takes."""

BATCHES = (40, 64, 70, 20_000)
"""Rows that kernels are compared with PyTorch on, for each way to launch: warps without rows, which copy for
the others; a warpgroup; two blocks of one; as many as a block takes."""
MAP_BATCHES = (1, 300, 2000)
"""Likewise maps: blocks of one sample, of two, of as many as a block takes."""

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


_agreed: dict[tuple[torch.device, torch.dtype, bool, bool], bool] = {}


def has_kernels_for(tensor: Tensor) -> bool:
    """Whether the GPU of a tensor has kernels for rows [B, q], or maps [B, C, H, W], of its dtype that are
    right there (asked once, or again where memory did not do)."""
    device, dtype, maps = tensor.device, tensor.dtype, tensor.dim() == 4
    if dtype not in native.NATIVE_DTYPES or not has_kernels(device.index):
        return False
    key = (device, dtype, maps, tf32(dtype, maps))
    if key not in _agreed:
        with torch.cuda.device(device):
            capturing = torch.cuda.is_current_stream_capturing()
        if capturing:  # which nothing may wait for
            warnings.warn(
                f"a CUDA graph captures odeblock's first call with {dtype} on {device}, before its kernels "
                "could be compared with PyTorch: it will replay slower PyTorch operators, and no adjoint; "
                "call the block once before",
                RuntimeWarning,
                stacklevel=2,
            )
            return False
        try:
            _agreed[key] = kernels_agree(device, dtype, maps)
        except torch.OutOfMemoryError:
            warnings.warn(
                f"too little memory is free on {device} to compare odeblock's kernels with PyTorch, as the "
                f"first call with {dtype} does: it runs on slower PyTorch operators; call the block once "
                "before memory is full",
                RuntimeWarning,
                stacklevel=2,
            )
            return False
    return _agreed[key]


# One for each number of features that kernels are compiled for, rows of every alignment among them, and more
# hidden units than fit on chip.
_ROWS = ((13, 72), (32, 64), (61, 70), (64, 67), (40, 8), (64, 264), (96, 328), (200, 72))
# Channels, and channels, height, width and kernel: those of the paper, and of products that are not full.
_MAPS = ((16, 16, 10, 10, 3), (3, 24, 7, 9, 5), (40, 20, 5, 6, 1))


def kernels_agree(device: torch.device, dtype: torch.dtype, maps: bool = False) -> bool:
    """Whether a GPU's kernels find what PyTorch finds on small problems, so that a GPU or a driver on which
    they never ran makes a block slow, not wrong. Says if they do not."""
    tolerance = 2e-3 if tf32(dtype, maps) else {2: 4, 4: 100, 8: 100}[dtype.itemsize] * torch.finfo(dtype).eps
    generator = torch.Generator().manual_seed(0)
    batches = MAP_BATCHES if maps else BATCHES
    for dim, hidden, *size in _MAPS if maps else _ROWS:
        area, kernel = size[:2], size[2:] * 2
        h = (batches[-1], dim, *area)
        sizes = (h, (2, dim, hidden, *kernel), (2, hidden, dim, *kernel), (2, hidden), (2, dim), h)
        made = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
        made[1] /= (hidden * math.prod(kernel)) ** 0.5
        made[2] /= (dim * math.prod(kernel)) ** 0.5
        with torch.inference_mode():
            tensors = [tensor.to(dtype).to(device) for tensor in made]
            for batch in batches:
                try:
                    error = max(_errors(batch, *tensors), default=0.0)
                    fault = None if error <= tolerance else f"error {error:.1e}"
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError as raised:
                    fault = str(raised)
                if fault is not None:
                    shape = f"maps of {dim} x {area[0]} x {area[1]}" if maps else f"rows of {dim} features"
                    warnings.warn(
                        f"odeblock's kernels do not find on {device} what PyTorch finds ({dtype}, {batch} "
                        f"{shape}: {fault}): please report it. Blocks run there correctly, but on slower "
                        "PyTorch operators",
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


def layers_of(h: Tensor, V: Tensor, *arguments: Any) -> Layers:
    """Those of a block of rows or of maps."""
    return Layers(V, *arguments) if V.dim() == 3 else MapLayers((h.shape[2], h.shape[3]), V, *arguments)


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
    layers = layers_of(h, V, W, hidden_bias, output_bias, activation, scale)
    if not layers.fuse(len(h), reconstruct, reconstruct):
        return None
    return layers.run(h.contiguous(), save_every, reconstruct)


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
    layers = layers_of(grad, V, W, hidden_bias, output_bias, activation, scale)
    batch = len(grad)
    if not layers.fuse(batch, True, reconstruct):
        return None
    states, checks = states.contiguous(), checks.contiguous()
    a = grad.to(states.dtype, copy=True, memory_format=torch.contiguous_format)
    gradients = [
        torch.empty_like(p, memory_format=torch.contiguous_format)
        if weight_gradients and p is not None
        else grad.new_empty(0)
        for p in (V, W, hidden_bias, output_bias)
    ]
    most = _layers_at_once(layers, batch, reconstruct)
    factors = layers.new_factors(batch, most, weight_gradients)

    @torch.autocast(a.device.type, enabled=False)
    def back(known: Tensor, bottom: int, top: int) -> None:
        """Through layers top-1 .. bottom, whose states are known [top - bottom, rows, q]."""
        while top > bottom:
            low = max(bottom, top - most)
            held = known[low - bottom : top - bottom]
            layers.sweep(a, held, low, top, factors)
            if weight_gradients:
                for gradient, found in zip(gradients, layers.gradients(factors, held, batch), strict=True):
                    if found is not None:
                        torch.mul(found, scale, out=gradient[low:top])
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
    dV, dW, dhidden, doutput = gradients
    return a.to(grad.dtype), dV, dW, dhidden, doutput, report


def _layers_at_once(layers: Layers, batch: int, reconstruct: bool) -> int:
    """Layers that a sweep takes: what it leaves of each, and the adjoint's states, fit the workspace."""
    dtype = layers.V.dtype
    factors = layers.factor_bytes(batch)
    state = reference.padded_rows(batch) * layers.dim * state_dtype(dtype).itemsize

    def size(most: int) -> int:
        return most * factors + (gpu_adjoint.ring_length(most, dtype) * state if reconstruct else 0)

    most = min(MOST_LAYERS, layers.depth)
    while most > 1 and size(most) > WORKSPACE:
        most -= 1
    return most
