"""The native core: whether there is one, and how tensors are passed to it.

Only ``ops`` and ``gpu`` call it, as ``native.core``.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from torch import Tensor

core: Any = None
"""The module ``odeblock._core`` (see ``_core.pyi``), or None."""

try:
    import odeblock._core as _core  # tells a missing module from one that cannot be loaded
except ImportError as error:
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
    core = _core
    _wanted = os.environ.get("ODEBLOCK_CPU")
    # build_info starts OpenMP's threads: in a child that is forked later, PyTorch's operators wait for them
    # for ever. An import alone must not be what starts them.
    _builds = core.build_info()["cpu_builds"] if _wanted else ()
    if _wanted and _wanted not in _builds:
        raise ImportError(
            f"ODEBLOCK_CPU: expected one of {', '.join(_builds)} (what this build of odeblock has and this "
            f"processor runs), got {_wanted!r}; unset it to get the best of them"
        )

NATIVE_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
"""What the core has kernels for, and its number for each."""


def build_info() -> dict[str, Any] | None:
    """How the native core was built and what it finds here; None where there is none."""
    return None if core is None else core.build_info()


def release_memory() -> None:
    """Give back to the system the memory that the native core keeps between calls, at most 512 MiB.

    What it keeps is memory that tensors of earlier calls had (stored states, workspace, gradients) and have
    no more; the next call is faster for it.
    """
    if core is not None:
        core.release_memory()


def runs_natively(tensor: Tensor) -> bool:
    """Whether a block of this device and dtype runs on the native core's CPU kernels."""
    return core is not None and tensor.device.type == "cpu" and tensor.dtype in NATIVE_DTYPES


def pointer(tensor: Tensor | None) -> int:
    """The tensor's address; 0, the core's null, for None and for an empty tensor."""
    return 0 if tensor is None else tensor.data_ptr()


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
