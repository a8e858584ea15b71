"""The training of one network on CIFAR-10: steps, schedules, evaluation, and what a checkpoint holds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...diagnostics import smoothness
from ...flow import gradient_flow_groups
from ..config import CifarConfig, Refusal
from .batches import Batches, normalise, on_device
from .data import Cifar10
from .files import Images
from .graph import GraphedStep, Step
from .network import build_network, network_arguments
from .processes import Processes

MOMENTUM = 0.9
WARM_UP, LOWEST = 0.3, 0.04
"""Of the one-cycle schedule: the share of steps in which the rate rises, and where it starts."""
EVALUATED = 500  # images at a time
LOOK_EVERY = {"cpu": 1, "cuda": 25}
"""Steps between two looks at losses and gradients: each look waits for a GPU."""


def rate(schedule: str, progress: float) -> float:
    """The factor of the learning rate when ``progress``, from 0 to 1, of the steps are made."""
    falling = progress
    if schedule == "onecycle":
        if progress < WARM_UP:
            return LOWEST + (1 - LOWEST) * 0.5 * (1 - math.cos(math.pi * progress / WARM_UP))
        falling = (progress - WARM_UP) / (1 - WARM_UP)
    return 0.5 * (1 + math.cos(math.pi * falling))


class Training:
    """A network under training: SGD with momentum on the cross-entropy of augmented images.

    ``log``: a line for each epoch, and at the end one with the result; dicts that JSON holds. Of several
    processes all have the same weights and the same log. A training that goes on from a ``state_dict`` ends
    with the bits of one that never stopped, on a GPU as far as PyTorch's kernels give the same each time.

    One GPU replays a CUDA graph of forward and backward, unless ``backward`` is "adjoint".

    Raises:
        Refusal: the batch cannot be shared by the processes, or there are too few images for one.
    """

    def __init__(self, config: CifarConfig, data: Cifar10, processes: Processes | None = None) -> None:
        self.config, self.data = config.resolved(), data
        self.processes = processes or Processes(device=config.device)
        count, device = self.processes.count, self.processes.device
        if self.config.batch_size % count:
            raise Refusal(
                f"argument --batch-size: expected a multiple of the {count} processes, got "
                f"{self.config.batch_size}"
            )
        self.dtype = torch.float64 if self.config.precision == "float64" else torch.float32
        size, seed, rank = self.config.batch_size, self.config.seed, self.processes.rank
        self.batches = Batches(data.train, size, seed, device, rank, count, self.dtype)
        self.network = build_network(replace(self.config, device=device))
        self.model = self.processes.wrap(self.network)
        self.optimizer = torch.optim.SGD(self._groups(), momentum=MOMENTUM)
        self._differentiate: Step = self._gradients
        # An adjoint of maps asks the GPU at every step whether it has settled.
        if torch.device(device).type == "cuda" and count == 1 and self.config.backward != "adjoint":
            self._differentiate = GraphedStep(self._gradients, self.network)
        self.total_steps = self.config.epochs * self.batches.steps
        self.step = 0
        self.log: list[dict[str, Any]] = []
        self._losses, self._seconds = 0.0, 0.0  # of the epoch so far
        self._since = time.monotonic()

    def _groups(self) -> list[dict[str, Any]]:
        lr, decay = self.config.lr, self.config.weight_decay
        if self.config.rates == "flow":
            groups = gradient_flow_groups(self.network, lr, weight_decay=decay)
        else:
            groups = [{"params": list(self.network.parameters()), "lr": lr, "weight_decay": decay}]
        return [{**group, "initial_lr": group["lr"]} for group in groups]

    @property
    def epochs(self) -> list[dict[str, Any]]:
        """The lines of the log that tell of epochs."""
        return [line for line in self.log if line["kind"] == "epoch"]

    @property
    def finished(self) -> bool:
        """Whether it has a result."""
        return bool(self.log) and self.log[-1]["kind"] == "result"

    # ---- steps -------------------------------------------------------------------------------------------

    def run(
        self,
        *,
        on_look: Callable[[float], None],
        on_epoch: Callable[[dict[str, Any]], None],
        save: Callable[[bool], None],
        stop: Callable[[], bool],
    ) -> bool:
        """Train to the end, or until ``stop()``; returns whether it is the end.

        Arguments:
            on_look: called with the loss whenever one is known. on_epoch: with every new line of the log.
            save: called after every look and at the end, with whether a checkpoint must be written: after an
                epoch, and before it stops. stop: asked at every look; one process is enough.

        Raises:
            FloatingPointError: a loss or a gradient is not finite; the text says at which step.
        """
        every = LOOK_EVERY[torch.device(self.processes.device).type]
        self._since = time.monotonic()
        unseen: list[Tensor] = []
        while self.step < self.total_steps:
            unseen.append(self._train_step())
            ended = self.step % self.batches.steps == 0
            if not ended and self.step % every:
                continue
            loss, stopped = self._look(unseen, stop())
            unseen.clear()
            on_look(loss)
            if ended:
                self._record()
                on_epoch(self.log[-1])
            save(ended or stopped)
            if stopped and self.step < self.total_steps:
                return False
        if not self.finished:
            self._result()
            save(True)
        return True

    def _train_step(self) -> Tensor:
        """One step; returns the loss before it and the norm of its gradient, [2]; does not wait for them."""
        self._set_rates(self.step)
        self.network.train()
        found = self._differentiate(*self.batches.next())
        self.optimizer.step()
        self.step += 1
        return found

    def _gradients(self, x: Tensor, y: Tensor) -> Tensor:
        """Leaves those of a batch in the parameters; returns its loss and their norm, [2], float64."""
        self.network.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self._logits(self.model, x), y)
        loss.backward()
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        return torch.stack([loss.detach(), norm]).double()

    def _set_rates(self, step: int) -> None:
        """Those of the step after ``step`` steps."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self._factor(step)

    def _factor(self, step: int) -> float:
        """Of the rates, after ``step`` steps."""
        return rate(str(self.config.schedule), step / self.total_steps)

    def _logits(self, model: torch.nn.Module, x: Tensor) -> Tensor:
        low = self.config.precision == "bfloat16"
        # No cache: each weight is cast once, and a CUDA graph must cast it anew.
        with torch.autocast(x.device.type, torch.bfloat16, enabled=low, cache_enabled=False):
            y: Tensor = model(x)
        return y.to(self.dtype)

    def _look(self, unseen: list[Tensor], stop: bool) -> tuple[float, bool]:
        """Add up the losses of the last steps; returns the last one, and whether any process is to stop."""
        *values, stopping = self.processes.sum(*torch.cat(unseen).tolist(), float(stop))
        means = [value / self.processes.count for value in values]
        losses, norms = means[::2], means[1::2]
        for behind, (loss, norm) in enumerate(zip(losses, norms, strict=True), start=1 - len(losses)):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise FloatingPointError(self._explanation(self.step + behind, loss, norm))
            self._losses += loss
        return losses[-1], stopping > 0

    def _explanation(self, step: int, loss: float, norm: float) -> str:
        """Of the first step whose loss, or the norm of whose gradient, is not finite."""
        where = (
            f"step {step} of {self.total_steps} (epoch {(step - 1) // self.batches.steps + 1}, rate "
            f"{self.config.lr * self._factor(step - 1):.3g})"
        )
        if not math.isfinite(loss):
            return (
                f"the loss is {loss} at {where}, after gradients that were finite: with these weights the "
                "network's outputs overflow; a smaller --lr may help"
            )
        adjoint = ", or another --backward" if self.config.backward == "adjoint" else ""
        return f"the gradient is {norm} at {where}, its loss {loss:.4g}; a smaller --lr may help{adjoint}"

    # ---- lines of the log --------------------------------------------------------------------------------

    def _record(self) -> None:
        """The line of an epoch that has just ended."""
        loss, accuracy = self.evaluate(self.data.validation)
        self._seconds += time.monotonic() - self._since
        entry = {
            "kind": "epoch",
            "epoch": self.step // self.batches.steps,
            "step": self.step,
            "train_loss": self._losses / self.batches.steps,
            "validation_loss": loss,
            "validation_accuracy": accuracy,
            "lr": self.config.lr * self._factor(self.step - 1),
            "seconds": round(self._seconds, 3),
            "V": smoothness(self.network.block.V),
            "W": smoothness(self.network.block.W),
        }
        self.log.append(entry)
        self._losses, self._seconds, self._since = 0.0, 0.0, time.monotonic()

    def _result(self) -> None:
        """The last line: the test set's, looked at once, where there is one."""
        last = self.epochs[-1]
        result = {"kind": "result", **{key: last[key] for key in ("validation_loss", "validation_accuracy")}}
        if self.data.test is not None:
            result["test_loss"], result["test_accuracy"] = self.evaluate(self.data.test)
        self.log.append(result)

    @torch.no_grad()
    def evaluate(self, images: Images) -> tuple[float, float]:
        """Mean loss, and the share of images that are right, as they are: not augmented.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        self.processes.share_buffers(self.network)
        self.network.eval()
        loss = right = 0.0
        pixels, labels = (self.processes.share(t) for t in on_device(images, self.processes.device))
        for few, y in zip(pixels.split(EVALUATED), labels.split(EVALUATED), strict=True):
            logits = self._logits(self.network, normalise(few, self.dtype))
            loss += float(F.cross_entropy(logits, y, reduction="sum"))
            right += int((logits.argmax(1) == y).sum())
        loss, right = (total / len(images) for total in self.processes.sum(loss, right))
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss of the images that it is evaluated on is {loss} after step {self.step} of "
                f"{self.total_steps}; a smaller --lr may help"
            )
        return loss, right

    # ---- checkpoints -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that goes on: tensors and plain values. The network alone: ``ConvNet(**state["network"])``."""
        return {
            "config": asdict(self.config),
            "network": network_arguments(self.config),
            "state_dict": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "batches": self.batches.state_dict(),
            "step": self.step,
            "log": self.log,
            "epoch_losses": self._losses,
            "epoch_seconds": self._seconds + time.monotonic() - self._since,
            "data": self.data.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what a training with the same settings saved.

        Raises:
            Refusal: it was trained on other images.
            ValueError: it is where no such training can be. One that is none raises errors of other kinds.
        """
        if state["data"] != self.data.fingerprint:
            raise Refusal("argument --data: expected the images that this run began with, got others")
        step, log = state["step"], state["log"]
        steps, position = self.batches.steps, state["batches"]["position"]
        epochs = sum(line["kind"] == "epoch" for line in log)
        if (
            not 0 <= step <= self.total_steps
            or position != (step - 1) % steps + 1 * (step > 0)
            or epochs != step // steps
        ):
            raise ValueError(f"step {step}: expected one of the {self.total_steps}, and a log up to it")
        self.network.load_state_dict(state["state_dict"])
        # The groups, rates among them, follow from the settings; the momentum does not.
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
        for parameter, kept in self.optimizer.state.items():
            if kept["momentum_buffer"].shape != parameter.shape:
                raise ValueError("optimizer: a momentum of another shape than its parameter's")
        self.batches.load_state_dict(state["batches"])
        if step > 0:
            self._set_rates(step - 1)
        self.step, self.log = step, log
        self._losses, self._seconds = float(state["epoch_losses"]), float(state["epoch_seconds"])
