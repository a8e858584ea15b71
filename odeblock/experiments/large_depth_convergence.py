"""Weights as functions of depth against their limit, (∫ ‖𝒵^L(s, t) - 𝒵(s, t)‖² ds)^½, along training.

The limit is stood in for by a network of 16,384 layers, trained side by side from the same function of
depth: an i.i.d. network of depth L starts with those of its layers that lie at k/L. The theorem: O(1/L),
uniformly in time.
In float64, for at first W differs by less than float32 can tell.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from ..diagnostics import distance
from .config import ConvergenceConfig
from .reproduce import Part, Results, Run, Summary
from .style import COLOURS, FONT, SEQUENTIAL, TITLES, depth_axis, finish, guide, legend_below, slope
from .synthetic import INITS, Descent, initial_W, make_block, make_data

STACKS = ("V", "W")
POINTS = 4


def parts(config: ConvergenceConfig) -> list[Part]:
    return [Part(init, config.iterations, partial(train, config, init)) for init in INITS]


def train(config: ConvergenceConfig, init: str, run: Run) -> Results:
    """iteration: of each comparison; V, W: the distances then, a list over depths for each."""
    x, y = (data.double() for data in make_data(config.samples, config.dim, config.seed))
    W = initial_W(init, config.reference, config.hidden_dim, config.dim, config.seed)

    def descent(depth: int) -> Descent:
        step = config.reference // depth
        return Descent(make_block(W[step - 1 :: step]).double(), x, y, config.lr)

    # The integral over depth is taken at a few points within each layer of the deepest network: at the layers
    # themselves i.i.d. networks begin with the same weights.
    stride = config.reference // (POINTS * config.depths[-1])
    layers = torch.arange(max(1, stride // 2), config.reference + 1, max(1, stride))
    reference, networks = descent(config.reference), [descent(depth) for depth in config.depths]
    everything = (reference, *networks)
    results: Results = {"iteration": [], "V": [], "W": []}
    if saved := run.load():
        results = saved["results"]
        for network, weights in zip(everything, saved["weights"], strict=True):
            network.block.load_state_dict(weights)
    done = results["iteration"][-1] if results["iteration"] else 0
    run.advance(done)
    for iteration in range(done + 1, config.iterations + 1):
        for network in everything:
            network.step()
        run.advance(1)
        if iteration % config.every == 0:
            results["iteration"].append(iteration)
            for name in STACKS:
                limit = getattr(reference.block, name)[layers - 1]
                found = [distance(getattr(n.block, name), limit, layers / config.reference) for n in networks]
                results[name].append(found)
            weights = [network.block.state_dict() for network in everything]
            run.save({"results": results, "weights": weights})
    return results


def summarise(config: ConvergenceConfig, results: dict[str, Results]) -> Summary:
    slopes = {
        (init, name): [slope(config.depths, at, config.fit_from) for at in results[init][name]]
        for init in INITS
        for name in STACKS
    }
    findings = {
        f"slope of {name} over L >= {config.fit_from}, {TITLES[init]}": f"{min(at):.3f} to {max(at):.3f}"
        for (init, name), at in slopes.items()
    }
    rows: list[dict[str, Any]] = [
        {
            "init": init,
            "iteration": iteration,
            "depth": depth,
            **{name: results[init][name][t][i] for name in STACKS},
        }
        for init in INITS
        for t, iteration in enumerate(results[init]["iteration"])
        for i, depth in enumerate(config.depths)
    ]
    figures = {
        "large-depth-convergence": _heat_maps(config, results),
        "large-depth-convergence-rate": _rates(config, results, slopes),
    }
    return Summary(figures, rows, findings)


def _heat_maps(config: ConvergenceConfig, results: dict[str, Results]) -> Figure:
    figure = Figure(figsize=(9.0, 6.4), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    for row, name in zip(panels, STACKS, strict=True):
        values = [value for init in INITS for at in results[init][name] for value in at]
        norm = LogNorm(min(values), max(values))
        for axes, init in zip(row, INITS, strict=True):
            found = results[init]
            columns = list(zip(*found[name], strict=True))
            mesh = axes.pcolormesh(
                found["iteration"], range(len(config.depths)), columns, norm=norm, cmap=SEQUENTIAL
            )
            axes.set_yticks(range(len(config.depths)), [str(depth) for depth in config.depths])
            last = name == STACKS[-1]
            finish(
                axes,
                TITLES[init] if name == STACKS[0] else "",
                "training iteration" if last else "",
                "depth $L$" if init == INITS[0] else "",
                grid="",
            )
        bar = figure.colorbar(mesh, ax=row)
        bar.set_label(rf"$\|\mathcal{{{name}}}^L(\cdot,t)-\mathcal{{{name}}}(\cdot,t)\|$", fontsize=FONT)
    return figure


def _rates(
    config: ConvergenceConfig, results: dict[str, Results], slopes: dict[tuple[str, str], list[float]]
) -> Figure:
    figure = Figure(figsize=(9.0, 5.0), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, name in zip(panels, STACKS, strict=True):
        for init, colour in zip(INITS, ("blue", "orange"), strict=True):
            label = f"{TITLES[init]}: slope {slopes[init, name][-1]:.2f}"
            values = results[init][name][-1]
            axes.plot(
                config.depths,
                values,
                color=COLOURS[colour],
                linewidth=1.8,
                marker="o",
                markersize=4,
                label=label,
            )
        guide(axes, config.depths, 0.5 * results["smooth"][name][-1][0])
        axes.set_yscale("log")
        depth_axis(axes, config.depths)
        symbol = rf"\mathcal{{{name}}}"
        finish(axes, f"iteration {config.iterations}", "depth $L$", rf"$\|{symbol}^L-{symbol}\|$")
        legend_below(axes, columns=1)
    return figure
