"""Initializers with settings, gradient flow, the limiting ODE, diagnostics: against closed forms and laws."""

from __future__ import annotations

import copy
import math
import pickle
import sys
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from odeblock import DeepResBlock, DeepResNet, diagnostics, flow, limit
from odeblock.initializers import (
    INITIALIZERS,
    KERNELS,
    Fields,
    Fourier,
    GaussianProcess,
    Initializer,
    Polynomial,
    depth_scale,
)

# ---- initializers ----------------------------------------------------------------------------------------


def cosine(r: torch.Tensor) -> torch.Tensor:
    return torch.cos(math.pi * r / 2)


SETTINGS: list[Initializer] = [
    *(GaussianProcess(kernel, 0.2) for kernel in KERNELS),
    GaussianProcess(cosine, 0.5),
    Fourier(),
    Fourier(modes=0),
    Fourier(modes=5, decay=2.0),
    Polynomial(),
    Polynomial(degree=0),
]


@pytest.mark.parametrize("depth", [1, 2, 60])
@pytest.mark.parametrize("init", SETTINGS, ids=lambda init: str(init).split(" at 0x")[0])
def test_variance(init: Initializer, depth: int) -> None:
    block = DeepResBlock(60, depth, 90, init=init)
    if isinstance(init, Polynomial) and init.degree:  # on average over many layers only
        depths = torch.arange(1, depth + 1, dtype=torch.float64) / depth
        x = 2 * depths - 1
        legendre = [torch.ones_like(x), x, (3 * x**2 - 1) / 2, (5 * x**3 - 3 * x) / 2]
        expected = sum((2 * j + 1) / 4 * p**2 for j, p in enumerate(legendre))
    else:
        expected = torch.ones(depth, dtype=torch.float64)
    for stack, inverse in ((block.W, 60), (block.V, 90)):
        variances = stack.detach().double().square().mean((1, 2)) * inverse
        torch.testing.assert_close(variances, expected, rtol=0.12, atol=0)


def test_the_default_is_the_squared_exponential_of_length_a_quarter() -> None:
    drawn = []
    for init in ("smooth", GaussianProcess(), GaussianProcess(lambda r: KERNELS["squared_exponential"](r))):
        torch.manual_seed(5)
        drawn.append(DeepResBlock(100, 50, init=init))
    assert torch.equal(drawn[0].V, drawn[1].V)
    for block in drawn[1:]:  # the same law by two factorisations: correlation exp(-2) at a lag of 2ℓ
        W = block.W.detach() * 10
        assert float((W[25:] * W[:-25]).mean()) == pytest.approx(math.exp(-2), abs=0.05)


@pytest.mark.parametrize(
    ("kernel", "correlations"),  # at lags of ℓ and 2ℓ
    [
        ("squared_exponential", (math.exp(-1 / 2), math.exp(-2))),
        (
            "matern52",
            ((1 + 5**0.5 + 5 / 3) * math.exp(-(5**0.5)), (1 + 20**0.5 + 20 / 3) * math.exp(-(20**0.5))),
        ),
        ("matern32", ((1 + 3**0.5) * math.exp(-(3**0.5)), (1 + 12**0.5) * math.exp(-(12**0.5)))),
        ("exponential", (math.exp(-1), math.exp(-2))),
    ],
)
def test_correlations_of_kernels(kernel: str, correlations: tuple[float, float]) -> None:
    assert len(KERNELS) == 4
    block = DeepResBlock(100, 40, 150, init=GaussianProcess(kernel, length_scale=0.25))
    for stack, inverse in ((block.W, 100), (block.V, 150)):
        Z = stack.detach() * inverse**0.5
        for lag, expected in zip((10, 20), correlations, strict=True):
            assert float((Z[lag:] * Z[:-lag]).mean()) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("decay", [0.0, 1.0, 1.5])
def test_powers_of_fourier_modes(decay: float) -> None:
    block = DeepResBlock(100, 32, 150, init=Fourier(modes=3, decay=decay), dtype=torch.float64)
    power = torch.fft.rfft(block.V.detach(), dim=0).abs().square().mean((1, 2))
    ratios = (power[:4] / power[1]).tolist()  # the constant has its cosine only, of twice a cosine's power
    assert ratios == pytest.approx([2, 1, 2 ** (-2 * decay), 3 ** (-2 * decay)], rel=0.05)


