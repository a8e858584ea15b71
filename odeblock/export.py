"""Exported programs in PyTorch's own operators, for ONNX and for where odeblock is not installed.

    program = torch.export.export(model, (x,)).run_decompositions(odeblock.export.decompositions())
    torch.onnx.export(program, dynamo=True).save("model.onnx")

The L steps are written out, 4 operators or more each: leave the op as it is for programs that run beside
odeblock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import ops, reference


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The forward of a block as the loop that it stands for: a table for ``run_decompositions`` of a
    ``torch.export.ExportedProgram``.

    An op that keeps states for a backward stays as it is. ``torch.export`` makes none, except in PyTorch 2.6:
    export under ``torch.no_grad()`` there. A block with normalisation has to be in evaluation.
    """
    return {ops.forward: _loop}


def _loop(*arguments: Any) -> Any:
    """The op ``deep_residual`` where no states are saved."""
    *tensors, activation, scale, save_every, reconstruct, _ = arguments
    if save_every or reconstruct:
        return NotImplemented
    y = reference.loop(*tensors, activation=activation, scale=scale)
    nothing = y.new_empty(0, dtype=reference.state_dtype(y.dtype))
    return y, nothing, nothing.clone()
