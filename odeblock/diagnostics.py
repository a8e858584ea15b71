"""What to watch in training: smoothness in depth, PL ratio, distance to a limit; which hypotheses hold.

Functions of stacked weights Z_1 .. Z_L, and ``Monitor``, which applies them to any model that holds a block
(``DeepResBlock``, ``DeepConvResBlock``) at every so many steps. Parameters that FSDP has sharded are gathered
one by one, for which all processes must ask.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .activations import get_activation
from .base import PARAMETERS, ResBlock
from .flow import blocks, flow_rates
from .limit import interpolate
from .sharded import whole
from .validation import check_layers, check_size

# ---- of weights ------------------------------------------------------------------------------------------


@torch.no_grad()
def smoothness(weights: Tensor) -> dict[str, float]:
    """How smooth stacked weights Z_1 .. Z_L are as a function of s = k/L.

    Arguments:
        weights: shape [L, ...], one layer after another.

    Returns:
        ``"max"``, L · max_k ‖Z_{k+1} - Z_k‖, the Lipschitz constant of the piecewise linear interpolation,
        and ``"total_variation"``, Σ_k ‖Z_{k+1} - Z_k‖, its length. Both in the Frobenius norm, per root of
        the number of entries of a layer, so that they read as the change of a typical coefficient. As L grows
        they stay bounded for weights that are smooth in depth and grow like L for independent ones.
        Both 0 for L = 1.

    Raises:
        ValueError: ``weights`` has no dimension, or no layer.
    """
    flat = _flat(weights)
    steps = (flat[1:] - flat[:-1]).norm(dim=1) / flat.shape[1] ** 0.5
    if steps.numel() == 0:
        return {"max": 0.0, "total_variation": 0.0}
    return {"max": float(steps.max()) * weights.shape[0], "total_variation": float(steps.sum())}


@torch.no_grad()
def largest_step(weights: Tensor) -> float:
    """max_k ‖Z_{k+1} - Z_k‖ in the Frobenius norm, the quantity of the paper's theorems; 0 for L = 1.

    Like 1/L for weights smooth in depth, like a constant for independent ones.

    Arguments:
        weights: shape [L, ...].

    Raises:
        ValueError: ``weights`` has no dimension, or no layer.
    """
    flat = _flat(weights)
    return float((flat[1:] - flat[:-1]).norm(dim=1).max()) if len(flat) > 1 else 0.0


@torch.no_grad()
def spectrum(weights: Tensor) -> Tensor:
    """Power of stacked weights along depth, by frequency: P_j for modes cos(πj (k - ½)/L), j = 0 .. L - 1.

    From the cosine transform, which does not see a jump between the last layer and the first. The powers add
    up to the mean square of a coefficient. P_j falls like j^-4 or faster for weights smooth in depth, and is
    the same for all j >= 1 for independent ones.

    Arguments:
        weights: shape [L, ...].

    Returns:
        shape [L], float64, on the device of ``weights``.

    Raises:
        ValueError: ``weights`` has no dimension, or no layer.
    """
    flat = _flat(weights)
    depth = flat.shape[0]
    even = torch.cat([flat, flat.flip(0)])  # period 2L, even about the two ends
    power: Tensor = (torch.fft.rfft(even, dim=0)[:depth].abs() / (2 * depth)).square()
    power[1:] *= 2  # j and -j
    return power.mean(dim=1)


@torch.no_grad()
def high_frequencies(weights: Tensor) -> float:
    """The share of the upper half of frequencies in what varies along depth, by ``spectrum``.

    For independent layers 1/2 if they are many (1 for two, 2/3 for four), like L^-3 or less for weights
    smooth in depth, 0 where nothing varies.

    Arguments:
        weights: shape [L, ...].

    Raises:
        ValueError: ``weights`` has no dimension, or no layer.
    """
    power = spectrum(weights)[1:]
    total = float(power.sum())
    return float(power[len(power) // 2 :].sum()) / total if total > 0 else 0.0


@torch.no_grad()
def roughness(weights: Tensor) -> float:
    """Von Neumann's ratio Σ_k ‖Z_{k+1} - Z_k‖² / 2 Σ_k ‖Z_k - mean‖²: about 1 for independent layers.

    Like 1/L² for weights smooth in depth; 0 where all layers are the same.

    Arguments:
        weights: shape [L, ...].

    Raises:
        ValueError: ``weights`` has no dimension, or no layer.
    """
    flat = _flat(weights)
    variation = float((flat - flat.mean(0)).square().sum())
    return float((flat[1:] - flat[:-1]).square().sum()) / (2 * variation) if variation > 0 else 0.0


@torch.no_grad()
def distance(weights: Tensor, limit: Tensor, at: Tensor | None = None) -> float:
    """The distance of two functions of depth, (∫ ‖𝒵(s) - 𝒵*(s)‖² ds)^½, in the Frobenius norm.

    Arguments:
        weights: shape [L, ...] with L >= 1, for 𝒵, linear in depth between its layers.
        limit: shape [n, ...], for 𝒵*, at n > L depths: the integral is the mean over them.
        at: these depths s, shape [n], evenly in [0, 1]; k/n, the layers of a network, by default. Depths that
            are layers of both show less than there is between them.

    Like 1/L for a network whose weights discretise 𝒵*. Computed in float32, or float64 for such weights.

    Raises:
        ValueError: layers of another shape in ``limit``, or none; not as many depths ``at`` as there.
    """
    check_layers("weights", weights)
    check_layers("limit", limit)
    if weights.shape[1:] != limit.shape[1:]:
        raise ValueError(f"limit: expected shape [n, {list(weights.shape[1:])}], got {list(limit.shape)}")
    if at is None:
        at = torch.arange(1, len(limit) + 1, dtype=torch.float64, device=weights.device) / len(limit)
    if at.shape != (len(limit),):
        raise ValueError(f"at: expected shape [{len(limit)}], as many as in limit, got {list(at.shape)}")
    values = interpolate(whole(weights), at * len(weights))
    return float((_flat(values, values.dtype) - _flat(limit, values.dtype)).square().sum(1).mean().sqrt())


def _flat(weights: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    check_layers("weights", weights)
    return whole(weights.detach()).reshape(weights.shape[0], -1).to(dtype)


# ---- of a model in training ------------------------------------------------------------------------------


@torch.no_grad()
def pl_ratio(model: nn.Module, risk: Tensor | float) -> float:
    """The Polyak-Łojasiewicz ratio ‖∇R‖² / 2R in the metric of the gradient flow, from ``.grad``.

    ‖∇R‖² = Σ_blocks L Σ_k ‖∂R/∂Z_k‖² + Σ_others ‖∂R/∂θ‖² is -dR/dt of the flow (``odeblock.flow``). A ratio
    that stays above µ > 0 gives R(t) <= R(0) exp(-2µt): linear convergence to a minimum of value 0, which
    is the condition of the paper's long-time theorem. Call it between ``backward()`` and the optimiser's
    step.

    Arguments:
        model: any module; parameters without a gradient count as not moving.
        risk: R >= 0, whose gradients they are.

    Returns:
        the ratio; infinity for R = 0.
    """
    square = sum(
        rate * float(whole(p.grad.double().square().sum()))
        for p, rate in flow_rates(model).items()
        if p.grad is not None
    )
    value = float(risk)
    return square / (2 * value) if value > 0 else float("inf")


class Monitor:
    """A callback that records, at every ``every``-th call, what the blocks of a model look like.

        monitor = Monitor(model, every=100)
        for x, y in batches:
            loss = ...
            loss.backward()
            monitor(loss)
            optimizer.step()

    Arguments:
        model: any module with blocks in it.
        every: calls between two records; the first call is one.
        limit: for some of the names "block.V", "block.W", ... (as in ``model.named_parameters()``) the
            weights [L*, ...] of a much deeper network, to take the ``distance`` from.

    ``history``: one dict of floats a record, "call", "loss", "pl_ratio", and for every stacked parameter NAME
    "NAME.max" and "NAME.total_variation" (``smoothness``), "NAME.high_frequencies" and, where there is a
    limit, "NAME.distance".

    Raises:
        TypeError, ValueError: ``every`` is not a whole number >= 1; the model has no block, or no parameter
            of a name in ``limit``.
    """

    def __init__(self, model: nn.Module, every: int = 1, limit: Mapping[str, Tensor] | None = None) -> None:
        self.model, self.every, self.limit = model, check_size("every", every), dict(limit or {})
        self.calls = 0
        self.history: list[dict[str, float]] = []
        names = self._stacks()
        if not names:
            raise ValueError("model: expected one that holds a DeepResBlock or DeepConvResBlock, found none")
        for name in self.limit:
            if name not in names:
                raise ValueError(f"limit: expected names among {', '.join(names)}; got {name!r}")

    def __call__(self, loss: Tensor | float) -> None:
        """Record, if it is time to, with the gradients that the last ``backward()`` left."""
        if self.calls % self.every == 0:
            value = float(loss.detach() if isinstance(loss, Tensor) else loss)
            entry = {"call": float(self.calls), "loss": value, "pl_ratio": pl_ratio(self.model, value)}
            for name, weights in self._stacks().items():
                entry.update({f"{name}.{key}": number for key, number in smoothness(weights).items()})
                entry[f"{name}.high_frequencies"] = high_frequencies(weights)
                if name in self.limit:
                    entry[f"{name}.distance"] = distance(weights, self.limit[name])
            self.history.append(entry)
        self.calls += 1

    def _stacks(self) -> dict[str, Tensor]:
        return {
            f"{path}.{name}" if path else name: weights
            for path, block in blocks(self.model)
            for name in PARAMETERS
            if (weights := getattr(block, name)) is not None
        }


# ---- hypotheses ------------------------------------------------------------------------------------------

SMOOTH_BELOW = 0.25
"""Of ``roughness``: independent layers have 1 at any depth, default smooth ones 0.2 at L = 8, 0.06 at 16."""


@dataclass(frozen=True)
class Assumption:
    """A hypothesis of the theorems: of which block, what it says, whether it holds, and why."""

    block: str
    name: str
    holds: bool
    reason: str

    def __str__(self) -> str:
        where = f"{self.block}: " if self.block else ""
        return f"{where}{self.name}: {'holds' if self.holds else 'FAILS'} ({self.reason})"


def check_assumptions(model: nn.Module) -> list[Assumption]:
    """Which hypotheses of the theorems of Marion, Wu, Sander & Biau (ICLR 2024) each block of a model meets.

    - "f(0, Z) = 0": fails for activations with σ(0) ≠ 0 (sigmoid, softplus) and with biases, unless these are
      zero and frozen, and with a normalisation.
    - "Lipschitz activation": every activation here is.
    - "smooth activation": σ' is continuous; fails for relu and leaky_relu.
    - "depth-scaled step": scale = 1/L.
    - "weights smooth in depth": as they are now, by ``roughness``; to be asked before training. Less than 8
      layers look rough if they differ at all.

    They are sufficient, not necessary: networks that fail one may behave as the theorems say.

    Raises:
        ValueError: the model has no block.
    """
    found = [assumption for name, block in blocks(model) for assumption in _check_block(name, block)]
    if not found:
        raise ValueError("model: expected one that holds a DeepResBlock or DeepConvResBlock, found none")
    return found


def _check_block(name: str, block: ResBlock) -> list[Assumption]:
    sigma = get_activation(block.activation)
    at_zero = float(sigma.function(torch.zeros((), dtype=torch.float64)))
    biases = [
        key
        for key in PARAMETERS[2:]
        if (bias := getattr(block, key)) is not None and (bias.requires_grad or bool(whole(bias).any()))
    ]
    reasons = [f"σ(0) = {at_zero:.3g} for {sigma.name}"] if at_zero else []
    reasons += [f"it has {' and '.join(biases)}"] if biases else []
    reasons += [f"norm={block.norm!r}"] if block.norm else []
    horizon = block.scale * block.depth
    rough = {key: roughness(getattr(block, key)) for key in PARAMETERS[:2]}
    shown = ", ".join(f"roughness of {key} {value:.2g}" for key, value in rough.items())
    return [
        Assumption(name, "f(0, Z) = 0", not reasons, "; ".join(reasons) or "σ(0) = 0, no biases"),
        Assumption(name, "Lipschitz activation", True, sigma.name),
        Assumption(
            name,
            "smooth activation",
            sigma.smooth,
            f"σ' of {sigma.name} {'is continuous' if sigma.smooth else 'jumps at 0'}",
        ),
        Assumption(name, "depth-scaled step", abs(horizon - 1) < 1e-9, f"scale · L = {horizon:.6g}"),
        Assumption(
            name,
            "weights smooth in depth",
            max(rough.values()) < SMOOTH_BELOW,
            f"{shown}; independent layers have 1",
        ),
    ]
