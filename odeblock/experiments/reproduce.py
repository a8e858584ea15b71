"""Runs one experiment of ``python -m odeblock reproduce``, part by part, and writes what it found.

An experiment is a module with two functions: ``parts(config)``, computations whose results are JSON, and
``summarise(config, results)``, which turns those into figures, rows and findings. Each part is written to
disk when it is done, and a long one keeps its state on the way: a run that was interrupted goes on from
there. Parts of other settings lie beside each other; those that other code computed are computed again.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from .config import Refusal, ReproduceConfig
from .outputs import provenance, save_checkpoint, save_csv, save_figure, save_json
from .saved import explained, is_file, load_checkpoint, read_json

PARTS, RUNS, FORMATS = "parts", "runs", ("pdf", "png")
PACKAGE = Path(__file__).resolve().parents[1]
INTERRUPTED = 130

Results = dict[str, Any]
"""What a part found; whatever JSON holds."""


class Run:
    """What a part under way is given: to tell how far it is, and to keep what it has if it takes long."""

    def __init__(
        self, advance: Callable[[int], None], path: Path, settings: dict[str, Any], folder: Path
    ) -> None:
        self.advance = advance
        """Called with the number of steps that were made."""
        self.folder = folder
        """For files that stay whatever code comes after them, of all parts; it need not exist."""
        self._path, self._settings = path, json.dumps(settings)

    def save(self, state: dict[str, Any]) -> None:
        """Keep ``state``, tensors and plain values, for a later call of the same command to ``load``."""
        save_checkpoint(self._path, {"settings": self._settings, "state": state})

    def load(self) -> dict[str, Any] | None:
        """What an interrupted call with the same settings saved last; None if nothing, or nothing whole."""
        saved = _whole(load_checkpoint, self._path)
        settings = saved.get("settings")
        same = isinstance(settings, str) and settings == self._settings
        return saved.get("state") if same else None


@dataclass(frozen=True)
class Part:
    """A computation: its name, its steps in the progress bar, and the function, which takes a ``Run``."""

    name: str
    steps: int
    compute: partial[Results]


@dataclass(frozen=True)
class Summary:
    """figures: by file name, without ending. rows: of the CSV, all of the same keys. findings: to print."""

    figures: Mapping[str, Figure]
    rows: list[dict[str, Any]]
    findings: Mapping[str, Any]


def reproduce(name: str, config: ReproduceConfig, output: Path) -> int:
    """Run the experiment ``name``; write its files to the folder ``output``.

    NAME.json: findings, settings, versions, and everything that was computed; NAME.csv: the numbers behind
    the figures; figures as PDF and PNG; parts/: what a later call with the same settings need not compute
    again. The other files are those of the last call; parts stay, whatever settings come after them. runs/:
    trainings of hours, where an experiment has them, which other code reads as well.

    Returns the exit code: 0; 130 after Ctrl-C; 1 where a loss was not finite.

    Raises:
        Refusal: an experiment needs data, and there are none; a folder lies where a file of it should.
    """
    console = Console()
    experiment = importlib.import_module(f".{name.replace('-', '_')}", __package__)
    parts: list[Part] = experiment.parts(config)
    settings = _settings(config)
    try:
        results = _run(parts, settings, output, console)
    except KeyboardInterrupt:
        console.print("interrupted: the same command goes on from here", style="bold")
        return INTERRUPTED
    except FloatingPointError as error:
        console.print(f"stopped: {error}", style="bold", markup=False, soft_wrap=True)
        return 1
    summary: Summary = experiment.summarise(config, results)
    for figure_name, figure in summary.figures.items():
        for ending in FORMATS:
            save_figure(output / f"{figure_name}.{ending}", figure)
    save_csv(output / f"{name}.csv", summary.rows)
    found = {
        "experiment": name,
        "config": asdict(config),
        **provenance(),
        "code": settings["code"],
        "findings": dict(summary.findings),
        "parts": results,
    }
    save_json(output / f"{name}.json", found)
    console.print(_table(name, summary.findings))
    console.print(f"saved in {output}", markup=False, soft_wrap=True)
    return 0


def _run(parts: list[Part], settings: dict[str, Any], output: Path, console: Console) -> dict[str, Results]:
    """The results of all parts, by name; those on disk with the same settings are not computed again."""
    (output / PARTS).mkdir(parents=True, exist_ok=True)
    key = _hash(json.dumps(settings["config"]).encode())[:8]
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    results: dict[str, Results] = {}
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=sum(part.steps for part in parts))
        done = 0
        for part in parts:
            progress.update(task, description=f"{part.name:<20}")
            path = output / PARTS / f"{part.name}-{key}.json"
            found = _read(path, settings)
            if found is None:
                state = path.with_suffix(".pt")
                run = Run(lambda steps: progress.advance(task, steps), state, settings, output / RUNS)
                try:
                    found = part.compute(run)
                except FloatingPointError as error:
                    raise FloatingPointError(f"{part.name}: {error}") from None
                save_json(path, {**settings, "results": found, "sha256": _sum(found)})
                state.unlink(missing_ok=True)
            results[part.name] = found
            done += part.steps
            progress.update(task, completed=done)
    return results


def _settings(config: ReproduceConfig) -> dict[str, Any]:
    """What results depend on: the configuration; PyTorch; and odeblock, by its sources and native core.

    Not on where data lie.
    """
    files = sorted([*PACKAGE.rglob("*.py"), *PACKAGE.glob("_core*.so")])
    code = "".join(f"{path.relative_to(PACKAGE)} {_hash(path.read_bytes())}\n" for path in files)
    given = {key: value for key, value in asdict(config).items() if key != "data"}
    settings = {"config": given, "torch": torch.__version__, "code": _hash(code.encode())}
    found: dict[str, Any] = json.loads(json.dumps(settings))  # as it is read again: lists for tuples
    return found


def _sum(results: Results | None) -> str:
    """By which changed bits are seen."""
    return _hash(json.dumps(results).encode())


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _read(path: Path, settings: dict[str, Any]) -> Results | None:
    """The results of a part in ``path``; None where there are none, or those of other settings."""
    stored = _whole(read_json, path)
    results: Results | None = stored.pop("results", None)
    return results if stored == {**settings, "sha256": _sum(results)} else None


def _whole(read: Callable[[Path, str], dict[str, Any]], path: Path) -> dict[str, Any]:
    """What is in ``path``; nothing if the file is not there, or not whole: it is computed again.

    Raises:
        Refusal: there is something else than a file, which could not be written, hours later.
    """
    with explained(path):
        is_file(path)
    try:
        return read(path, "what reproduce writes")
    except Refusal:
        return {}


def _table(name: str, findings: Mapping[str, Any]) -> Table:
    table = Table(title=name, title_justify="left", title_style="bold", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for label, value in findings.items():
        table.add_row(label, f"{value:.4g}" if isinstance(value, float) else str(value))
    return table
