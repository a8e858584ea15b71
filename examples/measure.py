"""Time and memory of a training step, as the other examples measure them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Measured(NamedTuple):
    """Seconds of forward and backward, MiB kept between the two, and the gradients."""

    seconds: float
    kept: float
    gradients: tuple[Tensor, ...]


def measure(loss: Callable[[], Tensor], parameters: Iterable[Tensor]) -> Measured:
    """Steps of a loss: memory of the first, beside the parameters; time of the fastest of three more."""
    parameters = list(parameters)
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()  # two views of a storage count once
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        value = loss()
    torch.autograd.grad(value, parameters)
    seconds = float("inf")
    for _ in range(3):  # other programs only ever add time
        began = time.perf_counter()
        gradients = torch.autograd.grad(loss(), parameters)
        seconds = min(seconds, time.perf_counter() - began)
    return Measured(seconds, sum(kept.values()) / 2**20, gradients)
