"""The command line: ``python -m odeblock info | train | reproduce | bench``."""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .activations import ACTIVATIONS
from .arguments import (
    MAX_SEED,
    Parser,
    add_common,
    device,
    experiment,
    given,
    given_values,
    options,
    positive_number,
    threads_for,
    whole_number,
    writable,
)
from .build import build_info
from .experiments.config import (
    BENCH_QUICK,
    CIFAR_DEFAULTS,
    CIFAR_QUICK,
    EXPERIMENTS,
    PRECISIONS,
    QUICK,
    RATES,
    SCHEDULES,
    BenchConfig,
    CifarConfig,
    Refusal,
    TrainConfig,
)
from .initializers import INITIALIZERS
from .validation import STRATEGIES

INTERRUPTED = 130

INTRODUCTION = """\
Very deep residual networks, h <- h + V_k s(W_k h) / L for k = 1 .. L, in the regime of neural ODEs.

  python -m odeblock info                      what was built, and what will run here
  python -m odeblock train --quick             two networks on real digits, in seconds
  python -m odeblock train cifar10 --data DIR  the paper's convolutional network on CIFAR-10
  python -m odeblock reproduce long-time       an experiment of the paper, figures and numbers
  python -m odeblock bench --depth 512         speed and memory of a block of your sizes

Each command explains itself: python -m odeblock COMMAND --help
"""