def test_kernels_are_as_smooth_as_they_say() -> None:
    steps = {}
    for kernel in KERNELS:
        largest = [
            diagnostics.largest_step(DeepResBlock(20, L, init=GaussianProcess(kernel)).W) for L in (100, 400)
        ]
        steps[kernel] = largest[0] / largest[1]
    for kernel in ("squared_exponential", "matern52", "matern32"):
        assert steps[kernel] == pytest.approx(4, rel=0.15)
    assert steps["exponential"] == pytest.approx(2, rel=0.15)


def test_fourier_is_periodic_and_polynomial_a_polynomial() -> None:
    block = DeepResBlock(3, 64, 4, init=Fourier(modes=2), dtype=torch.float64)
    coefficients = torch.fft.rfft(block.V.detach(), dim=0).abs()
    assert coefficients[:3].min() > 1e-3
    assert coefficients[3:].max() < 1e-12
    block = DeepResBlock(3, 20, 4, init=Polynomial(degree=2), dtype=torch.float64)
    assert block.V.detach().diff(n=3, dim=0).abs().max() < 1e-13
    assert block.V.detach().diff(n=2, dim=0).abs().min() > 1e-8


def test_fields() -> None:
    base = torch.randn(4, 3)
    init = Fields(lambda s: torch.full((3, 4), s), lambda s: (1 - s) * base)
    block = DeepResBlock(3, 5, 4, init=init)
    assert block.V[:, 0, 0].tolist() == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    torch.testing.assert_close(block.W[1], 0.6 * base)
    assert "Fields" in repr(block)
    with pytest.raises(ValueError, match=r"W: expected a function of s -> \[4, 3\], got \[3, 4\]"):
        DeepResBlock(3, 5, 4, init=Fields(init.V, init.V))


def test_an_initializer_runs_only_where_its_weights_stay() -> None:
    calls: list[int] = []

    def init(V: Tensor, W: Tensor, *, generator: torch.Generator | None = None) -> None:
        calls.append(len(V))
        V.data.zero_()
        W.data.zero_()

    block = DeepResBlock(3, 6, init=init)
    block.resample(9)
    block.split(2)
    empty = DeepResBlock(3, 7, init=init, device="meta")
    assert calls == [6]
    empty.to_empty(device="cpu").reset_parameters()
    assert calls == [6, 7]


