"""What ``accuracy.py`` measured, as Markdown tables and a figure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from odeblock.experiments.outputs import atomic_file, save_figure

JSON, MARKDOWN, FIGURE = "gradient_error.json", "gradient_error.md", "gradient_error.png"
ROOT = Path(__file__).resolve().parents[1]
DOCS_JSON = ROOT / "benchmarks" / "results" / JSON
DOCS_FIGURE = ROOT / "docs" / "images" / FIGURE
DOCS_PAGE = ROOT / "docs" / "gradient-error.md"
BEGIN, END = "<!-- written by benchmarks/accuracy.py: begin -->\n", "<!-- end -->\n"

GRADIENTS = {"h": "dx", "V": "dV", "W": "dW"}
WEIGHTS = {"smooth": "Smooth weights", "iid": "i.i.d. weights", "trained": "Trained weights"}
LABELS: dict[str, str] = {
    "eager": "eager autograd, worst of {runs}",
    "eager_low_state": "eager autograd, 16-bit state",
    "store": "`store`",
    "checkpoint": "`checkpoint`",
    "auto": "`auto`",
    "adjoint": "`adjoint`",
    "adjoint_2022": "2022 adjoint",
    "torchdiffeq": "torchdiffeq adjoint, `perturb`",
    "torchdiffeq_default": "torchdiffeq adjoint, default",
}
REBUILDING = ("adjoint", "adjoint_2022", "torchdiffeq", "torchdiffeq_default")
HEADLINE_DEPTH = 256

Entry = dict[str, Any]
Cells = dict[int, Entry]  # by depth


def select(results: dict[str, Any], weights: str, dtype: str) -> dict[str, Cells]:
    """method -> depth -> entry, the seeds put together: the largest errors, mean evaluations and order."""
    groups: dict[str, dict[int, list[Entry]]] = {}
    for entry in results["entries"]:
        if (entry["weights"], entry["dtype"]) == (weights, dtype):
            groups.setdefault(entry["method"], {}).setdefault(entry["depth"], []).append(entry)
    return {
        method: {depth: _worst(entries) for depth, entries in groups[method].items()}
        for method in LABELS
        if method in groups
    }


def _worst(entries: list[Entry]) -> Entry:
    for entry in entries:
        if "reason" in entry:
            return {"reason": entry["reason"]}
    errors = [entry["errors"] for entry in entries]
    worst: Entry = {"errors": {name: max(e[name] for e in errors) for name in errors[0]}}
    worst["gradient"] = max(worst["errors"][name] for name in GRADIENTS)
    worst["warned"] = any(entry.get("warned") for entry in entries)
    for name in ("estimate", "drift", "evaluations", "order"):
        values = [entry[name] for entry in entries if name in entry]
        if values:
            mean = name in ("evaluations", "order")
            worst[name] = sum(values) / len(values) if mean else max(values)
    return worst


def headline(results: dict[str, Any]) -> str | None:
    """The 2022 adjoint against ours; None where its depth was not measured."""
    methods = select(results, "smooth", "float32")
    ours, theirs = (methods[name].get(HEADLINE_DEPTH) for name in ("adjoint", "adjoint_2022"))
    if not (ours and theirs) or "reason" in ours or "reason" in theirs:
        return None
    return (
        f"Smooth weights, float32, L = {HEADLINE_DEPTH}: the largest error of a gradient is "
        f"{_number(theirs['gradient'])} with the 2022 adjoint ({theirs['evaluations']:.2f} evaluations of f "
        f"a step) and {_number(ours['gradient'])} with `adjoint` ({ours['evaluations']:.2f}): "
        f"{theirs['gradient'] / ours['gradient']:.0f} times less."
    )


def render(results: dict[str, Any]) -> str:
    """The generated part of the document."""
    case, training = results["case"], results["training"]
    seeds: dict[int, list[str]] = {}
    for depth, numbers in results["seeds"].items():
        seeds.setdefault(len(numbers), []).append(depth)
    counts = ", ".join(f"of {n} at L = {', '.join(where)}" for n, where in seeds.items())
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    parts = [
        f"B = {case['batch']}, q = {case['dim']}, m = {case['hidden']}, {case['activation']}, no biases; "
        f"trained for {training['epochs']} epochs. Errors, estimate and drift are the largest, evaluations "
        f"and order the mean, over seeds: {counts}. Commit {results['commit'] or 'unknown'}, "
        f"{results['machine']['cpu']}, {versions}.",
        headline(results) or "",
        _notes(results),
    ]
    tables = [(weights, dtype) for weights in WEIGHTS for dtype in ("float32", "bfloat16")]
    for weights, dtype in tables:
        methods = select(results, weights, dtype)
        parts += [f"### {WEIGHTS[weights]}, {dtype}", _table(results, methods, dtype)]
    parts.append("<details><summary>dx, dV and dW apart</summary>")
    for weights, dtype in tables:
        rows = [
            (_label(results, method), [_cell(cells[d], *GRADIENTS) for d in sorted(cells)])
            for method, cells in select(results, weights, dtype).items()
        ]
        parts += [f"**{WEIGHTS[weights]}, {dtype}** (dx dV dW)", _markdown(results, "", rows)]
    parts.append("</details>")
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(results: dict[str, Any], methods: dict[str, Cells], dtype: str) -> str:
    depths = sorted(methods["eager"])

    def row(label: str, method: str, *errors: str) -> tuple[str, list[str]]:
        return label, [_cell(methods[method][depth], *errors) for depth in depths]

    rows = [row(_label(results, name), name) for name in methods]
    rows.append(("**largest error of a reconstructed state**", []))
    rows += [row(_label(results, name), name, "states") for name in REBUILDING]
    rows.append(row(f"the {dtype} forward's own", "eager", "forward_states"))
    rows.append(("**evaluations of f a step**, in the backward", []))
    rows += [
        (_label(results, name), [_value(methods[name][d], "evaluations", "{:.2f}") for d in depths])
        for name in REBUILDING[:-1]
    ]
    rows.append(("**`adjoint` reports**", []))
    ours = [methods["adjoint"][depth] for depth in depths]
    rows.append(("order", [_value(cell, "order", "{:.1f}") for cell in ours]))
    rows += [(name, [_value(cell, name) for cell in ours]) for name in ("estimate", "drift")]
    return _markdown(results, "largest error of dx, dV, dW", rows)


def _label(results: dict[str, Any], method: str) -> str:
    label: str = LABELS[method].format(runs=results["eager_runs"])
    return label


def _cell(entry: Entry, *errors: str) -> str:
    """The named errors; without names the largest of a gradient, marked where the adjoint warned."""
    if "reason" in entry:
        return "—"
    if errors:
        return " ".join(_number(entry["errors"][name]) for name in errors)
    return _number(entry["gradient"]) + (" †" if entry["warned"] else "")


def _value(entry: Entry, name: str, form: str | None = None) -> str:
    if name not in entry:
        return "—"
    return form.format(entry[name]) if form else _number(entry[name])


def _number(value: float) -> str:
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}" if value else "0"


def _markdown(results: dict[str, Any], title: str, rows: Iterable[tuple[str, list[str]]]) -> str:
    depths = list(results["seeds"])
    lines = [[f"**{title}**" if title else "", *(f"L = {depth}" for depth in depths)]]
    lines.append(["---", *["---:"] * len(depths)])
    lines += [[label, *(cells or [""] * len(depths))] for label, cells in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _notes(results: dict[str, Any]) -> str:
    """What the marks in the tables mean, as far as there are any."""
    reasons: dict[str, list[str]] = {}
    for entry in results["entries"]:
        if "reason" in entry:
            names = reasons.setdefault(entry["reason"], [])
            names += [_label(results, entry["method"])] * (_label(results, entry["method"]) not in names)
    notes = [f"—: {reason} ({'; '.join(names)})." for reason, names in reasons.items()]
    if any(entry.get("warned") for entry in results["entries"]):
        notes.append("†: a `DriftWarning` said so.")
    return " ".join(notes)


# ---- figure ----------------------------------------------------------------------------------------------

FONT = 10
STYLES: dict[str, tuple[str, dict[str, Any]]] = {
    "eager": ("eager autograd (float32 state), worst of {runs}", {"color": "0.75", "linewidth": 6}),
    "adjoint": ("adjoint", {"color": "#0072B2", "linewidth": 2.4, "marker": "o", "markersize": 7}),
    "exact": ("store, checkpoint, auto", {"color": "black", "linewidth": 1, "marker": "o", "markersize": 3}),
    "adjoint_2022": ("2022 adjoint", {"color": "#D55E00", "marker": "s", "markersize": 5}),
    "torchdiffeq": ("torchdiffeq adjoint, perturb", {"color": "#009E73", "marker": "^", "markersize": 5}),
    "torchdiffeq_default": (
        "torchdiffeq adjoint, default",
        {"color": "#009E73", "linestyle": ":", "marker": "v", "markersize": 5},
    ),
    "eager_low_state": (
        "eager autograd, bfloat16 state",
        {"color": "#CC79A7", "linestyle": "--", "marker": "x", "markersize": 5},
    ),
}
"""A curve each, drawn in this order; the colours are told apart by the colour-blind too."""


def figure(results: dict[str, Any]) -> Figure:
    """Largest error of dx, dV, dW against L: a panel for each kind of weights (columns) and dtype (rows)."""
    drawn = Figure(figsize=(10.0, 7.0), layout="constrained")
    panels = drawn.subplots(2, 3, sharex=True, sharey="row")
    for row, dtype in zip(panels, ("float32", "bfloat16"), strict=True):
        for axes, weights in zip(row, WEIGHTS, strict=True):
            _draw(axes, results, select(results, weights, dtype))
            axes.set_title(f"{WEIGHTS[weights].lower()}, {dtype}", fontsize=FONT + 1)
        row[0].set_ylabel("largest error of dx, dV, dW", fontsize=FONT)
    for axes in panels[1]:
        axes.set_xlabel("depth L", fontsize=FONT)
    handles, labels = panels[1, 0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=FONT)
    return drawn


def _draw(axes: Axes, results: dict[str, Any], methods: dict[str, Cells]) -> None:
    curves = {name: _curve(cells) for name, cells in methods.items()}
    exact = [curves[name] for name in ("store", "checkpoint", "auto")]
    curves["exact"] = {depth: max(curve[depth] for curve in exact) for depth in exact[0]}
    depths = [int(depth) for depth in results["seeds"]]
    for name, (label, style) in STYLES.items():
        if name in curves:
            x, y = list(curves[name]), list(curves[name].values())
            axes.plot(x, y, label=label.format(runs=results["eager_runs"]), **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(depths, [str(d) if math.log2(d) % 2 == 0 else "" for d in depths])  # all do not fit
    axes.minorticks_off()
    axes.tick_params(labelsize=FONT - 1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


def _curve(cells: Cells) -> dict[int, float]:
    return {depth: entry["gradient"] for depth, entry in sorted(cells.items()) if "gradient" in entry}


# ---- files -----------------------------------------------------------------------------------------------


def write(results: dict[str, Any], folder: Path) -> None:
    """The Markdown and the figure of a run."""
    text = f"# Error of gradients against float64 autograd\n\n![]({FIGURE})\n\n{render(results)}"
    _save(folder / MARKDOWN, text)
    save_figure(folder / FIGURE, figure(results))


def write_docs(results: dict[str, Any]) -> None:
    """The same in the documentation: its page between two marks, and its figure."""
    head, _, rest = DOCS_PAGE.read_text().partition(BEGIN)
    _, _, tail = rest.partition(END)
    _save(DOCS_PAGE, head + BEGIN + render(results) + END + tail)
    save_figure(DOCS_FIGURE, figure(results))


def _save(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())
