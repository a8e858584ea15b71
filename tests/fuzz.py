"""Calls of the entry points with arguments that were meddled with: a right answer, or an error that says why.

``python tests/fuzz.py --calls 1000000 --seed 0`` says how many of each there were. An answer is right if it
is near the reference's in float64, or where rounding is amplified as near as the rule of oracle.py asks.
Anything but a TypeError or ValueError that begins with an argument's name is a defect, and so is the end of
the process. Of an op that is called by itself PyTorch refuses some arguments: a RuntimeError with its name.
"""

from __future__ import annotations

import argparse
import collections
import random
import unittest.mock
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from oracle import Case, Eager, errors, run
from torch import Tensor

from odeblock import (
    DeepConvResBlock,
    DeepResBlock,
    DriftError,
    DriftWarning,
    native,
    normalised_ops,
    ops,
)
from odeblock.activations import ACTIVATIONS
from odeblock.functional import deep_conv_residual, deep_residual

Arguments = dict[str, Any]
TENSORS = ("h", "V", "W", "hidden_bias", "output_bias")
NAMES = (*TENSORS, "activation", "scale", "backward", "strict", "anchors", "memory_budget")
BLOCK_NAMES = (
    "dim",
    "channels",
    "depth",
    "hidden_dim",
    "hidden_channels",
    "kernel_size",
    "bias",
    "init",
    "norm",
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NEAR = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 0.1, torch.float16: 0.02}
STRANGE: list[Any] = [
    *(None, True, False, 0, 1, 2, 3, -1, 7, 2**31, 2**63, -(2**40), 1.0, -0.5, 0.0, 1e-3, 1e300),
    *(
        float("nan"),
        float("inf"),
        "",
        "gelu",
        "relu",
        "store",
        "adjoint",
        "checkpoint",
        "auto",
        "GELU",
        b"tanh",
    ),
    *((), [], [1.0], {}, object(), torch.relu, torch.float32, 1j, np.float32(0.5), np.int64(2), np.ones(3)),
    *(torch.tensor(2), torch.tensor(0.5), torch.ones(3), torch.ones(2, 3, dtype=torch.int64)),
    *(torch.ones(2, 2, dtype=torch.complex64), torch.ones(2, 3).to_sparse(), torch.ones(2, 3, device="meta")),
    *(torch.empty(0), torch.empty(0, 3), torch.empty(3, 0, 2), torch.empty(1, 1, 1, 1, 1), "x" * 1000),
]


def valid(draw: random.Random) -> tuple[Callable[..., Tensor], Arguments]:
    """A function and arguments that fit."""
    maps = draw.random() < 0.4
    most = 12 if maps else 6  # some maps have channels enough for products of tiles
    L, q, m, batch = draw.randint(1, 4), draw.randint(1, most), draw.randint(1, most), draw.randint(0, 7)
    dtype = draw.choice(DTYPES)
    kernel = (draw.choice((1, 3)),) * 2 if maps else ()
    pixels = (draw.randint(1, 4), draw.randint(1, 4)) if maps else ()
    shapes = [(batch, q, *pixels), (L, q, m, *kernel), (L, m, q, *kernel), (L, m), (L, q)]
    arguments: Arguments = {name: torch.randn(s).to(dtype) for name, s in zip(TENSORS, shapes, strict=True)}
    for bias in TENSORS[3:]:
        if draw.random() < 0.5:
            arguments[bias] = None
    backward = draw.choice(("store", "checkpoint", "adjoint", "auto"))
    arguments |= {
        "activation": draw.choice(list(ACTIVATIONS)),
        "scale": draw.choice((None, 0.1, -0.2, 0, 1)),
        "backward": backward,
        "strict": draw.random() < 0.5,
        "anchors": draw.randint(0, 3) if backward == "adjoint" else 0,
        "memory_budget": 10**6 if backward == "checkpoint" and draw.random() < 0.3 else None,
    }
    return (deep_conv_residual if maps else deep_residual), arguments