def test_initializers_travel_with_the_block() -> None:
    init = GaussianProcess("matern32", 0.5)
    block = pickle.loads(pickle.dumps(DeepResBlock(4, 6, init=init)))
    assert block.init == copy.deepcopy(block).init == block.resample(9).init == init
    network = DeepResNet(2, 4, 6, 1, init=Fourier())
    before = network.block.V.clone()
    network.reset_parameters()
    assert not torch.equal(before, network.block.V)


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        (lambda: Fourier(modes=np.uint8(255), decay=Fraction(1, 2)), Fourier(255, 0.5)),
        (lambda: Polynomial(np.int8(127)), Polynomial(127)),
        (lambda: GaussianProcess(length_scale=Fraction(1, 4)), GaussianProcess()),
        (lambda: GaussianProcess("matern32", np.float16(0.25)), GaussianProcess("matern32")),
    ],
)
def test_settings_of_other_libraries_are_plain_numbers(given: Callable[[], Any], plain: Any) -> None:
    assert repr(given()) == repr(plain)
    found, expected = torch.empty(2, 6, 4, 4)
    for init, weights in ((given(), found), (plain, expected)):
        torch.manual_seed(1)
        init(weights, torch.empty(6, 4, 4))
    assert torch.equal(found, expected)
    assert found.any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianProcess("matern"), "kernel: expected a function or one of squared_exponential"),
        (lambda: GaussianProcess(length_scale=math.nan), "length_scale: expected a finite number > 0"),
        (lambda: Fourier(modes=-1), "modes: expected an int >= 0"),
        (lambda: Fourier(decay=math.inf), "decay: expected a finite number"),
        (lambda: Polynomial(degree=-1), "degree: expected an int >= 0"),
        (lambda: depth_scale(0), "depth: expected an int >= 1"),
        (lambda: depth_scale(4, math.nan), "beta: expected a finite number"),
        (
            lambda: GaussianProcess(length_scale=10**400),
            "length_scale: expected a finite number > 0, got one that no float can hold",
        ),
        (
            lambda: flow.gradient_flow_groups(nn.Linear(1, 1), 10**400),
            "lr: expected a finite number > 0, got one that no float can hold",
        ),
        (
            lambda: GaussianProcess(length_scale=Fraction(1, 10**400)),
            "length_scale: expected a finite number",
        ),
        (lambda: depth_scale(10**400), "depth: expected an int from 1 to 2"),
        (lambda: depth_scale(10**5000), "depth: expected an int from 1 to .* more than 100 digits"),
        (lambda: GaussianProcess(length_scale=0), "length_scale: expected a finite number > 0, got 0"),
    ],
)
def test_settings_out_of_range(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianProcess(["matern52"]), "kernel: expected a function or one of .*; got list"),
        (lambda: GaussianProcess(length_scale="a"), "length_scale: expected a finite number > 0, got str"),
        (lambda: Fourier(modes=2.5), "modes: expected an int >= 0, got float"),
        (lambda: Fourier(decay=None), "decay: expected a finite number, got NoneType"),
        (lambda: Polynomial(2.5), "degree: expected an int >= 0, got float"),
        (lambda: Fields(None, lambda s: s), "V: expected a function of s, got NoneType"),
        (lambda: Fields(lambda s: s, 1.0), "W: expected a function of s, got float"),
        (lambda: depth_scale(2.5), "depth: expected an int >= 1, got float"),
        (lambda: depth_scale(4, "1"), "beta: expected a finite number, got str"),
        (
            lambda: flow.gradient_flow_groups(nn.Linear(1, 1), "x"),
            "lr: expected a finite number > 0, got str",
        ),
        (
            lambda: flow.gradient_flow_groups(nn.Linear(1, 1), 0.1, weight_decay=None),
            "weight_decay: expected a finite number >= 0, got NoneType",
        ),
    ],
)
def test_settings_of_other_types(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"^{message}"):
        make()


