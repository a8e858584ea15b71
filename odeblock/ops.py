"""The custom ops ``odeblock::deep_residual`` and its backward: schemas, fake versions, kernels.

The only file that calls the native core. Tensors on the CPU go to it, and on a GPU what its kernels take;
everything else (other devices, a build without the core) runs the same op in plain PyTorch (``reference``).
The low-level ``torch.library`` interface is used because its calls cost a few microseconds.
"""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .activations import ACTIVATIONS
from .reconstruction import REPORT_SIZE, probe
from .reference import checks_shape, state_dtype, states_shape

try:
    import odeblock._core as _core  # tells a missing module from one that cannot be loaded
except ImportError as error:
    _core = None  # type: ignore[assignment]
    _reason = (
        "none was built, for no C++ compiler was found at installation; with GCC or Clang, install it again"
        if isinstance(error, ModuleNotFoundError)
        else f"it cannot be loaded: {error}"
    )
    warnings.warn(
        f"odeblock runs without its native core, correctly but on slower PyTorch operators: {_reason}",
        RuntimeWarning,
        stacklevel=2,
    )
else:
    _wanted, _builds = os.environ.get("ODEBLOCK_CPU"), _core.build_info()["cpu_builds"]
    if _wanted and _wanted not in _builds:
        raise ImportError(
            f"ODEBLOCK_CPU: expected one of {', '.join(_builds)} (what this build of odeblock has and this "
            f"processor runs), got {_wanted!r}; unset it to get the best of them"
        )

NATIVE_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

LARGE = 64 << 10
"""Bytes from which on memory is kept for the next tensor; the system's allocator would give it back."""

_library = torch.library.Library("odeblock", "DEF")
_library.define(
    "deep_residual(Tensor h, Tensor V, Tensor W, Tensor? hidden_bias, Tensor? output_bias, str activation, "
    "float scale, int save_every, bool reconstruct, bool keep_hidden) -> "
    "(Tensor y, Tensor states, Tensor checks)"
)
_library.define(
    "deep_residual_backward(Tensor grad, Tensor? h, Tensor V, Tensor W, Tensor? hidden_bias, "
    "Tensor? output_bias, Tensor states, Tensor checks, str activation, float scale, int save_every, "
    "bool reconstruct, int slots, bool keep_hidden, bool weight_gradients) -> "
    "(Tensor dh, Tensor dV, Tensor dW, Tensor dhidden_bias, Tensor doutput_bias, Tensor report)"
)


def core_build_info() -> dict[str, Any] | None:
    """How the native core was built and what it finds here; None where there is none."""
    return None if _core is None else _core.build_info()


def release_memory() -> None:
    """Give back to the system the memory that the native core keeps between calls, at most 512 MiB.

    What it keeps is memory that tensors of earlier calls had (stored states, workspace, gradients) and have
    no more; the next call is faster for it.
    """
    if _core is not None:
        _core.release_memory()


def runs_natively(tensor: Tensor) -> bool:
    """Whether a block of this device and dtype runs on the native core's CPU kernels."""
    return _core is not None and tensor.device.type == "cpu" and tensor.dtype in NATIVE_DTYPES


