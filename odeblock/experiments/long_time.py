"""Long training: full-batch gradient descent until the loss is below 1e-6, with PL ratio and weights.

The theorem: wide enough networks meet a Polyak-Łojasiewicz condition near the start, so that the loss falls
exponentially, and weights keep a limit in depth for all times.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..diagnostics import pl_ratio, smoothness
from .config import LongTimeConfig
from .networks import along_depth, random_coefficients
from .reproduce import Part, Results, Run, Summary
from .style import COLOURS, FONT, TITLES, finish, legend_below, sequence
from .synthetic import INITS, Descent, initial_W, make_block, make_data

STACKS = ("V", "W")
SNAPSHOTS = (0, 100, 1000, 10_000)
SAVED_EVERY = 1000


def parts(config: LongTimeConfig) -> list[Part]:
    return [Part(init, config.iterations, partial(train, config, init)) for init in INITS]


def train(config: LongTimeConfig, init: str, run: Run) -> Results:
    """iteration, loss, pl_ratio: at every record; index: of the coefficients of V and W in snapshots.

    snapshots: iteration, and one coefficient of V and of W along depth; smoothness: of V and W at the end.
    """
    x, y = make_data(config.samples, config.dim, config.seed)
    W = initial_W(init, config.depth, config.hidden_dim, config.dim, config.seed)
    descent = Descent(make_block(W), x, y, config.lr)
    block = descent.block
    index = random_coefficients(config.dim, config.hidden_dim, config.seed)
    results: Results = {"index": index, "iteration": [], "loss": [], "pl_ratio": [], "snapshots": []}
    start = 0
    if saved := run.load():
        start, results = saved["start"], saved["results"]
        block.load_state_dict(saved["weights"])
        run.advance(start)

    def snapshot(iteration: int) -> None:
        results["snapshots"].append({"iteration": iteration, **along_depth(block, index)})

    for iteration in range(start, config.iterations + 1):
        loss = descent.gradient()
        done = loss < config.target or iteration == config.iterations
        if done or iteration % config.every == 0:
            results["iteration"].append(iteration)
            results["loss"].append(loss)
            results["pl_ratio"].append(pl_ratio(block, loss))
        if done or iteration in SNAPSHOTS:
            snapshot(iteration)
        if done:
            break
        descent.optimizer.step()
        run.advance(1)
        if (iteration + 1) % SAVED_EVERY == 0:
            run.save({"start": iteration + 1, "results": results, "weights": block.state_dict()})
    return {**results, "smoothness": {name: smoothness(getattr(block, name)) for name in STACKS}}


def summarise(config: LongTimeConfig, results: dict[str, Results]) -> Summary:
    findings: dict[str, Any] = {}
    for init in INITS:
        found = results[init]
        findings |= {
            f"iterations, {TITLES[init]}": found["iteration"][-1],
            f"loss, {TITLES[init]}": found["loss"][-1],
            f"PL ratio: least, largest, {TITLES[init]}": " ".join(
                f"{bound(found['pl_ratio']):.2e}" for bound in (min, max)
            ),
            f"L max|ΔV|, L max|ΔW|, typical coefficient, {TITLES[init]}": " ".join(
                f"{found['smoothness'][name]['max']:.3g}" for name in STACKS
            ),
        }
    rows = [
        {"init": init, "iteration": i, "loss": loss, "pl_ratio": ratio}
        for init in INITS
        for i, loss, ratio in zip(
            *(results[init][key] for key in ("iteration", "loss", "pl_ratio")), strict=True
        )
    ]
    figures = {"long-time": _curves(config, results), "long-time-weights": _weights(results)}
    return Summary(figures, rows, findings)


def _curves(config: LongTimeConfig, results: dict[str, Results]) -> Figure:
    figure = Figure(figsize=(9.0, 4.0), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True)
    labels = {"loss": "loss $R$", "pl_ratio": r"PL ratio $\|\nabla R\|^2/2R$"}
    for axes, (key, label) in zip(panels, labels.items(), strict=True):
        for init, colour in zip(INITS, ("blue", "orange"), strict=True):
            axes.plot(
                results[init]["iteration"],
                results[init][key],
                color=COLOURS[colour],
                linewidth=1.8,
                label=TITLES[init],
            )
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        finish(axes, "", "training iteration", label)
    digit, exponent = f"{config.target:.0e}".split("e")
    power = rf"10^{{{int(exponent)}}}"
    label = f"target ${power}$" if digit == "1" else rf"target ${digit} \cdot {power}$"
    panels[0].axhline(config.target, color="0.4", linestyle="--", linewidth=1.2, label=label)
    panels[0].legend(frameon=False, fontsize=FONT - 2)
    panels[1].set_ylim(bottom=0.3 * min(min(results[init]["pl_ratio"]) for init in INITS))
    return figure


def _weights(results: dict[str, Results]) -> Figure:
    figure = Figure(figsize=(9.0, 6.4), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    panels[0, 0].sharey(panels[0, 1])  # not those of W, which of the smooth run hardly varies
    for row, name in zip(panels, STACKS, strict=True):
        for axes, init in zip(row, INITS, strict=True):
            snapshots = results[init]["snapshots"]
            for snapshot, colour in zip(snapshots, sequence(len(snapshots)), strict=True):
                curve = snapshot[name]
                s = [k / len(curve) for k in range(1, len(curve) + 1)]
                axes.plot(s, curve, color=colour, linewidth=1.6, label=f"iteration {snapshot['iteration']}")
            axes.ticklabel_format(axis="y", useOffset=False)
            i, j = (index + 1 for index in results[init]["index"][name])
            finish(
                axes,
                TITLES[init] if name == STACKS[0] else "",
                "depth $k/L$" if name == STACKS[-1] else "",
                rf"$({name}_k)_{{{i},{j}}}$" if init == INITS[0] else "",
            )
            if name == STACKS[-1]:
                legend_below(axes, columns=2)
    return figure
