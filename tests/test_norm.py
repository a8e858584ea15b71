"""Batch normalisation in DeepConvResBlock, against a plain loop of nn.Conv2d and nn.BatchNorm2d."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from odeblock import DeepConvResBlock, DriftError, limit, normalised
from odeblock.normalised import AFFINE, STATISTICS

STRATEGIES = ("auto", "store", "checkpoint", "adjoint")
DEPTH = 24


def make_block(depth: int = DEPTH, **options: Any) -> DeepConvResBlock:
    """None of its parameters what it starts from."""
    options = {"activation": "silu", "bias": True, "norm": "batch", **options}
    block = DeepConvResBlock(3, depth, 5, **options)
    for name, p in block.named_parameters():
        if p.dim() == 2:
            nn.init.normal_(p, float(name.endswith("norm_weight")), 0.3)
    return block


class Loop(nn.Module):
    """The modules that a block stands for."""

    def __init__(self, block: DeepConvResBlock) -> None:
        super().__init__()
        self.scale, self.layers = block.scale, nn.ModuleList(block.to_layers())

    def forward(self, h: Tensor) -> Tensor:
        for layer in self.layers:
            h = h + self.scale * layer(h)
        return h

    def stack(self, name: str) -> Tensor:
        """A parameter or buffer of the layers, as the block has it; or its gradient, as ``NAME.grad``."""
        name, _, grad = name.partition(".")
        place = {"W": 0, "hidden": 0, "V": 3, "output": 3}[name.split("_")[0]]
        kind = "weight" if name in ("V", "W") else "bias"
        if "norm" in name or "running" in name:
            place, kind = (
                place + 1,
                name.removeprefix("hidden_").removeprefix("output_").removeprefix("norm_"),
            )
        found = [getattr(layer[place], kind) for layer in self.layers]
        return torch.stack([t.grad for t in found] if grad else found)


def gradients(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """y and dx; those of parameters are left in them."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y))
    return y.detach(), x.grad


def check(block: DeepConvResBlock, loop: Loop, x: Tensor, tolerance: float) -> None:
    """Outputs, gradients and buffers, each relative to its largest entry."""

    def compare(name: str, ours: Tensor, theirs: Tensor) -> None:
        error = (ours - theirs).abs().max() / theirs.abs().max()
        assert error < tolerance, f"{name}: {error:.1e}"

    for name, ours, theirs in zip(("y", "dx"), gradients(block, x), gradients(loop, x), strict=True):
        compare(name, ours, theirs)
    for name, p in block.named_parameters():
        theirs = loop.stack(f"{name}.grad")
        if block.training and name in ("hidden_bias", "output_bias"):  # normalised away, but for rounding
            assert p.grad.abs().max() < tolerance
            assert theirs.abs().max() < tolerance
        else:
            compare(name, p.grad, theirs)
    for name in STATISTICS:
        compare(name, getattr(block, name), loop.stack(name))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-5)], ids=str)