def _pointer(tensor: Tensor | None) -> int:
    """The tensor's address; 0, the core's null, for None and for an empty tensor."""
    return 0 if tensor is None else tensor.data_ptr()


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A new tensor on the CPU, for the core to fill. If it is large, the core keeps its memory for others."""
    size = math.prod(shape) * dtype.itemsize
    if size < LARGE:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(_core.memory(size), dtype=dtype, count=size // dtype.itemsize).view(shape)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


@functools.cache
def _has_cuda_kernels(index: int) -> bool:
    """Whether the native core has kernels for that GPU; says once if it has not."""
    if _core is None or not _core.build_info()["cuda_architectures"]:
        return False
    reason = _core.cuda_unsupported(index)
    if reason is not None:
        capability = "".join(map(str, torch.cuda.get_device_capability(index)))
        built = ", ".join(_core.build_info()["cuda_architectures"])
        warnings.warn(
            f"odeblock has no kernels for {torch.cuda.get_device_name(index)} (sm_{capability}; built for "
            f"{built}): {reason}. Blocks run there correctly, but on slower PyTorch operators",
            RuntimeWarning,
            stacklevel=2,
        )
    return reason is None


_agreed: dict[tuple[torch.device, torch.dtype, bool], bool] = {}


def _runs_on_cuda_kernels(tensor: Tensor) -> bool:
    """Whether the GPU of a tensor has kernels for its dtype that are right there (asked once)."""
    device, dtype = tensor.device, tensor.dtype
    if dtype not in NATIVE_DTYPES or not _has_cuda_kernels(device.index):
        return False
    key = (device, dtype, _tf32(dtype))
    if key not in _agreed:
        if torch.cuda.is_current_stream_capturing():  # which nothing may wait for
            warnings.warn(
                f"a CUDA graph captures odeblock's first call with {dtype} on {device}, before its kernels "
                "could be compared with PyTorch: it will replay slower PyTorch operators; call the block "
                "once before",
                RuntimeWarning,
                stacklevel=2,
            )
            return False
        _agreed[key] = _cuda_kernels_agree(*key)
    return _agreed[key]


def _cuda_kernels_agree(device: torch.device, dtype: torch.dtype, tf32: bool) -> bool:
    """Whether a GPU's kernels find what PyTorch finds on small problems, so that a GPU or a driver on which
    they never ran makes a block slow, not wrong. Says if they do not."""
    tolerance = 2e-3 if tf32 else {2: 4, 4: 100, 8: 100}[dtype.itemsize] * torch.finfo(dtype).eps
    generator = torch.Generator().manual_seed(0)
    # One for each number of features that kernels are compiled for, rows of every alignment among them, and
    # more hidden units than fit on chip; and a batch for each way to launch them: a warp a block, four, as
    # many as a block takes.
    for dim, hidden in ((13, 72), (32, 64), (61, 70), (64, 67), (64, 264), (96, 328), (200, 72)):
        sizes = ((20_000, dim), (2, dim, hidden), (2, hidden, dim), (2, hidden), (2, dim))
        made = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
        made[1] /= hidden**0.5
        made[2] /= dim**0.5
        with torch.inference_mode():
            rows, V, W, b, c = (tensor.to(dtype).to(device) for tensor in made)
            exact = (V.double(), W.double(), b.double(), c.double())
            for h in (rows[:40], rows[:70], rows):
                try:
                    found = _forward_cuda(h, V, W, b, c, "tanh", 0.5, 1, True, tf32)
                    if found is None:  # more than this GPU's kernels take
                        continue
                    right = reference.forward(h.double(), *exact, "tanh", 0.5, 1, False, True)
                    error = max(  # of y and the states
                        float((ours.double() - theirs)[..., : len(h), :].abs().max() / theirs.abs().max())
                        for ours, theirs in zip(found[:2], right[:2], strict=True)
                    )
                    fault = None if error <= tolerance else f"error {error:.1e}"
                except RuntimeError as raised:
                    fault = str(raised)
                if fault is not None:
                    warnings.warn(
                        f"odeblock's kernels do not find on {device} what PyTorch finds ({dtype}, {len(h)} "
                        f"rows of {dim} features: {fault}): please report it. Blocks run there correctly, "
                        "but on slower PyTorch operators",
                        RuntimeWarning,
                        stacklevel=2,
                    )
                    return False
    return True


def _tf32(dtype: torch.dtype) -> bool:
    """Whether products of this dtype on a GPU are of float32 that PyTorch lets be rounded to tf32."""
    if dtype != torch.float32:
        return False
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # torch >= 2.9, where reading the other may raise
        return bool(matmul.fp32_precision == "tf32")
    return bool(matmul.allow_tf32)


def _forward_cuda(
    h: Tensor,
    V: Tensor,
    W: Tensor,
    hidden_bias: Tensor | None,
    output_bias: Tensor | None,
    activation: str,
    scale: float,
    save_every: int,
    keep_hidden: bool,
    tf32: bool,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The op on a GPU's kernels; None where they do not take the problem."""
    (batch, dim), (depth, hidden, _) = h.shape, W.shape
    sizes = (NATIVE_DTYPES[h.dtype], ACTIVATIONS[activation].native_id, batch, dim, hidden, depth)
    if not _core.cuda_fuses(*sizes, tf32, h.device.index):
        return None
    h, V, W = h.contiguous(), V.contiguous(), W.contiguous()
    hidden_bias, output_bias = _contiguous(hidden_bias), _contiguous(output_bias)
    y = torch.empty_like(h)
    shape = states_shape(batch, dim, hidden, depth, save_every, False, keep_hidden)
    states = torch.empty(shape, dtype=state_dtype(h.dtype), device=h.device)
    _core.cuda_forward(
        *sizes,
        scale,
        _pointer(h),
        _pointer(V),
        _pointer(W),
        _pointer(hidden_bias),
        _pointer(output_bias),
        _pointer(y),
        _pointer(states),
        save_every,
        keep_hidden,
        tf32,
        h.device.index,
        torch.cuda.current_stream(h.device).cuda_stream,
    )
    return y, states, states.new_empty(checks_shape(batch, depth, False))


