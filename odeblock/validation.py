"""Checks of arguments: every error names the argument, what was expected and what came."""

from __future__ import annotations

import math
import numbers
import operator
import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from .activations import get_activation

STRATEGIES = ("auto", "adjoint", "checkpoint", "store")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

NO_TORCHSCRIPT = (
    "cannot record a block, whose steps are one call of native code; use torch.export.export to save a model "
    "for inference, or torch.compile to run or train it in one graph"
)


MOST_ACCEPTED = 1024
_accepted: set[Any] = set()
"""Calls that passed, by all that the checks see: to look one up takes a third of the time."""

MOST = 2**48
"""Of a size: no machine has memory for as many numbers."""

_PLAIN = {type(None), bool, int, float, str}
"""Types of options whose values do not change."""


def check_arguments(
    h: Tensor,
    V: Tensor,
    W: Tensor,
    hidden_bias: Tensor | None,
    output_bias: Tensor | None,
    activation: str,
    scale: float | None,
    backward: str,
    strict: bool,
    anchors: int,
    memory_budget: int | None,
    *,
    maps: bool = False,
) -> float:
    """Refuse what cannot be computed of rows, or of ``maps``; return the scale, 1/L unless given."""
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError(f"torch.jit.trace {NO_TORCHSCRIPT}")
    options = (activation, scale, backward, strict, anchors, memory_budget)
    call: Any = None
    if not torch.compiler.is_compiling():
        try:
            looks = (_look(h), _look(V), _look(W), _look(hidden_bias), _look(output_bias))
            call = (maps, looks, options, *map(type, options))
            if call in _accepted:
                return 1.0 / V.shape[0] if scale is None else float(scale)
        except (
            AttributeError,
            RuntimeError,
            TypeError,
        ):  # no tensor, no or symbolic sizes, an option without hash
            call = None
    step = _check_arguments(h, V, W, hidden_bias, output_bias, *options, maps)
    if call is not None and _PLAIN.issuperset(map(type, options)):
        _accept(call)
    return step


def _accept(call: Any) -> None:
    if len(_accepted) >= MOST_ACCEPTED:
        _accepted.clear()
    _accepted.add(call)


def check_op(
    h: Tensor,
    V: Tensor,
    W: Tensor,
    hidden_bias: Tensor | None,
    output_bias: Tensor | None,
    activation: str,
    save_every: int,
    reconstruct: bool = False,
    slots: int | None = None,
    name: str = "h",
) -> None:
    """Refuse what must not come to the core from an op: anybody may call it, also a program that was saved.

    name: what errors call ``h``; it is "grad" in a backward, which has ``slots``.
    """
    tensors = [
        None if t is None else (t.shape, t.dtype, t.device, t.layout)
        for t in (h, V, W, hidden_bias, output_bias)
    ]
    call = (*tensors, activation, save_every, reconstruct, slots, name)
    if call in _accepted:
        return
    check_tensor("V", V)
    maps = V.dim() == 5
    options = (activation, 1.0, "store", False, 0, None, maps)
    _check_arguments(h, V, W, hidden_bias, output_bias, *options, name=name)
    if h.dim() != (4 if maps else 2):
        raise ValueError(
            f"{name}: expected shape {'[B, C, H, W]' if maps else '[B, q]'}, got {list(h.shape)}"
        )
    least = 0 if slots is None or reconstruct else 1
    if not least <= save_every <= len(V):
        raise ValueError(f"save_every: expected from {least} to L = {len(V)} steps, got {save_every}")
    if slots is not None:
        least = 1 if save_every > 1 and not reconstruct else 0
        if not least <= slots <= len(V):
            raise ValueError(f"slots: expected from {least} to L = {len(V)} states, got {slots}")
    _accept(call)


