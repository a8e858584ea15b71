"""The paper's network for CIFAR-10: a convolution that makes small maps, a deep block, a linear layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ...conv import DeepConvResBlock
from ..config import CifarConfig
from .files import CLASSES

POOL, POOLED = 4, 2  # maps are 10x10 after the stem, 2x2 after pooling by 4


class ConvNet(nn.Module):
    """Images [B, 3, 32, 32] -> maps [B, channels, 10, 10] -> the block -> pooled to 2x2 -> logits [B, 10].

    The stem is a convolution 5x5 with stride 3, batch normalisation if ``norm`` is "batch", and ReLU. With
    ``norm`` the block starts as the identity (the last normalisation of a step has weight 0), as in the
    authors' script; the bias of its convolutions, which normalisation would take away, is left out.

    Arguments:
        channels, depth, activation, init, backward: of the ``DeepConvResBlock``.
        norm: "batch" or None.

    Submodules: ``stem``, ``block``, ``head``.
    """

    def __init__(
        self,
        channels: int,
        depth: int,
        *,
        activation: str = "gelu",
        norm: str | None = "batch",
        init: str = "tied",
        backward: str = "auto",
    ) -> None:
        super().__init__()
        convolution = nn.Conv2d(3, channels, 5, stride=3, padding=1, bias=norm is None)
        normalisation = [] if norm is None else [nn.BatchNorm2d(channels)]
        self.stem = nn.Sequential(convolution, *normalisation, nn.ReLU())
        head = nn.Linear(channels * POOLED**2, CLASSES)  # drawn before the block: the same for every init
        self.block = DeepConvResBlock(
            channels, depth, activation=activation, norm=norm, init=init, backward=backward
        )
        if norm is not None:
            nn.init.zeros_(self.block.output_norm_weight)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        h = self._steps(self.stem(x))
        y: Tensor = self.head(F.avg_pool2d(h, POOL).flatten(1))
        return y

    def _steps(self, h: Tensor) -> Tensor:
        """The block; under autocast in its dtype, with one copy of the parameters a call in that."""
        device = h.device.type
        if not torch.is_autocast_enabled(device):
            y: Tensor = self.block(h)
            return y
        dtype = torch.get_autocast_dtype(device)
        parameters = {name: p.to(dtype) for name, p in self.block.named_parameters()}
        y = functional_call(self.block, parameters, h.to(dtype))
        return y


def network_arguments(config: CifarConfig) -> dict[str, Any]:
    """Arguments of ``ConvNet``, as they are stored in a checkpoint."""
    config = config.resolved()
    return {
        "channels": config.channels,
        "depth": config.depth,
        "activation": config.activation,
        "norm": None if config.norm == "none" else config.norm,
        "init": config.init,
        "backward": config.backward,
    }


def build_network(config: CifarConfig) -> ConvNet:
    """A network drawn with the seed, on the CPU: the same weights for every device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = ConvNet(**network_arguments(config))
    return network.to(config.device, torch.float64 if config.precision == "float64" else torch.float32)


def parameter_counts(network: ConvNet) -> dict[str, int]:
    """Of each submodule, and in all."""
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in network.named_children()}
    return {**counts, "all": sum(counts.values())}
