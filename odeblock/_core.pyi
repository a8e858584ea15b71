"""The native core (``csrc/bindings.cpp``): addresses and sizes in. See ``csrc/api.h``."""

from typing import Any

from typing_extensions import Buffer

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
    keep_hidden: bool,
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
    keep_hidden: bool,
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
    keep_hidden: bool,
    workspace: int,
    threads: int,
    /,
) -> None: ...
def cuda_unsupported(device: int, /) -> str | None: ...
def cuda_fuses(
    dtype: int, activation: int, batch: int, dim: int, hidden: int, depth: int, tf32: bool, device: int, /
) -> bool: ...
def cuda_forward(
    dtype: int,
    activation: int,
    batch: int,
    dim: int,
    hidden: int,
    depth: int,
    scale: float,
    V: int,
    W: int,
    hidden_bias: int,
    output_bias: int,
    h: int,
    start: int,
    y: int,
    end: int,
    states: int,
    save_every: int,
    tf32: bool,
    device: int,
    stream: int,
    /,
) -> None: ...
def cuda_sweep(
    dtype: int,
    activation: int,
    batch: int,
    dim: int,
    hidden: int,
    depth: int,
    scale: float,
    V: int,
    W: int,
    hidden_bias: int,
    output_bias: int,
    states: int,
    a: int,
    layer_a: int,
    layer_h: int,
    layer_s: int,
    layer_g: int,
    tf32: bool,
    device: int,
    stream: int,
    /,
) -> None: ...
def memory(size: int, /) -> Buffer: ...
def release_memory() -> None: ...
def build_info() -> dict[str, Any]: ...
