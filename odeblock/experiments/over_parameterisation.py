"""What width does for n samples: the PL constant at the start, and whether training ends within a budget.

The network is that of the theorem, h ← h + V σ(W h/√q) / (L√m), with V = 0 and one normal W at every depth;
x and y normal in R^d, risk (1/2n) Σ ‖F(x_i) - y_i‖². The block holds V/√m and W/√q, so that a step of rate
lr in the theorem's normalisation is one of lr · L/m and lr · L/q. Data, frozen matrices and weights are
drawn from streams of their own.

"growing" and "fixed": at V = 0 the gradient is that of V alone, and for every y the PL ratio is at least
λ_min(K)/n, K_ij = σ(w·x_i)·σ(w·x_j) on average over the m rows w of W/√q. That λ_min(K) = 0 for m < n is
linear algebra, the rank of K. What is measured is λ_min(K) for m = r n as n grows, with d = n and with d
fixed, and its limit for m → ∞.

"hidden" trains with the hidden units m for a width, q = d; "both" with q = m for a width, behind a frozen
normal A [d, q] and before a frozen B [q, d]: for q < d most y are out of reach, by the rank of B. The step
that descends fastest depends on the width, so that each network is trained at several rates.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from torch import Tensor

from ..block import DeepResBlock
from ..initializers import zero_v_
from .config import OverParameterisationConfig
from .reproduce import Part, Results, Run, Summary
from .style import FONT, SEQUENTIAL, finish, sequence, slope

CONSTANTS, TRAINED = ("growing", "fixed"), ("hidden", "both")
NODES = 32
"""Of Gauss-Hermite quadrature, per dimension: K at infinite width to 1e-5."""


def parts(config: OverParameterisationConfig) -> list[Part]:
    draws = len(config.ratios) + 1
    runs = len(config.widths) * config.seeds * len(config.rates)
    return [
        Part(f"{panel}-{n}", draws, partial(constants, config, panel, n))
        for panel in CONSTANTS
        for n in config.constant_samples
    ] + [
        Part(f"{panel}-{n}", runs, partial(trainings, config, panel, n))
        for panel in TRAINED
        for n in config.samples
    ]


def stream(seed: int, *purpose: str | int) -> torch.Generator:
    """Random numbers for one purpose: streams of other purposes, or other seeds, have nothing in common."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))  # it uses 32 bits


def draw_data(samples: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    """x and y, each [n, d]."""
    x, y = torch.randn(2, samples, dim, generator=stream(seed, "data", samples, dim))
    return x, y


def draw_block(depth: int, dim: int, width: int, seed: int) -> DeepResBlock:
    """V = 0, W/√q of m = ``width`` rows, tied."""
    init = partial(zero_v_, generator=stream(seed, "block", dim, width))
    return DeepResBlock(dim, depth, width, init=init, backward="store")


# ---- the PL constant at the start ------------------------------------------------------------------------


def constants(config: OverParameterisationConfig, panel: str, samples: int, run: Run) -> Results:
    """λ_min(K), n times the PL constant: ``finite`` [ratios][seeds], ``infinite`` [seeds]."""
    dim = samples if panel == "growing" else config.dim
    seeds = range(config.seed, config.seed + config.constant_seeds)
    finite = []
    for ratio in config.ratios:
        width = max(round(ratio * samples), 1)
        finite.append([smallest(kernel(samples, dim, width, seed)) for seed in seeds])
        run.advance(1)
    infinite = [smallest(infinite_kernel(draw_data(samples, dim, seed)[0])) for seed in seeds]
    run.advance(1)
    return {"finite": finite, "infinite": infinite}


def smallest(K: Tensor) -> float:
    """λ_min(K); what rounding leaves of a zero may be negative."""
    return float(torch.linalg.eigvalsh(K)[0].clamp_min(0))


def kernel(samples: int, dim: int, width: int, seed: int) -> Tensor:
    """K [n, n] of ``width`` hidden units on x in R^d."""
    x, _ = draw_data(samples, dim, seed)
    features = F.gelu(x.double() @ draw_block(1, dim, width, seed).W[0].detach().double().T)
    return features @ features.T / width


def infinite_kernel(x: Tensor) -> Tensor:
    """K [n, n] for m → ∞: the mean of σ(u) σ(v) over normal u, v of the covariance of x_i·w, x_j·w."""
    x = x.double()
    covariance = x @ x.T / x.shape[1]
    scale = covariance.diagonal().sqrt()
    rho = (covariance / scale.outer(scale)).clamp(-1, 1)
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(NODES))
    weights = weights / weights.sum()
    u = F.gelu(scale[:, None] * nodes)  # [n, nodes]
    K = torch.empty_like(covariance)
    for i in range(len(x)):
        # v = s_j (ρ z + √(1 - ρ²) z'), [j, z, z']
        other = (1 - rho[i].square()).clamp_min(0).sqrt()
        v = scale[:, None, None] * (rho[i, :, None, None] * nodes[:, None] + other[:, None, None] * nodes)
        K[i] = (F.gelu(v) @ weights) @ (weights * u[i])
    return (K + K.T) / 2


