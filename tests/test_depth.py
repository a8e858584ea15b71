"""What one does with a block's depth: trajectory, resample, split, vector field, layers, state dicts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from odeblock import DeepResBlock, DeepResNet, native
from odeblock.activations import ACTIVATIONS
from odeblock.limit import interpolate

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def make_block(dim: int = 6, depth: int = 20, hidden: int = 9, **options: Any) -> DeepResBlock:
    block = DeepResBlock(dim, depth, hidden, **{"activation": "tanh", "bias": True, **options})
    for bias in (block.hidden_bias, block.output_bias):
        if bias is not None:
            nn.init.normal_(bias)
    return block


def same_parameters(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---- trajectory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("every", [1, 3, 5, 19, 20])
def test_trajectory(every: int, dtype: torch.dtype) -> None:
    block = make_block(dtype=dtype)
    x = torch.randn(2, 3, 6, dtype=dtype)
    states = block.trajectory(x, every)
    depths = [*range(0, 20, every), 20]
    assert states.shape == (len(depths), 2, 3, 6)
    assert states.dtype == dtype
    assert torch.equal(states[0], x)
    assert torch.equal(states[-1], block(x))
    for state, k in zip(states[1:-1], depths[1:-1], strict=True):
        head = DeepResBlock(6, k, 9, activation="tanh", bias=True, scale=block.scale, dtype=dtype)
        head.load_state_dict({name: p[:k] for name, p in block.state_dict().items()})
        assert torch.equal(state, head(x))


def test_trajectory_has_gradients() -> None:
    block = make_block(dtype=torch.float64)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    tensors = (x, *block.parameters())
    whole = torch.autograd.grad(block(x).square().sum(), tensors)
    pieces = torch.autograd.grad(block.trajectory(x, 3)[-1].square().sum(), tensors)
    for a, b in zip(whole, pieces, strict=True):
        torch.testing.assert_close(a, b)
    block.trajectory(x)[1:].diff(dim=0).square().sum().backward()  # a kinetic energy
    assert all(p.grad is not None and p.grad.any() for p in block.parameters())


# ---- resample --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_resample_converges_to_the_ode_like_one_over_the_depth() -> None:
    for init in ("tied", "smooth"):
        torch.manual_seed(0)
        block = DeepResBlock(16, 64, 24, activation="tanh", init=init, dtype=torch.float64)
        x = torch.randn(32, 16, dtype=torch.float64)
        truth = block.resample(2**15)(x)  # Richardson: the error of Euler's method is a / L + O(1/L²)
        truth = truth + (truth - block.resample(2**14)(x))
        gaps = {depth: float((block.resample(depth)(x) - truth).norm()) for depth in (64, 128, 256, 512)}
        assert gaps[64] > 1e-3 * truth.norm()
        for depth in (64, 128, 256):
            assert gaps[depth] / gaps[2 * depth] == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("depth", [1, 7, 20, 33, 100])
def test_resample_of_tied_weights_is_exact(depth: int, dtype: torch.dtype) -> None:
    block = DeepResBlock(5, 20, 7, init="tied", dtype=dtype)
    other = block.resample(depth)
    assert other.depth == depth
    assert other.scale == 1 / depth
    assert torch.equal(other.V, block.V[:1].expand(depth, -1, -1))
    assert torch.equal(other.W, block.W[:1].expand(depth, -1, -1))


def test_resample_interpolates() -> None:
    block = make_block(depth=7, dtype=torch.float64)
    with torch.no_grad():
        s = torch.arange(1, 8, dtype=torch.float64) / 7
        block.V.copy_((2 - 3 * s)[:, None, None].expand_as(block.V))
    double = block.resample(14)
    s = (torch.arange(1, 15, dtype=torch.float64) / 14).clamp(min=1 / 7)
    torch.testing.assert_close(double.V[:, 0, 0], 2 - 3 * s, rtol=1e-14, atol=1e-14)
    assert same_parameters(double.resample(7), block)
    assert same_parameters(block.resample(7), block)
    # 49 layers on a grid of thirds: where layers coincide they are the same bits.
    assert torch.equal(block.resample(21).W[2::3], block.W)


def test_resample_keeps_the_horizon_and_the_settings() -> None:
    block = make_block(depth=10, scale=0.3, backward="adjoint", init="iid").eval()
    block.W.requires_grad_(False)
    other = block.resample(40)
    assert other.scale == pytest.approx(0.3 * 10 / 40)
    assert (other.activation, other.backward, other.init) == ("tanh", "adjoint", "iid")
    assert [p.requires_grad for p in other.parameters()] == [True, False, True, True]
    assert not other.training
    assert other.hidden_bias is not None
    other.V.data.zero_()
    assert block.V.any()


def test_depth_operations_leave_the_random_numbers_alone() -> None:
    block = make_block()
    before = torch.get_rng_state()
    block.resample(5), block.split(3), DeepResBlock.from_layers(block.to_layers())
    assert torch.equal(before, torch.get_rng_state())


# ---- split -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["auto", "store", "checkpoint"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("parts", [1, 2, 4, 7, 30])
def test_split_is_the_whole_bit_for_bit(parts: int, dtype: torch.dtype, strategy: str) -> None:
    block = make_block(17, 30, 13, dtype=dtype, backward=strategy)
    pieces = block.split(parts)
    assert isinstance(pieces, nn.Sequential)
    assert [piece.depth for piece in pieces] == [30 // parts + (i < 30 % parts) for i in range(parts)]
    x = torch.randn(50, 17, dtype=dtype)
    results = []
    for module in (block, pieces):
        inputs = x.clone().requires_grad_()
        y = module(inputs)
        y.square().sum().backward()
        results.append((y, inputs.grad))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(torch.cat([piece.V.grad for piece in pieces]), block.V.grad)
    pieces[0].V.data.zero_()
    assert block.V[0].any()


# ---- vector field ----------------------------------------------------------------------------------------


def test_eulers_method_on_the_vector_field_is_the_block() -> None:
    block = make_block(dtype=torch.float64, scale=0.02)
    field = block.vector_field()
    h = x = torch.randn(4, 6, dtype=torch.float64)
    for k in range(20):  # weights of layer k + 1 at the state of layer k: time (k + 1) / L
        h = h + field((k + 1) / 20, h) / 20
    torch.testing.assert_close(h, block(x), rtol=1e-13, atol=1e-13)


@torch.no_grad()
def test_the_block_converges_to_the_flow_of_its_vector_field() -> None:
    block = DeepResBlock(8, 400, dtype=torch.float64)
    field = block.vector_field()
    h = x = torch.randn(4, 8, dtype=torch.float64)
    steps = 100
    for k in range(steps):  # the classical Runge-Kutta method
        s, ds = k / steps, 1 / steps
        a = field(s, h)
        b = field(torch.tensor(s + ds / 2), h + ds / 2 * a)
        c = field(torch.tensor([s + ds / 2]), h + ds / 2 * b)
        d = field(s + ds, h + ds * c)
        h = h + ds / 6 * (a + 2 * b + 2 * c + d)
    gaps = [float((block.resample(depth)(x) - h).norm()) for depth in (400, 800, 1600)]
    assert gaps[0] < 0.01 * h.norm()
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.15)
    assert gaps[1] / gaps[2] == pytest.approx(2, rel=0.15)


def test_the_vector_field_has_the_parameters_and_gradients_of_the_block() -> None:
    block = make_block(depth=5, dtype=torch.float64)
    field = block.vector_field()
    assert {id(p) for p in field.parameters()} == {id(p) for p in block.parameters()}
    h = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    s = torch.tensor(0.53, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(field, (s, h))
    field(s, h).sum().backward()
    assert [int(k) for k in block.V.grad.flatten(1).any(dim=1).nonzero()] == [1, 2]  # layers 2 and 3 of 5
    low = make_block(dtype=torch.bfloat16).vector_field()
    assert low(0.5, torch.randn(2, 6)).dtype == torch.float32
    with pytest.raises(ValueError, match=r"s: expected one number, got a tensor of shape \[2\]"):
        field(torch.zeros(2), h)
    with pytest.raises(TypeError, match="s: expected a number or a tensor of one element, got str"):
        field("0.5", h)
    for bad, got in ((float("nan"), "nan"), (float("inf"), "inf"), (10**400, "one that no float can hold")):
        with pytest.raises(ValueError, match=f"^s: expected a finite number, got {got}"):
            field(bad, h)
    assert field(torch.tensor(float("nan")), h).isnan().all()  # to look at it would wait for a GPU
    assert block.vector_field("cubic")(torch.tensor(float("nan")), h).isnan().all()
    with pytest.raises(ValueError, match=r"h: expected shape \[\.\.\., 6\], got \[2, 5\]"):
        field(0.5, torch.randn(2, 5))
    for bad in ([1.0], torch.ones(2, 6, dtype=torch.int64)):
        with pytest.raises(TypeError, match=r"h: expected a floating-point torch\.Tensor, got"):
            field(0.5, bad)


def test_interpolate_stops_at_both_ends() -> None:
    weights = torch.tensor([[1.0], [2.0], [4.0]])
    at = interpolate(weights, torch.tensor([-3.0, 0.5, 1.0, 1.5, 2.25, 3.0, 9.0]))
    assert at.flatten().tolist() == [1.0, 1.0, 1.0, 1.5, 2.5, 4.0, 4.0]
    assert interpolate(weights[:1], torch.tensor([0.0, 5.0])).flatten().tolist() == [1.0, 1.0]


# ---- layers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_from_layers_to_layers_is_the_identity(activation: str, bias: bool) -> None:
    block = make_block(activation=activation, bias=bias, dtype=torch.float64)
    layers = block.to_layers()
    again = DeepResBlock.from_layers(layers)
    assert same_parameters(block, again)
    assert (again.dim, again.hidden_dim, again.depth, again.scale) == (6, 9, 20, 1 / 20)
    assert again.activation == activation
    x = torch.randn(3, 6, dtype=torch.float64)
    assert torch.equal(again(x), block(x))
    h = x
    for layer in layers:
        h = h + layer(h) / 20
    torch.testing.assert_close(h, block(x))
    layers[0][0].weight.data.zero_()
    assert block.W[0].any()
    assert again.W[0].any()


def branch(dim: int = 4, hidden: int = 6, sigma: Any = None, first: bool = True, last: bool = True) -> Any:
    return (nn.Linear(dim, hidden, bias=first), sigma or nn.ReLU(), nn.Linear(hidden, dim, bias=last))


def test_from_layers_takes_other_peoples_layers() -> None:
    layers = nn.ModuleList(
        [nn.Sequential(*branch(sigma=nn.ReLU(inplace=True), last=False)) for _ in range(3)]
    )
    block = DeepResBlock.from_layers(layers, scale=1.0, backward="store")
    assert block.hidden_bias is not None
    assert block.output_bias is None
    assert "hidden_bias=True" in repr(block)
    assert block.backward == "store"
    h = x = torch.randn(5, 4)
    for layer in layers:
        h = h + layer(h)
    torch.testing.assert_close(block(x), h)
    assert same_parameters(DeepResBlock.from_layers(block.to_layers(), scale=1.0), block)
    assert same_parameters(block.resample(3), block)
    block.reset_parameters()
    assert not block.hidden_bias.any()


REFUSED = [
    ([], ValueError, "layers: expected at least one layer"),
    (nn.ReLU(), TypeError, "layers: expected a list of .*got ReLU"),
    ([nn.Linear(4, 4)], TypeError, r"layers\[0\]: expected .*got Linear"),
    ([branch(), branch()[::2]], ValueError, r"layers\[1\]: expected three modules .*got 2.*nn.Identity\(\)"),
    ([(nn.ReLU(), *branch()[1:])], TypeError, r"layers\[0\]\[0\]: expected an nn.Linear, got ReLU"),
    ([(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))], ValueError, r"layers\[0\]: a residual branch returns"),
    (
        [branch(), branch(hidden=7)],
        ValueError,
        r"layers\[1\]\[0\]: .*nn.Linear\(4, 6\).*got nn.Linear\(4, 7\)",
    ),
    ([branch(sigma=nn.Mish())], ValueError, r"layers\[0\]\[1\]: expected an activation.*nn.ReLU.*got Mish"),
    ([branch(sigma=nn.LeakyReLU(0.2))], ValueError, r"layers\[0\]\[1\]: .*negative_slope=0.01.*got .*0.2"),
    ([branch(), branch(sigma=nn.Tanh())], ValueError, r"layers\[1\]\[1\]: .*expected relu as in.*got tanh"),
    (
        [branch(), branch(first=False)],
        ValueError,
        r"layers\[1\]\[0\]: expected a bias on every layer or on none",
    ),
    (
        [branch(last=False), branch()],
        ValueError,
        r"layers\[1\]\[2\]: expected a bias on every layer or on none",
    ),
    (
        [branch(), [module.double() for module in branch()]],
        ValueError,
        r"layers\[1\]\[0\]: expected torch.float32 on cpu as in layers\[0\]\[0\], got torch.float64",
    ),
    ([(nn.LazyLinear(6), nn.ReLU(), nn.Linear(6, 4))], ValueError, r"layers\[0\]\[0\]: .*lazy layer"),
]


@pytest.mark.parametrize(("layers", "error", "message"), REFUSED)
def test_layers_that_do_not_fit(layers: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DeepResBlock.from_layers(layers)


# ---- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["split", "resample", "trajectory"])
def test_impossible_arguments(name: str) -> None:
    block = make_block(depth=4)
    argument = {"split": "parts", "resample": "depth", "trajectory": "every"}[name]

    def call(value: Any) -> Any:
        return (
            block.trajectory(torch.randn(2, 6), value)
            if name == "trajectory"
            else getattr(block, name)(value)
        )

    for value in (0, -2):
        with pytest.raises(ValueError, match=f"{argument}: expected an int >= 1, got {value}"):
            call(value)
    for value in (2.0, "2", True, None):
        with pytest.raises(TypeError, match=f"{argument}: expected an int >= 1, got"):
            call(value)
    if name != "resample":
        with pytest.raises(ValueError, match=f"{argument}: expected an int from 1 to the depth 4, got 5"):
            call(5)
    largest = 2**48 if name == "resample" else "the depth 4"
    for value, got in ((10**19, 10**19), (10**5000, "one of more than 100 digits")):
        with pytest.raises(ValueError, match=f"{argument}: expected an int from 1 to {largest}, got {got}"):
            call(value)


def test_integers_of_other_libraries_are_integers() -> None:
    block = make_block(depth=np.int64(4))
    assert block.depth == 4
    assert type(block.depth) is int
    assert block.resample(np.int32(7)).depth == 7
    assert len(block.split(torch.tensor(2))) == 2


def test_trajectory_refuses_what_forward_refuses() -> None:
    block = make_block()
    for bad in (torch.randn(2, 5), torch.randn(2, 6).double(), [1.0]):
        with pytest.raises((TypeError, ValueError), match=r"^(h|V): "):
            block.trajectory(bad)


def test_a_state_dict_of_another_depth() -> None:
    network, other = DeepResNet(3, 6, 20, 2, bias=True), DeepResNet(3, 6, 30, 2, bias=True)
    with pytest.raises(RuntimeError, match="depth 20") as caught:
        other.load_state_dict(network.state_dict())
    text = str(caught.value)
    assert "block.V, W, hidden_bias, output_bias: this block has depth 30" in text
    assert "Load it into a block of depth 20, and call .resample(30)" in text
    other.block = network.block.resample(30)  # what it advises
    assert other(torch.randn(5, 3)).shape == (5, 2)
    with pytest.raises(RuntimeError, match=r"size mismatch for block\.V"):  # another width: as every module
        other.load_state_dict(DeepResNet(3, 7, 30, 2, bias=True).state_dict())
    result = other.load_state_dict({"A.weight": torch.zeros(6, 3)}, strict=False)
    assert "block.V" in result.missing_keys


# ---- without the native core -----------------------------------------------------------------------------


def test_everything_works_on_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    block = make_block(backward="adjoint", depth=40)
    x = torch.randn(3, 6)
    expected: Tensor = block(x)
    monkeypatch.setattr(native, "core", None)
    torch.testing.assert_close(block(x), expected)
    torch.testing.assert_close(block.trajectory(x, 7)[-1], expected)
    torch.testing.assert_close(block.split(4)(x), expected)
    block(x).sum().backward()
    assert math.isfinite(block.V.grad.sum())
