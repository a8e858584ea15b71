"""What ``torch.utils.flop_counter`` counts for the ops: their products, two operations for a multiply-add.

As of the loop in PyTorch's operators: a product of a layer is 2Bqm, of maps 2BHW·CMk², and a backward has the
steps that it runs again, those of the last adjoint by its report (one evaluation of each step where there is
none: fake tensors).

Registered when that module is first imported: it imports Triton, where there is one, for a second.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from torch import Tensor

from . import checkpointing, normalised_ops, ops
from .drift import DriftRecord
from .products import flat_sizes

COUNTER = "torch.utils.flop_counter"


def product(h: Tensor, V: Tensor) -> int:
    """Operations of V_k or W_k times a batch."""
    batch, dim, hidden = flat_sizes(h, V)
    if V.dim() == 3:
        return 2 * batch * dim * hidden
    return 2 * batch * dim * V.shape[2] * V.shape[3] * V.shape[4]


def forward(h: Tensor, V: Tensor, *_: Any, **__: Any) -> int:
    """Two products a step."""
    return 2 * V.shape[0] * product(h, V)


def backward(grad: Tensor, h: Tensor | None, V: Tensor, *others: Any, **_: Any) -> int:
    """Two products a step for dh, two for dV and dW, and those that give z again."""
    save_every, reconstruct, slots, keep_hidden, weight_gradients, _strict, record = others[-7:]
    depth = V.shape[0]
    products: float = (4 if weight_gradients else 2) * depth
    if reconstruct:
        real = type(grad) is Tensor and not grad.is_meta
        report = (real and DriftRecord.numbered(record).read()) or {"evaluations": 1.0}
        products += 2 * depth * report["evaluations"]
    else:
        products += products_again(depth, save_every, slots, keep_hidden)
    return round(products * product(grad, V))


def normalised_backward(grad: Tensor, V: Tensor, *others: Any, **_: Any) -> int:
    """The same, and that which gives V_k * σ(z) again."""
    save_every, slots, weight_gradients = others[-3:]
    depth = V.shape[0]
    products = (5 if weight_gradients else 3) * depth + products_again(depth, save_every, slots, False)
    return products * product(grad, V)


def products_again(depth: int, save_every: int, slots: int, keep_hidden: bool) -> int:
    """Products by which a backward has the states and hidden values that were not stored."""
    if save_every == 1:
        return 0 if keep_hidden else depth
    count = 0

    def advance(_: None, bottom: int, top: int) -> None:
        nonlocal count
        count += 2 * (top - bottom)

    def visit(_: None, bottom: int, top: int) -> None:
        """All but the top layer are run again, and may keep z."""
        nonlocal count
        again = top - bottom - 1
        count += 2 * again + (1 if keep_hidden else again + 1)

    for bottom in range(0, depth, save_every):
        checkpointing.sweep(None, bottom, min(bottom + save_every, depth), slots, advance, visit)
    return count


# ---- registration ----------------------------------------------------------------------------------------


def register(counter: ModuleType) -> None:
    """Tell PyTorch's counter."""
    for op, formula in (
        (ops.forward, forward),
        (ops.backward, backward),
        (normalised_ops.forward, forward),
        (normalised_ops.backward, normalised_backward),
    ):
        counter.register_flop_formula(op.overloadpacket, get_raw=True)(formula)


class _WhenImported(importlib.abc.MetaPathFinder):
    """Registers after the first import of the counter, which the other finders find."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)  # to ask is not to import
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if COUNTER in sys.modules:
    register(sys.modules[COUNTER])
else:
    sys.meta_path.insert(0, _WhenImported())
