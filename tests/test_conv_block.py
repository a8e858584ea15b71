"""DeepConvResBlock: parameters, initial weights, depth, lists of layers, memory formats."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from odeblock import DeepConvResBlock, DeepResBlock, diagnostics, flow, initializers, limit, reference
from odeblock.activations import ACTIVATIONS

STRATEGIES = ("auto", "store", "checkpoint", "adjoint")


def make_block(depth: int = 20, **options: Any) -> DeepConvResBlock:
    block = DeepConvResBlock(3, depth, 5, **{"activation": "tanh", "bias": True, **options})
    for bias in (block.hidden_bias, block.output_bias):
        if bias is not None:
            nn.init.normal_(bias)
    return block


def same_parameters(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_block_is_the_reference() -> None:
    block = make_block(scale=0.03)
    x = torch.randn(4, 3, 6, 7)
    weights = (block.V, block.W, block.hidden_bias, block.output_bias)
    y = reference.deep_conv_residual(x, *weights, activation="tanh", scale=0.03)
    torch.testing.assert_close(block(x), y)
    assert torch.equal(block(x[0]), block(x[:1])[0])


def test_parameters() -> None:
    block = DeepConvResBlock(4, 20, 6, 5, bias=True)
    shapes = {name: tuple(p.shape) for name, p in block.state_dict().items()}
    assert shapes == {
        "V": (20, 4, 6, 5, 5),
        "W": (20, 6, 4, 5, 5),
        "hidden_bias": (20, 6),
        "output_bias": (20, 4),
    }
    assert not block.hidden_bias.any()
    assert not block.output_bias.any()
    plain = DeepConvResBlock(4, 20)
    assert set(plain.state_dict()) == {"V", "W"}
    assert (plain.hidden_channels, plain.kernel_size, plain.norm, plain.scale) == (4, 3, None, 1 / 20)
    assert DeepConvResBlock(4, 5, device="meta").V.is_meta
    assert DeepConvResBlock(4, 5, dtype=torch.float64).W.dtype == torch.float64


def test_repr() -> None:
    assert repr(DeepConvResBlock(4, 5)) == (
        "DeepConvResBlock(channels=4, depth=5, kernel_size=3, activation='gelu', init='smooth', "
        "backward='auto')"
    )
    shown = repr(DeepConvResBlock(4, 5, 7, 1, bias=True, scale=0.5, norm="batch"))
    for part in ("hidden_channels=7", "kernel_size=1", "bias=True", "scale=0.5", "norm='batch'"):
        assert part in shown


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((0, 5), {}, ValueError, "channels: expected an int >= 1, got 0"),
        ((4, 0), {}, ValueError, "depth: expected an int >= 1, got 0"),
        ((4, 5, -1), {}, ValueError, "hidden_channels: expected an int >= 1, got -1"),
        ((4, 5, 4, 2), {}, ValueError, "kernel_size: expected an odd int.*got 2"),
        ((4, 5, 4, (3, 3)), {}, TypeError, "kernel_size: expected an int >= 1, got tuple"),
        ((4, 5), {"norm": "layer"}, ValueError, "norm: expected None or \"batch\", got 'layer'"),
        ((4, 5), {"activation": "mish"}, ValueError, "activation: expected one of"),
        ((4, 5), {"init": "he"}, ValueError, "init: expected one of"),
        ((4, 5), {"backward": "fast"}, ValueError, "backward: expected one of"),
    ],
)
def test_bad_arguments(arguments: tuple, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DeepConvResBlock(*arguments, **options)


@pytest.mark.parametrize(
    "init",
    [
        "smooth",
        "tied",
        "iid",
        "zero_v",
        initializers.GaussianProcess("matern32"),
        initializers.Fourier(),
        initializers.Polynomial(),
    ],
    ids=str,
)
def test_initial_variance(init: Any) -> None:
    """Of what a number of the result is summed over: C k² and M k² entries."""
    block = DeepConvResBlock(8, 60, 12, init=init)
    assert block.W.pow(2).mean().item() == pytest.approx(1 / (8 * 9), rel=0.15)
    if init == "zero_v":
        assert not block.V.any()
    else:
        assert block.V.pow(2).mean().item() == pytest.approx(1 / (12 * 9), rel=0.15)


def test_state_dict_and_copies() -> None:
    block, other = make_block(), make_block()
    other.load_state_dict(block.state_dict())
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(block(x), other(x))
    assert torch.equal(block(x), pickle.loads(pickle.dumps(copy.deepcopy(block)))(x))
    with pytest.raises(RuntimeError, match=r"depth 20.*call .resample\(30\)"):
        make_block(depth=30).load_state_dict(block.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_trajectory(dtype: torch.dtype) -> None:
    block = make_block(dtype=dtype)
    x = torch.randn(2, 3, 6, 5, dtype=dtype)
    states = block.trajectory(x, 3)
    assert states.shape == (8, 2, 3, 6, 5)
    assert states.dtype == dtype
    assert torch.equal(states[0], x)
    if dtype.itemsize > 2:
        assert torch.equal(states[-1], block(x))
    else:  # PyTorch's products of widened weights are not rounded
        torch.testing.assert_close(states[-1], block(x), rtol=0.02, atol=0.02)
    with pytest.raises(TypeError, match="h: expected the dtype of the block"):
        block.trajectory(x.half())


def test_resample_and_split() -> None:
    block = DeepConvResBlock(3, 40, 5, scale=0.01, activation="tanh", dtype=torch.float64)
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    deeper = block.resample(80)
    assert (deeper.depth, deeper.scale, deeper.kernel_size) == (80, 0.005, 3)
    assert (deeper(x) - block(x)).norm() < 0.02 * (block(x) - x).norm()
    assert same_parameters(deeper.resample(40), block)
    parts = block.split(3)
    assert [type(part) for part in parts] == [DeepConvResBlock] * 3
    assert torch.equal(parts(x), block(x))


def test_the_vector_field() -> None:
    block = make_block(dtype=torch.float64, scale=0.02)
    field = block.vector_field()
    h = x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    for k in range(20):
        h = h + field((k + 1) / 20, h) / 20
    torch.testing.assert_close(h, block(x), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(field(0.3, x[0]), field(0.3, x)[0])
    with pytest.raises(ValueError, match=r"h: expected shape \[B, 3, H, W\] or \[3, H, W\], got \[2, 4\]"):
        field(0.5, torch.randn(2, 4))
    assert limit.ode_gap(block, x) > limit.ode_gap(block.resample(160), x)


def test_tools_for_models_find_it() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 1), DeepConvResBlock(3, 10), DeepResBlock(4, 5))
    assert [name for name, _ in flow.blocks(model)] == ["1", "2"]
    assert flow.flow_rates(model)[model[1].V] == 10
    assert len(diagnostics.check_assumptions(model)) == 10
    monitor = diagnostics.Monitor(model)
    monitor(1.0)
    assert "1.W.total_variation" in monitor.history[0]
    other = limit.resample(nn.Sequential(model[1]), 30, lambda net: net(torch.ones(1, 3, 4, 4)).sum()).model
    assert other[0].depth == 30
    found = limit.fields(model[1])
    again = DeepConvResBlock(3, 10, init=initializers.Fields(found["V"], found["W"]))
    assert same_parameters(again, model[1])


# ---- layers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_from_layers_to_layers_is_the_identity(activation: str) -> None:
    block = make_block(activation=activation, dtype=torch.float64)
    layers = block.to_layers()
    again = DeepConvResBlock.from_layers(layers)
    assert same_parameters(block, again)
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    assert torch.equal(again(x), block(x))
    h = x
    for layer in layers:
        h = h + layer(h) / 20
    torch.testing.assert_close(h, block(x))


def branch(first: nn.Module | None = None, *others: nn.Module) -> tuple[nn.Module, ...]:
    others = others or (nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1))
    return (nn.Conv2d(4, 6, 3, padding="same") if first is None else first, *others)


def normalised(norm: nn.Module | None = None) -> tuple[nn.Module, ...]:
    norm = nn.BatchNorm2d(6) if norm is None else norm
    return (*branch()[:1], norm, *branch()[1:], nn.BatchNorm2d(4))


REFUSED = [
    ([branch(nn.Linear(4, 6))], TypeError, r"layers\[0\]\[0\]: expected an nn.Conv2d, got Linear"),
    ([branch(nn.Conv2d(4, 6, 3, padding=1, stride=2))], ValueError, r"stride=\(1, 1\), got stride=\(2, 2\)"),
    ([branch(nn.Conv2d(4, 6, 3))], ValueError, r"\[0\]\[0\]: .*padding=\(1, 1\), got padding=\(0, 0\)"),
    ([branch(nn.Conv2d(4, 6, 3, padding=2, dilation=2))], ValueError, r"expected padding=\(1, 1\)"),
    ([branch(nn.Conv2d(4, 6, 3, padding="same", dilation=2))], ValueError, r"expected dilation=\(1, 1\)"),
    ([branch(nn.Conv2d(4, 6, 3, padding=1, groups=2))], ValueError, "expected groups=1, got groups=2"),
    (
        [branch(nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"))],
        ValueError,
        "expected padding_mode='zeros', got padding_mode='reflect'",
    ),
    ([branch(nn.Conv2d(4, 6, 2))], ValueError, r"expected a square kernel of odd size, got .*\(2, 2\)"),
    ([branch(nn.Conv2d(4, 6, (3, 1), padding=(1, 0)))], ValueError, "expected a square kernel"),
    (
        [branch(nn.Conv2d(4, 6, 5, padding=2))],
        ValueError,
        r"layers\[0\]: a residual branch returns to the size",
    ),
    ([branch(nn.LazyConv2d(6, 3, padding=1))], ValueError, r"layers\[0\]\[0\]: .*lazy layer"),
    (
        [branch(), branch(nn.Conv2d(4, 6, 3, padding=1, bias=False))],
        ValueError,
        "expected a bias on every layer",
    ),
    ([branch()[:2]], ValueError, r"layers\[0\]: expected three modules"),
    ([branch(), normalised()], ValueError, r"layers\[1\]: all layers .* same modules; expected 3 .* got 5"),
    (
        [normalised(nn.BatchNorm2d(6, eps=0.1))],
        ValueError,
        r"layers\[0\]\[1\]: expected nn.BatchNorm2d.*eps=0.1",
    ),
    ([normalised(nn.BatchNorm2d(6, affine=False))], ValueError, r"layers\[0\]\[1\]: .*affine=False"),
    (
        [normalised(), normalised(nn.BatchNorm2d(6).double())],
        ValueError,
        r"layers\[1\]\[1\]: expected weight of torch.float32 as in layers\[0\]\[1\], got torch.float64; call",
    ),
    (
        [normalised(), normalised(nn.BatchNorm2d(6, device="meta"))],
        ValueError,
        r"layers\[1\]\[1\]: expected weight on cpu as the convolution before, got it on meta; call",
    ),
    (
        [normalised(nn.GroupNorm(2, 6))],
        ValueError,
        r"layers\[0\]\[1\]: expected nn.BatchNorm2d.*got GroupNorm",
    ),
]


@pytest.mark.parametrize(("layers", "error", "message"), REFUSED)
def test_layers_that_do_not_fit(layers: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DeepConvResBlock.from_layers(layers)


# ---- in a model ------------------------------------------------------------------------------------------


def test_a_network_in_channels_last() -> None:
    """``.to(memory_format=torch.channels_last)`` takes five dimensions for volumes, and refuses."""
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), make_block(), nn.Conv2d(3, 2, 1))
    x = torch.randn(2, 3, 6, 5)
    expected = model(x)
    model = model.to(memory_format=torch.channels_last)
    assert model[1].V.is_contiguous()
    y = model(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    model.double()
    assert model[1].V.shape == (20, 3, 5, 3, 3)
    assert isinstance(model[1].V, nn.Parameter)
    assert model[1].V.grad.dtype == torch.float64
    assert DeepConvResBlock(3, 4, device="meta").to_empty(device="cpu").V.shape == (4, 3, 3, 3, 3)