def check_devices(optional: dict[str, Tensor | None], **tensors: Tensor) -> None:
    """All are where the first of ``tensors`` is, for what only looks at their sizes: of a meta tensor among
    others PyTorch would ask for results that none has computed."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):  # PyTorch lets None pass
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    first, *_ = tensors
    device = tensors[first].device
    for name, found in {**tensors, **optional}.items():
        if found is not None and found.device != device:
            raise ValueError(f"{name}: expected the device of {first}, {device}; got {found.device}")


def check_saved(name: str, tensor: Any, shape: tuple[int, ...], dtype: torch.dtype, device: Any) -> None:
    """A tensor that the forward saved: hooks of saved tensors may have brought it back in another form."""
    check_tensor(name, tensor)
    if (tensor.shape, tensor.dtype, tensor.device) != (shape, dtype, device):
        expected = f"{list(shape)}, {dtype} on {device}, as the forward saved it"
        got = f"{list(tensor.shape)}, {tensor.dtype} on {tensor.device}"
        raise RuntimeError(f"{name}: expected a tensor {expected}; got {got}")


def _look(tensor: Any) -> Any:
    """What the checks see of a tensor."""
    if tensor is None:
        return None
    return type(tensor), tensor.shape, tensor.dtype, tensor.device, tensor.layout


def _check_arguments(
    h: Tensor,
    V: Tensor,
    W: Tensor,
    hidden_bias: Tensor | None,
    output_bias: Tensor | None,
    activation: str,
    scale: float | None,
    backward: str,
    strict: bool,
    anchors: int,
    memory_budget: int | None,
    maps: bool,
    name: str = "h",
) -> float:
    check_tensor(name, h)
    check_tensor("V", V)
    check_tensor("W", W)
    (_check_kernels if maps else _check_matrices)(V)
    q, m, taps = ("C", "M", ", k, k") if maps else ("q", "m", "")
    depth, dim, hidden, *kernel = V.shape
    _check_shape("W", W, (depth, hidden, dim, *kernel), f"[L, {m}, {q}{taps}]", V)
    (check_maps if maps else check_rows)(h, dim, f" ({q} of V {list(V.shape)})", name)
    if maps and (h.shape[-1] < 1 or h.shape[-2] < 1):
        raise ValueError(f"{name}: expected maps of at least one pixel, H, W >= 1; got {list(h.shape)}")
    weights = {"V": V, "W": W}
    biases = {"hidden_bias": (hidden_bias, hidden, m), "output_bias": (output_bias, dim, q)}
    for key, (bias, size, letter) in biases.items():
        if bias is not None:
            check_tensor(key, bias)
            _check_shape(key, bias, (depth, size), f"[L, {letter}]", V)
            weights[key] = bias
    for key, tensor in weights.items():
        if tensor.dtype != h.dtype:
            raise TypeError(f"{key}: expected the dtype of {name}, {h.dtype}; got {tensor.dtype}")
        if tensor.device != h.device:
            raise ValueError(f"{key}: expected the device of {name}, {h.device}; got {tensor.device}")
    get_activation(activation)
    check_options(backward, strict, anchors, memory_budget)
    return 1.0 / depth if scale is None else check_scale(scale)


def _check_matrices(V: Tensor) -> None:
    if V.dim() != 3 or V.shape[0] < 1:
        raise ValueError(f"V: expected shape [L, q, m] with L >= 1, got {list(V.shape)}")
    if min(V.shape[1:]) < 1:
        raise ValueError(f"V: expected shape [L, q, m] with q, m >= 1, got {list(V.shape)}")


def _check_kernels(V: Tensor) -> None:
    if V.dim() != 5 or min(V.shape[:3]) < 1:
        raise ValueError(f"V: expected shape [L, C, M, k, k] with L, C, M >= 1, got {list(V.shape)}")
    if V.shape[3] != V.shape[4] or V.shape[3] % 2 == 0:
        raise ValueError(
            "V: expected shape [L, C, M, k, k] with one odd k, so that zeros around a map keep its size; got "
            f"{list(V.shape)}"
        )


def check_layers(name: str, weights: Tensor) -> None:
    """A stack over depth of at least one layer."""
    if weights.dim() < 1 or weights.shape[0] < 1:
        raise ValueError(f"{name}: expected shape [L, ...] with L >= 1, got {list(weights.shape)}")


def check_rows(h: Tensor, dim: int, source: str = "", name: str = "h") -> None:
    """Rows of ``dim`` features; ``source``: what errors say of where that comes from."""
    if h.dim() < 1 or h.shape[-1] != dim:
        raise ValueError(f"{name}: expected shape [..., {dim}]{source}, got {list(h.shape)}")


def check_maps(h: Tensor, channels: int, source: str = "", name: str = "h") -> None:
    """One map, or a batch of maps, of ``channels``; ``source`` as of ``check_rows``."""
    if h.dim() not in (3, 4) or h.shape[-3] != channels:
        expected = f"[B, {channels}, H, W] or [{channels}, H, W]{source}"
        raise ValueError(f"{name}: expected shape {expected}, got {list(h.shape)}")


def check_scale(scale: Any) -> float:
    """A finite number, as a float."""
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise TypeError(f"scale: expected a number or None (1/L), got {type(scale).__name__}")
    if not abs(scale) < math.inf:  # which a compiler can ask of a symbol, unlike isfinite
        raise ValueError(f"scale: expected a finite number, got {scale!r}")
    try:
        return float(scale)
    except OverflowError:
        raise ValueError("scale: expected a number that a float can hold, got a larger one") from None


def check_strategy(backward: Any) -> str:
    """One of the names of the backward strategies."""
    if not isinstance(backward, str):
        raise TypeError(f"backward: expected a name (str), got {type(backward).__name__}")
    if backward not in STRATEGIES:
        raise ValueError(f"backward: expected one of {', '.join(STRATEGIES)}; got {backward!r}")
    return backward


def check_options(backward: Any, strict: Any, anchors: Any, memory_budget: Any) -> tuple[int, int | None]:
    """A strategy, and the options that go with it; returns the last two as plain ints."""
    check_strategy(backward)
    check_flag("strict", strict)
    anchors = check_size("anchors", anchors, least=0, most=sys.maxsize)
    if anchors and backward != "adjoint":
        raise ValueError(f'anchors: expected 0 unless backward is "adjoint", got {anchors} with {backward!r}')
    if memory_budget is not None:
        memory_budget = check_size("memory_budget", memory_budget, most=sys.maxsize)
        if backward not in ("auto", "checkpoint"):
            raise ValueError(
                'memory_budget: expected None unless backward is "auto" or "checkpoint", got '
                f"{memory_budget} with {backward!r}"
            )
    return anchors, memory_budget


def plain_sizes(anchors: Any, memory_budget: Any) -> tuple[int, int | None]:
    """These options, which were checked, as plain ints: a tensor may change, and a short type overflows."""
    if type(anchors) is not int:
        anchors = operator.index(anchors)
    if memory_budget is not None and type(memory_budget) is not int:
        memory_budget = operator.index(memory_budget)
    return anchors, memory_budget


def check_flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")
    return value


def check_size(name: str, value: Any, *, least: int = 1, most: int | None = MOST) -> int:
    """A whole number from ``least`` to ``most``, also of another library's integer type, as an int."""
    try:
        if isinstance(value, bool):
            raise TypeError
        value = operator.index(value)
    except (TypeError, RuntimeError):  # the latter from a tensor on the meta device
        raise TypeError(f"{name}: expected an int >= {least}, got {type(value).__name__}") from None
    if value < least:
        raise ValueError(f"{name}: expected an int >= {least}, got {in_digits(value)}")
    if most is not None and value > most:
        raise ValueError(f"{name}: expected an int from {least} to {most}, got {in_digits(value)}")
    return int(value)


