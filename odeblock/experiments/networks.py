"""The networks that are trained and compared: built from the settings, and their eager twin."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import reference
from ..base import ResBlock
from ..block import DeepResBlock
from ..network import DeepResNet
from .config import TrainConfig

FEATURES, CLASSES = 64, 10  # of the digits: pixels and labels


def network_arguments(config: TrainConfig, init: str) -> dict[str, Any]:
    """Arguments of ``DeepResNet`` (device aside), as they are stored in a checkpoint."""
    return {
        "in_features": FEATURES,
        "dim": config.dim,
        "depth": config.depth,
        "out_features": CLASSES,
        "hidden_dim": config.hidden_dim,
        "activation": config.activation,
        "init": init,
        "backward": config.backward,
    }


def build_network(config: TrainConfig, init: str) -> DeepResNet:
    """A network drawn with the seed. A and B come first, so they are the same for every ``init``."""
    network = DeepResNet(**network_arguments(config, init))
    with torch.random.fork_rng(devices=[]):  # drawn on the CPU: the same weights for every device
        torch.manual_seed(config.seed)
        network.A.reset_parameters()
        network.B.reset_parameters()
        network.block.reset_parameters()
    return network.to(config.device)


def random_coefficients(
    dim: int, hidden: int, seed: int, kernel: tuple[int, ...] = ()
) -> dict[str, list[int]]:
    """[i, j] of a random coefficient of V [q, m] and of W [m, q], the same for every network of a seed.

    With convolutions [i, j, u, v], of V [C, M, *kernel] and of W [M, C, *kernel].
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = {"V": (dim, hidden, *kernel), "W": (hidden, dim, *kernel)}
    return {
        name: [int(torch.randint(size, (), generator=generator)) for size in shape]
        for name, shape in shapes.items()
    }


def along_depth(block: ResBlock, indices: dict[str, list[int]]) -> dict[str, list[float]]:
    """These coefficients of V and of W, from layer 1 to L."""
    return {
        name: getattr(block, name).detach()[(slice(None), *index)].tolist() for name, index in indices.items()
    }


class EagerBlock(nn.Module):
    """A block's own parameters run as a loop of PyTorch operators, differentiated by ordinary autograd."""

    def __init__(self, block: DeepResBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, h: Tensor) -> Tensor:
        """h [..., dim] -> h_L [..., dim]."""
        block = self.block
        return reference.deep_residual(
            h,
            block.V,
            block.W,
            block.hidden_bias,
            block.output_bias,
            activation=block.activation,
            scale=block.scale,
        )


def eager_twin(network: DeepResNet) -> nn.Module:
    """The same network on the same parameters, with the eager loop for a block."""
    return nn.Sequential(network.A, EagerBlock(network.block), network.B)
