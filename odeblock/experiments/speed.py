"""Seconds of a training step, ours against the eager loop: in one process, interleaved A B A B, medians."""

from __future__ import annotations

import copy
import statistics
import time

import torch
from torch import nn

from ..network import DeepResNet
from .config import TrainConfig
from .digits import Digits
from .loop import make_optimizer, train_step
from .networks import eager_twin


def step_seconds(network: DeepResNet, data: Digits, config: TrainConfig) -> tuple[float, float]:
    """Median seconds of one training step on a copy of ``network``: (ours, the eager loop).

    Both take real steps (forward, backward, optimiser) on the same weights and digits, turn by turn; one
    turn of each goes untimed before.
    """
    network = copy.deepcopy(network)
    optimizer = make_optimizer(network, config.lr)
    x, y = data.train_x[: config.batch_size], data.train_y[: config.batch_size]

    def seconds(model: nn.Module) -> float:
        _synchronize(config.device)
        start = time.perf_counter()
        train_step(model, optimizer, x, y)
        _synchronize(config.device)
        return time.perf_counter() - start

    peers = (network, eager_twin(network))
    rounds = [[seconds(peer) for peer in peers] for _ in range(1 + config.timing_rounds)]
    ours, eager = zip(*rounds[1:], strict=True)
    return statistics.median(ours), statistics.median(eager)


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)
