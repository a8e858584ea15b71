"""Parameters of which each process has a share: those that ``torch.distributed.fsdp.fully_shard`` leaves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .initializers import Initializer


def is_sharded(parameter: Any) -> bool:
    """Whether it is a DTensor, told without the import of them, which takes as long as PyTorch's own."""
    return hasattr(parameter, "full_tensor")


def whole(tensor: Any) -> Tensor:
    """All of a tensor of which this process may have a share, or of a sum of which it has a term.

    Numbers read from a DTensor without it may be those of this process alone. All processes must ask.
    """
    found: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return found


@torch.no_grad()
def draw(init: Initializer, V: Any, W: Any) -> None:
    """V and W from an initializer; as a whole, as it draws functions of depth, and depth is what is sharded.

    All processes draw, so that their generators stay alike where they were; the first one's weights count.
    """
    if not is_sharded(V):
        init(V, W)
        return
    from torch.distributed.tensor import distribute_tensor

    both: list[Tensor] = [torch.empty(Z.shape, dtype=Z.dtype, device=Z.device) for Z in (V, W)]
    init(*both)
    for share, drawn in zip((V, W), both, strict=True):
        share.copy_(distribute_tensor(drawn, share.device_mesh, share.placements))
