"""``python -m odeblock train cifar10``: one run, told live, stopped by Ctrl-C or by the clock, resumed."""

from __future__ import annotations

import signal
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ...arguments import device
from ..config import CifarConfig, Refusal
from .data import Cifar10, download, load
from .network import parameter_counts
from .processes import Processes, processes
from .run import Run, read_checkpoint

INTERRUPTED = 130


@dataclass(frozen=True)
class Options:
    """What a call is told beside the settings.

    output: folder of the run. data: of CIFAR-10, None for images that are made up. download: whether to fetch
    it if need be. resume: whether to go on with the run in ``output``, if there is one. minutes,
    checkpoint_every: as of ``Run.go``.
    """

    output: Path
    data: Path | None = None
    download: bool = False
    resume: bool = False
    minutes: float | None = None
    checkpoint_every: float | None = None


def train(config: CifarConfig, given: dict[str, Any], options: Options) -> int:
    """Train a network: ``config`` with ``given`` in the place of its values; a run that goes on has its own.

    Returns the exit code: 0, also when the minutes are over; 1 when a loss or a gradient was no longer
    finite; 130 after Ctrl-C, or after SIGTERM, which ends it after the step under way.

    Raises:
        Refusal: options that do not fit; the text is one line. OSError: a file cannot be written; the
            checkpoint is the last one.
    """
    state = read_checkpoint(options.output)
    if state is not None and not options.resume:
        raise Refusal(
            f"argument --output: expected a folder without a run, got {str(options.output)!r}; --resume goes "
            "on with it"
        )
    if state is not None:
        config = CifarConfig(**state["config"])
    config = replace(config, **given)
    check_device(config)
    with processes(config.device) as group:
        console = Console(quiet=not group.first)
        run = Run(options.output, config, _load(options, config, group), state, group)
        return _go(run, options, console)


def check_device(config: CifarConfig) -> None:
    """Of a run that goes on it is the one where it was; a Refusal where there is none here."""
    try:
        device(config.device)
    except ArgumentTypeError as error:
        raise Refusal(f"argument --device: {error}") from None


def _load(options: Options, config: CifarConfig, group: Processes) -> Cifar10:
    if options.download and options.data is not None and group.first:
        download(options.data)
    group.wait()
    return load(options.data, config.images)


def _go(run: Run, options: Options, console: Console) -> int:
    training = run.training
    console.print(_title(run), style="bold", markup=False, soft_wrap=True)
    epochs, code = training.config.epochs, 0
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    message = ""
    with _signals() as caught, Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=training.total_steps, note="")

        def on_look(loss: float) -> None:
            epoch = min(training.step // training.batches.steps + 1, epochs)
            text = f"epoch {epoch}/{epochs}"
            progress.update(task, completed=training.step, description=text, note=f"loss {loss:.4f}")

        def on_epoch(line: dict[str, Any]) -> None:
            progress.console.print(_epoch(line), markup=False, soft_wrap=True)

        progress.update(task, completed=training.step)
        try:
            finished = run.go(
                minutes=options.minutes,
                checkpoint_every=options.checkpoint_every,
                stop=lambda: bool(caught),
                on_look=on_look,
                on_epoch=on_epoch,
            )
            if not finished:
                over = options.minutes is not None and not caught
                code = 0 if over else INTERRUPTED
                message = (
                    f"{f'stopped after {options.minutes:g} minutes' if over else 'interrupted'} at step "
                    f"{training.step} of {training.total_steps}; --resume goes on from there"
                )
        except FloatingPointError as error:
            code, message = 1, f"stopped: {error}"
    console.print(message or _result(training.log[-1]), style="bold", markup=False, soft_wrap=True)
    console.print(f"saved in {options.output}", markup=False, soft_wrap=True)
    return code


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Gathers the first SIGINT or SIGTERM in a list, in the place of what it would do; a second one does."""
    caught: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {
        number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _title(run: Run) -> str:
    config, data = run.training.config, run.training.data
    count = parameter_counts(run.training.network)["all"]
    return (
        f"CIFAR-10 ({data.form}, {len(data.train)} images), L = {config.depth}, {config.channels} channels, "
        f"{count} parameters, {config.activation}, norm {config.norm}, init {config.init}, "
        f"{config.schedule}, rates {config.rates}, {config.precision}, seed {config.seed}"
    )


def _epoch(line: dict[str, Any]) -> str:
    return (
        f"epoch {line['epoch']:>3}  loss {line['train_loss']:.4f}  validation {line['validation_loss']:.4f}, "
        f"{100 * line['validation_accuracy']:.2f} %  rate {line['lr']:.2g}  {line['seconds']:.0f} s"
    )


def _result(line: dict[str, Any]) -> str:
    accuracies = {part: line.get(f"{part}_accuracy") for part in ("validation", "test")}
    return ", ".join(f"{part} accuracy {100 * a:.2f} %" for part, a in accuracies.items() if a is not None)
