"""The one style of all figures: fonts, colours that the colour-blind tell apart, axes, and fitted slopes."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

FONT = 11
TITLES = {"smooth": "smooth initialisation", "iid": "i.i.d. initialisation"}
COLOURS = {"blue": "#0072B2", "orange": "#D55E00", "green": "#009E73", "grey": "0.55"}
"""Of Okabe & Ito's palette."""
SEQUENTIAL = "viridis"
"""The map for ordered things and for heat maps: its lightness is monotone."""


def finish(axes: Axes, title: str = "", xlabel: str = "", ylabel: str = "", grid: str = "both") -> None:
    """Title, labels, a light grid behind the lines, no frame on top and to the right."""
    axes.set_title(title, fontsize=FONT + 1)
    axes.set_xlabel(xlabel, fontsize=FONT)
    axes.set_ylabel(ylabel, fontsize=FONT)
    axes.tick_params(labelsize=FONT - 1)
    axes.spines[["top", "right"]].set_visible(False)
    if grid:
        axes.grid(axis=grid, color="0.9", linewidth=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def depth_axis(axes: Axes, depths: Sequence[int]) -> None:
    """A logarithmic axis of depths, with ticks at all of them, or, of more than 8, at every other one."""
    axes.set_xscale("log", base=2)
    first = (len(depths) - 1) % 2  # such that the last one is shown
    shown = depths if len(depths) <= 8 else depths[first::2]
    axes.xaxis.set_major_locator(FixedLocator(list(shown)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([str(depth) for depth in shown])


def sequence(count: int) -> list[tuple[float, ...]]:
    """Colours for ``count`` ordered lines, dark to light, without the yellow that paper swallows."""
    colours = matplotlib.colormaps[SEQUENTIAL](np.linspace(0.0, 0.85, count))
    return [tuple(colour) for colour in colours]


def slope(depths: Sequence[int], values: Sequence[float], fit_from: int) -> float:
    """The exponent p of values ∝ L^p, by least squares in logarithms over L >= ``fit_from``."""
    pairs = [(depth, value) for depth, value in zip(depths, values, strict=True) if depth >= fit_from]
    x, y = np.log(np.array(pairs, dtype=np.float64)).T
    return float(np.polyfit(x, y, 1)[0])


def guide(axes: Axes, depths: Sequence[int], anchor: float, power: int = -1) -> None:
    """A dashed line ∝ L^power that starts at ``anchor``."""
    first = depths[0]
    values = [anchor * (depth / first) ** power for depth in depths]
    axes.plot(depths, values, color="0.4", linestyle="--", linewidth=1.2, label=rf"$\propto L^{{{power}}}$")


def legend_below(axes: Axes, columns: int) -> None:
    """A legend under the label of the x axis, where no line can pass behind it."""
    axes.legend(
        frameon=False, fontsize=FONT - 2, ncols=columns, loc="upper center", bbox_to_anchor=(0.5, -0.16)
    )
