"""What a block costs on this machine: every backward strategy against a loop of PyTorch operators.

Times are ratios, of runs that take turns in one process; memory is what forward and backward add at their
peak, each measured in a fresh process. ``make bench`` compares with more, over many sizes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ..block import DeepResBlock
from ..drift import DriftWarning
from ..validation import STRATEGIES
from .config import BenchConfig
from .memory import step_memory
from .networks import EagerBlock
from .outputs import provenance, save_json
from .speed import median_seconds

RESULTS = "bench.json"
EAGER = "eager loop"


def bench(config: BenchConfig, output: Path) -> int:
    """Measure, print a table, and write bench.json to the folder ``output``; returns the exit code 0."""
    console = Console()
    with console.status("measuring time"):
        speedup = measure_speed(config)
    with console.status("measuring memory"):
        memory = measure_memory(config)
    console.print(_table(config, speedup, memory))
    results = {"speedup": speedup, "memory_bytes": memory}
    save_json(output / RESULTS, {"experiment": "bench", "config": asdict(config), **provenance(), **results})
    console.print(f"saved in {output}", markup=False, soft_wrap=True)
    return 0


def measure_speed(config: BenchConfig) -> dict[str, float]:
    """Time of the eager loop over that of each strategy, forward and backward; and of the forward alone."""
    torch.manual_seed(config.seed)
    h = torch.randn(config.batch_size, config.dim, device=config.device)
    block = DeepResBlock(config.dim, config.depth, config.hidden_dim, activation=config.activation)
    block.to(config.device)
    eager = EagerBlock(block)

    def train(run: nn.Module, backward: str) -> None:
        block.backward = backward
        block.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DriftWarning)  # time is all that is measured
            run(h).square().mean().backward()

    @torch.no_grad()
    def infer(run: nn.Module) -> Tensor:
        found: Tensor = run(h)
        return found

    work: dict[str, Callable[[], object]] = {
        EAGER: partial(train, eager, "auto"),
        **{strategy: partial(train, block, strategy) for strategy in STRATEGIES},
    }
    seconds = dict(zip(work, median_seconds(list(work.values()), config.rounds, config.device), strict=True))
    forward = median_seconds([partial(infer, eager), partial(infer, block)], config.rounds, config.device)
    return {
        **{strategy: seconds[EAGER] / seconds[strategy] for strategy in STRATEGIES},
        "forward": forward[0] / forward[1],
    }


def measure_memory(config: BenchConfig) -> dict[str, int | None]:
    """Bytes of each strategy and of the eager loop; None where this system cannot tell."""
    network = {
        "in_features": config.dim,
        "dim": config.dim,
        "depth": config.depth,
        "out_features": config.dim,
        "hidden_dim": config.hidden_dim,
        "activation": config.activation,
    }

    def measure(strategy: str, eager: bool) -> int | None:
        arguments: dict[str, Any] = {**network, "backward": strategy}
        return step_memory(arguments, config.batch_size, config.device, eager=eager)

    return {
        EAGER: measure("auto", True),
        **{strategy: measure(strategy, False) for strategy in STRATEGIES},
    }


def _table(config: BenchConfig, speedup: dict[str, float], memory: dict[str, int | None]) -> Table:
    hidden = config.hidden_dim or config.dim
    title = (
        f"B = {config.batch_size}, q = {config.dim}, m = {hidden}, L = {config.depth}, {config.activation}, "
        f"{config.device}"
    )
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for heading in ("speed, eager loop = 1", "peak memory, MiB"):
        table.add_column(heading, justify="right")
    table.add_row("forward alone", f"{speedup['forward']:.2f}", "")
    for name, number in memory.items():
        size = "-" if number is None else f"{number / 2**20:.2f}"
        table.add_row(name, f"{speedup.get(name, 1.0):.2f}", size)
    return table
