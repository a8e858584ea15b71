"""Markdown tables and figures of what ``make bench`` wrote.

    python benchmarks/report.py outputs/bench.json --output outputs/bench

writes speed.md, speedup_by_width.png and memory_by_depth.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from odeblock.experiments.config import Refusal
from odeblock.experiments.outputs import atomic_file, save_figure
from odeblock.experiments.saved import explained, read_json

STRATEGIES = ("store", "checkpoint", "auto", "adjoint")
PEERS = ("eager", "compile", "torch.utils.checkpoint", "torchdiffeq", "2022 adjoint")
MAP_PEERS = ("eager", "channels last", "compile", "torch.utils.checkpoint", "2022 adjoint")
MAPS = " of maps"
SHARED = ("store", "auto", "eager")
WRITTEN = "what make bench writes"
Entry = dict[str, Any]
Shape = tuple[int, ...]


def read(path: Path) -> tuple[dict[str, Any], dict[str, dict[Shape, Entry]]]:
    """The file; its entries by kind of work, then by shape: (B, q, m, L), of maps (B, C, M, L, H, k)."""
    data = read_json(path, WRITTEN)
    works = ("inference", "forward", "training")
    entries: dict[str, dict[Shape, Entry]] = {work + of: {} for of in ("", MAPS) for work in works}
    for benchmark in data["benchmarks"]:
        entry = benchmark["extra_info"]
        if "overhead" in entry or "normalised" in entry:
            continue
        entries[entry["work"] + (MAPS if len(entry["shape"]) > 4 else "")][tuple(entry["shape"])] = entry
    return data, {work: dict(sorted(cases.items())) for work, cases in entries.items()}


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


def size(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.1f}"


def share(entry: Entry, name: str) -> str:
    found = entry["share_of_peak"][name]
    return "-" if found is None else f"{100 * found:.0f} %"


def named(shape: Shape) -> str:
    return ", ".join(map(str, shape))


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


def sizes(cases: Iterable[Shape]) -> str:
    """What the numbers of a shape are."""
    return "B, C, M, L, H, k" if any(len(shape) > 4 for shape in cases) else "B, q, m, L"


def inference_table(cases: dict[Shape, Entry], peers: tuple[str, ...]) -> str:
    def row(shape: Shape, entry: Entry) -> list[str]:
        ours = entry["seconds"]["auto"]
        times = [f"{entry['seconds'][name] / ours:.2f}" for name in peers]
        memory = [size(entry["peak_bytes"][name]) for name in ("auto", *peers)]
        return [named(shape), *times, share(entry, "auto"), share(entry, "eager"), *memory]

    head = [sizes(cases), *peers, "ours, of FMA peak", "eager, of FMA peak", "MiB: ours", *peers]
    return table(head, (row(*case) for case in cases.items()))


def ratio_table(cases: dict[Shape, Entry]) -> str:
    """The fastest peer over each strategy."""

    def row(shape: Shape, entry: Entry) -> list[str]:
        ratios = [f"{entry['ratio'][name]:.2f}" for name in STRATEGIES]
        return [named(shape), *ratios, entry["fastest_peer"], *(share(entry, name) for name in SHARED)]

    head = [sizes(cases), *(f"`{s}`" for s in STRATEGIES), "fastest peer"]
    head += [f"{name}, of FMA peak" for name in SHARED]
    return table(head, (row(*case) for case in cases.items()))


def cost_table(cases: dict[Shape, Entry], peers: tuple[str, ...]) -> str:
    """Each strategy and each peer over ``store``."""
    names = (*STRATEGIES[1:], *peers)

    def row(shape: Shape, entry: Entry) -> list[str]:
        seconds = entry["seconds"]
        ours = seconds["store"]
        return [named(shape), *(f"{seconds[n] / ours:.2f}" if n in seconds else "-" for n in names)]

    return table([sizes(cases), *names], (row(*case) for case in cases.items()))


def overhead_table(data: dict[str, Any]) -> str:
    """Microseconds of a call on next to nothing, and ours over PyTorch's operators."""
    found = [b["extra_info"] for b in data["benchmarks"] if "overhead" in b["extra_info"]]

    def row(entry: Entry) -> list[str]:
        times = [f"{1e6 * seconds:.0f}" for seconds in entry["seconds"].values()]
        return [entry["overhead"], *times, *(f"{ratio:.2f}" for ratio in entry["ratio"].values())]

    head = [f"µs: {name}" for name in found[0]["seconds"]] + [f"ratio: {name}" for name in found[0]["ratio"]]
    return table(["one row, q = m = 16, L = 1", *head], map(row, found))


def normalised_table(found: list[Entry]) -> str:
    """Everyone over ``store``, and the fastest peer over ours."""

    def row(entry: Entry) -> list[str]:
        costs = (f"{seconds / entry['seconds']['store']:.2f}" for seconds in entry["seconds"].values())
        return [named(entry["normalised"]), *costs, *(f"{ratio:.2f}" for ratio in entry["ratio"].values())]

    head = [f"over `store`: {name}" for name in found[0]["seconds"]]
    return table(["B, C, L, H", *head, *(f"ratio: {name}" for name in found[0]["ratio"])], map(row, found))