EXIT_CODES = (
    "exit codes: 0 done; 1 stopped, for the loss was no longer finite, a file could not be written or memory "
    "ran out; 2 wrong options; 130 interrupted (Ctrl-C)"
)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code. Wrong options end the process with code 2."""
    parser = Parser(
        prog="python -m odeblock",
        description=INTRODUCTION,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(several=False)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (_add_info, _add_train, _add_reproduce, _add_bench):
        add(commands)
    arguments = parser.parse_args(argv)
    count = os.environ.get("WORLD_SIZE", "1")
    if count != "1" and not arguments.several:
        parser.error(
            f"expected one process, got {count} (WORLD_SIZE, from torchrun): of what takes time only "
            "train cifar10 shares its work"
        )
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # of "| head", which has seen enough
            _tell(f"{error.filename or 'standard output'}: {error.strerror or error}")
        code = 1
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        _tell(" ".join(["out of memory, fewer samples at once need less:", *str(error).splitlines()[:1]]))
        code = 1
    return code


def _is_out_of_memory(error: Exception) -> bool:
    """PyTorch has a type of its own for a GPU's memory, and none for the CPU's."""
    own = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return own or "allocate memory" in str(error)


def _tell(problem: str) -> None:
    """Why nothing more is done, on one line."""
    print(f"python -m odeblock: error: {problem}", file=sys.stderr)


# ---- info ------------------------------------------------------------------------------------------------


def _add_info(commands: Any) -> None:
    parser = commands.add_parser("info", help="what was built, and what will run here")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_info, several=True)


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
    add_common(parser, "outputs/train")
    option = options(parser, TrainConfig(), replace(TrainConfig(), **QUICK))
    option("--depth", whole_number(1), "L, residual steps", metavar="L")
    option("--dim", whole_number(1), "q, features", metavar="Q")
    option("--hidden-dim", whole_number(1), "m, hidden units of a step", metavar="M")
    option("--epochs", whole_number(1), "passes over the training set", metavar="N")
    option("--batch-size", whole_number(1), "rows of a step", metavar="B")
    option("--lr", positive_number, "learning rate of A and B; V and W get L times as much", metavar="LR")
    option("--seed", whole_number(0, MAX_SEED), "of weights and order of the data", metavar="S")
    option("--device", device, "cpu, cuda or cuda:N", metavar="DEVICE")
    option("--activation", str, "σ", choices=list(ACTIVATIONS))
    option("--backward", str, "backward strategy", choices=STRATEGIES)
    parser.set_defaults(run=lambda arguments: _train(arguments, parser))
    _add_cifar10(parser.add_subparsers(metavar="DATA", title="other data"))


def _train(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    train = experiment("train", parser).train
    config = given(arguments, replace(TrainConfig(), **(QUICK if arguments.quick else {})))
    output = writable(arguments.output, parser)
    with threads_for(small=arguments.quick):
        code: int = train(config, output)
    return code


def _add_cifar10(data: Any) -> None:
    parser = data.add_parser(
        "cifar10",
        help="train the paper's convolutional network on CIFAR-10",
        description="Train a deep convolutional network on CIFAR-10. Writes checkpoint.pt, from which "
        "--resume goes on, and log.jsonl, a line for each epoch. The defaults are the paper's, which want a "
        "GPU; without batch normalisation (--norm none) those that go with it. On several processors or "
        "GPUs: torchrun --nproc-per-node N -m odeblock train cifar10 ...",
        epilog=EXIT_CODES,
        allow_abbrev=False,
    )
    add_common(parser, "outputs/cifar10")
    option = options(parser, CifarConfig(), replace(CifarConfig(), **CIFAR_QUICK))

    def by_norm(key: str) -> str:
        return ", ".join(f"{usual[key]} with norm {norm}" for norm, usual in CIFAR_DEFAULTS.items())

    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder with cifar-10-batches-py, cifar-10-batches-bin, an archive of one as downloaded, or an "
        ".npz of JPEG files (without: quick makes up a few images)",
    )
    parser.add_argument("--download", action="store_true", help="fetch it into that folder, with torchvision")
    option("--images", whole_number(1), "only the first so many for training", metavar="N", unset="all")
    option("--depth", whole_number(1), "L, residual steps", metavar="L")
    option("--channels", whole_number(1), "of the maps", metavar="C")
    option("--norm", str, "batch normalisation everywhere, or nowhere", choices=list(CIFAR_DEFAULTS))
    option("--init", str, "of V and W", choices=list(INITIALIZERS), unset=by_norm("init"))
    option("--activation", str, "σ", choices=list(ACTIVATIONS))
    option("--backward", str, "backward strategy", choices=STRATEGIES)
    option("--epochs", whole_number(1), "passes over the training set", metavar="N")
    option("--batch-size", whole_number(1), "images of a step", "--batch", metavar="B")
    option("--lr", positive_number, "largest learning rate", metavar="LR")
    option("--schedule", str, "of the learning rate", choices=SCHEDULES, unset=by_norm("schedule"))
    option("--rates", str, "flow: L times lr for the block", choices=RATES, unset=by_norm("rates"))
    option("--precision", str, "bfloat16: of products, by autocast", choices=PRECISIONS)
    option("--seed", whole_number(0, MAX_SEED), "of weights, order and augmentation", metavar="S")
    option("--device", device, "cpu, cuda or cuda:N", metavar="DEVICE")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in --output, if there is one"
    )
    parser.add_argument(
        "--minutes", type=positive_number, metavar="M", help="stop after so many; --resume goes on"
    )
    parser.add_argument(
        "--checkpoint-every",
        type=positive_number,
        default=600.0,
        metavar="SECONDS",
        help="between two checkpoints within an epoch; there is one after every epoch (default: 600)",
    )
    parser.set_defaults(run=lambda arguments: _train_cifar10(arguments, parser), several=True)


def _train_cifar10(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    command = experiment("cifar.command", parser)
    if arguments.data is None and (arguments.download or not arguments.quick):
        parser.error("argument --data: expected a folder for CIFAR-10, got none (--quick runs without)")
    config = replace(CifarConfig(), **(CIFAR_QUICK if arguments.quick else {}))
    names = ("data", "download", "resume", "minutes", "checkpoint_every")
    chosen = {name: getattr(arguments, name) for name in names}
    told = command.Options(output=writable(arguments.output, parser), **chosen)
    with threads_for(small=arguments.quick):
        try:
            code: int = command.train(config, given_values(arguments, config), told)
        except Refusal as refused:
            parser.error(str(refused))
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
    add_common(parser, "outputs/NAME; quick: outputs/NAME-quick")
    parser.add_argument(
        "--seed", type=whole_number(0, MAX_SEED), metavar="S", help="of weights and data (default: 0)"
    )
    parser.add_argument("--data", metavar="DIR", help="of weights-on-cifar, as train cifar10 takes it")
    parser.set_defaults(run=lambda arguments: _reproduce(arguments, parser))


def _settings() -> str:
    lines = ["settings, full:"]
    for name, listing in EXPERIMENTS.items():
        settings = ", ".join(
            f"{key}={value[0]}..{value[-1]}" if isinstance(value, tuple) else f"{key}={value}"
            for key, value in asdict(listing.config).items()
            if key not in ("seed", "networks") and value is not None
        )
        lines.append(textwrap.fill(f"{name}: {settings}", 100, initial_indent="  ", subsequent_indent="    "))
    return "\n".join(lines)


def _reproduce(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    harness = experiment("reproduce", parser)
    experiment(arguments.name.replace("-", "_"), parser)  # its packages are asked for before anything runs
    listing = EXPERIMENTS[arguments.name]
    config = given(arguments, listing.quick if arguments.quick else listing.config)
    if arguments.data is not None and not hasattr(config, "data"):
        parser.error(f"argument --data: {arguments.name} takes none, got {arguments.data!r}")
    output = arguments.output or Path("outputs") / (arguments.name + "-quick" * arguments.quick)
    writable(output, parser)
    writable(output / harness.PARTS, parser)
    with threads_for(small=arguments.quick or listing.small):
        try:
            code: int = harness.reproduce(arguments.name, config, output)
        except Refusal as refused:
            parser.error(str(refused))
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
    add_common(parser, "outputs/bench")
    option = options(parser, BenchConfig(), replace(BenchConfig(), **BENCH_QUICK))
    option("--depth", whole_number(1), "L, residual steps", metavar="L")
    option("--dim", whole_number(1), "q, features", metavar="Q")
    option("--hidden-dim", whole_number(1), "m, hidden units of a step", metavar="M")
    option("--batch-size", whole_number(1), "rows", metavar="B")
    option("--seed", whole_number(0, MAX_SEED), "of weights and rows", metavar="S")
    option("--device", device, "cpu, cuda or cuda:N", metavar="DEVICE")
    option("--activation", str, "σ", choices=list(ACTIVATIONS))
    parser.set_defaults(run=lambda arguments: _bench(arguments, parser))


def _bench(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    bench = experiment("bench", parser).bench
    config = given(arguments, replace(BenchConfig(), **(BENCH_QUICK if arguments.quick else {})))
    code: int = bench(config, writable(arguments.output, parser))
    return code


if __name__ == "__main__":
    sys.exit(main())