def least_ratio(ratios: Sequence[float], values: Sequence[float], floor: float) -> float | None:
    """The least m/n from which ``values`` reach ``floor``, on straight lines between logarithms."""
    for i, value in enumerate(values):
        if value >= floor:
            if i == 0 or values[i - 1] <= 0:
                return ratios[i]
            low, high = math.log(values[i - 1]), math.log(value)
            part = (math.log(floor) - low) / (high - low)
            return math.exp((1 - part) * math.log(ratios[i - 1]) + part * math.log(ratios[i]))
    return None


# ---- training --------------------------------------------------------------------------------------------


def trainings(config: OverParameterisationConfig, panel: str, samples: int, run: Run) -> Results:
    """``iterations``: [widths][seeds][rates], what it took to reach the target; None where it was not."""
    iterations = []
    for width in config.widths:
        iterations.append(train(config, panel, samples, width)[0])
        run.advance(config.seeds * len(config.rates))
    return {"iterations": iterations}


def train(
    config: OverParameterisationConfig, panel: str, samples: int, width: int
) -> tuple[list[list[int | None]], Tensor]:
    """Gradient descent for every seed and rate, N networks at once.

    They are tiny, and the block takes them one by one, which would take minutes more: here each layer is a
    product of N matrices. A network leaves when it reaches the target, or when its loss is not finite or
    above that at the start.

    Returns:
        iterations [seeds][rates] until the target was reached, None where it was not; and the last loss of
        each network over its first, [seeds, rates].
    """
    depth, dim = config.depth, width if panel == "both" else config.dim
    seeds, rates = range(config.seed, config.seed + config.seeds), torch.tensor(config.rates)

    def stack(draw: Callable[[int], Tensor]) -> Tensor:
        return torch.stack([draw(seed) for seed in seeds]).repeat_interleave(len(rates), 0)

    x, y = (stack(lambda seed, i=i: draw_data(samples, config.dim, seed)[i]) for i in range(2))  # type: ignore[misc]
    B = torch.eye(dim).expand(len(x), -1, -1)
    if panel == "both":
        x = x @ stack(lambda seed: torch.randn(config.dim, dim, generator=stream(seed, "A", dim)))
        x = x / config.dim**0.5
        B = stack(lambda seed: torch.randn(dim, config.dim, generator=stream(seed, "B", dim))) / dim**0.5
    lr = rates.repeat(config.seeds)[:, None, None]
    first_W = stack(lambda seed: draw_block(1, dim, width, seed).W[0].detach().T)  # [N, q, m]
    W = [first_W.clone().requires_grad_() for _ in range(depth)]
    V = [torch.zeros(len(x), width, dim).requires_grad_() for _ in range(depth)]  # [N, m, q]
    running = torch.arange(len(x))
    first: Tensor | None = None
    ratio, reached = torch.ones(len(x)), torch.full((len(x),), -1)
    for iteration in range(config.iterations + 1):
        h = x
        for V_k, W_k in zip(V, W, strict=True):
            h = torch.baddbmm(h, F.gelu(h @ W_k), V_k, alpha=1 / depth)
        loss = 0.5 * (h @ B - y).square().sum((1, 2)) / samples
        first = loss.detach() if first is None else first
        now = loss.detach() / first[running]
        ratio[running] = now
        reached[running[now < config.target]] = iteration
        kept = (now >= config.target) & (now <= 1)  # not where it is nan
        if iteration == config.iterations or not kept.any():
            break
        gradients = torch.autograd.grad(loss.sum(), V + W)
        with torch.no_grad():
            for p, gradient, fan in zip(V + W, gradients, [width] * depth + [dim] * depth, strict=True):
                p -= lr * (depth / fan) * gradient
        if not kept.all():
            x, y, B, lr, running = (t[kept] for t in (x, y, B, lr, running))
            V, W = ([p.detach()[kept].requires_grad_() for p in stack_] for stack_ in (V, W))
    shape = (config.seeds, len(rates))
    found = [[None if i < 0 else int(i) for i in row] for row in reached.view(shape).tolist()]
    return found, ratio.view(shape)