def test_the_loop_of_modules(dtype: torch.dtype, tolerance: float, strategy: str, bias: bool) -> None:
    block = make_block(backward=strategy, bias=bias, dtype=dtype)
    loop = Loop(block)
    for maps in ((7, 6), (5, 3)):  # running statistics of two batches
        check(block, loop, 3 * torch.randn(4, 3, *maps, dtype=dtype) + 1, tolerance)
    assert block.num_batches_tracked == loop.layers[0][1].num_batches_tracked == 2
    block.eval(), loop.eval()
    before = copy.deepcopy(block.state_dict())
    check(block, loop, torch.randn(2, 3, 1, 1, dtype=dtype), tolerance)
    assert all(torch.equal(t, before[name]) for name, t in block.state_dict().items())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_many_steps(strategy: str) -> None:
    block = make_block(300, backward=strategy, init="smooth", activation="tanh")
    exact = Loop(copy.deepcopy(block).double())
    x = torch.randn(4, 3, 5, 5)
    y, dx = gradients(block, x)
    true_y, true_dx = gradients(exact, x.double())
    assert (y - true_y).abs().max() < 1e-5 * true_y.abs().max()
    assert (dx - true_dx).abs().max() < 1e-5 * true_dx.abs().max()
    for name in ("V", "W", *AFFINE):
        true = exact.stack(f"{name}.grad")
        assert (getattr(block, name).grad - true).abs().max() < 2e-5 * true.abs().max(), name
    if strategy == "adjoint":
        assert block.last_drift["drift"] < 1e-5
        assert block.last_drift["evaluations"] < 4


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_channels_last(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU has them: any layout of h gives and takes contiguous maps and gradients."""
    monkeypatch.setattr(normalised, "CHANNELS_LAST", {"cpu"})
    block = make_block(40, backward=strategy, dtype=torch.float64)
    x = torch.randn(4, 3, 7, 6, dtype=torch.float64)
    check(block, Loop(block), x, 1e-12)
    assert block.V.grad.is_contiguous()
    y = block(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous()
    torch.testing.assert_close(y, block(x), rtol=1e-12, atol=1e-12)
    assert block(x[0]).shape == (3, 7, 6)


def test_strategies_agree_to_the_bit() -> None:
    blocks = [make_block(backward="store")]
    blocks += [copy.deepcopy(blocks[0]) for _ in range(2)]
    blocks[1].backward, blocks[2].backward, blocks[2].memory_budget = (
        "checkpoint",
        "checkpoint",
        4 * 4 * 3 * 42 * 2,
    )
    x = torch.randn(4, 3, 7, 6)
    results = [
        [*gradients(block, x), *(p.grad for p in block.parameters()), *block.buffers()] for block in blocks
    ]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)
    block = copy.deepcopy(blocks[0])
    with torch.no_grad():
        torch.testing.assert_close(block(x), blocks[0](x), rtol=0, atol=0)


@pytest.mark.parametrize("strategy", ["store", "adjoint"])
def test_derivatives_of_every_order(strategy: str) -> None:
    options = {"kernel_size": 1, "scale": 0.02, "activation": "tanh", "dtype": torch.float64}
    block = make_block(3, backward=strategy, **options)
    x = torch.randn(3, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    chosen = ("V", "hidden_norm_weight", "output_norm_bias")
    weights = [getattr(block, name).detach().requires_grad_() for name in chosen]

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(chosen, weights, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *weights), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, (x, *weights))


def test_running_statistics_are_bookkept_once_a_call() -> None:
    for strategy in STRATEGIES:
        block = make_block(backward=strategy)
        x = torch.randn(4, 3, 7, 6, requires_grad=True)
        before = block.hidden_running_mean.clone()
        y = block(x)
        after = [block.hidden_running_mean.clone(), block.output_running_var.clone()]
        assert not torch.equal(before, after[0])
        y.sum().backward()
        block.trajectory(x, 5)
        block.eval()(x)
        assert block.num_batches_tracked == 1
        assert torch.equal(block.hidden_running_mean, after[0])
        assert torch.equal(block.output_running_var, after[1])
        with torch.no_grad():
            block.train()(x)  # without gradients as well
        assert block.num_batches_tracked == 2


def test_statistics_are_those_of_the_forward() -> None:
    """What changes between forward and backward does not matter to it."""
    block, other = (make_block(backward="checkpoint") for _ in range(2))
    other.load_state_dict(block.state_dict())
    x = torch.randn(4, 3, 5, 5)
    expected = gradients(other, x)[1]
    inputs = x.clone().requires_grad_()
    y = block(inputs)
    block.eval()
    block.hidden_running_var.fill_(100)
    y.backward(torch.linspace(-1, 2, y.numel()).view_as(y))
    assert torch.equal(inputs.grad, expected)


def test_one_value_has_no_variance() -> None:
    block = make_block()
    with pytest.raises(
        ValueError, match=r"h: expected more than one value of each channel.*got \[1, 3, 1, 1\]"
    ):
        block(torch.randn(1, 3, 1, 1))
    with pytest.raises(ValueError, match=r"h: expected shape \[B, 3, H, W\]"):
        block(torch.randn(2, 4, 5, 5))
    with pytest.raises(TypeError, match="V: expected the dtype of h"):
        block(torch.randn(2, 3, 5, 5).double())
    assert block.num_batches_tracked == 0
    assert block(torch.randn(0, 3, 4, 4)).shape == (0, 3, 4, 4)  # none to measure
    assert block(torch.randn(3, 4, 4)).shape == (3, 4, 4)
    assert block.num_batches_tracked == 1
    assert block.eval()(torch.randn(1, 3, 1, 1)).isfinite().all()


def test_depth() -> None:
    block = make_block(dtype=torch.float64)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    for _ in range(5):
        block(x)
    states = block.trajectory(x, 7)
    y = block(x)
    torch.testing.assert_close(states[-1], y, rtol=1e-12, atol=1e-12)
    parts = block.split(3)
    assert parts[1].num_batches_tracked == block.num_batches_tracked == 6
    torch.testing.assert_close(parts(x), y, rtol=1e-12, atol=1e-12)
    other = block.resample(2 * DEPTH)
    assert other.norm == "batch"
    assert torch.equal(other.hidden_running_var[1::2], block.hidden_running_var)
    assert torch.equal(other.output_norm_weight[1::2], block.output_norm_weight)
    assert isinstance(other.output_norm_weight, nn.Parameter)
    assert set(dict(other.named_buffers())) == {*STATISTICS, "num_batches_tracked"}
    block.eval(), other.eval()
    assert (other(x) - block(x)).norm() < 0.1 * (block(x) - x).norm()
    h = x
    for k in range(DEPTH):
        h = h + block.vector_field()((k + 1) / DEPTH, h) / DEPTH
    torch.testing.assert_close(h, block(x), rtol=1e-12, atol=1e-12)
    assert limit.ode_gap(block, x) < 0.1


def test_a_cubic_in_depth_keeps_variances_positive() -> None:
    block = DeepConvResBlock(3, 8, norm="batch").eval()
    for var in (block.hidden_running_var, block.output_running_var):
        var.copy_(torch.tensor([2.9, 0.01] * 4)[:, None].expand_as(var))
    field, h = block.vector_field("cubic"), torch.randn(2, 3, 4, 4)
    assert all(field(i / 50, h).isfinite().all() for i in range(51))


def test_copies_and_state_dicts() -> None:
    block = make_block()
    block(torch.randn(4, 3, 5, 5))
    other = make_block()
    other.load_state_dict(block.state_dict())
    x = torch.randn(2, 3, 5, 5)
    expected = copy.deepcopy(block).eval()(x)
    for again in (other, pickle.loads(pickle.dumps(block)), DeepConvResBlock.from_layers(block.to_layers())):
        assert torch.equal(again.eval()(x), expected)
        assert again.norm == "batch"
        assert again.num_batches_tracked.item() == 1
    with pytest.raises(RuntimeError, match=r"hidden_norm_weight.*this block has depth 30.*depth 24"):
        make_block(30).load_state_dict(block.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        make_block().load_state_dict(make_block(norm=None).state_dict())
    block.reset_parameters()
    assert block.num_batches_tracked == 0
    assert (block.output_running_var == 1).all()
    assert (block.hidden_norm_weight == 1).all()
    assert not block.hidden_running_mean.any()
    empty = DeepConvResBlock(3, 4, norm="batch", device="meta").to_empty(device="cpu")
    empty.reset_parameters()
    empty(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("strategy", ["store", "adjoint"])
def test_half_precision(strategy: str, dtype: torch.dtype) -> None:
    """Of convolutions alone under autocast: states, normalisation and running statistics are float32."""
    block = make_block(100, backward=strategy, activation="tanh")
    exact = copy.deepcopy(block)
    x = torch.randn(4, 3, 6, 5)
    with torch.autocast("cpu", dtype):
        y, dx = gradients(block, x)
    true_y, true_dx = gradients(exact, x)
    unit = torch.finfo(dtype).eps
    assert y.dtype == dtype
    assert (y - true_y).abs().max() < 4 * unit * true_y.abs().max()
    assert (dx - true_dx).abs().max() < 16 * unit * true_dx.abs().max()
    assert all(p.grad.dtype == torch.float32 for p in block.parameters())
    if strategy == "adjoint":
        assert block.last_drift["drift"] < unit
    torch.testing.assert_close(
        block.V.grad, exact.V.grad, rtol=0, atol=32 * unit * float(exact.V.grad.abs().max())
    )
    assert block.hidden_running_mean.dtype == torch.float32
    torch.testing.assert_close(block.hidden_running_mean, exact.hidden_running_mean, rtol=0, atol=8 * unit)
    low = copy.deepcopy(block).to(dtype)
    y, _ = gradients(low, x.to(dtype))
    assert y.dtype == dtype
    assert (y - true_y).abs().max() < 8 * unit * true_y.abs().max()


def test_what_cannot_be_inverted_is_said() -> None:
    block = make_block(3, backward="adjoint", strict=True, scale=30.0, bias=False)
    with pytest.raises(DriftError):
        gradients(block, torch.randn(4, 3, 5, 5))
    assert block.last_drift["drift"] > 1e-3


def test_frozen_and_compiled() -> None:
    block = make_block()
    block.hidden_norm_weight.requires_grad_(False)
    x = torch.randn(2, 3, 5, 5)
    block(x).sum().backward()
    assert block.hidden_norm_weight.grad is None
    assert block.V.grad is not None
    expected = [block(x), block.eval()(x)]
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected[1])
    block.train()
    torch.testing.assert_close(compiled(x), expected[0])
