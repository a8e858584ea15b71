"""The figure of the experiment ``train``: one coefficient of V and one of W along depth, smooth and i.i.d."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

TITLES = {"smooth": "smooth initialisation", "iid": "i.i.d. initialisation"}
COLOURS = {"V": ("#56A6E0", "#003A5C"), "W": ("#F08A3C", "#6B2A00")}
"""Trained (light) and initial (dark): blues and oranges, which the colour-blind tell apart too."""

FONT = 11
FEW_LAYERS = 32  # up to here every layer is marked


def coefficient_figure(coefficients: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Two panels, smooth left and i.i.d. right, on one scale.

    Arguments:
        coefficients: for each network that was reached, "smooth" and "iid", a mapping of "V" and "W" to
            {"index": [i, j], "initial": L numbers, "trained": L numbers}.

    Returns:
        a ``matplotlib.figure.Figure`` of its own (no pyplot, no global state).
    """
    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, init in zip(panels, TITLES, strict=True):
        _style(axes, TITLES[init])
        if init in coefficients:
            _draw(axes, coefficients[init])
        else:
            axes.text(0.5, 0.5, "not trained", transform=axes.transAxes, ha="center", fontsize=FONT)
    panels[0].set_ylabel("coefficient", fontsize=FONT)
    reached = [axes for axes in panels if axes.lines]
    if reached:
        handles, labels = reached[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=FONT)
    return figure


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=FONT + 1)
    axes.set_xlabel(r"depth $k/L$", fontsize=FONT)
    axes.set_xlim(0.0, 1.01)
    axes.tick_params(labelsize=FONT - 1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


def _draw(axes: Axes, coefficients: Mapping[str, Any]) -> None:
    for name in ("V", "W"):
        curve = coefficients[name]
        depth = len(curve["trained"])
        s = [k / depth for k in range(1, depth + 1)]
        i, j = (index + 1 for index in curve["index"])
        symbol = rf"$({name}_k)_{{{i},{j}}}$"
        light, dark = COLOURS[name]
        marker = "." if depth <= FEW_LAYERS else ""
        after, before = f"{symbol} after training", f"{symbol} at initialisation"
        axes.plot(s, curve["trained"], color=light, linewidth=2.2, marker=marker, markersize=9, label=after)
        axes.plot(s, curve["initial"], color=dark, linewidth=0.7, marker=marker, markersize=3, label=before)
