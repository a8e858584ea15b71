"""The processes that train one network together, started by ``torchrun``; usually a single one.

Each has the whole network and its share of every batch. What they must agree on, sums of losses and whether
to stop, goes through here; with one process nothing does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Processes:
    """How many there are, which of them this is, and the device that is its own."""

    count: int = 1
    rank: int = 0
    device: str = "cpu"

    @property
    def first(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network, whose gradients are means over all processes after its backward."""
        if self.count == 1:
            return network
        return DistributedDataParallel(network, [self.device] if self.device != "cpu" else None)

    def sum(self, *values: float) -> list[float]:
        """Sums over all processes, in float64."""
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def share_buffers(self, network: nn.Module) -> None:
        """The first one's running statistics for all: each has normalised its own share of the batches."""
        if self.count > 1:
            for buffer in network.buffers():
                dist.broadcast(buffer, 0)

    def share(self, tensor: Tensor) -> Tensor:
        """The rows of ``tensor`` that are this one's."""
        return tensor.tensor_split(self.count)[self.rank]

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            dist.barrier()


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """Those that ``torchrun`` started, as its environment variables tell; one alone without.

    Gradients go over gloo on the CPU, over NCCL on GPUs, of which each process takes one.
    """
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count == 1:
        yield Processes(device=device)
        return
    if device.startswith("cuda"):
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device == "cpu" else "nccl")
    try:
        yield Processes(count, dist.get_rank(), device)
    finally:
        dist.destroy_process_group()
