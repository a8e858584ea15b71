"""The experiment ``train``: one network from smooth and one from i.i.d. weights, on handwritten digits.

The paper's claim on real data: weights that start smooth in depth stay so during training, and the network
remains the discretisation of a neural ODE; independent weights stay rough (Marion et al. 2024, figure 4).
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..build import build_info
from . import loop
from .config import TrainConfig
from .digits import SPLIT_SEED, Digits, load_digits
from .memory import step_memory
from .networks import build_network, network_arguments
from .outputs import save_checkpoint, save_figure, save_json
from .plots import coefficient_figure
from .report import render, table_rows
from .speed import step_seconds

NAMES = {"smooth": "smooth", "iid": "i.i.d."}

RESULTS, FIGURE = "results.json", "coefficients.png"


def checkpoint_name(init: str) -> str:
    """File name of the checkpoint of the network that started from ``init``."""
    return f"checkpoint_{init}.pt"


def train(config: TrainConfig, output: Path) -> int:
    """Run the experiment; results.json, coefficients.png and two checkpoints go to the folder ``output``.

    Returns the exit code: 0, 130 after Ctrl-C (what was reached is saved and reported all the same), 1 when
    a loss was no longer finite (what was complete before is saved).
    """
    console = Console()
    experiment = Experiment(config, output)
    try:
        experiment.run(console)
    except KeyboardInterrupt:
        console.print("interrupted: saving what was reached")
        experiment.save(interrupted=True)
    except FloatingPointError as error:
        console.print(f"stopped: {error}", markup=False, soft_wrap=True)
        return 1
    ...