# ---- what it shows ---------------------------------------------------------------------------------------


def summarise(config: OverParameterisationConfig, results: dict[str, Results]) -> Summary:
    findings: dict[str, Any] = {}
    for panel, name in zip(CONSTANTS, ("d = n", f"d = {config.dim}"), strict=True):
        found = {n: results[f"{panel}-{n}"] for n in config.constant_samples}
        least = {
            n: least_ratio(config.ratios, _medians(part["finite"]), config.floor) for n, part in found.items()
        }
        infinite = {n: f"{statistics.median(part['infinite']):.2g}" for n, part in found.items()}
        label = f"least m/n with n · PL constant >= {config.floor:g}, {name}, by n"
        findings[label] = _listed({n: "none" if r is None else f"{r:.2f}" for n, r in least.items()})
        widths = {n: n * r for n, r in least.items() if r is not None}
        if len(widths) > 2:
            findings[f"exponent p of that m ∝ n^p, {name}"] = slope(list(widths), list(widths.values()), 0)
        findings[f"n · PL constant at infinite width, {name}, by n"] = _listed(infinite)
    for panel, name in zip(TRAINED, ("q = d", "q = m"), strict=True):
        for label, share in (("at which every seed succeeds", 1.0), ("of half of the seeds", 0.5)):
            findings[f"least width {label}, {name}, by n"] = _listed(
                {
                    n: next((w for w, s in zip(config.widths, line, strict=True) if s >= share), "none")
                    for n, line in zip(config.samples, shares(config, results, panel), strict=True)
                }
            )
        n = config.samples[0]
        label = f"largest rate at which half of the seeds succeed, {name}, n = {n}, by width"
        findings[label] = _listed(
            {
                width: max(
                    (rate for rate, s in zip(config.rates, line, strict=True) if s >= 0.5), default="none"
                )
                for width, line in zip(config.widths, _by_rate(results[f"{panel}-{n}"]), strict=True)
            }
        )
    return Summary({"over-parameterisation": _figure(config, results)}, _rows(config, results), findings)


def shares(config: OverParameterisationConfig, results: dict[str, Results], panel: str) -> list[list[float]]:
    """[samples][widths], of the seeds that reach the target at one of the rates at least."""
    return [
        [
            statistics.mean(any(i is not None for i in seed) for seed in cell)
            for cell in results[f"{panel}-{n}"]["iterations"]
        ]
        for n in config.samples
    ]


def _by_rate(part: Results) -> list[list[float]]:
    """[widths][rates], of the seeds that reach the target at this rate."""
    return [
        [statistics.mean(i is not None for i in rate) for rate in zip(*cell, strict=True)]
        for cell in part["iterations"]
    ]


def _medians(rows: list[list[float]]) -> list[float]:
    return [statistics.median(row) for row in rows]


def _listed(found: dict[int, Any]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in found.items())


