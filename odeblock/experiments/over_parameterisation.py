"""What the width of the block does for training on n samples: the PL constant at first, the loss in the end.

The theorem asks for a width of at least a constant times n, for then the PL ratio is bounded below near the
start. In its normalisation, h ← h + V σ(W h/√q) / (L√m), the best step of gradient descent does not depend
on the width: with V/√m and W/√q for parameters the rates are lr · L/m and lr · L/q. V = 0, W tied, normal x
and y in R^d, risk (1/2n) Σ ‖F(x_i) - y_i‖².

"constant": with V = 0 the gradient is that of V alone, and for every y the PL ratio is at least λ_min(K)/n,
where K_ij = σ(W x_i)·σ(W x_j)/m, of rank m at most. "hidden" trains with the hidden units m for a
width, q = d; "both" with q = m for a width, behind a frozen random A [q, d] and before a frozen B [d, q].
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from ..block import DeepResBlock
from .config import OverParameterisationConfig
from .loop import finite
from .reproduce import Part, Results, Run, Summary
from .style import FONT, SEQUENTIAL, finish
from .synthetic import make_data

Grid = NDArray[np.float64]  # [samples, widths]

TITLES = {
    "constant": "PL constant at the start",
    "hidden": "last loss / first loss, $q = d$",
    "both": "last loss / first loss, $q = m$",
}
TRAINED = ("hidden", "both")
ZERO = 1e-12
"""A smaller PL constant is rounding: λ_min(K) = 0."""


def parts(config: OverParameterisationConfig) -> list[Part]:
    trainings = len(config.widths) * config.seeds
    return [
        Part(f"{panel}-{samples}", trainings if panel in TRAINED else 1, partial(row, config, panel, samples))
        for panel in TITLES
        for samples in config.samples
    ]


def row(config: OverParameterisationConfig, panel: str, samples: int, run: Run) -> Results:
    """values: for each width a list over seeds, of PL constants or of the last loss over the first."""
    values: list[list[float]] = []
    for width in config.widths:
        values.append([])
        for seed in range(config.seed, config.seed + config.seeds):
            if panel in TRAINED:
                values[-1].append(train(config, panel, samples, width, seed))
                run.advance(1)
            else:
                values[-1].append(pl_constant(config, samples, width, seed))
    return {"values": values}


def pl_constant(config: OverParameterisationConfig, samples: int, width: int, seed: int) -> float:
    """λ_min(K)/n at V = 0, with ``width`` hidden units on x in R^d."""
    x, _ = make_data(samples, config.dim, seed)
    block = _block(config, config.dim, width, seed)
    features = F.gelu(x.double() @ block.W[0].detach().double().T)
    return float(torch.linalg.eigvalsh(features @ features.T / width)[0].clamp_min(0)) / samples


def train(config: OverParameterisationConfig, panel: str, samples: int, width: int, seed: int) -> float:
    """The loss after training over that at the start."""
    x, y = make_data(samples, config.dim, seed)
    dim, B = config.dim, None
    if panel == "both":
        dim, generator = width, torch.Generator().manual_seed(seed + 1)
        x = x @ (torch.randn(config.dim, dim, generator=generator) / config.dim**0.5)
        B = torch.randn(dim, config.dim, generator=generator) / dim**0.5
    block = _block(config, dim, width, seed)
    rates = {block.V: config.lr * config.depth / width, block.W: config.lr * config.depth / dim}
    optimizer = torch.optim.SGD([{"params": [p], "lr": lr} for p, lr in rates.items()])

    def risk() -> Tensor:
        h: Tensor = block(x)
        return 0.5 * ((h if B is None else h @ B) - y).square().sum(1).mean()

    first = finite(risk())
    for _ in range(config.iterations):
        optimizer.zero_grad()
        loss = risk()
        finite(loss)
        loss.backward()
        optimizer.step()
    return finite(risk()) / first


def _block(config: OverParameterisationConfig, dim: int, width: int, seed: int) -> DeepResBlock:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DeepResBlock(dim, config.depth, width, init="zero_v", backward="store")


def summarise(config: OverParameterisationConfig, results: dict[str, Results]) -> Summary:
    rows = [
        {"panel": panel, "samples": n, "width": width, "seed": config.seed + i, "value": value}
        for panel in TITLES
        for n in config.samples
        for width, values in zip(config.widths, results[f"{panel}-{n}"]["values"], strict=True)
        for i, value in enumerate(values)
    ]
    labels = {
        "constant": "least width with a PL constant > 0, by n",
        "hidden": "least successful width, q = d, by n",
        "both": "least successful width, q = m, by n",
    }
    findings: dict[str, Any] = {}
    for panel, label in labels.items():
        least = [
            next((str(w) for w, good in zip(config.widths, line, strict=True) if good), "none")
            for line in _good(config, panel, np.array(_medians(config, results, panel)))
        ]
        findings[label] = ", ".join(f"{n}: {w}" for n, w in zip(config.samples, least, strict=True))
    return Summary({"over-parameterisation": _figure(config, results)}, rows, findings)


def _medians(
    config: OverParameterisationConfig, results: dict[str, Results], panel: str
) -> list[list[float]]:
    """Over seeds, [samples][widths]."""
    return [
        [statistics.median(values) for values in results[f"{panel}-{n}"]["values"]] for n in config.samples
    ]


def _good(config: OverParameterisationConfig, panel: str, grid: Grid) -> NDArray[np.bool_]:
    """Where the PL constant is positive, or training successful."""
    return grid < config.success if panel in TRAINED else grid > ZERO


def _figure(config: OverParameterisationConfig, results: dict[str, Results]) -> Figure:
    figure = Figure(figsize=(11.0, 4.4), layout="constrained")
    axes_row: list[Axes] = list(figure.subplots(1, 3, sharey=True))
    panels = dict(zip(TITLES, axes_row, strict=True))
    for panel, axes in panels.items():
        grid = np.array(_medians(config, results, panel))
        trained = panel in TRAINED
        norm = LogNorm(1e-6, 1.0, clip=True) if trained else LogNorm(1e-8, 1e-2, clip=True)
        mesh = axes.pcolormesh(grid, norm=norm, cmap=SEQUENTIAL + ("_r" if trained else ""))
        y, x = np.nonzero(_good(config, panel, grid))
        axes.plot(x + 0.5, y + 0.5, "o", color="white", markeredgecolor="black", markersize=6)
        axes.set_xticks(np.arange(len(config.widths)) + 0.5, [str(width) for width in config.widths])
        axes.set_yticks(np.arange(len(config.samples)) + 0.5, [str(n) for n in config.samples])
        width = "features and hidden units" if panel == "both" else "hidden units $m$"
        dot = f"dot: < {config.success:g}" if trained else "dot: > 0"
        finish(
            axes, f"{TITLES[panel]}\n({dot})", width, "samples $n$" if panel == "constant" else "", grid=""
        )
        if panel != "hidden":
            bar = figure.colorbar(mesh, ax=axes, extend="min")
            bar.ax.tick_params(labelsize=FONT - 2)
    return figure
