"""Stacked weights to and from lists of residual branches: two nn.Linear or nn.Conv2d, σ between.

After each nn.Conv2d there may be an nn.BatchNorm2d.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .activations import ACTIVATIONS, get_activation


@dataclass(frozen=True)
class Branch:
    """The modules of a step.

    kind: of those with weights. normalised: whether an nn.BatchNorm2d may follow each of them. expected: what
    errors say of a step. shown: a module of the kind, for errors. make: an empty one, without a bias, for a
    weight. refuse: raises for one (named ``where``) with settings that a block has not.
    """

    kind: type[nn.Module]
    normalised: bool
    expected: str
    shown: Callable[[Any], str]
    make: Callable[[Tensor], nn.Module]
    refuse: Callable[[str, Any], None]


PLACES = {3: (0, 1, 2), 5: (0, 2, 3, 1, 4)}
"""Of the three or five modules of a step: where the first with weights is, the activation, the second with
weights, and the normalisations."""


def stack_layers(branch: Branch, layers: Iterable[Any]) -> tuple[str, list[Any], Tensor | None]:
    """The name of the activation, and copies of what is stacked along depth: V, W, hidden and output bias
    (None where there is none); then, where there are normalisations, weight and bias of the first and of the
    second, mean and variance of the first and of the second. Last the number of batches that the first
    normalisation of all has seen, as all of them have.

    Raises:
        TypeError, ValueError: as ``from_layers`` of a block says; the text names the layer.
    """
    if not isinstance(layers, Iterable):
        raise TypeError(f"layers: expected a list of {branch.expected}, got {type(layers).__name__}")
    steps = [_modules(branch, f"layers[{k}]", layer) for k, layer in enumerate(layers)]
    if not steps:
        raise ValueError(f"layers: expected at least one layer {branch.expected}, got none")
    model = steps[0]
    hidden, sigma, output, *norms = PLACES[len(model)]
    V, W = model[output].weight, model[hidden].weight
    if V.shape[:2] != W.shape[1::-1] or V.shape[2:] != W.shape[2:]:
        raise ValueError(
            f"layers[0]: a residual branch returns to the size it starts from; expected {branch.expected}, "
            f"got {branch.shown(model[hidden])} and {branch.shown(model[output])}"
        )
    name = _activation_name(f"layers[0][{sigma}]", model[sigma])
    for k, step in enumerate(steps):
        if len(step) != len(model):
            raise ValueError(
                f"layers[{k}]: all layers of a block have the same modules; expected {len(model)} as in "
                f"layers[0], got {len(step)}"
            )
        found = _activation_name(f"layers[{k}][{sigma}]", step[sigma])
        if found != name:
            raise ValueError(
                f"layers[{k}][{sigma}]: all layers of a block share one activation; expected {name} as in "
                f"layers[0], got {found}"
            )
        for i in (hidden, output):
            _check_alike(branch, f"layers[{k}][{i}]", step[i], f"layers[0][{i}]", model[i])
        for i in norms:
            _check_norm(f"layers[{k}][{i}]", step[i], step[i - 1], f"layers[0][{i}]", model[i])

    def stack(i: int, name: str) -> Tensor | None:
        tensors = [getattr(step[i], name) for step in steps]
        return None if tensors[0] is None else torch.stack([t.detach() for t in tensors])

    places = [(output, "weight"), (hidden, "weight"), (hidden, "bias"), (output, "bias")]
    for names in (("weight", "bias"), ("running_mean", "running_var")):
        places += [(i, name) for i in norms for name in names]
    tracked = model[norms[0]].num_batches_tracked.clone() if norms else None
    return name, [stack(*place) for place in places], tracked


def make_layer(
    branch: Branch,
    activation: str,
    tracked: Any,
    V: Tensor,
    W: Tensor,
    hidden_bias: Tensor | None,
    output_bias: Tensor | None,
    *norm: Any,
) -> nn.Sequential:
    """The modules of a step, with copies of what ``stack_layers`` stacks."""

    def module(weight: Tensor, bias: Tensor | None) -> nn.Module:
        made = branch.make(weight)
        made.weight = nn.Parameter(weight.detach().clone())
        if bias is not None:
            made.bias = nn.Parameter(bias.detach().clone())
        return made

    def normalisation(weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> nn.Module:
        made = nn.BatchNorm2d(len(weight), device=weight.device)
        made.weight, made.bias = (nn.Parameter(t.detach().clone()) for t in (weight, bias))
        made.running_mean, made.running_var = mean.clone(), var.clone()
        made.num_batches_tracked = tracked.clone()
        return made

    hidden, output = [module(W, hidden_bias)], [module(V, output_bias)]
    if tracked is not None:
        hidden.append(normalisation(*norm[0:2], *norm[4:6]))
        output.append(normalisation(*norm[2:4], *norm[6:8]))
    return nn.Sequential(*hidden, get_activation(activation).module(), *output)


# ---- kinds of branches -----------------------------------------------------------------------------------


def _refuse_convolution(where: str, convolution: nn.Conv2d) -> None:
    kernel = convolution.kernel_size
    if kernel[0] != kernel[1] or kernel[0] % 2 == 0:
        raise ValueError(f"{where}: expected a square kernel of odd size, got kernel_size={kernel}")
    settings = {
        "stride": (1, 1),
        "padding": (kernel[0] // 2, kernel[1] // 2),
        "dilation": (1, 1),
        "groups": 1,
        "padding_mode": "zeros",
    }
    for name, expected in settings.items():
        value = getattr(convolution, name)
        if value != expected and (name, value) != ("padding", "same"):
            raise ValueError(
                f"{where}: a block has convolutions that keep the size of a map, of every channel with every "
                f"one; expected {name}={expected!r}, got {name}={value!r}"
            )


LINEAR = Branch(
    nn.Linear,
    False,
    "(nn.Linear(q, m), activation module, nn.Linear(m, q))",
    lambda linear: f"nn.Linear({linear.in_features}, {linear.out_features})",
    lambda weight: nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta"),
    lambda where, linear: None,
)

CONVOLUTION = Branch(
    nn.Conv2d,
    True,
    "(nn.Conv2d(C, M, k, padding=k//2), activation module, nn.Conv2d(M, C, k, padding=k//2)), perhaps with "
    "nn.BatchNorm2d after each nn.Conv2d",
    lambda conv: f"nn.Conv2d({conv.in_channels}, {conv.out_channels}, {conv.kernel_size[0]})",
    lambda weight: nn.Conv2d(
        weight.shape[1],
        weight.shape[0],
        weight.shape[2],
        padding=weight.shape[2] // 2,
        bias=False,
        device="meta",
    ),
    _refuse_convolution,
)


# ---- inside ----------------------------------------------------------------------------------------------


def _modules(branch: Branch, where: str, layer: Any) -> list[Any]:
    if not isinstance(layer, (nn.Sequential, list, tuple)):
        raise TypeError(
            f"{where}: expected {branch.expected} as a tuple, list or nn.Sequential, got {_name(layer)}"
        )
    modules = list(layer)
    if len(modules) not in ((3, 5) if branch.normalised else (3,)):
        kinds = ", ".join(map(_name, modules)) or "none"
        hint = "; for no activation put nn.Identity() in the middle" if len(modules) == 2 else ""
        raise ValueError(
            f"{where}: expected three modules {branch.expected}, got {len(modules)}: {kinds}{hint}"
        )
    hidden, _, output, *_ = PLACES[len(modules)]
    for i in (hidden, output):
        if not isinstance(modules[i], branch.kind):
            raise TypeError(f"{where}[{i}]: expected an nn.{branch.kind.__name__}, got {_name(modules[i])}")
        if is_lazy(modules[i].weight):
            raise ValueError(
                f"{where}[{i}]: expected weights, got a lazy layer; run a batch through it first"
            )
        branch.refuse(f"{where}[{i}]", modules[i])
    return modules


def _check_norm(where: str, norm: Any, before: Any, where_model: str, model: Any) -> None:
    """A batch normalisation as the block has it, of the result of the module before, with the dtypes of
    ``model``."""
    expected = nn.BatchNorm2d(before.out_channels, device="meta")
    if type(norm) is not nn.BatchNorm2d or _settings(norm) != _settings(expected):
        raise ValueError(f"{where}: expected nn.{expected!r}, got {norm!r}")
    for name in ("weight", "bias", "running_mean", "running_var"):
        dtype, device = getattr(model, name).dtype, before.weight.device
        tensor = getattr(norm, name)
        if tensor.device != device:
            raise ValueError(
                f"{where}: expected {name} on {device} as the convolution before, got it on {tensor.device}; "
                "call .to() first"
            )
        if tensor.dtype != dtype:
            raise ValueError(
                f"{where}: expected {name} of {dtype} as in {where_model}, got {tensor.dtype}; call .to() "
                "first"
            )


def _name(value: Any) -> str:
    return type(value).__name__


def _settings(module: nn.Module) -> dict[str, Any]:
    """What the user chose, such as a slope; where the result is written does not matter."""
    ignored = ("training", "inplace")
    return {key: value for key, value in vars(module).items() if key[0] != "_" and key not in ignored}


def _activation_name(where: str, module: Any) -> str:
    for activation in ACTIVATIONS.values():
        example = activation.module()
        if type(module) is type(example) and _settings(module) == _settings(example):
            return activation.name
    known = ", ".join(f"nn.{activation.module()!r}" for activation in ACTIVATIONS.values())
    raise ValueError(f"{where}: expected an activation of the block, one of {known}; got {module!r}")


def _check_alike(branch: Branch, where: str, module: Any, where_model: str, model: Any) -> None:
    if module.weight.shape != model.weight.shape:
        raise ValueError(
            f"{where}: all layers of a block have the same sizes; expected {branch.shown(model)} as in "
            f"{where_model}, got {branch.shown(module)}"
        )
    if (module.bias is None) != (model.bias is None):
        have, lack = (where, where_model) if model.bias is None else (where_model, where)
        raise ValueError(
            f"{where}: expected a bias on every layer or on none, but {have} has one and {lack} has not; a "
            "bias of zeros changes nothing"
        )
    for ours, theirs in ((module.weight, model.weight), (module.bias, model.weight)):
        if ours is not None and (ours.dtype, ours.device) != (theirs.dtype, theirs.device):
            raise ValueError(
                f"{where}: expected {theirs.dtype} on {theirs.device} as in {where_model}, got {ours.dtype} "
                f"on {ours.device}; call .to() first"
            )