def _forward(
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
    if h.is_cuda and not reconstruct and _runs_on_cuda_kernels(h):
        results = _forward_cuda(
            h, V, W, hidden_bias, output_bias, activation, scale, save_every, keep_hidden, _tf32(h.dtype)
        )
        if results is not None:
            return results
    if not runs_natively(h):
        return reference.forward(
            h, V, W, hidden_bias, output_bias, activation, scale, save_every, reconstruct, keep_hidden
        )
    h, V, W = h.contiguous(), V.contiguous(), W.contiguous()
    hidden_bias, output_bias = _contiguous(hidden_bias), _contiguous(output_bias)
    batch, dim = h.shape
    depth, hidden = W.shape[:2]
    threads = torch.get_num_threads()
    sizes = (NATIVE_DTYPES[h.dtype], ACTIVATIONS[activation].native_id, batch, dim, hidden, depth)
    y = torch.empty_like(h)
    computed = state_dtype(h.dtype)
    shape = states_shape(batch, dim, hidden, depth, save_every, reconstruct, keep_hidden)
    states = _empty(shape, computed)
    checks = _empty(checks_shape(batch, depth, reconstruct), computed)
    workspace = _empty((_core.forward_workspace(*sizes, threads),), torch.uint8)
    _core.forward(
        *sizes,
        scale,
        _pointer(h),
        _pointer(V),
        _pointer(W),
        _pointer(hidden_bias),
        _pointer(output_bias),
        _pointer(y),
        _pointer(states),
        _pointer(probe(dim, computed)),
        _pointer(checks),
        save_every,
        reconstruct,
        keep_hidden,
        _pointer(workspace),
        threads,
    )
    return y, states, checks


def _backward(
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
    if not runs_natively(grad):
        return reference.backward(
            grad,
            h,
            V,
            W,
            hidden_bias,
            output_bias,
            states,
            checks,
            activation,
            scale,
            save_every,
            reconstruct,
            slots,
            keep_hidden,
            weight_gradients,
        )
    grad, V, W = grad.contiguous(), V.contiguous(), W.contiguous()
    h, hidden_bias, output_bias = _contiguous(h), _contiguous(hidden_bias), _contiguous(output_bias)
    batch, dim = grad.shape
    depth, hidden = W.shape[:2]
    # Saved-tensor hooks may have brought these back in another form.
    for name, tensor, shape in (
        ("states", states, states_shape(batch, dim, hidden, depth, save_every, reconstruct, keep_hidden)),
        ("checks", checks, checks_shape(batch, depth, reconstruct)),
    ):
        if tensor.shape != shape or tensor.dtype != state_dtype(grad.dtype) or tensor.device != grad.device:
            expected = f"{list(shape)}, {state_dtype(grad.dtype)} on {grad.device}, as the forward saved it"
            got = f"{list(tensor.shape)}, {tensor.dtype} on {tensor.device}"
            raise RuntimeError(f"{name}: expected a tensor {expected}; got {got}")
    states, checks = states.contiguous(), checks.contiguous()
    threads = torch.get_num_threads()
    sizes = (NATIVE_DTYPES[grad.dtype], ACTIVATIONS[activation].native_id, batch, dim, hidden, depth)
    dh = torch.empty_like(grad)
    dV, dW, dhidden, doutput = (
        _empty(p.shape if weight_gradients and p is not None else (0,), grad.dtype)
        for p in (V, W, hidden_bias, output_bias)
    )
    report = torch.zeros(REPORT_SIZE, dtype=torch.float64)
    size = _core.backward_workspace(*sizes, save_every, reconstruct, slots, keep_hidden, threads)
    workspace = _empty((size,), torch.uint8)
    _core.backward(
        *sizes,
        scale,
        _pointer(grad),
        _pointer(h),
        _pointer(V),
        _pointer(W),
        _pointer(hidden_bias),
        _pointer(output_bias),
        _pointer(states),
        _pointer(probe(dim, state_dtype(grad.dtype))),
        _pointer(checks),
        _pointer(dh),
        _pointer(dV),
        _pointer(dW),
        _pointer(dhidden),
        _pointer(doutput),
        _pointer(report),
        save_every,
        reconstruct,
        slots,
        keep_hidden,
        _pointer(workspace),
        threads,
    )
    return dh, dV, dW, dhidden, doutput, report


# One kernel for every backend: it decides by itself between the native core and PyTorch operators.
_library.impl("deep_residual", _forward, "CompositeExplicitAutograd")
_library.impl("deep_residual_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("odeblock::deep_residual", lib=_library)
def _forward_fake(
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
    batch, (depth, dim, hidden) = h.shape[0], V.shape
    computed = state_dtype(h.dtype)
    shape = states_shape(batch, dim, hidden, depth, save_every, reconstruct, keep_hidden)
    states = h.new_empty(shape, dtype=computed)
    checks = h.new_empty(checks_shape(batch, depth, reconstruct), dtype=computed)
    return h.new_empty(h.shape), states, checks


@torch.library.register_fake("odeblock::deep_residual_backward", lib=_library)
def _backward_fake(
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
    dV, dW, dhidden, doutput = (
        p.new_empty(p.shape) if weight_gradients and p is not None else grad.new_empty(0)
        for p in (V, W, hidden_bias, output_bias)
    )
    report = torch.empty(REPORT_SIZE, dtype=torch.float64, device="cpu")
    return grad.new_empty(grad.shape), dV, dW, dhidden, doutput, report


forward = torch.ops.odeblock.deep_residual.default
backward = torch.ops.odeblock.deep_residual_backward.default
