"""Neighbouring layers: max_k ‖Z_{k+1} - Z_k‖ against L at several times of training, for Z = V and Z = W.

The theorem: O(1/L), uniformly in time, if it holds at the start. In float64, for at first W moves by less
than float32 can tell. And how much longer the Python loop takes (in float32).
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from matplotlib.figure import Figure

from ..diagnostics import largest_step
from .config import LipschitzConfig
from .reproduce import Part, Results, Run, Summary
from .speed import median_seconds
from .style import FONT, TITLES, depth_axis, finish, guide, legend_below, sequence, slope
from .synthetic import INITS, Descent, LoopDescent, initial_W, make_block, make_data

STACKS = ("V", "W")


def parts(config: LipschitzConfig) -> list[Part]:
    found = [
        Part(f"{init}-{depth}", depth * config.iterations[-1], partial(train, config, init, depth))
        for init in INITS
        for depth in config.depths
    ]
    return [*found, Part("speed", config.iterations[-1] * config.depths[-1], partial(compare, config))]


def train(config: LipschitzConfig, init: str, depth: int, run: Run) -> Results:
    """V, W: the largest step of each after each of the iterations; loss: then."""
    x, y = (data.double() for data in make_data(config.samples, config.dim, config.seed))
    W = initial_W(init, depth, config.hidden_dim, config.dim, config.seed)
    descent = Descent(make_block(W).double(), x, y, config.lr)
    results: Results = {"V": [], "W": [], "loss": []}
    block, done = descent.block, 0
    for iterations in config.iterations:
        for _ in range(iterations - done):
            descent.step()
            run.advance(depth)
        done = iterations
        for name in STACKS:
            results[name].append(largest_step(getattr(block, name)))
        results["loss"].append(descent.gradient())
    return results


def compare(config: LipschitzConfig, run: Run) -> Results:
    """Time of an iteration of the Python loop over ours, of interleaved runs, medians.

    ratios: for each depth. whole: of one iteration at every depth, as the experiment makes them.
    """
    x, y = make_data(config.samples, config.dim, config.seed)
    times = []
    for depth in config.depths:
        block = make_block(initial_W("smooth", depth, config.hidden_dim, config.dim, config.seed))
        ours, loop = (kind(copy.deepcopy(block), x, y, config.lr) for kind in (Descent, LoopDescent))
        times.append(median_seconds([ours.step, loop.step], config.timing_rounds))
        for name in ("V", "W"):
            stacks = (getattr(descent.block, name) for descent in (loop, ours))
            torch.testing.assert_close(*stacks, rtol=1e-3, atol=1e-5)
    whole = [sum(seconds) for seconds in zip(*times, strict=True)]
    return {"ratios": [loop / ours for ours, loop in times], "whole": whole[1] / whole[0]}


def summarise(config: LipschitzConfig, results: dict[str, Results]) -> Summary:
    slopes: dict[tuple[str, str], list[float]] = {}
    rows = []
    for init in INITS:
        for name in STACKS:
            steps = [results[f"{init}-{depth}"][name] for depth in config.depths]
            slopes[init, name] = [
                slope(config.depths, at, config.fit_from) for at in zip(*steps, strict=True)
            ]
        rows += [
            {
                "init": init,
                "depth": depth,
                "iteration": iteration,
                **{name: results[f"{init}-{depth}"][name][i] for name in (*STACKS, "loss")},
            }
            for depth in config.depths
            for i, iteration in enumerate(config.iterations)
        ]
    speed = results["speed"]
    findings = {
        f"slope of {name} over L >= {config.fit_from}, {TITLES[init]}": f"{min(at):.3f} to {max(at):.3f}"
        for (init, name), at in slopes.items()
    }
    findings["time of the Python loop / ours, by depth"] = ", ".join(
        f"{depth}: {ratio:.1f}" for depth, ratio in zip(config.depths, speed["ratios"], strict=True)
    )
    findings["time of the Python loop / ours, whole experiment"] = f"{speed['whole']:.1f}"
    return Summary({"large-depth-lipschitz": _figure(config, results, slopes)}, rows, findings)


def _figure(
    config: LipschitzConfig, results: dict[str, Results], slopes: dict[tuple[str, str], list[float]]
) -> Figure:
    """Of V, which starts at 0: what is seen comes from training. (i.i.d. W starts with steps of its own.)"""
    figure = Figure(figsize=(9.0, 5.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, init in zip(panels, INITS, strict=True):
        steps = [results[f"{init}-{depth}"]["V"] for depth in config.depths]
        colours = sequence(len(config.iterations))
        for i, (iteration, colour) in enumerate(zip(config.iterations, colours, strict=True)):
            values = [at[i] for at in steps]
            label = f"iteration {iteration}: slope {slopes[init, 'V'][i]:.2f}"
            axes.plot(
                config.depths, values, color=colour, linewidth=1.8, marker="o", markersize=4, label=label
            )
        if init == "smooth":
            guide(axes, config.depths, 3 * max(steps[0]))
        axes.set_yscale("log")
        depth_axis(axes, config.depths)
        finish(axes, TITLES[init], "depth $L$")
        legend_below(axes, columns=2)
    panels[0].set_ylabel(r"$\max_k\,\|V_{k+1}-V_k\|_F$", fontsize=FONT)
    return figure
