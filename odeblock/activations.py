"""The one table of activations: name, PyTorch function, its backward and module, and the native core's id.

``csrc/activations.h`` holds the same table for C++ and CUDA; ``tests/test_activations.py`` compares the two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_aten = torch.ops.aten

LEAKY_SLOPE = 0.01  # the default of torch.nn.LeakyReLU


@dataclass(frozen=True)
class Activation:
    """An activation sigma.

    name: what users write. native_id: what ``csrc/activations.h`` calls it.
    function: z -> sigma(z). backward: (u, z, s) -> u * sigma'(z), given s = sigma(z).
    module: makes the ``torch.nn`` module of the same function.
    """

    name: str
    native_id: int
    function: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], Tensor]
    module: Callable[[], nn.Module]

    @property
    def smooth(self) -> bool:
        """Whether sigma' is continuous."""
        return self.name not in ("relu", "leaky_relu")


_TABLE = (
    Activation("identity", 0, lambda z: z, lambda u, z, s: u, nn.Identity),
    Activation("relu", 1, F.relu, lambda u, z, s: _aten.threshold_backward(u, z, 0), nn.ReLU),
    Activation(
        "leaky_relu",
        2,
        lambda z: F.leaky_relu(z, LEAKY_SLOPE),
        lambda u, z, s: _aten.leaky_relu_backward(u, z, LEAKY_SLOPE, False),
        lambda: nn.LeakyReLU(LEAKY_SLOPE),
    ),
    Activation("tanh", 3, torch.tanh, lambda u, z, s: _aten.tanh_backward(u, s), nn.Tanh),
    Activation("sigmoid", 4, torch.sigmoid, lambda u, z, s: _aten.sigmoid_backward(u, s), nn.Sigmoid),
    Activation("softplus", 5, F.softplus, lambda u, z, s: _aten.softplus_backward(u, z, 1, 20), nn.Softplus),
    Activation("silu", 6, F.silu, lambda u, z, s: _aten.silu_backward(u, z), nn.SiLU),
    Activation("gelu", 7, F.gelu, lambda u, z, s: _aten.gelu_backward(u, z), nn.GELU),
    Activation(
        "gelu_tanh",
        8,
        lambda z: F.gelu(z, approximate="tanh"),
        lambda u, z, s: _aten.gelu_backward(u, z, approximate="tanh"),
        lambda: nn.GELU(approximate="tanh"),
    ),
)

ACTIVATIONS: dict[str, Activation] = {activation.name: activation for activation in _TABLE}


def get_activation(name: str) -> Activation:
    """Look an activation up by name; ValueError lists the known ones."""
    if not isinstance(name, str):
        raise TypeError(f"activation: expected a name (str), got {type(name).__name__}")
    if name not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}; got {name!r}")
    return ACTIVATIONS[name]