def in_digits(value: int) -> str:
    """Python refuses to write out what has thousands of them."""
    return str(value) if abs(value) < 10**100 else "one of more than 100 digits"


def check_number(name: str, value: Any, *, least: float | None = None, above: float | None = None) -> float:
    """A finite number, >= ``least`` or > ``above`` where given, as a float."""
    expected = "a finite number"
    expected += f" >= {least:g}" if least is not None else f" > {above:g}" if above is not None else ""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"{name}: expected {expected}, got one that no float can hold") from None
    low = (least is not None and number < least) or (above is not None and number <= above)
    if low or not abs(number) < math.inf:  # which a compiler can ask of a symbol, unlike isfinite
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return number


def check_tensor(name: str, value: Any) -> None:
    """A dense tensor of a dtype that states may have."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in DTYPES:
        expected = ", ".join(str(dtype) for dtype in DTYPES)
        raise TypeError(f"{name}: expected one of {expected}; got {value.dtype}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got {value.layout}; call .to_dense()")
    if value.is_nested or isinstance(value, UninitializedParameter):
        raise TypeError(f"{name}: expected a tensor with sizes, got a nested or an uninitialised one")


def check_affine(name: str, value: Any, V: Tensor, *, hidden: bool) -> None:
    """γ or β of the hidden channels or of the others, on the device of V [L, C, M, k, k]."""
    check_tensor(name, value)
    depth, dim, units = V.shape[:3]
    letters = "[L, M]" if hidden else "[L, C]"
    _check_shape(name, value, (depth, units if hidden else dim), letters, V)
    if value.device != V.device:
        raise ValueError(f"{name}: expected a tensor on {V.device} as V, got one on {value.device}")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], letters: str, V: Tensor) -> None:
    if tuple(tensor.shape) != shape:
        expected = f"{letters} = {list(shape)} (from V {list(V.shape)})"
        raise ValueError(f"{name}: expected shape {expected}, got {list(tensor.shape)}")
