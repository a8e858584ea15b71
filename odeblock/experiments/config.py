"""The settings of the experiment ``train``. Imports nothing, so that the command line can list defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TrainConfig:
    """Settings of ``python -m odeblock train``; both networks share them.

    depth: L. dim: q. hidden_dim: m, ``dim`` if None. activation: σ. backward: strategy of the block.
    epochs: passes over the training set. batch_size: rows of a step. lr: learning rate of A and B; V and W
    get L times as much (gradient flow, see ``loop.make_optimizer``). seed: of the initial weights, the order
    of the data and the coefficient that is drawn; not of the train/test split, which is fixed.
    device: "cpu", "cuda" or "cuda:N". timing_rounds: steps timed for each of ours and the eager loop.
    """

    depth: int = 256
    dim: int = 64
    hidden_dim: int | None = None
    epochs: int = 30
    batch_size: int = 64
    lr: float = 0.05
    seed: int = 0
    device: str = "cpu"
    activation: str = "gelu"
    backward: str = "auto"
    timing_rounds: int = 11


QUICK: dict[str, Any] = {"depth": 16, "dim": 16, "epochs": 2, "timing_rounds": 3}
"""What ``--quick`` puts in place of the defaults: seconds instead of a minute."""
