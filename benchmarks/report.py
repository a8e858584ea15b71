"""Markdown tables and figures of what ``make bench`` wrote.

    python benchmarks/report.py outputs/bench.json --output outputs/bench

writes speed.md, speedup_by_width.png and memory_by_depth.png.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from odeblock.experiments.outputs import atomic_file, save_figure

STRATEGIES = ("store", "checkpoint", "auto", "adjoint")
PEERS = ("eager", "compile", "torch.utils.checkpoint", "torchdiffeq", "2022 adjoint")
Entry = dict[str, Any]
Shape = tuple[int, ...]


def read(path: Path) -> tuple[dict[str, Any], dict[tuple[str, str], dict[Shape, Entry]]]:
    """The file, and its entries by work and strategy, then by shape (B, q, m, L)."""
    data = json.loads(path.read_text())
    entries: dict[tuple[str, str], dict[Shape, Entry]] = {}
    for benchmark in data["benchmarks"]:
        entry = benchmark["extra_info"]
        entries.setdefault((entry["work"], entry["strategy"]), {})[tuple(entry["shape"])] = entry
    return data, entries


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


def size(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.1f}"


def share(entry: Entry) -> str:
    return "-" if entry["share_of_peak"] is None else f"{100 * entry['share_of_peak']:.0f} %"


def heading(data: dict[str, Any]) -> str:
    machine, commit = data["machine_info"], data["commit_info"]
    state = " (with changes)" if commit.get("dirty") else ""
    core = machine.get("core") or {}
    return (
        f"{machine.get('cpu', {}).get('brand_raw', machine['machine'])}, {machine['threads']} threads, "
        f"{core.get('cpu_features', 'no native core')}, {core.get('compiler', '')}; "
        f"torch {machine['torch']}, odeblock {machine['odeblock']} at {commit['id'][:10]}{state}; "
        f"{data['datetime'][:10]}. float32, gelu_tanh, smooth weights. Times are medians of interleaved "
        "rounds, over ours: 3 means that the peer takes three times as long.\n"
    )


def forward_table(cases: dict[Shape, Entry]) -> str:
    def row(shape: Shape, entry: Entry) -> list[str]:
        ours = entry["seconds"][entry["strategy"]]
        peers = [f"{entry['seconds'][name] / ours:.2f}" for name in PEERS[:2]]
        memory = [size(entry["peak_bytes"][name]) for name in (entry["strategy"], *PEERS[:2])]
        return [", ".join(map(str, shape)), *peers, share(entry), *memory]

    head = ["B, q, m, L", *PEERS[:2], "ours, of FMA peak", "MiB: ours", *PEERS[:2]]
    return table(head, (row(*case) for case in sorted(cases.items())))


def training_table(entries: dict[tuple[str, str], dict[Shape, Entry]]) -> str:
    """The fastest peer over each strategy, and what not storing costs."""

    def row(shape: Shape, store: Entry) -> list[str]:
        others = {s: entries["training", s][shape] for s in STRATEGIES if shape in entries["training", s]}
        cells = [f"{others[s]['ratio']:.2f}" if s in others else "-" for s in STRATEGIES]
        cost = [
            f"{others[s]['seconds'][s] / others[s]['seconds']['store']:.2f}" if s in others else "-"
            for s in STRATEGIES[1:]
        ]
        return [", ".join(map(str, shape)), *cells, store["fastest_peer"], *cost, share(store)]

    head = ["B, q, m, L", *(f"`{s}`" for s in STRATEGIES), "fastest peer"]
    head += [*(f"`{s}` over `store`" for s in STRATEGIES[1:]), "`store`, of FMA peak"]
    return table(head, (row(*case) for case in sorted(entries["training", "store"].items())))


def peers_table(cases: dict[Shape, Entry]) -> str:
    def row(shape: Shape, entry: Entry) -> list[str]:
        seconds = entry["seconds"]
        ours = seconds["store"]
        cells = [f"{seconds[name] / ours:.2f}" if name in seconds else "-" for name in PEERS]
        return [", ".join(map(str, shape)), *cells]

    return table(["B, q, m, L", *PEERS], (row(*case) for case in sorted(cases.items())))


def memory_table(entries: dict[tuple[str, str], dict[Shape, Entry]]) -> str:
    def row(shape: Shape) -> list[str]:
        return [", ".join(map(str, shape)), *(size(bytes_of(entries, name, shape)) for name in names)]

    names = (*STRATEGIES, *PEERS)
    return table(["B, q, m, L", *names], (row(shape) for shape in sorted(entries["training", "store"])))


def bytes_of(entries: dict[tuple[str, str], dict[Shape, Entry]], name: str, shape: Shape) -> int | None:
    strategy = name if name in STRATEGIES else "store"
    found: int | None = entries["training", strategy][shape]["peak_bytes"].get(name)
    return found


def draw_speedup(entries: dict[tuple[str, str], dict[Shape, Entry]]) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    shown = [("inference", "auto", "Inference"), ("training", "store", "Training step, store")]
    for axes, (work, strategy, title) in zip(panels, shown, strict=True):
        cases = entries[work, strategy]
        for batch in sorted({shape[0] for shape in cases}):
            best = {q: 0.0 for b, q, *_ in cases if b == batch}
            for (b, q, *_), entry in cases.items():
                if b == batch:
                    best[q] = max(best[q], entry["ratio"])
            if len(best) > 1:
                axes.plot(sorted(best), [best[q] for q in sorted(best)], "o-", label=f"B = {batch}")
        axes.axhline(1, color="gray", linewidth=1)
        axes.set(title=title, xlabel="features q", xscale="log", yscale="log")
        axes.set_xticks([16, 64, 256, 512], ["16", "64", "256", "512"])
        axes.set_yticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
        axes.minorticks_off()
        if len(axes.lines) > 1:
            axes.legend()
    panels[0].set_ylabel("times as fast as the fastest peer")
    return figure


def draw_memory(entries: dict[tuple[str, str], dict[Shape, Entry]]) -> Figure:
    """Of the shape that was measured at the most depths."""
    cases = entries["training", "store"]
    depths: dict[Shape, list[int]] = {}
    for *sizes, depth in cases:
        depths.setdefault(tuple(sizes), []).append(depth)
    sizes = max(depths, key=lambda s: len(depths[s]))
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in (*STRATEGIES, *PEERS):
        found = {L: bytes_of(entries, name, (*sizes, L)) for L in sorted(depths[sizes])}
        points = {L: count / 2**20 for L, count in found.items() if count}
        style = "o-" if name in STRATEGIES else "s--"
        axes.plot(list(points), list(points.values()), style, label=name, markersize=4)
    axes.set(
        xlabel="depth L", ylabel="MiB beyond parameters and gradients", xscale="log", yscale="log",
        title="Peak memory of a training step, B = {}, q = {}, m = {}".format(*sizes),
    )  # fmt: skip
    axes.set_xticks(sorted(depths[sizes]), [str(L) for L in sorted(depths[sizes])])
    axes.minorticks_off()
    axes.legend(fontsize="small")
    return figure


def markdown(data: dict[str, Any], entries: dict[tuple[str, str], dict[Shape, Entry]]) -> str:
    parts = [heading(data)]
    for work, title in (("inference", "Inference"), ("forward", "Forward, with what a backward needs")):
        parts += [f"### {title}\n", forward_table(entries[work, "auto"])]
    parts += ["### Training step: the fastest peer over ours\n", training_table(entries)]
    parts += ["![Speed-up by width](speedup_by_width.png)\n"]
    parts += ["### Training step: each peer over `store`\n", peers_table(entries["training", "store"])]
    parts += ["Gradients of torchdiffeq and of the 2022 adjoint are off by O(1/L); the others are exact.\n"]
    parts += ["### Training step: peak memory, MiB beyond inputs, parameters and gradients\n"]
    parts += [memory_table(entries), "![Memory by depth](memory_by_depth.png)\n"]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="the JSON of make bench")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"), help="folder (%(default)s)")
    arguments = parser.parse_args()
    data, entries = read(arguments.results)
    arguments.output.mkdir(parents=True, exist_ok=True)
    with atomic_file(arguments.output / "speed.md") as file:
        file.write(markdown(data, entries).encode())
    save_figure(arguments.output / "speedup_by_width.png", draw_speedup(entries))
    save_figure(arguments.output / "memory_by_depth.png", draw_memory(entries))


if __name__ == "__main__":
    main()
