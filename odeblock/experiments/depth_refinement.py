"""Depth as a choice after training: a network trained at one depth, run at others; trained coarse to fine.

A smooth network is a discretisation of an ODE, and so is what it becomes at another depth: accuracy stays.
And most of the training can be done on the coarse one, at a fraction of the work.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from torch import nn

from .. import limit
from .config import RefinementConfig, TrainConfig
from .digits import load_digits
from .loop import Training, accuracy, cross_entropy
from .networks import build_network
from .reproduce import Part, Results, Run, Summary
from .style import COLOURS, FONT, TITLES, depth_axis, finish

METHODS = {"deep": "deep from the start", "refined": "shallow, then deep"}


def parts(config: RefinementConfig) -> list[Part]:
    weight = config.deep // config.shallow
    found = [
        Part(_name(init, seed), config.epochs, partial(resample, config, init, seed))
        for init in TITLES
        for seed in _seeds(config)
    ]
    return [*found, Part("refine", 2 * weight * config.epochs, partial(refine, config))]


def _seeds(config: RefinementConfig) -> range:
    return range(config.seed, config.seed + config.seeds)


def _name(init: str, seed: int) -> str:
    return f"resample-{init}-{seed}"


def _training(config: RefinementConfig, depth: int, init: str, seed: int) -> Training:
    settings = TrainConfig(
        depth=depth,
        dim=config.dim,
        epochs=config.epochs,
        batch_size=config.batch_size,
        lr=config.lr,
        seed=seed,
    )
    return Training(build_network(settings, init), load_digits(), settings)


def resample(config: RefinementConfig, init: str, seed: int, run: Run) -> Results:
    """Trained at ``shallow``: "test_accuracy" and "test_loss" at each depth.

    "trained_accuracy", "trained_loss": before resampling; "back": accuracy at ``shallow`` again, from the
    last.
    """
    training = _training(config, config.shallow, init, seed)
    for _ in range(config.epochs):
        training.epoch(lambda loss: None)
        run.advance(1)
    data = training.data

    def test_loss(model: nn.Module) -> torch.Tensor:
        return cross_entropy(model(data.test_x), data.test_y)

    @torch.no_grad()
    def test_accuracy(model: nn.Module) -> float:
        return accuracy(model(data.test_x), data.test_y)

    network: nn.Module = training.network
    results: Results = {"test_accuracy": [], "test_loss": [], "trained_accuracy": test_accuracy(network)}
    for depth in config.depths:
        other, results["trained_loss"], loss = limit.resample(network, depth, test_loss)
        results["test_accuracy"].append(test_accuracy(other))
        results["test_loss"].append(loss)
    results["back"] = test_accuracy(limit.resample(other, config.shallow, test_loss).model)
    return results


def refine(config: RefinementConfig, run: Run) -> Results:
    """For each method, after each epoch: train_loss, test_accuracy, and time as a fraction of all of "deep".

    Both are trained turn by turn, an epoch each, in one process. Time is that of training steps alone, for
    each epoch the median of all with that depth.
    """
    trainings = {
        "refined": _training(config, config.shallow, "smooth", config.seed),
        "deep": _training(config, config.deep, "smooth", config.seed),
    }
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for epoch in range(config.epochs):
        if epoch == config.shallow_epochs:
            trainings["refined"].change_depth(config.deep)
        for method, training in trainings.items():
            start = time.perf_counter()
            training.epoch(lambda loss: None)
            seconds[method].append(time.perf_counter() - start)
            training.record()
            run.advance(config.deep // config.shallow)
    deep = [statistics.median(seconds["deep"])] * config.epochs
    shallow = [statistics.median(seconds["refined"][: config.shallow_epochs])] * config.shallow_epochs
    rest = config.epochs - config.shallow_epochs
    typical = {"deep": deep, "refined": shallow + [statistics.median(seconds["refined"][-rest:])] * rest}
    return {
        method: {
            "time": [done / sum(deep) for done in accumulate(typical[method], initial=0.0)],
            **{key: [entry[key] for entry in training.history] for key in ("train_loss", "test_accuracy")},
        }
        for method, training in trainings.items()
    }


def summarise(config: RefinementConfig, results: dict[str, Results]) -> Summary:
    rows: list[dict[str, Any]] = []
    findings: dict[str, Any] = {}
    deepest = config.depths[-1]

    def row(part: str, depth: int, epoch: float | None, *numbers: float | None) -> dict[str, Any]:
        names = ("time", "loss", "test_accuracy")
        return {"part": part, "depth": depth, "epoch": epoch, **dict(zip(names, numbers, strict=True))}

    for init, title in TITLES.items():
        found = [results[_name(init, seed)] for seed in _seeds(config)]
        for seed, one in zip(_seeds(config), found, strict=True):
            curves = zip(config.depths, one["test_loss"], one["test_accuracy"], strict=True)
            rows += [row(_name(init, seed), L, None, None, loss, right) for L, loss, right in curves]
        accuracies = ([one[key] for one in found] for key in ("trained_accuracy", "test_accuracy", "back"))
        findings[f"test accuracy, %: at {config.shallow} (trained), {deepest}, back; {title}"] = " ".join(
            f"{100 * _mean(values):.2f}" for values in accuracies
        )
        findings[f"test loss: at {config.shallow} (trained), {deepest}; {title}"] = " ".join(
            f"{_mean([one[key] for one in found]):.4f}" for key in ("trained_loss", "test_loss")
        )
    for method, text in METHODS.items():
        found = results["refine"][method]
        curves = zip(found["time"], found["train_loss"], found["test_accuracy"], strict=True)
        for epoch, (when, loss, right) in enumerate(curves):
            shallow = method == "refined" and epoch <= config.shallow_epochs
            depth = config.shallow if shallow else config.deep
            rows.append(row(method, depth, float(epoch), when, loss, right))
        findings[f"time (1: deep), train loss, test accuracy in %; {text}"] = (
            f"{found['time'][-1]:.2f} {found['train_loss'][-1]:.4f} {100 * found['test_accuracy'][-1]:.1f}"
        )
    figures = {
        "depth-refinement": _training_curves(config, results),
        "depth-resampling": _depths(config, results),
    }
    return Summary(figures, rows, findings)


def _mean(values: list[Any]) -> float:
    """Of numbers, or of the last numbers of lists."""
    return statistics.fmean(value[-1] if isinstance(value, list) else value for value in values)


def _training_curves(config: RefinementConfig, results: dict[str, Results]) -> Figure:
    figure = Figure(figsize=(9.0, 4.0), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, by in zip(panels, ("time", "epoch"), strict=True):
        styles = (("orange", 4.0), ("blue", 1.6))  # where both agree both are seen
        for (method, text), (colour, width) in zip(METHODS.items(), styles, strict=True):
            found = results["refine"][method]
            x = found["time"] if by == "time" else range(config.epochs + 1)
            axes.plot(x, found["train_loss"], color=COLOURS[colour], linewidth=width, label=text)
            if method == "refined":
                at = config.shallow_epochs
                point = (x[at], found["train_loss"][at])
                label = f"from L = {config.shallow} to {config.deep}"
                axes.plot(*point, "o", color=COLOURS[colour], markersize=7, label=label)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(FixedLocator([0.5, 0.6, 0.7, 0.8, 1.0, 1.5, 2.0]))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
    finish(panels[0], "", "time, fraction of deep training", "loss on the training set")
    finish(panels[1], "", "epoch")
    panels[0].legend(frameon=False, fontsize=FONT - 2)
    return figure


def _depths(config: RefinementConfig, results: dict[str, Results]) -> Figure:
    figure = Figure(figsize=(9.0, 4.0), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, key in zip(panels, ("test_accuracy", "test_loss"), strict=True):
        for (init, title), colour in zip(TITLES.items(), ("blue", "orange"), strict=True):
            factor = 100 if key == "test_accuracy" else 1
            seeds = [[factor * value for value in results[_name(init, seed)][key]] for seed in _seeds(config)]
            mean = [statistics.fmean(values) for values in zip(*seeds, strict=True)]
            axes.plot(config.depths, mean, color=COLOURS[colour], linewidth=2.2, marker="o", label=title)
            for values in seeds:
                axes.plot(config.depths, values, color=COLOURS[colour], linewidth=0.6)
        axes.plot([], [], color="0.4", linewidth=0.6, label="one seed each; thick: mean")
        trained = f"trained at $L = {config.shallow}$"
        axes.axvline(config.shallow, color="0.4", linestyle="--", linewidth=1.2, label=trained)
        depth_axis(axes, config.depths)
    finish(panels[0], "", "depth $L$ after resampling", "test accuracy, %")
    finish(panels[1], "", "depth $L$ after resampling", "test loss")
    shown = panels[0].get_legend_handles_labels()
    figure.legend(*shown, frameon=False, fontsize=FONT - 2, ncols=4, loc="outside lower center")
    return figure
