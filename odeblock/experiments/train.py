"""The experiment ``train``: one network from smooth and one from i.i.d. weights, on handwritten digits.

What it shows (Marion, Wu, Sander & Biau, ICLR 2024): weights that start smooth in depth stay so in training,
and the network remains the discretisation of a neural ODE; weights that start independent stay rough.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..network import DeepResNet
from .config import TrainConfig
from .digits import SPLIT_SEED, load_digits
from .loop import Training
from .memory import step_memory
from .networks import along_depth, build_network, network_arguments, random_coefficients
from .outputs import provenance, save_checkpoint, save_figure, save_json
from .plots import coefficient_figure
from .report import render, table_rows
from .speed import step_seconds

INITS = {"smooth": "smooth", "iid": "i.i.d."}
RESULTS, FIGURE = "results.json", "coefficients.png"
CHECKPOINTS = {init: f"checkpoint_{init}.pt" for init in INITS}


def train(config: TrainConfig, output: Path) -> int:
    """Run the experiment; write results.json, coefficients.png and two checkpoints to the folder ``output``.

    Returns the exit code: 0; 130 after Ctrl-C; 1 when a loss was no longer finite. What was reached is saved
    and reported in every case: of a network whose loss was not finite, the last epoch before.
    """
    console = Console()
    experiment = Experiment(config, output)
    error: str | None = None
    code = 0
    try:
        experiment.run(console)
    except KeyboardInterrupt:
        error, code = "interrupted", 130
    except FloatingPointError as problem:
        error, code = str(problem), 1
    experiment.save(interrupted=code == 130, error=error)
    console.print(render(list(table_rows(experiment.summary())), _title(config)))
    if error:
        console.print(f"stopped: {error}", style="bold", markup=False, soft_wrap=True)
    console.print(f"saved in {output}", markup=False, soft_wrap=True)
    return code


def _title(config: TrainConfig) -> str:
    hidden = config.hidden_dim or config.dim
    return (
        f"handwritten digits, L = {config.depth}, q = {config.dim}, m = {hidden}, {config.activation}, "
        f"seed {config.seed}"
    )


@dataclass
class Run:
    """One of the two networks: its training, the weights it started from, and what a step costs."""

    training: Training
    initial: dict[str, list[float]]
    cost: dict[str, dict[str, float | None]] = field(default_factory=dict)


class Experiment:
    """Both networks as far as they were reached; ``save`` can be called at any time."""

    def __init__(self, config: TrainConfig, output: Path) -> None:
        self.config, self.output = config, output
        self.runs: dict[str, Run] = {}
        self.indices = random_coefficients(config.dim, config.hidden_dim or config.dim, config.seed)
        """The coefficient of V and of W that the figure shows, the same in both networks."""

    def run(self, console: Console) -> None:
        """Train both networks, then measure what a step costs."""
        columns = (
            TextColumn("{task.description:<9}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as progress:
            for init in INITS:
                self._train(init, progress)
                self.save(interrupted=True)  # replaced at the end; true if this process is killed before
            self._measure_costs(progress)

    def _train(self, init: str, progress: Progress) -> None:
        data = load_digits(self.config.device)
        training = Training(build_network(self.config, init), data, self.config)
        self.runs[init] = Run(training, self._coefficients(training.network))
        task = progress.add_task(INITS[init], total=training.total_steps, note="")
        try:
            training.run(lambda loss: progress.update(task, advance=1, note=f"loss {loss:.4f}"))
        except FloatingPointError as error:
            raise FloatingPointError(f"{INITS[init]} network: {error}") from None

    def _measure_costs(self, progress: Progress) -> None:
        config = self.config
        task = progress.add_task("measuring", total=3 * len(self.runs), note="time and memory of a step")
        for init, run in self.runs.items():
            seconds = step_seconds(run.training.network, run.training.data, config)
            epoch = run.training.steps_per_epoch
            run.cost["epoch_seconds"] = {"odeblock": seconds[0] * epoch, "eager": seconds[1] * epoch}
            progress.advance(task)
            memory = run.cost["memory_bytes"] = {}
            for name in ("odeblock", "eager"):
                memory[name] = step_memory(
                    network_arguments(config, init), config.batch_size, config.device, eager=name == "eager"
                )
                progress.advance(task)

    def _coefficients(self, network: DeepResNet) -> dict[str, list[float]]:
        return along_depth(network.block, self.indices)

    def summary(self) -> dict[str, Any]:
        """For each network that was reached: history, the two coefficients along depth, and costs."""
        summary: dict[str, Any] = {}
        for init, run in self.runs.items():
            trained = self._coefficients(run.training.network)
            coefficients = {
                name: {"index": self.indices[name], "initial": run.initial[name], "trained": trained[name]}
                for name in self.indices
            }
            summary[init] = {
                "checkpoint": CHECKPOINTS[init],
                "history": run.training.history,
                "cost": run.cost,
                "coefficients": coefficients,
            }
        return summary

    def save(self, *, interrupted: bool, error: str | None = None) -> None:
        """Write all files; those of an earlier experiment in the same folder do not survive."""
        for init, name in CHECKPOINTS.items():
            if init in self.runs:
                save_checkpoint(self.output / name, self._checkpoint(init))
            else:
                (self.output / name).unlink(missing_ok=True)
        networks = self.summary()
        curves = {init: network["coefficients"] for init, network in networks.items()}
        save_figure(self.output / FIGURE, coefficient_figure({"": curves}))
        results = {
            "experiment": "train",
            "interrupted": interrupted,
            "error": error,
            "config": asdict(self.config),
            **provenance(),
            "data": {"name": "scikit-learn digits", "split_seed": SPLIT_SEED},
            "networks": networks,
            "table": [asdict(row) for row in table_rows(networks)],
        }
        save_json(self.output / RESULTS, results)

    def _checkpoint(self, init: str) -> dict[str, Any]:
        """Rebuilt with ``DeepResNet(**checkpoint["network"])`` and ``load_state_dict``."""
        training = self.runs[init].training
        return {
            "network": network_arguments(self.config, init),
            "state_dict": training.network.state_dict(),
            "config": asdict(self.config),
            **{key: training.history[-1][key] for key in ("epoch", "step", "test_accuracy")},
        }