def meddled(draw: random.Random, x: Any) -> Any:
    """Another value in the place of one: something strange, or nearly the same."""
    plain = isinstance(x, Tensor) and x.layout is torch.strided and x.device.type == "cpu"
    if not plain or draw.random() < 0.3:
        return draw.choice(STRANGE)
    kind = draw.randrange(9)
    if kind == 0:
        return x.to(draw.choice((*DTYPES, torch.int32, torch.bool, torch.complex64)))
    if kind == 1 and x.dim():
        return x.transpose(draw.randrange(x.dim()), draw.randrange(x.dim()))
    if kind == 2 and x.dim():
        return x[..., : x.shape[-1] - 1]
    if kind == 3 and x.dim():
        return x[:0]
    if kind == 4:
        return x[None]
    if kind == 5 and x.dim():
        return x[0] if len(x) else x.sum()
    if kind == 6 and x.dim():
        return x[:1].expand(x.shape) if len(x) else x
    if kind == 7:
        return x.to("meta")
    return torch.cat([x, x])[:: draw.choice((1, 2))] if x.dim() else x.new_ones(2)


NUDGES = 8
"""Of a million calls a few amplify rounding, and have more than twice eager's: the condition decides."""


def compare(given: Arguments, found: dict[str, Tensor]) -> None:
    """y and gradients are near the reference's in float64; where they are not, as a block may amplify what
    rounding does, the rule of oracle.py decides."""
    dtype = given["h"].dtype
    for name, result in found.items():
        assert result.shape == given["h" if name == "y" else name].shape, name
        assert result.dtype == dtype, name
    tensors = {name: None if given[name] is None else given[name].detach().double() for name in TENSORS}
    features = given["h"].shape[-3:] if given["V"].dim() == 5 else given["h"].shape[-1:]
    tensors["h"] = tensors["h"].reshape(-1, *features)
    case = Case(tensors, torch.ones_like(tensors["h"]), given["activation"], given["scale"])
    truth = run(case.reference, case, torch.float64)
    truth = {name: truth[name] for name in found}
    sizes = {name: float(value.abs().max()) if value.numel() else 0.0 for name, value in truth.items()}
    # Also in float16, the scale in float32; else one may be infinite, and another NaN.
    if max(sizes.values()) >= 1e4 or abs(given["scale"] or 0) >= 1e38:
        return
    results = {name: result.detach().double().view_as(truth[name]) for name, result in found.items()}
    eager = Eager(case, dtype, truth, NUDGES)
    for name, error in errors(results, truth).items():
        near = NEAR[dtype] * max(1.0, 1 / max(sizes[name], 1e-300))
        assert eager.allows(name, error, near), f"{name}: error {error:.1e}, eager {eager.worst[name]:.1e}"


def refused(call: Callable[[], Any], names: tuple[str, ...]) -> str | None:
    """The kind of error, if there is one, which has to begin with one of the names."""
    try:
        call()
    except (TypeError, ValueError) as error:
        if not str(error).startswith(tuple(f"{name}:" for name in names)):
            raise AssertionError(f"an error that names no argument: {error}") from error
        return type(error).__name__
    return None


def call_function(draw: random.Random) -> str:
    """One call; what became of it."""
    function, given = valid(draw)
    for _ in range(draw.choice((0, 1, 1, 1, 2, 3))):
        name = draw.choice(NAMES)
        given[name] = meddled(draw, given[name])
    found: dict[str, Tensor] = {}

    def run() -> None:
        function(**given)
        inputs = {name: given[name].detach().requires_grad_() for name in TENSORS if given[name] is not None}
        y = function(**given | inputs)
        gradients = torch.autograd.grad(y, list(inputs.values()), torch.ones_like(y))
        found.update(y=y, **dict(zip(inputs, gradients, strict=True)))

    try:
        refusal = refused(run, NAMES)
    except (DriftError, DriftWarning) as drift:
        return type(drift).__name__
    if not refusal:
        compare(given, found)
    return refusal or "right"


def of_block(block: torch.nn.Module, h: Any) -> list[Tensor]:
    """y, dh and the gradients of a block's parameters."""
    if isinstance(h, Tensor) and h.dtype in DTYPES:
        h = h.detach().requires_grad_()
    block.zero_grad()
    y = block(h)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    return [y.detach(), h.grad, *(p.grad for p in block.parameters())]