def memory_table(cases: dict[Shape, Entry], peers: tuple[str, ...]) -> str:
    names = (*STRATEGIES, *peers)
    rows = (
        [named(shape), *(size(case["peak_bytes"].get(n)) for n in names)] for shape, case in cases.items()
    )
    return table([sizes(cases), *names], rows)


def draw_speedup(entries: dict[str, dict[Shape, Entry]]) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    shown = [("inference", "auto", "Inference"), ("training", "store", "Training step, store")]
    for axes, (work, strategy, title) in zip(panels, shown, strict=True):
        cases = entries[work]
        for batch in sorted({shape[0] for shape in cases}):
            best = {q: 0.0 for b, q, *_ in cases if b == batch}
            for (b, q, *_), entry in cases.items():
                if b == batch:
                    best[q] = max(best[q], entry["ratio"][strategy])
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


def draw_memory(cases: dict[Shape, Entry]) -> Figure:
    """Of a training step, for the shape that was measured at the most depths."""
    depths: dict[Shape, list[int]] = {}
    for *sizes, depth in cases:
        depths.setdefault(tuple(sizes), []).append(depth)
    sizes = max(depths, key=lambda s: len(depths[s]))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in (*STRATEGIES, *PEERS):
        found = {L: cases[(*sizes, L)]["peak_bytes"].get(name) for L in sorted(depths[sizes])}
        points = {L: count / 2**20 for L, count in found.items() if count}
        style = "o-" if name in STRATEGIES else "s--"
        axes.plot(list(points), list(points.values()), style, label=name, markersize=4)
    scale = "log" if any(len(line.get_xdata()) for line in axes.lines) else "linear"  # none, if tiny
    axes.set(
        xlabel="depth L", ylabel="MiB beyond parameters and gradients", xscale="log", yscale=scale,
        title="Peak memory of a training step, B = {}, q = {}, m = {}".format(*sizes),
    )  # fmt: skip
    axes.set_xticks(sorted(depths[sizes]), [str(L) for L in sorted(depths[sizes])])
    axes.minorticks_off()
    figure.legend(loc="outside right upper", fontsize="small")
    return figure


def markdown(data: dict[str, Any], entries: dict[str, dict[Shape, Entry]]) -> str:
    operations = (
        "Of the peak: counting 4BqmL operations for a forward, 16BqmL for a training step; of maps times "
        "pixels and taps, of which Winograd's products need less than half.\n"
    )
    parts = [heading(data), operations]
    parts += ["### Inference: each peer over ours\n", inference_table(entries["inference"], PEERS[:2])]
    forward, training = entries["forward"], entries["training"]
    parts += ["### Forward, with what a backward needs: the fastest peer over ours\n", ratio_table(forward)]
    parts += ["### Training step: the fastest peer over ours\n", ratio_table(training)]
    parts += ["![Speed-up by width](speedup_by_width.png)\n"]
    parts += ["### Training step: everyone over `store`\n", cost_table(training, PEERS)]
    parts += ["Gradients of torchdiffeq and of the 2022 adjoint are off by O(1/L); the others are exact.\n"]
    parts += ["### Training step: peak memory, MiB beyond inputs, parameters and gradients\n"]
    parts += [memory_table(training, PEERS), "![Memory by depth](memory_by_depth.png)\n"]
    parts += ["### Forward: peak memory, MiB beyond inputs and result\n", memory_table(forward, PEERS)]
    if any("overhead" in b["extra_info"] for b in data["benchmarks"]):
        parts += ["### Overhead: a call on next to nothing\n", overhead_table(data)]
    inference, training = entries["inference" + MAPS], entries["training" + MAPS]
    if training:
        parts += [
            "## Maps\n",
            "### Inference: each peer over ours\n",
            inference_table(inference, MAP_PEERS[:3]),
        ]
        parts += ["### Training step: the fastest peer over ours\n", ratio_table(training)]
        parts += ["### Training step: everyone over `store`\n", cost_table(training, MAP_PEERS)]
        parts += ["### Training step: peak memory, MiB\n", memory_table(training, MAP_PEERS)]
    normalised = [b["extra_info"] for b in data["benchmarks"] if "normalised" in b["extra_info"]]
    if normalised:
        parts += ["### Training step with batch normalisation\n", normalised_table(normalised)]
    return "\n".join(parts)


def write(results: Path, output: Path) -> None:
    """The files that the first lines name.

    Raises:
        Refusal: ``results`` is not what ``make bench`` writes.
    """
    with explained(results, WRITTEN):
        data, entries = read(results)
        text = markdown(data, entries)
        save_figure(output / "speedup_by_width.png", draw_speedup(entries))
        save_figure(output / "memory_by_depth.png", draw_memory(entries["training"]))
    with atomic_file(output / "speed.md") as file:
        file.write(text.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="the JSON of make bench")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"), help="folder (%(default)s)")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    try:
        write(arguments.results, arguments.output)
    except Refusal as refused:
        parser.error(str(refused))


if __name__ == "__main__":
    main()
