"""DeepResBlock, DeepResNet and the initializers."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch

import odeblock
from odeblock import DeepResBlock, DeepResNet, initializers, reference
from odeblock.diagnostics import smoothness


def test_the_block_is_the_reference() -> None:
    block = DeepResBlock(6, 20, 9, activation="silu", bias=True, scale=0.03)
    for bias in (block.hidden_bias, block.output_bias):
        torch.nn.init.normal_(bias)
    x = torch.randn(4, 3, 6)
    y = reference.deep_residual(
        x, block.V, block.W, block.hidden_bias, block.output_bias, activation="silu", scale=0.03
    )
    torch.testing.assert_close(block(x), y)


def test_parameters() -> None:
    block = DeepResBlock(6, 20, 9, bias=True)
    shapes = {name: tuple(p.shape) for name, p in block.named_parameters()}
    assert shapes == {"V": (20, 6, 9), "W": (20, 9, 6), "hidden_bias": (20, 9), "output_bias": (20, 6)}
    assert all(p.requires_grad for p in block.parameters())
    assert not block.hidden_bias.any()
    assert not block.output_bias.any()
    plain = DeepResBlock(6, 20)
    assert set(plain.state_dict()) == {"V", "W"}
    assert plain.hidden_bias is None
    assert plain.hidden_dim == 6
    assert plain.scale == 1 / 20


def test_state_dict_and_copies() -> None:
    block = DeepResBlock(5, 12, 7, bias=True)
    other = DeepResBlock(5, 12, 7, bias=True)
    x = torch.randn(3, 5)
    buffer = io.BytesIO()
    torch.save(block.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(block(x), other(x))
    assert torch.equal(block(x), copy.deepcopy(block)(x))


def test_device_and_dtype() -> None:
    assert DeepResBlock(4, 5, dtype=torch.float64).V.dtype == torch.float64
    assert DeepResBlock(4, 5, device="meta").V.is_meta
    x = torch.randn(2, 4, dtype=torch.float64)
    assert DeepResBlock(4, 50).double()(x).dtype == torch.float64
    low = DeepResBlock(4, 50, dtype=torch.bfloat16)
    y = low(x.bfloat16())
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert low.V.grad.dtype == torch.bfloat16


def test_repr() -> None:
    assert repr(DeepResBlock(4, 5)) == (
        "DeepResBlock(dim=4, depth=5, activation='gelu', init='smooth', backward='auto')"
    )
    assert "hidden_dim=7" in repr(DeepResBlock(4, 5, 7))
    assert "bias=True" in repr(DeepResBlock(4, 5, bias=True))
    assert "scale=0.5" in repr(DeepResBlock(4, 5, scale=0.5))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((0, 5), {}, ValueError, "dim: expected an int >= 1, got 0"),
        ((4, 0), {}, ValueError, "depth: expected an int >= 1, got 0"),
        ((4, 2.0), {}, TypeError, "depth: expected an int >= 1, got float"),
        ((4, 10**19), {}, ValueError, f"depth: expected an int from 1 to {2**48}, got {10**19}"),
        ((10**19, 5), {}, ValueError, f"dim: expected an int from 1 to {2**48}, got {10**19}"),
        ((4, 5, -1), {}, ValueError, "hidden_dim: expected an int >= 1, got -1"),
        ((4, 5), {"activation": "mish"}, ValueError, "activation: expected one of"),
        ((4, 5), {"init": "he"}, ValueError, "init: expected one of smooth, tied, iid, zero_v; got 'he'"),
        ((4, 5), {"init": 3}, TypeError, "init: expected a name"),
        ((4, 5), {"scale": float("nan")}, ValueError, "scale: expected a finite number"),
        ((4, 5), {"backward": "fast"}, ValueError, "backward: expected one of"),
    ],
)
def test_bad_arguments(arguments: tuple, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DeepResBlock(*arguments, **options)


def test_network() -> None:
    network = DeepResNet(10, 6, 15, 3, 8, bias=True, activation="tanh", init="tied")
    x = torch.randn(4, 10)
    y = network(x)
    assert y.shape == (4, 3)
    torch.testing.assert_close(y, network.B(network.block(network.A(x))))
    y.sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    assert set(DeepResNet(10, 6, 15, 3).state_dict()) == {"A.weight", "block.V", "block.W", "B.weight"}
    with pytest.raises(ValueError, match="in_features"):
        DeepResNet(0, 6, 15, 3)
    assert type(DeepResNet(np.int64(2), 3, 4, np.int64(5)).A.in_features) is int
    before = network.B.weight.clone()
    network.reset_parameters()
    assert not torch.equal(before, network.B.weight)


@pytest.mark.parametrize("init", initializers.INITIALIZERS)
@pytest.mark.parametrize("depth", [1, 2, 7, 300])
def test_initial_variance(init: str, depth: int) -> None:
    block = DeepResBlock(40, depth, 60, init=init)
    assert block.W.pow(2).mean().item() == pytest.approx(1 / 40, rel=0.15)
    if init == "zero_v":
        assert not block.V.any()
    else:
        assert block.V.pow(2).mean().item() == pytest.approx(1 / 60, rel=0.15)
        if init == "smooth":  # at every depth, not only on average
            variances = block.V.pow(2).mean(dim=(1, 2)) * 60
            assert variances.min() > 0.8
            assert variances.max() < 1.2


def test_initializers_along_depth() -> None:
    depth = 400
    blocks = {init: DeepResBlock(30, depth, init=init) for init in ("smooth", "tied", "iid", "zero_v")}
    for init in ("tied", "zero_v"):
        assert smoothness(blocks[init].W) == {"max": 0.0, "total_variation": 0.0}
    # A step of the process has standard deviation 1/(L ℓ) = 4/L of a weight's, independent ones √2 of it.
    W = blocks["smooth"].W.detach() * 30**0.5
    steps = (W[1:] - W[:-1]).pow(2).mean().sqrt().item()
    assert steps == pytest.approx(4 / depth, rel=0.1)
    W = blocks["iid"].W.detach() * 30**0.5
    assert (W[1:] - W[:-1]).pow(2).mean().sqrt().item() == pytest.approx(2**0.5, rel=0.05)
    # Correlation exp(-(s - s')² / 2ℓ²) at lag ℓ: 0.607.
    W = blocks["smooth"].W.detach() * 30**0.5
    lag = (W[depth // 4 :] * W[: -depth // 4]).mean().item()
    assert lag == pytest.approx(0.607, abs=0.06)
    assert torch.equal(blocks["zero_v"](torch.eye(30)), torch.eye(30))


def test_seeds_and_generators() -> None:
    for init in ("smooth", "tied", "iid"):
        first, second, third = (
            torch.manual_seed(seed) and DeepResBlock(5, 9, init=init) for seed in (1, 1, 2)
        )
        assert torch.equal(first.V, second.V)
        assert not torch.equal(first.V, third.V)
        fill = initializers.get_initializer(init)
        drawn = []
        for _ in range(2):
            V, W = torch.empty(9, 5, 4), torch.empty(9, 4, 5)
            fill(V, W, generator=torch.Generator().manual_seed(3))
            drawn.append(V)
        assert torch.equal(*drawn)
    with pytest.raises(ValueError, match="length_scale"):
        initializers.smooth_(torch.empty(3, 2, 2), torch.empty(3, 2, 2), length_scale=0.0)


def test_smoothness() -> None:
    ramp = torch.linspace(0, 1, 101)[:, None, None].expand(101, 3, 4)
    measured = smoothness(ramp)
    assert measured["total_variation"] == pytest.approx(1.0)
    assert measured["max"] == pytest.approx(1.01, rel=1e-4)
    assert smoothness(torch.randn(1, 3, 4)) == {"max": 0.0, "total_variation": 0.0}
    with pytest.raises(ValueError, match="weights: expected shape"):
        smoothness(torch.tensor(1.0))


def test_build_info() -> None:
    info = odeblock.build_info()
    assert info["version"] == odeblock.__version__
    assert info["native"]
    assert info["openmp"]
    assert info["cpu_features"] in info["cpu_builds"]
    assert info["torch"] == torch.__version__
    assert (info["cuda_version"] is None) == (info["cuda_architectures"] == [])