def call_block(draw: random.Random) -> str:
    """A block is made and called; right if it is near what PyTorch's operators give."""
    maps = draw.random() < 0.5
    given: Arguments = {"channels" if maps else "dim": draw.randint(1, 5), "depth": draw.randint(1, 4)}
    given |= {"hidden_channels": 3, "kernel_size": 3} if maps else {"hidden_dim": 3}
    if maps and draw.random() < 0.5:
        given["norm"] = "batch"
    given |= {
        "activation": "tanh",
        "bias": draw.random() < 0.5,
        "init": draw.choice(("smooth", "iid", "tied")),
    }
    h: Any = torch.randn(3, next(iter(given.values())), *((4, 2) if maps else ()))
    options = ["scale", "backward", "strict", "anchors", "memory_budget"]
    for _ in range(draw.choice((0, 1, 1, 2))):
        name = draw.choice((*given, *options, *(["norm"] if maps else [])))
        value = draw.choice(STRANGE)
        if isinstance(value, int) and value > 1000 and name not in NAMES:
            continue  # no size is wrong, only large
        if not (name == "init" and callable(value)):  # which is for the user to answer for
            given[name] = value
    if draw.random() < 0.3:
        h = meddled(draw, h)

    found: list[list[Tensor]] = []

    def run() -> None:
        block = (DeepConvResBlock if maps else DeepResBlock)(**given)
        found.append(of_block(block, h))
        with unittest.mock.patch.object(native, "core", None):
            found.append(of_block(block, h))

    try:
        refusal = refused(run, (*NAMES, *BLOCK_NAMES))
    except (DriftError, DriftWarning) as drift:
        return type(drift).__name__
    if refusal:
        return refusal
    near = 0.01 if given.get("norm") else NEAR[torch.float32]  # a small variance magnifies
    size = max((float(theirs.abs().max()) for theirs in found[1] if theirs.numel()), default=0.0)
    for ours, theirs in zip(*found, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        if size < 1e4 and ours.numel():  # and not NaN
            assert float((ours - theirs).abs().max()) <= near * max(1.0, size)
    return "right"


def call_op(draw: random.Random) -> str:
    """An op beneath and then its backward, whose arguments a strategy would choose. Right if y is, and the
    gradients if nothing was meddled with; with batch normalisation if all ends well."""
    function, given = valid(draw)
    L, q, m = given["V"].shape[:3]
    normalised = function is deep_conv_residual and len(given["h"]) > 0 and draw.random() < 0.4
    steps = draw.randint(0, L)
    given |= {"scale": given["scale"] or 0.5, "save_every": steps, "slots": draw.randint(1, max(1, steps))}
    given |= {"reconstruct": draw.random() < 0.3, "keep_hidden": draw.random() < 0.5}
    given |= {"weight_gradients": draw.random() < 0.8, "strict": False, "record": 0}
    given |= {f"hidden_{name}": torch.randn(L, m) for name in ("weight", "shift")}
    given |= {f"output_{name}": torch.randn(L, q) for name in ("weight", "shift")}
    touched = False

    def call(op: Any) -> dict[str, Tensor]:
        nonlocal touched
        names = [argument.name for argument in op._schema.arguments]
        for _ in range(draw.choice((0, 0, 0, 1, 1, 2))):
            name = draw.choice(names)
            given[name], touched = meddled(draw, given[name]), True
        found = op(**{name: given[name] for name in names})
        return dict(zip([result.name for result in op._schema.returns], found, strict=True))

    kind: Any = normalised_ops if normalised else ops
    try:
        saved = call(kind.forward)
        if not normalised:
            compare(given, {"y": saved["y"]})
        given.update(saved, grad=torch.ones_like(saved["y"]))
        gradients = call(kind.backward)
    except (DriftError, DriftWarning) as drift:
        return type(drift).__name__
    except (TypeError, ValueError, RuntimeError) as error:
        ours = (*(f"{name}:" for name in given), "odeblock::", "Cannot access storage of SparseTensorImpl")
        if not str(error).startswith(ours):
            raise
        return type(error).__name__
    if not (touched or normalised):
        found = {name[1:]: gradient for name, gradient in gradients.items() if given[name[1:]] is not None}
        compare(given, found if given["weight_gradients"] else {"h": found["h"]})
    return "right"


def fuzz(calls: int, seed: int) -> collections.Counter[str]:
    """How many calls ended in which way. Call i is the same whatever the number of calls."""
    outcomes: collections.Counter[str] = collections.Counter()
    warnings.simplefilter("error", DriftWarning)
    for i in range(calls):
        draw = random.Random(f"{seed} {i}")
        torch.manual_seed(i)
        kind = draw.random()
        call = call_block if kind < 0.15 else call_op if kind < 0.3 else call_function
        try:
            outcomes[call(draw)] += 1
        except Exception as error:
            raise AssertionError(f"call {i} of seed {seed}") from error
    return outcomes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for outcome, count in sorted(fuzz(options.calls, options.seed).items()):
        print(f"{count:9,} {outcome}")
