"""Whether a residual is a pure function of its arguments, as ``residual_scan`` needs it, as far as one sees.

Its backward calls f again: what f draws, changes or takes from elsewhere would make gradients silently wrong.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from .scan import FunctionSteps


def check_purity(steps: FunctionSteps, h: Tensor, leaves: Sequence[Tensor]) -> None:
    """Refuse an f whose gradients would be silently wrong, as far as a call on the first step shows it.

    It is called on copies, so that nothing of the user's is changed.
    """
    # detach leaves tangents where they are
    point, *layer = (forward_ad.unpack_dual(x.detach()).primal.clone() for x in (h, *(p[0] for p in leaves)))
    located, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(layer, steps.spec))
    arguments = {"h": point, **{"Z_k" + pytree.keystr(path): z for path, z in located}}
    versions = {name: tensor._version for name, tensor in arguments.items()}
    buffers, random = _buffers(steps.f), _random_states(h)
    with torch.enable_grad():  # the kernels that the backward takes
        found = steps.residual(point, layer)
    if found.requires_grad:
        raise ValueError(
            "f: expected to need gradients only through h and Z_k, but it uses another tensor that requires "
            "one, which would not get it; pass that tensor, stacked over depth, in params"
        )
    if forward_ad.unpack_dual(found).tangent is not None:
        raise ValueError(
            "f: expected to move only with h and Z_k, but it uses another tensor with a tangent, which would "
            "be lost; pass that tensor, stacked over depth, in params"
        )
    has_values = not isinstance(found, FakeTensor)
    if has_values and any(not torch.equal(a, b) for a, b in zip(random, _random_states(h), strict=True)):
        raise ValueError(
            "f: expected a function without random numbers, which the backward could not repeat, but it drew "
            "some; draw them before and pass them in params, stacked over depth"
        )
    for name, tensor in arguments.items():
        if tensor._version != versions[name]:
            raise ValueError(f"f: expected to leave its arguments alone, but it changed {name} in place")
    after = _buffers(steps.f)
    for name, (buffer, version) in buffers.items():
        now, its_version = after.get(name, (None, 0))
        if now is not buffer or its_version != version:
            raise ValueError(
                f"f: expected to leave its modules alone, but it changed {name}, which the backward would do "
                "again; call .eval(), or turn its running statistics off"
            )
    if has_values and h.device.type == "cpu":
        with torch.enable_grad():
            again = steps.residual(point, layer)
        if not bool(((found == again) | (found.isnan() & again.isnan())).all()):
            raise ValueError(
                "f: expected the same result from the same arguments, but a second call gave another; the "
                "backward calls it again, so all that varies belongs in params"
            )


def _random_states(h: Tensor) -> list[Tensor]:
    """Of the generators that f draws from by default."""
    states = [torch.get_rng_state()]
    if h.is_cuda and not torch.cuda.is_current_stream_capturing():
        states.append(torch.cuda.get_rng_state(h.device))
    return states


def _buffers(f: Any) -> dict[str, tuple[Tensor, int]]:
    """Name, buffer and version, of the modules that f is, is a method of, or refers to."""
    return {
        f"the buffer {name!r} of {where} ({type(module).__name__})": (
            buffer,
            0 if buffer.is_inference() else buffer._version,
        )
        for where, value in _references(f)
        for module in (value.__self__ if inspect.ismethod(value) else value,)
        if isinstance(module, torch.nn.Module)
        for name, buffer in module.named_buffers()
    }


def _references(f: Any) -> Iterator[tuple[str, Any]]:
    """f, what its partials bind, and the variables from outside that it names."""
    while isinstance(f, functools.partial):
        for i, value in enumerate((*f.args, *f.keywords.values())):
            yield f"argument {i} of f", value
        f = f.func
    yield "f", f
    try:
        variables = inspect.getclosurevars(inspect.unwrap(f))
    except (TypeError, ValueError):  # not a Python function, or a variable is not bound yet
        return
    yield from variables.nonlocals.items()
    yield from variables.globals.items()
