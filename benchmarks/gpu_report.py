"""Figures of what ``benchmarks/gpu.py`` wrote, on any machine with matplotlib.

    python benchmarks/gpu_report.py benchmarks/results/GPU.json --output docs/images

writes gpu_depth.png (a training step along depth: speed and peak memory) and gpu_steps.png (training steps of
all shapes, as a share of the matrix product's rate).
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from odeblock.experiments.config import Refusal
from odeblock.experiments.outputs import save_figure
from odeblock.experiments.saved import explained, read_json

STYLES = {  # of Okabe and Ito, which the colour-blind tell apart
    "store": ("#0072B2", "o-"),
    "auto": ("#009E73", "s-"),
    "adjoint": ("#D55E00", "^-"),
    "eager": ("#000000", "o--"),
    "checkpointed": ("#CC79A7", "s--"),
    "compiled step": ("#999999", "^--"),
}
WRITTEN = "what benchmarks/gpu.py writes"
Step = dict[str, Any]


def sweep_of(steps: list[Step]) -> list[Step]:
    """Those of the shape (B, q, m) that was measured at the most depths, by depth."""
    (sizes, _), *_ = Counter(tuple(step["shape"][:3]) for step in steps).most_common()
    return sorted((s for s in steps if tuple(s["shape"][:3]) == sizes), key=lambda s: s["shape"][3])


def draw_depth(gpu: str, steps: list[Step]) -> Figure:
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    depths = [step["shape"][3] for step in steps]
    for name, (colour, style) in STYLES.items():
        for axes, key, unit in ((speed, "row_layers_per_second", 1e9), (memory, "peak_bytes", 2**20)):
            points = {s["shape"][3]: s[key][name] / unit for s in steps if s[key].get(name)}
            if points:
                axes.plot(list(points), list(points.values()), style, color=colour, label=name, markersize=5)
    batch, q, m, _ = steps[0]["shape"]
    figure.suptitle(f"Training step, {steps[0]['products']}, B = {batch}, q = {q}, m = {m}, {gpu}")
    speed.set(ylabel="rows and layers a second, 10⁹")
    memory.set(ylabel="peak memory beyond inputs, MiB")
    for axes in (speed, memory):
        axes.set(xlabel="depth L", xscale="log", yscale="log")
        axes.set_xticks(depths, [str(depth) for depth in depths])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = speed.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def draw_steps(gpu: str, rates: dict[str, float], steps: list[Step]) -> Figure:
    figure = Figure(figsize=(10, 1 + 0.55 * len(steps)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(STYLES)
    for number, (name, (colour, _)) in enumerate(STYLES.items()):
        shares = [100 * s["operations_per_second"].get(name, 0) / rates[s["products"]] for s in steps]
        places = [place + height * (number - (len(STYLES) - 1) / 2) for place in range(len(steps))]
        axes.barh(places, shares, height, color=colour, label=name)
    axes.set_yticks(range(len(steps)), [f"{s['products']}: {', '.join(map(str, s['shape']))}" for s in steps])
    axes.invert_yaxis()
    axes.set(xlabel="of the matrix product's rate, %, counting 16BqmL operations", ylabel="B, q, m, L")
    axes.set_title(f"Training step, {gpu}")
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def write(results: Path, output: Path) -> None:
    """The figures that the first lines name.

    Raises:
        Refusal: ``results`` is not what ``benchmarks/gpu.py`` writes, or has no training steps.
    """
    with explained(results, WRITTEN):
        data = read_json(results, WRITTEN)
        if not data["steps"]:
            raise ValueError("no training steps; python benchmarks/gpu.py --only step,depth measures some")
        sweep = sweep_of(data["steps"])
        others = [step for step in data["steps"] if step not in sweep] or sweep
        save_figure(output / "gpu_depth.png", draw_depth(data["gpu"], sweep))
        save_figure(output / "gpu_steps.png", draw_steps(data["gpu"], data["matrix_product"], others))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="the JSON of benchmarks/gpu.py")
    parser.add_argument("--output", type=Path, default=Path("docs/images"), help="folder (%(default)s)")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    try:
        write(arguments.results, arguments.output)
    except Refusal as refused:
        parser.error(str(refused))


if __name__ == "__main__":
    main()
