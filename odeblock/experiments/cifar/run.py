"""A run: a training and the folder that it lives in, where it stops and goes on.

``checkpoint.pt`` is all that goes on; ``log.jsonl`` is its log to read, a line for each start, each epoch and
the result. Each is written whole, the log first: a run that was killed between the two goes on from the
checkpoint before, and writes the log again.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Container
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ...activations import ACTIVATIONS
from ...arguments import MAX_NUMBER, MAX_SEED
from ...initializers import INITIALIZERS
from ...validation import STRATEGIES
from ..config import CIFAR_DEFAULTS, PRECISIONS, RATES, SCHEDULES, CifarConfig, Refusal
from ..outputs import atomic_file, provenance, remove_partial, save_checkpoint
from ..saved import explained, is_file, load_checkpoint
from .data import Cifar10
from .network import ConvNet, network_arguments, parameter_counts
from .processes import Processes
from .training import Training

CHECKPOINT, LOG = "checkpoint.pt", "log.jsonl"
KIND = "a checkpoint of train cifar10"
NUMBERS = {
    "start": ("step", "steps", "processes", "threads"),
    "epoch": ("epoch", "step", "train_loss", "validation_loss", "validation_accuracy", "lr", "seconds"),
    "result": ("validation_loss", "validation_accuracy"),
}
"""Of the lines of a log."""
CHOICES: dict[str, Container[str]] = {
    "norm": CIFAR_DEFAULTS,
    "init": INITIALIZERS,
    "activation": ACTIVATIONS,
    "backward": STRATEGIES,
    "schedule": SCHEDULES,
    "rates": RATES,
    "precision": PRECISIONS,
}
FREE = frozenset({"device", "backward"})
"""Settings that may be others when a run goes on: they change gradients by rounding alone."""


def read_checkpoint(folder: Path) -> dict[str, Any] | None:
    """What the run in ``folder`` has reached; None where there is none.

    Raises:
        Refusal: the file is there, and is not whole, or not of such a run.
    """
    path = folder / CHECKPOINT
    with explained(path, KIND):
        if not is_file(path):
            return None
        state = load_checkpoint(path, KIND)
        _check(state)
        return state


def _check(state: dict[str, Any]) -> None:
    """Raises an error of any kind where ``state`` is not as ``Training.state_dict`` makes one.

    Nothing of the sizes that it claims is made before its tensors are seen to have them.
    """
    config = CifarConfig(**state["config"])
    for key, usual in asdict(CifarConfig().resolved()).items():
        value = state["config"][key]
        number = isinstance(usual, (int, float)) or (key == "images" and value is not None)
        if type(value) is not type(usual) and not (number and type(value) is int):
            raise ValueError(f"config: {key} is {type(value).__name__}")
        least = 1 if type(value) is int and key != "seed" else 0
        if key in CHOICES:
            possible = value in CHOICES[key]
        else:
            most = MAX_NUMBER if key == "lr" else MAX_SEED
            possible = not number or (least <= value <= most and (key != "lr" or value > 0))
        if not possible:
            raise ValueError(f"config: {key} cannot be {value!r}")
    if state["network"] != network_arguments(config):
        raise ValueError("network: its arguments are not those of the settings")
    with torch.device("meta"):
        network = ConvNet(**{**state["network"], "init": "zero_v"})  # the others compute
    network.to(torch.float64 if config.precision == "float64" else torch.float32)
    expected = {name: (x.shape, x.dtype) for name, x in network.state_dict().items()}
    if {name: (x.shape, x.dtype) for name, x in state["state_dict"].items()} != expected:
        raise ValueError("state_dict: the tensors are not those of the network")
    if any(x.nbytes > x.untyped_storage().nbytes() for x in state["state_dict"].values()):
        raise ValueError("state_dict: a tensor is larger than its memory")
    for line in state["log"]:
        numbers = [line[key] for key in NUMBERS[line["kind"]]]
        if line["kind"] == "epoch":
            numbers += [*line["V"].values(), *line["W"].values()]
        if not all(map(math.isfinite, numbers)):
            raise ValueError("log: a number is not finite")
    if not json.loads(json.dumps(state["log"], allow_nan=False)):
        raise ValueError("log: it is empty")


def agreed(config: CifarConfig, state: dict[str, Any] | None) -> CifarConfig:
    """``config`` with its defaults filled in; it must be that of the run that goes on, if one does.

    Raises:
        Refusal: it is another; the text names the first setting that differs.
    """
    config = config.resolved()
    saved = asdict(config) if state is None else state["config"]
    for key, value in asdict(config).items():
        if value != saved[key] and key not in FREE:
            option = f"--{key.replace('_', '-')}"
            raise Refusal(f"argument {option}: the run that goes on has {saved[key]}, got {value}")
    return config


class Run:
    """The run in ``folder``, from its ``state`` (``read_checkpoint``) on, or from the start if that is None.

    Raises:
        Refusal: as ``agreed`` and ``Training`` say.
    """

    def __init__(
        self,
        folder: Path,
        config: CifarConfig,
        data: Cifar10,
        state: dict[str, Any] | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.folder = folder
        self.training = Training(agreed(config, state), data, processes)
        if state is not None:
            with explained(folder / CHECKPOINT, KIND):
                self.training.load_state_dict(state)
        if self.training.processes.first:
            remove_partial(folder)
        if not self.training.finished:
            self.training.log.append(self._start())
        self._saved = time.monotonic()

    def _start(self) -> dict[str, Any]:
        """The line that says what begins, or goes on, with what."""
        training = self.training
        device = training.processes.device
        line = {
            "kind": "start",
            "step": training.step,
            "steps": training.total_steps,
            "config": asdict(training.config),
            "data": training.data.description(),
            "parameters": parameter_counts(training.network),
            "processes": training.processes.count,
            "threads": torch.get_num_threads(),
            "processor": device if device == "cpu" else torch.cuda.get_device_name(device),
            **provenance(),
        }
        plain: dict[str, Any] = json.loads(json.dumps(line))  # of types that a checkpoint may hold
        return plain

    def go(
        self,
        *,
        minutes: float | None = None,
        checkpoint_every: float | None = None,
        stop: Callable[[], bool] = lambda: False,
        on_look: Callable[[float], None] = lambda loss: None,
        on_epoch: Callable[[dict[str, Any]], None] = lambda line: None,
    ) -> bool:
        """Train to the end; returns whether it is reached. A checkpoint is written after every epoch.

        Arguments:
            minutes: after which it stops, if given, with a checkpoint. checkpoint_every: seconds between two
                checkpoints within an epoch. stop, on_look, on_epoch: as of ``Training.run``.

        Raises:
            FloatingPointError: as ``Training.run``. The last checkpoint is from before.
        """
        begin = time.monotonic()

        def over() -> bool:
            return stop() or (minutes is not None and time.monotonic() - begin >= 60 * minutes)

        def save(due: bool) -> None:
            if due or (checkpoint_every is not None and time.monotonic() - self._saved >= checkpoint_every):
                self.save()

        return self.training.run(on_look=on_look, on_epoch=on_epoch, save=save, stop=over)

    def save(self) -> None:
        """Write both files; of several processes the first one does."""
        if self.training.processes.first:
            with atomic_file(self.folder / LOG) as file:
                for line in self.training.log:
                    file.write((json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode())
            save_checkpoint(self.folder / CHECKPOINT, self.training.state_dict())
        self._saved = time.monotonic()


def initial(state: dict[str, Any]) -> CifarConfig:
    """The settings with which ``build_network`` makes the network that a checkpoint's run started from."""
    return replace(CifarConfig(**state["config"]), device="cpu")