@pytest.mark.parametrize(
    "init",
    [*INITIALIZERS, GaussianProcess("matern32"), Fourier(), Polynomial()],
    ids=lambda init: init if isinstance(init, str) else type(init).__name__,
)
def test_the_default_device_is_not_that_of_the_block(init: Any) -> None:
    torch.manual_seed(1)
    expected = DeepResBlock(4, 6, init=init)
    torch.manual_seed(1)
    with torch.device("meta"):
        block = DeepResBlock(4, 6, init=init, device="cpu")
    assert torch.equal(block.V, expected.V)
    assert torch.equal(block.W, expected.W)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (lambda r: 2 * torch.exp(-r), r"with value 1 at 0, got 2"),
        (lambda r: torch.sin(r) / r, r"with value 1 at 0, got nan"),
        (lambda r: 1.0, r"of r \[L, L\] -> \[5, 5\], got float"),
        (lambda r: torch.exp(-r[0]), r"of r \[L, L\] -> \[5, 5\], got \[5\]"),
        (lambda r: (r < 1.5).double(), "whose matrix of the first 3 of 5 layers"),
    ],
)
def test_kernels_that_are_none(kernel: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^kernel: expected a .*({message})"):
        DeepResBlock(3, 5, init=GaussianProcess(kernel, 0.2))


@torch.no_grad()
def test_critical_scales() -> None:
    """β = 1/2 for independent layers, 1 for tied ones: the output neither vanishes nor explodes with L."""
    x = torch.randn(64, 40)

    def growth(init: str, beta: float) -> float:
        changes = []
        for depth in (64, 1024):
            block = DeepResBlock(40, depth, init=init, activation="tanh", scale=depth_scale(depth, beta))
            changes.append(float((block(x) - x).norm()))
        return changes[1] / changes[0]

    assert growth("iid", 0.5) == pytest.approx(1, abs=0.15)
    assert growth("iid", 1.0) == pytest.approx(1 / 4, abs=0.05)  # the identity, like L^(1/2 - β)
    assert growth("tied", 1.0) == pytest.approx(1, abs=0.3)
    assert growth("tied", 0.5) > 2
    assert depth_scale(16) == DeepResBlock(2, 16).scale


# ---- flow ------------------------------------------------------------------------------------------------


def regression(depth: int, init: str = "zero_v") -> tuple[DeepResNet, Callable[[], Tensor]]:
    """A network and its risk on ten points, the same for every depth."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 10, 3, generator=generator, dtype=torch.float64)
    torch.manual_seed(2)
    network = DeepResNet(3, 4, depth, 3, 6, init=init, activation="tanh", dtype=torch.float64)
    return network, lambda: (network(x) - y).square().mean()


def test_groups_find_every_block() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = DeepResNet(3, 4, 10, 4)
            self.inner = nn.ModuleDict({"second": DeepResBlock(4, 7, bias=True)})

    model = Two()
    model.first.B.weight.requires_grad_(False)
    groups = flow.gradient_flow_groups(model, 0.1, weight_decay=0.2)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    second = model.inner["second"]
    assert found == {
        id(model.first.A.weight): (0.1, 0.2),
        **{id(p): (10 * 0.1, 0.2 / 10) for p in model.first.block.parameters()},
        **{id(p): (7 * 0.1, 0.2 / 7) for p in second.parameters()},
    }
    assert len(list(second.parameters())) == 4


def speeds(depth: int, optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> list[float]:
    """How far a layer's typical coefficient of V goes in one step."""
    network, risk = regression(depth)
    before = network.block.V.detach().clone()
    risk().backward()
    optimizer(network).step()
    return (network.block.V.detach() - before).square().mean((1, 2)).sqrt().tolist()


def test_layers_move_at_a_speed_that_does_not_depend_on_depth() -> None:
    def sgd(network: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(flow.gradient_flow_groups(network, 0.1))

    shallow, deep = speeds(8, sgd), speeds(128, sgd)
    assert sum(deep) / 128 == pytest.approx(sum(shallow) / 8, rel=0.01)
    plain = speeds(128, lambda network: torch.optim.SGD(network.parameters(), 0.1))
    assert deep[0] == pytest.approx(128 * plain[0])


def test_adam_cancels_the_factor() -> None:
    """Its steps have the size of its rate: the same for each L without the groups, L times larger with."""
    plain = [
        sum(speeds(L, lambda network: torch.optim.Adam(network.parameters(), 1e-3))) / L for L in (8, 128)
    ]
    assert plain == pytest.approx([1e-3, 1e-3], rel=0.01)
    groups = speeds(
        128, lambda network: torch.optim.Adam(flow.gradient_flow_groups(network, 1e-3, weight_decay=0.0))
    )
    assert groups[0] == pytest.approx(128e-3, rel=0.01)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_weight_decay_does_not_depend_on_depth(optimizer: Any) -> None:
    for depth in (4, 64):
        network, _ = regression(depth, "iid")
        before = copy.deepcopy(network)
        for p in network.parameters():
            p.grad = torch.zeros_like(p)
        optimizer(flow.gradient_flow_groups(network, 0.1, weight_decay=0.3)).step()
        for p, old in zip(network.parameters(), before.parameters(), strict=True):
            torch.testing.assert_close(p, old * (1 - 0.1 * 0.3))


def test_the_flow_of_a_quadratic_is_an_exponential() -> None:
    pytest.importorskip("torchdiffeq")
    model = nn.Sequential(nn.Linear(2, 3, bias=False), DeepResBlock(3, 5)).double()
    linear, block = model[0], model[1]
    start = copy.deepcopy(model)
    block.W.requires_grad_(False)

    def risk() -> Tensor:  # of size 1/L in each layer, as a network's
        return 0.5 * (block.V.square().sum() / 5 + linear.weight.square().sum() / 2)

    seen: list[tuple[float, float]] = []
    risks = flow.integrate(
        model, risk, [0, 0.5, 2], rtol=1e-8, atol=1e-10, on_time=lambda t, R: seen.append((t, R))
    )
    torch.testing.assert_close(block.V, start[1].V * math.exp(-2), rtol=1e-6, atol=0)
    torch.testing.assert_close(linear.weight, start[0].weight * math.exp(-1), rtol=1e-6, atol=0)
    assert torch.equal(block.W, start[1].W)
    assert [t for t, _ in seen] == [0, 0.5, 2]
    assert [R for _, R in seen] == risks
    assert risks[2] == pytest.approx(risk().item())


def test_the_flow_leaves_what_the_risk_does_not_see() -> None:
    pytest.importorskip("torchdiffeq")
    model = nn.ModuleDict({"block": DeepResBlock(3, 4), "unused": nn.Linear(2, 2)}).double()
    block, unused = model["block"], model["unused"]
    start = copy.deepcopy(model)
    flow.integrate(model, lambda: block.V.square().sum(), [0.0, 0.1])
    assert torch.equal(unused.weight, start["unused"].weight)
    assert torch.equal(block.W, start["block"].W)
    torch.testing.assert_close(block.V, start["block"].V * math.exp(-0.8), rtol=1e-3, atol=0)


def test_small_steps_of_sgd_follow_the_flow() -> None:
    pytest.importorskip("torchdiffeq")
    network, risk = regression(12, "smooth")
    other, other_risk = regression(12, "smooth")
    flow.integrate(network, risk, [0, 0.5], rtol=1e-7, atol=1e-9)
    gaps = []
    for steps in (50, 100):
        other.load_state_dict(regression(12, "smooth")[0].state_dict())
        optimizer = torch.optim.SGD(flow.gradient_flow_groups(other, 0.5 / steps))
        for _ in range(steps):
            optimizer.zero_grad()
            other_risk().backward()
            optimizer.step()
        gaps.append(float((other.block.V - network.block.V).detach().norm()))
    start = regression(12, "smooth")[0].block.V
    assert gaps[0] < 0.02 * float((network.block.V - start).norm())
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.1)  # Euler's method: of first order


def test_flow_refusals() -> None:
    network, risk = regression(4)
    for bad in ({"lr": 0.0}, {"lr": math.nan}, {"lr": 0.1, "weight_decay": -1.0}):
        with pytest.raises(ValueError, match=r"^(lr|weight_decay): expected a finite number"):
            flow.gradient_flow_groups(network, **bad)
    for times in ([0.0], [0.0, 0.0], [1.0, 0.0], [0.0, math.inf], [-math.inf, 1.0]):
        with pytest.raises(ValueError, match=r"^times: expected two or more finite increasing numbers"):
            flow.integrate(network, risk, times)
    with pytest.raises(FloatingPointError, match="the risk is nan"):
        flow.integrate(network, lambda: risk() * math.nan, [0.0, 1.0])
    network.requires_grad_(False)
    with pytest.raises(ValueError, match=r"^model: expected trainable parameters"):
        flow.gradient_flow_groups(network, 0.1)
    with pytest.raises(ValueError, match=r"^model: expected trainable parameters"):
        flow.integrate(network, risk, [0.0, 1.0])


# ---- limit -----------------------------------------------------------------------------------------------


def test_orders_of_interpolation() -> None:
    def error(kind: str, depth: int) -> float:
        s = torch.arange(1, depth + 1, dtype=torch.float64) / depth
        fine = torch.linspace(1 / depth, 1, 500, dtype=torch.float64)
        values = limit.interpolate(torch.sin(5 * s)[:, None], fine * depth, kind)[:, 0]
        return float((values - torch.sin(5 * fine)).abs().max())

    assert error("linear", 20) / error("linear", 40) == pytest.approx(4, rel=0.2)
    assert error("cubic", 20) / error("cubic", 40) == pytest.approx(16, rel=0.3)
    stack = torch.randn(7, 2, 3)
    torch.testing.assert_close(limit.interpolate(stack, torch.arange(1.0, 8.0), "cubic"), stack)
    for depth in (1, 2, 3):  # a line through two layers, a parabola through three
        s = torch.arange(1, depth + 1, dtype=torch.float64)
        at = torch.tensor([1.0, 1.3, 2.5, 3.0]).clamp(max=depth)
        powers = (s ** (depth - 1))[:, None]
        torch.testing.assert_close(limit.interpolate(powers, at, "cubic")[:, 0], at.double() ** (depth - 1))
    with pytest.raises(ValueError, match=r"^kind: expected one of linear, cubic; got 'spline'"):
        limit.interpolate(stack, torch.ones(1), "spline")


@pytest.mark.parametrize("interpolation", limit.INTERPOLATIONS)
def test_fields_of_a_block(interpolation: str) -> None:
    block = DeepResBlock(3, 8, 4, bias=True, dtype=torch.float64)
    found = limit.fields(block, interpolation)
    assert list(found) == ["V", "W", "hidden_bias", "output_bias"]
    torch.testing.assert_close(found["V"](0.5), block.V[3])
    other = DeepResBlock(3, 16, 4, init=Fields(found["V"], found["W"]), dtype=torch.float64)
    torch.testing.assert_close(other.W[1::2], block.W)
    if interpolation == "linear":
        torch.testing.assert_close(other.V, block.resample(16).V)
    found["W"](0.3).sum().backward()
    assert block.W.grad is not None
    assert block.W.grad.any()


def test_fields_travel_with_the_block_they_start() -> None:
    found = limit.fields(DeepResBlock(3, 8, 4))
    block = DeepResBlock(3, 16, 4, init=Fields(found["V"], found["W"]))
    assert "Field([8, 3, 4], 'linear')" in repr(block)
    for other in (pickle.loads(pickle.dumps(block)), copy.deepcopy(block)):
        with torch.no_grad():
            other.V.zero_()
        other.reset_parameters()
        assert torch.equal(other.V, block.V)
    with pytest.raises(ValueError, match=r"^interpolation: expected one of linear, cubic; got 'spline'"):
        limit.fields(block, "spline")


def test_solve_is_the_matrix_exponential() -> None:
    pytest.importorskip("torchdiffeq")
    block = DeepResBlock(4, 3, 5, activation="identity", init="tied", dtype=torch.float64)
    h = torch.randn(6, 4, dtype=torch.float64)
    exact = h @ torch.matrix_exp(block.V[0] @ block.W[0]).T
    for interpolation in limit.INTERPOLATIONS:
        solution = limit.solve(block, h, rtol=1e-10, atol=1e-12, interpolation=interpolation)
        torch.testing.assert_close(solution, exact, rtol=1e-8, atol=1e-8)
    solution.sum().backward()
    assert block.V.grad is not None
    assert block.V.grad.any()


def test_the_gap_to_the_ode_falls_like_one_over_the_depth() -> None:
    pytest.importorskip("torchdiffeq")
    h = torch.randn(16, 8)
    base = DeepResBlock(8, 512, 12, activation="tanh")
    gaps = [limit.ode_gap(base.resample(L), h, interpolation="cubic", tol=1e-7) for L in (32, 64, 128)]
    assert gaps[0] > 1e-3
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.15)
    assert gaps[1] / gaps[2] == pytest.approx(2, rel=0.15)


