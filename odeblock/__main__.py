"""The command line: ``python -m odeblock info | train | reproduce | bench``."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import re
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch

from .activations import ACTIVATIONS
from .build import build_info
from .experiments.config import BENCH_QUICK, EXPERIMENTS, QUICK, BenchConfig, TrainConfig
from .validation import STRATEGIES

MAX_SEED = 2**63 - 1
EXTRAS = {"matplotlib", "rich", "sklearn"}
INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """Refuses with one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


INTRODUCTION = """\
Very deep residual networks, h <- h + V_k s(W_k h) / L for k = 1 .. L, in the regime of neural ODEs.

  python -m odeblock info                      what was built, and what will run here
  python -m odeblock train --quick             two networks on real digits, in seconds
  python -m odeblock reproduce long-time       an experiment of the paper, figures and numbers
  python -m odeblock bench --depth 512         speed and memory of a block of your sizes

Each command explains itself: python -m odeblock COMMAND --help
"""

EXIT_CODES = "exit codes: 0 done; 1 the loss was no longer finite; 2 wrong options; 130 interrupted (Ctrl-C)"


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code. Wrong options end the process with code 2."""
    parser = _Parser(
        prog="python -m odeblock",
        description=INTRODUCTION,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (_add_info, _add_train, _add_reproduce, _add_bench):
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
        description="Train on handwritten digits from smooth and from i.i.d. weights, and compare: accuracy, "
        "smoothness in depth, memory and time. Writes a table, a figure, checkpoints and results.json.",
        epilog=EXIT_CODES,
        allow_abbrev=False,
    )
    _add_common(parser, "outputs/train")
    option = _options(parser, TrainConfig(), replace(TrainConfig(), **QUICK))
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
    train = _experiment("train", parser).train
    config = _given(arguments, replace(TrainConfig(), **(QUICK if arguments.quick else {})))
    output = _writable(arguments.output, parser)
    with _threads_for(small=arguments.quick):
        code: int = train(config, output)
    return code


# ---- reproduce -------------------------------------------------------------------------------------------


def _add_reproduce(commands: Any) -> None:
    width = max(map(len, EXPERIMENTS))
    names = "\n".join(f"  {name:<{width}}  {listing.text}" for name, listing in EXPERIMENTS.items())
    parser = commands.add_parser(
        "reproduce",
        help="an experiment of the paper: figures and every number",
        description="Redraw an experiment of Marion, Wu, Sander & Biau, ICLR 2024 (docs/paper.md compares):"
        f"\n\n{names}\n\nWrites figures (PDF and PNG), NAME.csv, and NAME.json with settings, versions and "
        "every number.\nInterrupted, it goes on where it was when it is called again, also after calls with "
        "other settings.",
        epilog=f"{_settings()}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("name", choices=list(EXPERIMENTS), metavar="NAME", help="one of those above")
    _add_common(parser, "outputs/NAME; quick: outputs/NAME-quick")
    parser.add_argument(
        "--seed", type=_whole_number(0, MAX_SEED), metavar="S", help="of weights and data (default: 0)"
    )
    parser.set_defaults(run=lambda arguments: _reproduce(arguments, parser))


def _settings() -> str:
    lines = ["settings, full:"]
    for name, listing in EXPERIMENTS.items():
        settings = ", ".join(
            f"{key}={value[0]}..{value[-1]}" if isinstance(value, tuple) else f"{key}={value}"
            for key, value in asdict(listing.config).items()
            if key != "seed"
        )
        lines.append(textwrap.fill(f"{name}: {settings}", 100, initial_indent="  ", subsequent_indent="    "))
    return "\n".join(lines)


def _reproduce(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    harness = _experiment("reproduce", parser)
    _experiment(arguments.name.replace("-", "_"), parser)  # its packages are asked for before anything runs
    listing = EXPERIMENTS[arguments.name]
    config = _given(arguments, listing.quick if arguments.quick else listing.config)
    output = arguments.output or Path("outputs") / (arguments.name + "-quick" * arguments.quick)
    _writable(output, parser)
    _writable(output / harness.PARTS, parser)
    with _threads_for(small=arguments.quick or listing.small):
        code: int = harness.reproduce(arguments.name, config, output)
    return code


# ---- bench -----------------------------------------------------------------------------------------------


def _add_bench(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="speed and memory of a block here, by backward strategy, against a PyTorch loop",
        description="Speed and memory of a block here, by backward strategy, against a loop of PyTorch "
        "operators: medians of runs that take turns. Wants a quiet machine. Writes bench.json.",
        epilog=EXIT_CODES,
        allow_abbrev=False,
    )
    _add_common(parser, "outputs/bench")
    option = _options(parser, BenchConfig(), replace(BenchConfig(), **BENCH_QUICK))
    option("--depth", _whole_number(1), "L, residual steps", metavar="L")
    option("--dim", _whole_number(1), "q, features", metavar="Q")
    option("--hidden-dim", _whole_number(1), "m, hidden units of a step", metavar="M")
    option("--batch-size", _whole_number(1), "rows", metavar="B")
    option("--seed", _whole_number(0, MAX_SEED), "of weights and rows", metavar="S")
    option("--device", _device, "cpu, cuda or cuda:N", metavar="DEVICE")
    option("--activation", str, "σ", choices=list(ACTIVATIONS))
    parser.set_defaults(run=lambda arguments: _bench(arguments, parser))


def _bench(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    bench = _experiment("bench", parser).bench
    config = _given(arguments, replace(BenchConfig(), **(BENCH_QUICK if arguments.quick else {})))
    code: int = bench(config, _writable(arguments.output, parser))
    return code


# ---- what commands share ---------------------------------------------------------------------------------


def _add_common(parser: argparse.ArgumentParser, folder: str) -> None:
    parser.add_argument(
        "--output",
        type=Path,
        default=None if "NAME" in folder else Path(folder),
        metavar="DIR",
        help=f"folder for all files (default: {folder})",
    )
    parser.add_argument("--quick", action="store_true", help="a run of seconds: small and short by default")


def _options(parser: argparse.ArgumentParser, default: Any, quick: Any) -> Callable[..., None]:
    """Adds options for fields of a configuration, whose help tells their defaults."""

    def option(name: str, kind: Callable[[str], Any], text: str, **extra: Any) -> None:
        key = name[2:].replace("-", "_")
        usual, small = getattr(default, key), getattr(quick, key)
        shown = f"{'dim' if usual is None else usual}" + (f"; quick: {small}" if small != usual else "")
        parser.add_argument(name, type=kind, help=f"{text} (default: {shown})", **extra)

    return option


def _given(arguments: argparse.Namespace, config: Any) -> Any:
    """The configuration with what was given in the place of its values."""
    names = {field.name for field in fields(config)}
    given = {key: value for key, value in vars(arguments).items() if key in names and value is not None}
    return replace(config, **given)


def _experiment(name: str, parser: argparse.ArgumentParser) -> ModuleType:
    """A module of ``odeblock.experiments``; one line with the remedy where a package is missing."""
    try:
        return importlib.import_module(f".experiments.{name}", __package__)
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        parser.error(f"{package} is not installed, please run: pip install 'odeblock[experiments]'")


@contextmanager
def _threads_for(*, small: bool) -> Iterator[None]:
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


def _writable(output: Path, parser: argparse.ArgumentParser) -> Path:
    """The folder, made if need be."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        parser.error(
            f"argument --output: expected a folder to write to, got {str(output)!r} ({error.strerror})"
        )
    return output


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
