"""The command line: ``python -m odeblock info | train``."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from .activations import ACTIVATIONS
from .build import build_info
from .experiments.config import QUICK, TrainConfig
from .validation import STRATEGIES

MAX_SEED = 2**63 - 1
EXTRAS = {"matplotlib", "rich", "sklearn"}
INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """Refuses with one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code. Wrong options end the process with code 2."""
    parser = _Parser(
        prog="python -m odeblock", description="Very deep residual networks.", allow_abbrev=False
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (_add_info, _add_train):
        add(commands)
    arguments = parser.parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except KeyboardInterrupt:
        code = INTERRUPTED
    return code


# ---- info ------------------------------------------------------------------------------------------------


def _add_info(commands: Any) -> None:
    parser = commands.add_parser("info", help="what was built, and what will run here")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_info)


def _info(arguments: argparse.Namespace) -> int:
    info = build_info()
    if arguments.json:
        print(json.dumps(info, indent=2))
        return 0
    paths = info.pop("paths")
    lines = {key.replace("_", " "): _readable(value) for key, value in info.items()}
    lines.update({f"path: {where}": what for where, what in paths.items()})
    width = max(map(len, lines))
    print("\n".join(f"{key:<{width}}  {value}" for key, value in lines.items()))
    return 0


def _readable(value: Any) -> str:
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


# ---- train -----------------------------------------------------------------------------------------------


def _add_train(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="train on handwritten digits from smooth and from i.i.d. weights, and compare",
        description="Train on handwritten digits from smooth and from i.i.d. weights, and compare.",
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for all files")
    parser.add_argument("--quick", action="store_true", help="a run of seconds: small and short by default")

    default, quick = TrainConfig(), replace(TrainConfig(), **QUICK)

    def option(name: str, kind: Callable[[str], Any], text: str, **extra: Any) -> None:
        key = name[2:].replace("-", "_")
        usual, small = getattr(default, key), getattr(quick, key)
        shown = f"{'dim' if usual is None else usual}" + (f"; quick: {small}" if small != usual else "")
        parser.add_argument(name, type=kind, help=f"{text} (default: {shown})", **extra)

    option("--depth", _whole_number(1), "L, residual steps", metavar="L")
    option("--dim", _whole_number(1), "q, features", metavar="Q")
    option("--hidden-dim", _whole_number(1), "m, hidden units of a step", metavar="M")
    option("--epochs", _whole_number(1), "passes over the training set", metavar="N")
    option("--batch-size", _whole_number(1), "rows of a step", metavar="B")
    option("--lr", _learning_rate, "learning rate of A and B; V and W get L times as much", metavar="LR")
    option("--seed", _whole_number(0, MAX_SEED), "of weights and order of the data", metavar="S")
    option("--device", _device, "cpu, cuda or cuda:N", metavar="DEVICE")
    option("--activation", str, "σ", choices=list(ACTIVATIONS))
    option("--backward", str, "backward strategy", choices=STRATEGIES)
    parser.set_defaults(run=lambda arguments: _train(arguments, parser))


def _train(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    try:
        from .experiments.train import train
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        parser.error(f"{package} is not installed, please run: pip install 'odeblock[experiments]'")
    output = arguments.output
    try:
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        parser.error(
            f"argument --output: expected a folder to write to, got {str(output)!r} ({error.strerror})"
        )
    config = replace(TrainConfig(), **(QUICK if arguments.quick else {}))
    names = {field.name for field in fields(TrainConfig)}
    given = {key: value for key, value in vars(arguments).items() if key in names and value is not None}
    return train(replace(config, **given), output)


# ---- kinds of option values ------------------------------------------------------------------------------


def _whole_number(low: int, high: float = math.inf) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]+", text) or not low <= int(text) <= high:
            upper = f" and <= {high}" if math.isfinite(high) else ""
            raise argparse.ArgumentTypeError(f"expected a whole number >= {low}{upper}, got {text!r}")
        return int(text)

    return parse


def _learning_rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"expected a finite number > 0, got {text!r}")
    return value


def _device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", text):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {text!r}")
    count = torch.cuda.device_count()
    if text != "cpu" and int(text.partition(":")[2] or 0) >= count:
        raise argparse.ArgumentTypeError(
            f"expected cpu or one of the {count} GPUs that PyTorch sees here, got {text!r}"
        )
    return text


if __name__ == "__main__":
    sys.exit(main())
