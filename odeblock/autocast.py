"""What ``torch.autocast`` means for a block: its tensors are cast once a call, and nothing within."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

is_any_autocast_enabled = torch._C._is_any_autocast_enabled
"""Whether it is on for any device, which takes less time to ask than for one."""


def autocasts(device: str) -> bool:
    """Whether autocast is on for tensors there. (Some devices have none; PyTorch 2.6 cannot compile that.)"""
    if device == "meta" or not (torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)):
        return False
    return torch.is_autocast_enabled(device)


def autocasted(h: Any, *tensors: Any) -> tuple[Any, ...]:
    """h and other arguments in autocast's dtype, where it is on for h; as they are if float64, or no
    floating-point tensors."""
    arguments = (h, *tensors)
    if not isinstance(h, Tensor) or not autocasts(h.device.type):
        return arguments
    dtype = torch.get_autocast_dtype(h.device.type)
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in arguments
    )


def without(device: str) -> contextlib.AbstractContextManager[Any]:
    """Operators in the dtypes of their arguments."""
    return torch.autocast(device, enabled=False) if autocasts(device) else contextlib.nullcontext()
