"""Gradient flow in the depth-scaled metric: dZ_k/dt = -L ∂R/∂Z_k, as rates of an optimiser and as an ODE.

The gradient of the risk R with respect to one of L layers is of size 1/L, because each layer makes 1/L of the
way. The factor L makes up for it: layers move at a speed that does not depend on L, and neighbours move
alike, so that weights smooth in depth stay smooth (Marion, Wu, Sander & Biau, ICLR 2024). Every other
parameter θ of the model follows dθ/dt = -∂R/∂θ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .base import ResBlock
from .limit import import_torchdiffeq
from .validation import check_number


def blocks(model: nn.Module) -> Iterator[tuple[str, ResBlock]]:
    """Every block (``ResBlock``) in a model (or the model itself, then named ""), with its name there."""
    for name, module in model.named_modules():
        if isinstance(module, ResBlock):
            yield name, module


def flow_rates(model: nn.Module) -> dict[nn.Parameter, float]:
    """Every trainable parameter with the factor that its gradient has in the flow: L, or 1 outside of blocks.

    L is the depth of the parameter's block, whose step is meant to be 1/L: with a larger ``scale``, such as
    1/√L, this factor is too large. (Of the parts of ``block.split`` each has its own, smaller L: make
    the groups yourself if they are to move as the whole would.)
    """
    rates = {p: 1.0 for p in model.parameters() if p.requires_grad}
    for _, block in blocks(model):
        rates.update({p: float(block.depth) for p in block.parameters() if p.requires_grad})
    return rates


def gradient_flow_groups(model: nn.Module, lr: float, *, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Parameter groups with which SGD takes steps of length ``lr`` along the gradient flow.

        torch.optim.SGD(gradient_flow_groups(model, lr=0.05), momentum=0.9)

    Parameters of a block of depth L get the rate L · lr and the weight decay ``weight_decay`` / L, the
    others lr and ``weight_decay``. A step of SGD subtracts rate · decay · Z, so both shrink by lr ·
    ``weight_decay`` a step, whatever L is: the flow of R + ``weight_decay``/2 · ((1/L) Σ_k ‖Z_k‖² + ‖θ‖²),
    which has a limit. Decoupled decay, as in ``AdamW``, subtracts the same product.

    Not for Adam and others that divide a gradient by its own size: the 1/L that the factor L makes up for
    cancels there already, and layers would move L times too far. Give those ``model.parameters()``.

    Arguments:
        model: any module; its blocks are found wherever they are.
        lr: rate of the parameters outside of blocks, finite and > 0.
        weight_decay: finite and >= 0.

    Returns:
        one group for each depth that occurs, in the model's order, and one for what is outside of blocks.

    Raises:
        TypeError, ValueError: no number, or one out of range; no trainable parameters.
    """
    lr, weight_decay = check_number("lr", lr, above=0), check_number("weight_decay", weight_decay, least=0)
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter, rate in flow_rates(model).items():
        groups.setdefault(rate, []).append(parameter)
    if not groups:
        raise ValueError("model: expected trainable parameters, found none")
    return [
        {"params": parameters, "lr": rate * lr, "weight_decay": weight_decay / rate}
        for rate, parameters in groups.items()
    ]


def integrate(
    model: nn.Module,
    risk: Callable[[], Tensor],
    times: Sequence[float],
    *,
    rtol: float = 1e-4,
    atol: float = 1e-6,
    method: str = "dopri5",
    on_time: Callable[[float, float], None] | None = None,
) -> list[float]:
    """Solve the gradient flow itself, with torchdiffeq's adaptive steps; the model ends at the last time.

    The theory's setting, for networks small enough that the whole training set fits one call.

    Arguments:
        model: whose trainable parameters move, as far as the risk depends on them; all of one dtype and
            device.
        risk: () -> R, a scalar of the model at its present parameters, on the whole training set.
        times: increasing, finite; at the first one the parameters are what they are.
        rtol, atol: tolerances of a step, for all parameters together.
        method: of ``torchdiffeq.odeint``.
        on_time: called with (t, R) at each of ``times``, while the model has the parameters of that time.

    Returns:
        R at each of ``times``.

    Raises:
        ImportError: torchdiffeq is not installed.
        ValueError: ``times`` do not increase; nothing is trainable.
        FloatingPointError: R is not finite; the parameters are then those where it was.
    """
    if len(times) < 2 or not all(-math.inf < a < b < math.inf for a, b in pairwise(times)):
        raise ValueError(f"times: expected two or more finite increasing numbers, got {list(times)}")
    rates = flow_rates(model)
    if not rates:
        raise ValueError("model: expected trainable parameters, found none")
    torchdiffeq = import_torchdiffeq()
    parameters, factors = list(rates), list(rates.values())

    @torch.no_grad()
    def load(state: Tensor) -> None:
        for parameter, value in zip(parameters, state.split([p.numel() for p in parameters]), strict=True):
            parameter.copy_(value.view_as(parameter))

    def evaluate() -> Tensor:
        R = risk()
        if not math.isfinite(R.item()):
            raise FloatingPointError(f"the risk is {R.item()}")
        return R

    def velocity(t: Tensor, state: Tensor) -> Tensor:
        load(state)
        with torch.enable_grad():
            gradients = torch.autograd.grad(evaluate(), parameters, materialize_grads=True)
        return torch.cat([-L * g.flatten() for L, g in zip(factors, gradients, strict=True)])

    found: list[float] = []
    with torch.no_grad():
        state = torch.cat([p.flatten() for p in parameters])
        at = torch.as_tensor(times, dtype=torch.float64, device=state.device)
        path = torchdiffeq.odeint(velocity, state, at, rtol=rtol, atol=atol, method=method)
        for t, state in zip(times, path, strict=True):
            load(state)
            found.append(float(evaluate()))
            if on_time is not None:
                on_time(float(t), found[-1])
    return found
