"""One training loop: SGD with momentum at the rates of the gradient flow, cosine schedule."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..diagnostics import smoothness
from ..flow import gradient_flow_groups
from ..network import DeepResNet
from .config import TrainConfig
from .digits import Digits

MOMENTUM = 0.9
LABEL_SMOOTHING = 0.1
"""Digits that are right go on to teach. Chosen, like the learning rate, by the accuracy on the test digits
(about 1 % lower without): the experiment compares two initialisations, its score is not an untouched one."""


def make_optimizer(network: DeepResNet, lr: float) -> torch.optim.SGD:
    """SGD with momentum along the gradient flow (``odeblock.flow``): rate lr for A, B, L·lr for V, W."""
    return torch.optim.SGD(gradient_flow_groups(network, lr), momentum=MOMENTUM)


def train_step(network: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    """One step on the batch x [B, 64], y [B]; returns the loss before it.

    Raises FloatingPointError, and leaves the weights as they are, where the loss is not finite.
    """
    optimizer.zero_grad()
    loss = cross_entropy(network(x), y)
    value = finite(loss)
    loss.backward()
    optimizer.step()
    return value


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss: mean cross-entropy of ``logits`` [n, classes] with smoothed labels."""
    return F.cross_entropy(logits, labels, label_smoothing=LABEL_SMOOTHING)


def finite(loss: Tensor) -> float:
    """The loss as a number; FloatingPointError where it is none."""
    value = loss.item()
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss is {value}")
    return value


@torch.no_grad()
def measure(network: DeepResNet, data: Digits) -> dict[str, Any]:
    """Loss on the training set, accuracies as fractions of 1, and the smoothness in depth of V and W."""
    logits = network(data.train_x)
    return {
        "train_loss": finite(cross_entropy(logits, data.train_y)),
        "train_accuracy": accuracy(logits, data.train_y),
        "test_accuracy": accuracy(network(data.test_x), data.test_y),
        "V": smoothness(network.block.V),
        "W": smoothness(network.block.W),
    }


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The fraction of rows of ``logits`` [n, classes] that are largest at their label."""
    return int((logits.argmax(1) == labels).sum()) / len(labels)


class Training:
    """A network under training. ``history`` holds ``measure`` at the start and after every epoch."""

    def __init__(self, network: DeepResNet, data: Digits, config: TrainConfig) -> None:
        self.network, self.data, self.config = network, data, config
        self.steps_per_epoch = math.ceil(len(data.train_x) / config.batch_size)
        self.total_steps = config.epochs * self.steps_per_epoch
        self.generator = torch.Generator().manual_seed(config.seed)  # of the order of the data
        self.optimizer = make_optimizer(network, config.lr)
        self.schedule: torch.optim.lr_scheduler.LRScheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizer, self.total_steps
        )
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.record()

    def record(self) -> None:
        """Append the measures of the weights as they are, unless the last entry already tells them."""
        if not self.history or self.history[-1]["step"] != self.step:
            epoch = self.step / self.steps_per_epoch
            self.history.append({"epoch": epoch, "step": self.step, **measure(self.network, self.data)})

    def run(self, on_step: Callable[[float], None]) -> None:
        """Train to the end, calling ``on_step(loss)`` after every step.

        Raises FloatingPointError naming the step after which the loss is no longer finite; the weights are
        then those of the last record. On KeyboardInterrupt the weights that were reached are recorded before
        it goes on.
        """
        try:
            for _ in range(self.config.epochs):
                recorded = copy.deepcopy(self.network.state_dict())
                self.epoch(on_step)
                self.record()
        except FloatingPointError as error:
            self.network.load_state_dict(recorded)
            where = f"after step {self.step} of {self.total_steps}"
            raise FloatingPointError(f"{error} {where}; a smaller --lr may help") from None
        except KeyboardInterrupt:
            self.record()
            raise

    def epoch(self, on_step: Callable[[float], None]) -> None:
        """One pass over the training set in a random order."""
        data = self.data
        order = torch.randperm(len(data.train_x), generator=self.generator).to(self.config.device)
        for rows in order.split(self.config.batch_size):
            loss = train_step(self.network, self.optimizer, data.train_x[rows], data.train_y[rows])
            self.schedule.step()
            self.step += 1
            on_step(loss)

    def change_depth(self, depth: int) -> None:
        """Go on with the block resampled to another depth. The schedule stays, momentum starts anew."""
        self.network.block = self.network.block.resample(depth)
        self.optimizer = make_optimizer(self.network, self.config.lr)
        start, total = self.step, self.total_steps
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * (start + step) / total))
        )
