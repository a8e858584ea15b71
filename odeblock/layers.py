"""Stacked weights to and from lists of residual branches (nn.Linear, activation module, nn.Linear)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .activations import ACTIVATIONS, get_activation

_EXPECTED = "(nn.Linear(q, m), activation module, nn.Linear(m, q))"

Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""V [L, q, m], W [L, m, q], hidden_bias [L, m] or None, output_bias [L, q] or None."""


def stack_layers(layers: Iterable[Any]) -> tuple[str, Weights]:
    """The name of the activation, and copies of the weights stacked along depth.

    Raises:
        TypeError, ValueError: as ``DeepResBlock.from_layers`` says; the text names the layer.
    """
    if not isinstance(layers, Iterable):
        raise TypeError(f"layers: expected a list of {_EXPECTED}, got {type(layers).__name__}")
    triples = [_triple(f"layers[{k}]", layer) for k, layer in enumerate(layers)]
    if not triples:
        raise ValueError(f"layers: expected at least one layer {_EXPECTED}, got none")
    first, middle, last = triples[0]
    if last.in_features != first.out_features or last.out_features != first.in_features:
        raise ValueError(
            "layers[0]: a residual branch returns to the size it starts from; expected nn.Linear(q, m) and "
            f"nn.Linear(m, q), got {_shape(first)} and {_shape(last)}"
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
        for i, (linear, model) in ((0, (hidden, first)), (2, (output, last))):
            _check_alike(f"{where}[{i}]", linear, f"layers[0][{i}]", model)

    def stack(tensors: list[Any]) -> Tensor | None:
        return None if tensors[0] is None else torch.stack([t.detach() for t in tensors])

    V, W = (stack([triple[i].weight for triple in triples]) for i in (2, 0))
    assert V is not None
    assert W is not None
    return name, (V, W, stack([t[0].bias for t in triples]), stack([t[2].bias for t in triples]))


def make_layer(
    activation: str, V: Tensor, W: Tensor, hidden_bias: Tensor | None, output_bias: Tensor | None
) -> nn.Sequential:
    """nn.Linear(q, m), activation, nn.Linear(m, q) with copies of V [q, m], W [m, q] and the biases."""

    def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        layer.weight = nn.Parameter(weight.detach().clone())
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone())
        return layer

    return nn.Sequential(linear(W, hidden_bias), get_activation(activation).module(), linear(V, output_bias))


def _triple(where: str, layer: Any) -> tuple[nn.Linear, nn.Module, nn.Linear]:
    if not isinstance(layer, (nn.Sequential, list, tuple)):
        raise TypeError(
            f"{where}: expected {_EXPECTED} as a tuple, list or nn.Sequential, got {_name(layer)}"
        )
    modules = list(layer)
    if len(modules) != 3:
        kinds = ", ".join(map(_name, modules)) or "none"
        hint = "; for no activation put nn.Identity() in the middle" if len(modules) == 2 else ""
        raise ValueError(f"{where}: expected three modules {_EXPECTED}, got {len(modules)}: {kinds}{hint}")
    for i in (0, 2):
        if not isinstance(modules[i], nn.Linear):
            raise TypeError(f"{where}[{i}]: expected an nn.Linear, got {_name(modules[i])}")
        if is_lazy(modules[i].weight):
            raise ValueError(
                f"{where}[{i}]: expected weights, got a lazy layer; run a batch through it first"
            )
    return modules[0], modules[1], modules[2]


def _name(value: Any) -> str:
    return type(value).__name__


def _shape(linear: nn.Linear) -> str:
    return f"nn.Linear({linear.in_features}, {linear.out_features})"


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


def _check_alike(where: str, linear: nn.Linear, where_model: str, model: nn.Linear) -> None:
    if linear.weight.shape != model.weight.shape:
        raise ValueError(
            f"{where}: all layers of a block have the same sizes; expected {_shape(model)} as in "
            f"{where_model}, got {_shape(linear)}"
        )
    if (linear.bias is None) != (model.bias is None):
        have, lack = (where, where_model) if model.bias is None else (where_model, where)
        raise ValueError(
            f"{where}: expected a bias on every layer or on none, but {have} has one and {lack} has not; a "
            "bias of zeros changes nothing"
        )
    for ours, theirs in ((linear.weight, model.weight), (linear.bias, model.weight)):
        if ours is not None and (ours.dtype, ours.device) != (theirs.dtype, theirs.device):
            raise ValueError(
                f"{where}: expected {theirs.dtype} on {theirs.device} as in {where_model}, got {ours.dtype} "
                f"on {ours.device}; call .to() first"
            )