def test_resample_a_model() -> None:
    network = DeepResNet(3, 6, 20, 2)
    x = torch.randn(9, 3)

    def loss(model: nn.Module) -> Tensor:
        return model(x).square().mean()

    other, before, after = limit.resample(network, 200, loss)
    assert isinstance(other, DeepResNet)
    assert (other.block.depth, network.block.depth) == (200, 20)
    assert torch.equal(other.A.weight, network.A.weight)
    assert before == float(loss(network))
    assert after == float(loss(other))
    assert after == pytest.approx(before, rel=0.2)
    assert after != before
    block = limit.resample(network.block, 7, lambda model: model(torch.ones(6)).sum()).model
    assert isinstance(block, DeepResBlock)
    assert block.depth == 7
    with pytest.raises(ValueError, match=r"^model: expected one that holds a DeepResBlock"):
        limit.resample(nn.Linear(2, 2), 7, lambda model: 0.0)


def test_a_block_under_several_names_is_resampled_once() -> None:
    block, own = DeepResBlock(3, 12), DeepResBlock(3, 12)
    inner = nn.Sequential(own)
    model = nn.ModuleDict({"a": block, "b": nn.Sequential(block, inner), "c": block, "d": inner})
    other = limit.resample(model, 6, lambda model: 0.0).model
    a, (b, inner), c, d = other["a"], other["b"], other["c"], other["d"]
    assert a is b is c
    assert d is inner
    assert a.depth == d[0].depth == 6
    assert torch.equal(d[0].V, own.resample(6).V)
    assert model["a"] is model["c"] is block
    assert block.depth == 12


