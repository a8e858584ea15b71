"""Stacked weights to and from lists of residual branches: two nn.Linear or nn.Conv2d, σ between."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .activations import ACTIVATIONS, get_activation

Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""V [L, q, m], W [L, m, q], hidden_bias [L, m] or None, output_bias [L, q] or None; or of convolutions."""


@dataclass(frozen=True)
class Branch:
    """The modules of a step.

    kind: of the first and the last. expected: what errors say of the three. shown: a module of the kind, for
    errors. make: an empty one, without a bias, for a weight. refuse: raises for one (named ``where``) with
    settings that a block has not.
    """

    kind: type[nn.Module]
    expected: str
    shown: Callable[[Any], str]
    make: Callable[[Tensor], nn.Module]
    refuse: Callable[[str, Any], None]


def stack_layers(branch: Branch, layers: Iterable[Any]) -> tuple[str, Weights]:
    """The name of the activation, and copies of the weights stacked along depth.

    Raises:
        TypeError, ValueError: as ``from_layers`` of a block says; the text names the layer.
    """
    if not isinstance(layers, Iterable):
        raise TypeError(f"layers: expected a list of {branch.expected}, got {type(layers).__name__}")
    triples = [_triple(branch, f"layers[{k}]", layer) for k, layer in enumerate(layers)]
    if not triples:
        raise ValueError(f"layers: expected at least one layer {branch.expected}, got none")
    first, middle, last = triples[0]
    if last.weight.shape[:2] != first.weight.shape[1::-1] or last.weight.shape[2:] != first.weight.shape[2:]:
        raise ValueError(
            f"layers[0]: a residual branch returns to the size it starts from; expected {branch.expected}, "
            f"got {branch.shown(first)} and {branch.shown(last)}"
        )
    name = _activation_name("layers[0][1]", middle)
    for k, (hidden, sigma, output) in enumerate(triples):
        where = f"layers[{k}]"
        found = _activation_name(f"{where}[1]", sigma)
        if found != name:
            raise ValueError(
                f"{where}[1]: all layers of a block share one activation; expected {name} as in layers[0], "
                f"got {found}"
            )
        for i, (module, model) in ((0, (hidden, first)), (2, (output, last))):
            _check_alike(branch, f"{where}[{i}]", module, f"layers[0][{i}]", model)

    def stack(tensors: list[Any]) -> Tensor | None:
        return None if tensors[0] is None else torch.stack([t.detach() for t in tensors])

    V, W = (stack([triple[i].weight for triple in triples]) for i in (2, 0))
    assert V is not None
    assert W is not None
    return name, (V, W, stack([t[0].bias for t in triples]), stack([t[2].bias for t in triples]))


def make_layer(
    branch: Branch,
    activation: str,
    V: Tensor,
    W: Tensor,
    hidden_bias: Tensor | None,
    output_bias: Tensor | None,
) -> nn.Sequential:
    """The modules of a step, with copies of its weights and biases."""

    def module(weight: Tensor, bias: Tensor | None) -> nn.Module:
        made = branch.make(weight)
        made.weight = nn.Parameter(weight.detach().clone())
        if bias is not None:
            made.bias = nn.Parameter(bias.detach().clone())
        return made

    return nn.Sequential(module(W, hidden_bias), get_activation(activation).module(), module(V, output_bias))


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
    "(nn.Linear(q, m), activation module, nn.Linear(m, q))",
    lambda linear: f"nn.Linear({linear.in_features}, {linear.out_features})",
    lambda weight: nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta"),
    lambda where, linear: None,
)

CONVOLUTION = Branch(
    nn.Conv2d,
    "(nn.Conv2d(C, M, k, padding=k//2), activation module, nn.Conv2d(M, C, k, padding=k//2))",
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


def _triple(branch: Branch, where: str, layer: Any) -> tuple[Any, nn.Module, Any]:
    if not isinstance(layer, (nn.Sequential, list, tuple)):
        raise TypeError(
            f"{where}: expected {branch.expected} as a tuple, list or nn.Sequential, got {_name(layer)}"
        )
    modules = list(layer)
    if len(modules) != 3:
        kinds = ", ".join(map(_name, modules)) or "none"
        hint = "; for no activation put nn.Identity() in the middle" if len(modules) == 2 else ""
        raise ValueError(
            f"{where}: expected three modules {branch.expected}, got {len(modules)}: {kinds}{hint}"
        )
    for i in (0, 2):
        if not isinstance(modules[i], branch.kind):
            raise TypeError(f"{where}[{i}]: expected an nn.{branch.kind.__name__}, got {_name(modules[i])}")
        if is_lazy(modules[i].weight):
            raise ValueError(
                f"{where}[{i}]: expected weights, got a lazy layer; run a batch through it first"
            )
        branch.refuse(f"{where}[{i}]", modules[i])
    return modules[0], modules[1], modules[2]


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
