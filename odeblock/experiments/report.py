"""The closing table of the experiment ``train``: its lines as numbers, and how they are printed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One line of the table: what, in which unit, for each network (None: not reached), and i.i.d./smooth."""

    section: str
    label: str
    unit: str
    smooth: float | None
    iid: float | None
    ratio: float | None = None


def table_rows(networks: Mapping[str, Any]) -> Iterator[Row]:
    """Every line of the table.

    Arguments:
        networks: for "smooth" and "iid", as far as reached, a mapping with ``history`` (of
            ``loop.Training``) and, as far as measured, ``cost``: {"memory_bytes": {"odeblock", "eager"},
            "epoch_seconds": {"odeblock", "eager"}}.
    """

    def both(*path: str | int) -> tuple[float | None, float | None]:
        return _look_up(networks, "smooth", *path), _look_up(networks, "iid", *path)

    for part in ("train", "test"):
        smooth, iid = both("history", -1, f"{part}_accuracy")
        yield Row("accuracy", part, "%", _times(smooth, 100), _times(iid, 100))
    for name in ("V", "W"):
        for key, label in (("total_variation", "total variation"), ("max", "max")):
            for when, entry in (("start", 0), ("trained", -1)):
                smooth, iid = both("history", entry, name, key)
                yield Row(
                    "smoothness in depth", f"{label} of {name}, {when}", "", smooth, iid, _over(iid, smooth)
                )
    for section, key, unit, factor in (
        ("peak memory of a training step", "memory_bytes", "MiB", 2.0**-20),
        ("time of an epoch", "epoch_seconds", "s", 1.0),
    ):
        ours, eager = both("cost", key, "odeblock"), both("cost", key, "eager")
        yield Row(section, "odeblock", unit, *(_times(value, factor) for value in ours))
        yield Row(section, "eager loop", unit, *(_times(value, factor) for value in eager))
        yield Row(section, "eager loop / odeblock", "×", _over(eager[0], ours[0]), _over(eager[1], ours[1]))


def _look_up(tree: Any, *path: str | int) -> float | None:
    """The number at the end of ``path``, None where the way there is not yet made."""
    for key in path:
        try:
            tree = tree[key]
        except (KeyError, IndexError):
            return None
    number: float | None = tree
    return number


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _over(numerator: float | None, denominator: float | None) -> float | None:
    return None if numerator is None or not denominator else numerator / denominator


def render(rows: list[Row], title: str) -> Table:
    """The rows as a ``rich`` table; a dash stands for what was not reached or could not be measured."""
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    for heading in ("smooth", "i.i.d.", "i.i.d./smooth"):
        table.add_column(heading, justify="right", no_wrap=True)
    section = ""
    for row in rows:
        if row.section != section:
            section = row.section
            table.add_section()
            table.add_row(section, style="bold")
        ratio = "" if row.ratio is None else _text(row.ratio, "×")
        table.add_row(f"  {row.label}", _text(row.smooth, row.unit), _text(row.iid, row.unit), ratio)
    return table


def _text(value: float | None, unit: str) -> str:
    """Three significant digits (percentages: two decimals) and the unit."""
    if value is None:
        return "-"
    digits = f"{value:.2f}" if unit == "%" else f"{float(f'{value:.3g}'):g}"
    return f"{digits} {unit}".rstrip()
