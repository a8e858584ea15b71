"""Weights along depth after training a convolutional network on CIFAR-10, as the paper's third figure has it.

Three networks: from smooth weights, here the same at every depth, and from i.i.d. ones, with GELU; from
smooth ones with ReLU. Each is a run of ``train cifar10`` in a folder of its own, ``runs/NAME-SEED``: read if
it has a result, else begun or continued. It may have been trained elsewhere.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from ..diagnostics import smoothness
from .cifar import data
from .cifar import run as cifar
from .cifar.network import ConvNet, build_network
from .config import CifarConfig, CifarWeightsConfig, Refusal
from .networks import along_depth, random_coefficients
from .plots import draw
from .reproduce import Part, Results, Run, Summary
from .style import FONT, TITLES, finish

NAMES = {"gelu": "GELU", "relu": "ReLU"}
INITS = {"smooth": "tied", "iid": "iid"}
CHECKPOINT_EVERY = 600.0  # seconds, within an epoch


def parts(config: CifarWeightsConfig) -> list[Part]:
    return [
        Part(f"{activation}-{init}", config.epochs, partial(train, config, activation, init))
        for activation, init in config.networks
    ]


def train(config: CifarWeightsConfig, activation: str, init: str, run: Run) -> Results:
    """epochs, result: lines of the run's log. smoothness: of V and W before the first step. coefficients: as
    ``plots`` wants them. trained_on: the processor.

    Raises:
        Refusal: there are no data to train with, or the run in its folder is another.
    """
    folder = run.folder / f"{activation}-{init}-{config.seed}"
    state = cifar.read_checkpoint(folder)
    settings = _settings(config, activation, init)
    try:
        cifar.agreed(settings, state)
    except Refusal as refused:
        raise Refusal(f"argument --output: {folder} has another run: {refused}") from None
    if state is None or state["log"][-1]["kind"] != "result":
        folder.mkdir(parents=True, exist_ok=True)
        training = cifar.Run(folder, settings, _load(config), state)
        run.advance(len(training.training.epochs))
        training.go(checkpoint_every=CHECKPOINT_EVERY, on_epoch=lambda line: run.advance(1))
        state = cifar.read_checkpoint(folder)
        assert state is not None
    return _results(state, config.seed)


def _settings(config: CifarWeightsConfig, activation: str, init: str) -> CifarConfig:
    return CifarConfig(
        depth=config.depth,
        channels=config.channels,
        norm=config.norm,
        init=INITS[init],
        activation=activation,
        epochs=config.epochs,
        batch_size=config.batch_size,
        lr=config.lr,
        precision=config.precision,
        images=config.images,
        seed=config.seed,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )


def _load(config: CifarWeightsConfig) -> data.Cifar10:
    if config.data is None:
        raise Refusal("argument --data: expected a folder with CIFAR-10 to train with, got none")
    return data.load(None if config.data == data.MADE_UP else Path(config.data), config.images)


def _results(state: dict[str, Any], seed: int) -> Results:
    log = state["log"]
    begun = build_network(cifar.initial(state)).block
    network = ConvNet(**state["network"])
    network.load_state_dict(state["state_dict"])
    channels, hidden, *kernel = begun.V.shape[1:]
    indices = random_coefficients(channels, hidden, seed, tuple(kernel))
    initial, trained = (along_depth(block, indices) for block in (begun, network.block))
    return {
        "epochs": [line for line in log if line["kind"] == "epoch"],
        "result": log[-1],
        "trained_on": [line["processor"] for line in log if line["kind"] == "start"],
        "smoothness": {name: smoothness(getattr(begun, name)) for name in ("V", "W")},
        "coefficients": {
            name: {"index": index, "initial": initial[name], "trained": trained[name]}
            for name, index in indices.items()
        },
    }


def summarise(config: CifarWeightsConfig, results: dict[str, Results]) -> Summary:
    rows: list[dict[str, Any]] = []
    findings: dict[str, Any] = {}
    numbers = ("train_loss", "validation_loss", "validation_accuracy")
    for activation, init in config.networks:
        found = results[f"{activation}-{init}"]
        rows += [
            {
                "activation": activation,
                "init": init,
                "epoch": line["epoch"],
                **{key: line.get(key) for key in numbers},
                **{f"{name}_{key}": line[name][key] for name in ("V", "W") for key in line[name]},
            }
            for line in ({"epoch": 0, **found["smoothness"]}, *found["epochs"])
        ]
        what = _title(activation, init)
        accuracies = (found["result"].get(f"{part}_accuracy") for part in ("validation", "test"))
        findings[f"validation, test accuracy, %: {what}"] = " ".join(
            "-" if accuracy is None else f"{100 * accuracy:.2f}" for accuracy in accuracies
        )
        first, last = found["smoothness"], found["epochs"][-1]
        for key, label in (("max", "L max|ΔV|, L max|ΔW|"), ("total_variation", "Σ|ΔV|, Σ|ΔW|")):
            findings[f"{label}, a typical coefficient, start -> trained: {what}"] = ", ".join(
                f"{first[name][key]:.3g} -> {last[name][key]:.3g}" for name in ("V", "W")
            )
    return Summary({"weights-on-cifar": _figure(config, results)}, rows, findings)


def _title(activation: str, init: str) -> str:
    return f"{NAMES.get(activation, activation)}, {TITLES[init]}"


def _figure(config: CifarWeightsConfig, results: dict[str, Results]) -> Figure:
    figure = Figure(figsize=(4.5 * len(config.networks), 4.2), layout="constrained")
    panels = figure.subplots(1, len(config.networks), squeeze=False)[0]
    for axes, (activation, init) in zip(panels, config.networks, strict=True):
        ylabel = "coefficient" if axes is panels[0] else ""
        finish(axes, _title(activation, init), "depth $k/L$", ylabel, grid="y")
        axes.set_xlim(0.0, 1.01)
        draw(axes, results[f"{activation}-{init}"]["coefficients"])
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=FONT)
    return figure