def _rows(config: OverParameterisationConfig, results: dict[str, Results]) -> list[dict[str, Any]]:
    """value: λ_min(K), or the iterations until the target, empty where it was not reached."""
    rows: list[dict[str, Any]] = []

    def add(panel: str, n: int, width: float, i: int, rate: float | str, value: float | None) -> None:
        rows.append(
            {"panel": panel, "samples": n, "width": width, "seed": config.seed + i, "rate": rate}
            | {"value": "" if value is None else value}
        )

    for panel in CONSTANTS:
        for n in config.constant_samples:
            part = results[f"{panel}-{n}"]
            widths = [*(max(round(ratio * n), 1) for ratio in config.ratios), math.inf]
            for width, values in zip(widths, [*part["finite"], part["infinite"]], strict=True):
                for i, value in enumerate(values):
                    add(panel, n, width, i, "", value)
    for panel in TRAINED:
        for n in config.samples:
            for width, cell in zip(config.widths, results[f"{panel}-{n}"]["iterations"], strict=True):
                for i, seed in enumerate(cell):
                    for rate, iterations in zip(config.rates, seed, strict=True):
                        add(panel, n, width, i, rate, iterations)
    return rows


def _figure(config: OverParameterisationConfig, results: dict[str, Results]) -> Figure:
    figure = Figure(figsize=(10.5, 8.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.05, 1))
    lines = list(upper.subplots(1, 2, sharey=True))
    for axes, panel, name in zip(lines, CONSTANTS, ("$d = n$", f"$d = {config.dim}$"), strict=True):
        _lines(config, results, panel, axes)
        ylabel = "$n$ · PL constant at the start" if panel == CONSTANTS[0] else ""
        finish(axes, f"PL constant, {name}", "hidden units per sample $m/n$", ylabel)
    upper.legend(
        *lines[0].get_legend_handles_labels(),
        loc="outside right center",
        frameon=False,
        fontsize=FONT - 1,
    )
    maps = list(lower.subplots(1, 2, sharey=True))
    for axes, panel in zip(maps, TRAINED, strict=True):
        grid = np.array(shares(config, results, panel))
        mesh = axes.pcolormesh(grid, vmin=0.0, vmax=1.0, cmap=SEQUENTIAL, edgecolors="white", linewidth=1.0)
        for (y, x), share in np.ndenumerate(grid):
            colour = "black" if share > 0.5 else "white"
            axes.text(x + 0.5, y + 0.5, f"{share:.1f}", ha="center", va="center", color=colour, fontsize=FONT)
        axes.set_xticks(np.arange(len(config.widths)) + 0.5, [str(width) for width in config.widths])
        axes.set_yticks(np.arange(len(config.samples)) + 0.5, [str(n) for n in config.samples])
        name, label = ("$q = d$", "hidden units $m$") if panel == "hidden" else ("$q = m$", "width $q = m$")
        finish(axes, f"training, {name} ($d = {config.dim}$)", label, "", grid="")
    maps[0].set_ylabel("samples $n$", fontsize=FONT)
    bar = lower.colorbar(mesh, ax=maps)
    bar.set_label(f"share of seeds that reach {config.target:g} of the first loss", fontsize=FONT)
    bar.ax.tick_params(labelsize=FONT - 1)
    return figure


def _lines(config: OverParameterisationConfig, results: dict[str, Results], panel: str, axes: Axes) -> None:
    """λ_min(K) against m/n, medians of seeds, and right of them the limit of infinite width."""
    right = 3 * config.ratios[-1]
    for n, colour in zip(config.constant_samples, sequence(len(config.constant_samples)), strict=True):
        part = results[f"{panel}-{n}"]
        pairs = [(r, v) for r, v in zip(config.ratios, _medians(part["finite"]), strict=True) if r >= 1]
        axes.plot(*zip(*pairs, strict=True), "o-", color=colour, markersize=4, label=f"$n = {n}$")
        axes.plot(right, statistics.median(part["infinite"]), "D", color=colour, markersize=6, clip_on=False)
    axes.axhline(config.floor, color="0.4", linestyle="--", linewidth=1.2, label=f"{config.floor:g}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = [ratio for ratio in (1, 2, 4, 8, 16) if ratio <= config.ratios[-1]]
    axes.xaxis.set_major_locator(FixedLocator([*ticks, right]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([*(str(tick) for tick in ticks), "$\\infty$"])
