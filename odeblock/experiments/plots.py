"""One coefficient of V and one of W along depth, before and after training, smooth and i.i.d."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .style import FONT, TITLES, finish

COLOURS = {"V": ("#56A6E0", "#003A5C"), "W": ("#F08A3C", "#6B2A00")}
"""Trained (light) and initial (dark): blues and oranges, which the colour-blind tell apart too."""

FEW_LAYERS = 32  # up to here every layer is marked


def coefficient_figure(rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Figure:
    """Two panels a row, smooth left and i.i.d. right, on one scale.

    Arguments:
        rows: by what is common to a row's networks ("" for nothing to tell): for each network that was
            reached, "smooth" and "iid", a mapping of "V" and "W" to {"index": [i, j], "initial": L numbers,
            "trained": L numbers}.

    Returns:
        a ``matplotlib.figure.Figure`` of its own (no pyplot, no global state).
    """
    figure = Figure(figsize=(9.0, 0.8 + 3.4 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), 2, sharex=True, sharey=True, squeeze=False)
    for line, (text, coefficients) in enumerate(rows.items(), start=1):
        for axes, init in zip(panels[line - 1], TITLES, strict=True):
            title = f"{text}, {TITLES[init]}" if text else TITLES[init]
            xlabel = "depth $k/L$" if line == len(rows) else ""
            finish(axes, title, xlabel, "coefficient" if init == "smooth" else "", grid="y")
            axes.set_xlim(0.0, 1.01)
            if init in coefficients:
                draw(axes, coefficients[init])
            else:
                axes.text(0.5, 0.5, "not trained", transform=axes.transAxes, ha="center", fontsize=FONT)
    reached = [axes for axes in panels.flat if axes.lines]
    if reached:
        handles, labels = reached[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=FONT)
    return figure


def draw(axes: Axes, coefficients: Mapping[str, Any]) -> None:
    """The two coefficients of one network, as ``coefficient_figure`` takes them."""
    for name in ("V", "W"):
        curve = coefficients[name]
        depth = len(curve["trained"])
        s = [k / depth for k in range(1, depth + 1)]
        index = ",".join(str(i + 1) for i in curve["index"])
        symbol = rf"$({name}_k)_{{{index}}}$"
        light, dark = COLOURS[name]
        marker = "." if depth <= FEW_LAYERS else ""
        after, before = f"{symbol} after training", f"{symbol} at initialisation"
        axes.plot(s, curve["trained"], color=light, linewidth=2.2, marker=marker, markersize=9, label=after)
        axes.plot(s, curve["initial"], color=dark, linewidth=0.7, marker=marker, markersize=3, label=before)
