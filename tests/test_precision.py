"""Mixed precision: autocast, scaled losses, and blocks that are cast as a whole."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import Case, check_strategies, make_case
from torch import Tensor, nn

from odeblock import DeepConvResBlock, DeepResBlock, DeepResNet
from odeblock.functional import deep_conv_residual, deep_residual

STRATEGIES = ("auto", "store", "checkpoint", "adjoint")
KINDS = pytest.mark.parametrize("maps", [False, True], ids=["rows", "maps"])
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def make_block(maps: bool, depth: int = 60, **options: Any) -> nn.Module:
    options = {"activation": "tanh", "bias": True, **options}
    block = DeepConvResBlock(3, depth, 5, **options) if maps else DeepResBlock(6, depth, 5, **options)
    for bias in (block.hidden_bias, block.output_bias):
        nn.init.normal_(bias)
    return block


def make_batch(maps: bool) -> Tensor:
    return torch.randn(2, 3, 6, 5) if maps else torch.randn(7, 6)


def step(model: Callable[[Tensor], Tensor], parameters: list[Tensor], x: Tensor) -> list[Tensor]:
    """The result, and gradients of x and the parameters."""
    x = x.detach().requires_grad_()
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *parameters])]


# ---- autocast --------------------------------------------------------------------------------------------


@KINDS
@HALVES
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_autocast_is_the_block_in_its_dtype(strategy: str, dtype: torch.dtype, maps: bool) -> None:
    """Tensors are cast once a call; gradients come back in the dtype of what they are of."""
    block = make_block(maps, backward=strategy)
    low = copy.deepcopy(block).to(dtype)
    x = make_batch(maps)
    expected = step(low, list(low.parameters()), x.to(dtype))
    for given in (x, x.to(dtype)):  # what comes from a layer before it has autocast's dtype already
        with torch.autocast("cpu", dtype):
            y, dx, *gradients = step(block, list(block.parameters()), given)
        assert (y.dtype, dx.dtype) == (dtype, given.dtype)
        assert all(gradient.dtype == torch.float32 for gradient in gradients)
        for a, b in zip((y, dx, *gradients), expected, strict=True):
            assert torch.equal(a.float(), b.float())


@KINDS
def test_autocast_leaves_float64_alone(maps: bool) -> None:
    block, x = make_block(maps).double(), make_batch(maps).double()
    expected = block(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
    assert y.dtype == torch.float64
    assert torch.equal(y, expected)


@dataclass
class AutocastCase(Case):
    """Whose baseline is the loop that one would write, under autocast."""

    @property
    def reference(self) -> Callable[..., Tensor]:
        return under_autocast(_loop, self.tensors["V"].dim() == 5)


def _loop(
    maps: bool, h: Tensor, V: Tensor, W: Tensor, b: Any, c: Any, *, activation: str, scale: float
) -> Tensor:
    def product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2) if maps else F.linear(x, weight, bias)

    for k in range(len(V)):
        h = h + scale * product(getattr(torch, activation)(product(h, W[k], b[k])), V[k], c[k])
    return h


def under_autocast(function: Callable[..., Tensor], *first: Any) -> Callable[..., Tensor]:
    """Of tensors in half precision, which become float32 before, and are given to autocast of that dtype;
    as they are where they are float64."""

    def run(*tensors: Tensor, **options: Any) -> Tensor:
        dtype = tensors[0].dtype
        if dtype == torch.float64:
            return function(*first, *tensors, **options)
        with torch.autocast("cpu", dtype):
            return function(*first, *(t.float() for t in tensors), **options).to(dtype)

    return run


@KINDS
@HALVES
def test_autocast_by_the_rule(dtype: torch.dtype, maps: bool) -> None:
    """At most twice the error of the loop under autocast, against float64."""
    made = make_case(4, 9, 7, 100, activation="tanh", smooth=True, scale=0.01, maps=(4, 3) if maps else None)
    case = AutocastCase(made.tensors, made.grad, made.activation, made.scale)
    function = deep_conv_residual if maps else deep_residual
    check_strategies(under_autocast(function), case, dtype, STRATEGIES)


@KINDS
@pytest.mark.parametrize("inside", [False, True])
def test_autocast_in_a_compiled_graph(inside: bool, maps: bool) -> None:
    """Compiled with autocast within, or called under it."""
    torch._dynamo.reset()
    block, x = make_block(maps, 20, backward="adjoint"), make_batch(maps)

    def model(x: Tensor) -> Tensor:
        if not inside:
            return block(x)
        with torch.autocast("cpu", torch.bfloat16):
            return block(x)

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    full = step(compiled, list(block.parameters()), x) if not inside else None
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        expected, found = (step(f, list(block.parameters()), x) for f in (model, compiled))
    assert found[0].dtype == torch.bfloat16
    for a, b in zip(expected, found, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert full is None or full[0].dtype == torch.float32


@KINDS
def test_a_trajectory_under_autocast_ends_in_the_block(maps: bool) -> None:
    """Its state is not rounded between the pieces, in which steps of size 1/L would be lost."""
    block, x = make_block(maps, 300), make_batch(maps)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
        states = block.trajectory(x)
    assert states.dtype == y.dtype == torch.bfloat16
    assert torch.equal(states[-1], y)


# ---- scaled losses ---------------------------------------------------------------------------------------


@KINDS
def test_a_scaled_step_in_float16(maps: bool) -> None:
    """The scaler takes its factor out of the gradients, and leaves out a step whose gradients overflow."""
    block, x = make_block(maps), make_batch(maps)
    optimizer = torch.optim.SGD(block.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def train(factor: float) -> list[Tensor]:
        """The change of each parameter."""
        before = [p.detach().clone() for p in block.parameters()]
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            y = block(x)
        scaler.scale(factor * y.float().square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        return [p.detach() - old for p, old in zip(block.parameters(), before, strict=True)]

    expected = torch.autograd.grad(block(x).square().mean(), list(block.parameters()))
    for change, gradient in zip(train(1.0), expected, strict=True):
        assert float((change + gradient).abs().max()) < 0.02 * float(gradient.abs().max())
    assert scaler.get_scale() == 2.0**10
    assert not any(change.any() for change in train(1e6))
    assert scaler.get_scale() == 2.0**9
    assert all(change.any() for change in train(1.0))


# ---- blocks that are cast as a whole ---------------------------------------------------------------------


def make_models() -> list[nn.Module]:
    norm = DeepConvResBlock(3, 4, 5, bias=True, norm="batch").eval()
    return [make_block(False), make_block(True), norm, DeepResNet(6, 4, 5, 2, bias=True)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("model", make_models(), ids=["rows", "maps", "norm", "network"])
def test_a_module_and_its_state_in_another_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    x = make_batch(isinstance(model, DeepConvResBlock)).to(dtype)
    names = {torch.bfloat16: "bfloat16", torch.float16: "half", torch.float64: "double"}
    cast = getattr(copy.deepcopy(model), names[dtype])()
    assert {p.dtype for p in cast.parameters()} == {dtype}
    y = cast(x)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    assert all(p.grad.dtype == dtype for p in cast.parameters())
    # A state dict takes on the dtype of where it is loaded.
    loaded = copy.deepcopy(cast)
    with torch.no_grad():
        for p in loaded.parameters():
            p.zero_()
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded(x), y)
    moved = copy.deepcopy(model).to("meta", dtype)
    assert moved(x.to("meta")).shape == y.shape
    moved = moved.to_empty(device="cpu")
    moved.load_state_dict(model.state_dict())
    assert torch.equal(moved(x), y)