def test_limit_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    block = DeepResBlock(3, 4)
    with pytest.raises(ValueError, match=r"^interpolation: expected one of linear, cubic"):
        block.vector_field("nearest")
    with pytest.raises(ValueError, match=r"^h: expected shape \[\.\.\., 3\]"):
        limit.solve(block, torch.zeros(2, 4))
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ImportError, match=r"pip install 'odeblock\[ode\]'"):
        limit.solve(block, torch.zeros(2, 3))


# ---- diagnostics -----------------------------------------------------------------------------------------


def test_largest_step_and_roughness() -> None:
    weights = torch.zeros(4, 2, 2)
    weights[2] = 3.0
    assert diagnostics.largest_step(weights) == 6.0
    assert diagnostics.roughness(weights) == pytest.approx(2 * 36 / (2 * 4 * (9 - 9 / 4)))
    assert diagnostics.largest_step(weights[:1]) == diagnostics.roughness(weights[:1]) == 0.0
    assert diagnostics.roughness(torch.randn(50, 30, 30)) == pytest.approx(1, abs=0.02)
    assert diagnostics.roughness(torch.ones(50, 3, 3)) == 0.0


def test_spectrum() -> None:
    depth = 32
    k = torch.arange(depth, dtype=torch.float64)
    wave = 2 + 3 * torch.cos(math.pi * 5 * (k + 0.5) / depth)
    power = diagnostics.spectrum(wave[:, None, None].expand(depth, 2, 3))
    expected = torch.zeros(depth, dtype=torch.float64)
    expected[0], expected[5] = 4, 4.5
    torch.testing.assert_close(power, expected, rtol=0, atol=1e-12)
    for weights in (torch.randn(33, 20, 20), torch.randn(1, 3)):
        power = diagnostics.spectrum(weights)
        assert power.shape == (len(weights),)
        assert float(power.sum()) == pytest.approx(float(weights.square().mean()))
    power = diagnostics.spectrum(torch.randn(64, 40, 40))
    assert power[1:].max() / power[1:].min() < 1.5


