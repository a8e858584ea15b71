"""Error of the gradient against L, with and without stored states: ours, and the adjoint of 2022.

Sander, Ablin & Peyré (NeurIPS 2022) recover h_k as h_{k+1} - f_k(h_{k+1})/L, with an error of O(1/L) in the
gradient. Against float64 autograd; the tables of docs/gradient-error.md have more methods and trained
weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..drift import DriftWarning
from ..functional import deep_residual
from .config import AdjointErrorConfig
from .gradients import adjoint_2022, random_inputs
from .reproduce import Part, Results, Run, Summary
from .style import COLOURS, FONT, TITLES, depth_axis, finish, slope

METHODS: dict[str, Callable[..., Tensor]] = {
    "adjoint_2022": partial(adjoint_2022, {}),
    "store": partial(deep_residual, backward="store"),
    "adjoint": partial(deep_residual, backward="adjoint"),
}
ROUNDING = 10  # times the error of stored states: from here on an error is the method's own
LABELS = {"adjoint_2022": "adjoint of 2022", "store": "stored states", "adjoint": "our adjoint"}
STYLES: dict[str, dict[str, Any]] = {
    "adjoint_2022": {"color": COLOURS["orange"], "marker": "s"},
    "store": {"color": COLOURS["grey"], "linewidth": 5},
    "adjoint": {"color": COLOURS["blue"], "marker": "o"},
}


def parts(config: AdjointErrorConfig) -> list[Part]:
    return [
        Part(f"{weights}-{depth}", depth * config.seeds, partial(measure, config, weights, depth))
        for weights in TITLES
        for depth in config.depths
    ]


def measure(config: AdjointErrorConfig, weights: str, depth: int, run: Run) -> Results:
    """For each method the largest relative error of dx, dV and dW over all seeds, in float32."""
    errors = dict.fromkeys(METHODS, 0.0)
    for seed in range(config.seed, config.seed + config.seeds):
        inputs = random_inputs(weights, config.batch, config.dim, config.dim, depth, seed)
        truth = gradients(METHODS["store"], inputs, config.activation, torch.float64)
        for name, method in METHODS.items():
            found = gradients(method, inputs, config.activation, torch.float32)
            error = max(
                float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(found, truth, strict=True)
            )
            errors[name] = max(errors[name], error)
        run.advance(depth)
    return dict(errors)


def gradients(
    method: Callable[..., Tensor], inputs: dict[str, Tensor], activation: str, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """dh, dV, dW of the block in ``dtype``."""
    h, V, W = (inputs[name].to(dtype, copy=True).requires_grad_() for name in ("h", "V", "W"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DriftWarning)  # errors are what is drawn
        y = method(h, V, W, activation=activation, scale=None)
        return torch.autograd.grad(y, (h, V, W), inputs["grad"].to(dtype))


def summarise(config: AdjointErrorConfig, results: dict[str, Results]) -> Summary:
    rows = [
        {"weights": weights, "depth": depth, **results[f"{weights}-{depth}"]}
        for weights in TITLES
        for depth in config.depths
    ]
    findings: dict[str, Any] = {}
    for weights, title in TITLES.items():
        old, new, stored = (
            [results[f"{weights}-{depth}"][name] for depth in config.depths]
            for name in ("adjoint_2022", "adjoint", "store")
        )
        # Where rounding, which is the error of stored states, is no part of it.
        above = [i for i in range(len(old)) if old[i] > ROUNDING * stored[i]]
        if len(above) > 1:
            depths = [config.depths[i] for i in above]
            findings[f"slope of the adjoint of 2022 over L = {depths[0]} to {depths[-1]}, {title}"] = slope(
                depths, [old[i] for i in above], depths[0]
            )
        findings[f"its error / ours, by depth, {title}"] = ", ".join(
            f"{depth}: {a / b:.0f}" for depth, a, b in zip(config.depths, old, new, strict=True)
        )
    return Summary({"adjoint-error": _figure(config, results)}, rows, findings)


def _figure(config: AdjointErrorConfig, results: dict[str, Results]) -> Figure:
    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (weights, title) in zip(panels, TITLES.items(), strict=True):
        for name in ("store", "adjoint_2022", "adjoint"):
            values = [results[f"{weights}-{depth}"][name] for depth in config.depths]
            style = {"linewidth": 1.8, "markersize": 5, **STYLES[name]}
            axes.plot(config.depths, values, label=LABELS[name], **style)
        axes.set_yscale("log")
        depth_axis(axes, config.depths)
        finish(axes, title, "depth $L$")
    panels[0].set_ylabel("largest relative error of a gradient", fontsize=FONT)
    panels[1].legend(frameon=False, fontsize=FONT - 2, loc="center left", bbox_to_anchor=(0.0, 0.45))
    return figure
