"""Who is compared, and in what: our strategies and what a user would pick instead, by name.

The peers are in ``peers.py``. Weights are smooth, activations gelu_tanh, everything is float32. A shape is
(B, q, m, L) of rows; of maps (B, C, M, L, H, k), H x H pixels and kernels k x k.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import peers
import torch
from torch import Tensor

from odeblock import initializers
from odeblock.drift import DriftRecord
from odeblock.functional import conv_recorded, recorded

ACTIVATION = "gelu_tanh"
STRATEGIES = ("store", "checkpoint", "auto", "adjoint")

Shape = tuple[int, ...]
Run = Callable[[str, tuple[Tensor, ...]], tuple[Tensor, ...]]


def ours(record: dict[str, float], *tensors: Tensor | None, strategy: str, **options: Any) -> Tensor:
    arguments = (*tensors, options["activation"], options["scale"], strategy, False, 0, None)
    call = recorded if arguments[1].dim() == 3 else conv_recorded
    y: Tensor = call(DriftRecord(record), *arguments)
    return y


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    **{strategy: partial(ours, strategy=strategy) for strategy in STRATEGIES},
    "eager": peers.eager,
    "channels last": peers.channels_last,
    "compile": peers.compiled_step,
    "torch.utils.checkpoint": peers.checkpointed,
    "torchdiffeq": partial(peers.torchdiffeq_adjoint, perturb=True),
    "2022 adjoint": peers.adjoint_2022,
}

# Error, relative to the largest entry, that is allowed: the last two are not exact, and a compiled step at
# L = 1024 is off by 1.6e-5.
TOLERANCE = dict.fromkeys(FUNCTIONS, 1e-5) | {"compile": 1e-4, "torchdiffeq": 0.2, "2022 adjoint": 0.2}

_PEERS = {
    "inference": ("eager", "compile"),
    "forward": ("eager", "compile"),
    "training": ("eager", "compile", "torch.utils.checkpoint", "torchdiffeq", "2022 adjoint"),
}
_MAP_PEERS = {
    "inference": ("eager", "channels last", "compile"),
    "forward": ("eager", "channels last", "compile"),
    "training": ("eager", "channels last", "compile", "torch.utils.checkpoint", "2022 adjoint"),
}


def strategies_of(work: str) -> tuple[str, ...]:
    """Inference is the same for all."""
    return ("auto",) if work == "inference" else STRATEGIES


def peers_of(work: str, shape: Shape) -> tuple[str, ...]:
    """torchdiffeq up to L = 256: each of its steps makes gradients of all layers, half a minute at 1024."""
    names = _PEERS if len(shape) == 4 else _MAP_PEERS
    return tuple(name for name in names[work] if name != "torchdiffeq" or shape[3] <= 256)


def make_inputs(
    batch: int, dim: int, hidden: int, depth: int, size: int = 0, kernel: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """h [B, q], V [L, q, m], W [L, m, q]; or h [B, C, H, H], V [L, C, M, k, k], W [L, M, C, k, k]."""
    pixels, taps = ((size, size), (kernel, kernel)) if kernel else ((), ())
    V, W = torch.empty(depth, dim, hidden, *taps), torch.empty(depth, hidden, dim, *taps)
    initializers.smooth_(V.flatten(2), W.flatten(2))
    return torch.randn(batch, dim, *pixels), V, W


def apply(name: str, inputs: tuple[Tensor, ...]) -> Tensor:
    return FUNCTIONS[name]({}, *inputs, None, None, activation=ACTIVATION, scale=None)


def inference(name: str, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    with torch.inference_mode():
        return (apply(name, inputs),)


def forward(name: str, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """With all that a backward will need."""
    return (apply(name, tuple(x.detach().requires_grad_() for x in inputs)).detach(),)


def training(name: str, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """y, dh, dV, dW."""
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    y = apply(name, inputs)
    return y.detach(), *torch.autograd.grad(y, inputs, torch.ones_like(y))


WORKS: dict[str, Run] = {"inference": inference, "forward": forward, "training": training}

# Operations per BqmL; of maps q and m are channels, times pixels times taps. A step is counted as 16, which
# one takes that keeps no state and evaluates f twice; with all states stored it is 12, as an eager step.
_OPERATIONS = {"inference": 4, "forward": 4, "training": 16}


def operations(work: str, shape: Shape) -> int:
    each = shape[4] ** 2 * shape[5] ** 2 if len(shape) > 4 else 1
    return _OPERATIONS[work] * math.prod(shape[:4]) * each
