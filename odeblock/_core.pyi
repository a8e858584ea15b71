"""The native core (``csrc/bindings.cpp``): addresses and sizes in, nothing kept. See ``csrc/api.h``."""

from typing import Any

def forward_workspace(
    dtype: int, activation: int, batch: int, dim: int, hidden: int, depth: int, threads: int, /
) -> int: ...
def forward(
    dtype: int,
    activation: int,
    batch: int,
    dim: int,
    hidden: int,
    depth: int,
    scale: float,
    h: int,
    V: int,
    W: int,
    hidden_bias: int,
    output_bias: int,
    y: int,
    states: int,
    probe: int,
    checks: int,
    save_every: int,
    reconstruct: bool,
    workspace: int,
    threads: int,
    /,
) -> None: ...
def backward_workspace(
    dtype: int,
    activation: int,
    batch: int,
    dim: int,
    hidden: int,
    depth: int,
    save_every: int,
    reconstruct: bool,
    slots: int,
    threads: int,
    /,
) -> int: ...
def backward(
    dtype: int,
    activation: int,
    batch: int,
    dim: int,
    hidden: int,
    depth: int,
    scale: float,
    grad: int,
    h: int,
    V: int,
    W: int,
    hidden_bias: int,
    output_bias: int,
    states: int,
    probe: int,
    checks: int,
    dh: int,
    dV: int,
    dW: int,
    dhidden_bias: int,
    doutput_bias: int,
    report: int,
    save_every: int,
    reconstruct: bool,
    slots: int,
    workspace: int,
    threads: int,
    /,
) -> None: ...
def prefer_large_pages(data: int, size: int, /) -> None: ...
def build_info() -> dict[str, Any]: ...