def test_high_frequencies() -> None:
    assert diagnostics.high_frequencies(torch.randn(65, 40, 40)) == pytest.approx(0.5, abs=0.02)
    assert diagnostics.high_frequencies(torch.ones(8, 2, 2)) == 0.0
    assert diagnostics.high_frequencies(torch.randn(1, 2)) == 0.0
    shares = [diagnostics.high_frequencies(torch.linspace(0, 1, L).double()[:, None]) for L in (64, 128)]
    assert shares[0] / shares[1] == pytest.approx(8, rel=0.2)


@pytest.mark.parametrize(
    "init",
    [
        Fourier(10, decay=-400.0),
        Fourier(10, decay=1e308),
        Fourier(0, decay=-1e308),
        *(GaussianProcess(kernel, scale) for kernel in KERNELS for scale in (5e-324, 1e-170, 1e200, 1e308)),
    ],
    ids=repr,
)
def test_extreme_settings_give_finite_weights(init: Any) -> None:
    block = DeepResBlock(3, 6, init=init)
    for stack in (block.V, block.W):
        assert stack.isfinite().all()
        assert stack.any()


def test_distance() -> None:
    s = torch.arange(1, 4097, dtype=torch.float64)[:, None, None] / 4096
    reference = torch.cat([s.sin(), s.cos()], 1)
    assert diagnostics.distance(reference, reference) == 0.0
    assert diagnostics.distance(reference + 0.5, reference) == pytest.approx(0.5 * 2**0.5)
    shifted = [
        diagnostics.distance(reference[4096 // L - 1 :: 4096 // L] + 1 / L, reference) for L in (64, 128)
    ]
    assert shifted[0] / shifted[1] == pytest.approx(2, rel=0.02)
    shallow, at = reference[63::64], s.flatten()  # 64 layers; the limit at layers of theirs, and between
    layers = diagnostics.distance(shallow, reference[63::64])
    between = diagnostics.distance(shallow, reference[31::64], at[31::64])
    assert layers == 0 < between < 2e-3
    with pytest.raises(ValueError, match=r"^limit: expected shape \[n, \[2, 1\]\]"):
        diagnostics.distance(reference, reference[:, :1])
    with pytest.raises(ValueError, match=r"^limit: expected shape \[L, ...\] with L >= 1"):
        diagnostics.distance(shallow, reference[:0])
    for function in (diagnostics.distance, limit.interpolate):
        with pytest.raises(ValueError, match=r"^weights: expected shape \[L, ...\] with L >= 1"):
            function(shallow[:0], at)
    with pytest.raises(ValueError, match=r"^at: expected shape \[4096\], .* got \[4095\]"):
        diagnostics.distance(shallow, reference, at[1:])


def test_the_pl_ratio_is_the_speed_of_the_flow() -> None:
    network, risk = regression(16, "smooth")
    R = risk()
    R.backward()
    ratio = diagnostics.pl_ratio(network, R)
    eps = 1e-6
    torch.optim.SGD(flow.gradient_flow_groups(network, eps)).step()
    assert ratio == pytest.approx(float(R - risk()) / eps / (2 * float(R)), rel=1e-3)
    assert diagnostics.pl_ratio(network, 0.0) == math.inf


def test_monitor() -> None:
    network, risk = regression(6, "smooth")
    model = nn.ModuleDict({"net": network})
    deep = torch.zeros(50, 4, 6, dtype=torch.float64)
    monitor = diagnostics.Monitor(model, every=2, limit={"net.block.V": deep})
    for _ in range(4):
        loss = risk()
        loss.backward()
        monitor(loss)
        with torch.no_grad():
            network.block.V.mul_(2)
    first, second = monitor.history
    assert (first["call"], second["call"]) == (0.0, 2.0)
    assert second["net.block.V.max"] == pytest.approx(4 * first["net.block.V.max"])
    assert second["net.block.V.distance"] == pytest.approx(4 * first["net.block.V.distance"])
    assert second["net.block.W.total_variation"] == first["net.block.W.total_variation"] > 0
    assert "net.block.W.distance" not in first
    assert first["net.block.V.high_frequencies"] == diagnostics.high_frequencies(network.block.V)
    assert first["pl_ratio"] > 0
    diagnostics.Monitor(network.block)(1.0)  # a block is a model too
    with pytest.raises(ValueError, match=r"^model: expected one that holds a DeepResBlock"):
        diagnostics.Monitor(nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match=r"^limit: expected names among net\.block\.V, net\.block\.W; got 'V'"
    ):
        diagnostics.Monitor(model, limit={"V": deep})


def failures(**options: Any) -> list[str]:
    block = DeepResBlock(8, 40, **options)
    return [assumption.name for assumption in diagnostics.check_assumptions(block) if not assumption.holds]


def test_check_assumptions() -> None:
    assert failures() == failures(init="tied") == failures(init="zero_v") == []
    assert failures(init="iid") == failures(init=GaussianProcess("exponential", 0.01))
    assert failures(init="iid") == ["weights smooth in depth"]
    assert failures(activation="sigmoid") == failures(activation="softplus") == ["f(0, Z) = 0"]
    assert failures(bias=True) == ["f(0, Z) = 0"]
    assert failures(activation="relu") == failures(activation="leaky_relu") == ["smooth activation"]
    assert failures(scale=depth_scale(40, 0.5)) == ["depth-scaled step"]
    network = DeepResNet(2, 8, 40, 2, bias=True, activation="tanh")
    text = "\n".join(map(str, diagnostics.check_assumptions(network)))
    assert "block: f(0, Z) = 0: FAILS (it has hidden_bias and output_bias)" in text
    assert "block: Lipschitz activation: holds (tanh)" in text
    network.block.requires_grad_(False)  # zero, and never anything else
    assert all(assumption.holds for assumption in diagnostics.check_assumptions(network))
    with pytest.raises(ValueError, match=r"^model: expected one that holds a DeepResBlock"):
        diagnostics.check_assumptions(nn.Linear(2, 2))
