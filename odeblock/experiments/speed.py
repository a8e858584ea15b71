"""Seconds of ours and of others: in one process, interleaved A B A B, medians."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from ..network import DeepResNet
from .config import TrainConfig
from .digits import Digits
from .loop import make_optimizer, train_step
from .networks import eager_twin


def median_seconds(
    peers: Sequence[Callable[[], object]], rounds: int, device: str = "cpu"
) -> tuple[float, ...]:
    """Median seconds of a call of each of ``peers``, turn by turn for ``rounds`` turns after one untimed."""

    def seconds(peer: Callable[[], object]) -> float:
        _synchronize(device)
        start = time.perf_counter()
        peer()
        _synchronize(device)
        return time.perf_counter() - start

    turns = [[seconds(peer) for peer in peers] for _ in range(1 + rounds)]
    return tuple(statistics.median(times) for times in zip(*turns[1:], strict=True))


def step_seconds(network: DeepResNet, data: Digits, config: TrainConfig) -> tuple[float, float]:
    """Median seconds of one training step on a copy of ``network``: (ours, the eager loop).

    Both take real steps (forward, backward, optimiser) on the same weights and digits.
    """
    network = copy.deepcopy(network)
    optimizer = make_optimizer(network, config.lr)
    x, y = data.train_x[: config.batch_size], data.train_y[: config.batch_size]
    peers = [partial(train_step, model, optimizer, x, y) for model in (network, eager_twin(network))]
    ours, eager = median_seconds(peers, config.timing_rounds, config.device)
    return ours, eager


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)
