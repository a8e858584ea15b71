"""What the commands of ``python -m odeblock`` share: options, kinds of their values, refusals on one line."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch

from .experiments.outputs import remove_partial

MAX_SEED = 2**63 - 1
MAX_COUNT = 2**31 - 1
MAX_NUMBER = 1e29
"""Times any depth it is a rate that a float32 can hold."""
EXTRAS = {"matplotlib", "rich", "sklearn"}


class Parser(argparse.ArgumentParser):
    """Refuses with one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def add_common(parser: argparse.ArgumentParser, folder: str) -> None:
    parser.add_argument(
        "--output",
        type=output_folder,
        default=None if "NAME" in folder else Path(folder),
        metavar="DIR",
        help=f"folder for all files (default: {folder})",
    )
    parser.add_argument("--quick", action="store_true", help="a run of seconds: small and short by default")


def options(parser: argparse.ArgumentParser, default: Any, quick: Any) -> Callable[..., None]:
    """Adds options for fields of a configuration, whose help tells their defaults.

    Of one that is None by default it tells ``unset``.
    """

    def option(
        name: str, kind: Callable[[str], Any], text: str, *others: str, unset: str = "dim", **extra: Any
    ) -> None:
        key = name[2:].replace("-", "_")
        usual, small = getattr(default, key), getattr(quick, key)
        shown = f"{unset if usual is None else usual}" + (f"; quick: {small}" if small != usual else "")
        parser.add_argument(name, *others, type=kind, help=f"{text} (default: {shown})", **extra)

    return option


def given(arguments: argparse.Namespace, config: Any) -> Any:
    """The configuration with what was given in the place of its values."""
    return replace(config, **given_values(arguments, config))


def given_values(arguments: argparse.Namespace, config: Any) -> dict[str, Any]:
    """What was given of a configuration's fields."""
    names = {field.name for field in fields(config)}
    return {key: value for key, value in vars(arguments).items() if key in names and value is not None}


def experiment(name: str, parser: argparse.ArgumentParser) -> ModuleType:
    """A module of ``odeblock.experiments``; one line with the remedy where a package is missing."""
    try:
        return importlib.import_module(f".experiments.{name}", __package__)
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        parser.error(f"{package} is not installed, please run: pip install 'odeblock[experiments]'")


@contextmanager
def threads_for(*, small: bool) -> Iterator[None]:
    """One thread for small networks, unless OMP_NUM_THREADS says otherwise.

    A second one gains nothing there, and where other programs keep the processors busy OpenMP's threads,
    which wait by spinning, take 20 times longer. (OMP_WAIT_POLICY has no effect any more: torch is loaded.)
    """
    before = torch.get_num_threads()
    if small and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def writable(output: Path, parser: argparse.ArgumentParser) -> Path:
    """The folder, made if need be, without what calls that were killed left unfinished."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
        remove_partial(output)
    except OSError as error:
        parser.error(
            f"argument --output: expected a folder to write to, got {str(output)!r} ({error.strerror})"
        )
    return output


# ---- kinds of option values ------------------------------------------------------------------------------


def output_folder(text: str) -> Path:
    if not text:  # which Path takes for the current folder
        raise argparse.ArgumentTypeError("expected a folder to write to, got ''")
    return Path(text)


def whole_number(low: int, high: int = MAX_COUNT) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,20}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"expected a whole number >= {low} and <= {high}, got {text!r}")
        return int(text)

    return parse


def positive_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= MAX_NUMBER:
        raise argparse.ArgumentTypeError(f"expected a finite number > 0 and <= {MAX_NUMBER:g}, got {text!r}")
    return value


def device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", text):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {text!r}")
    count = torch.cuda.device_count()
    if text != "cpu" and int(text.partition(":")[2] or 0) >= count:
        raise argparse.ArgumentTypeError(
            f"expected cpu or one of the {count} GPUs that PyTorch sees here, got {text!r}"
        )
    return text
