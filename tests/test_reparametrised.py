"""Weights that are computed from parameters: parametrizations, pruning, the older norms of torch.nn.utils."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from odeblock import DeepConvResBlock, DeepResBlock, limit, reference
from odeblock.flow import gradient_flow_groups

DEPTH = 8


class Halves(nn.Module):
    """Every layer at half its size; counts how often it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, X: Tensor) -> Tensor:
        self.calls += 1
        return X / 2

    def right_inverse(self, V: Tensor) -> Tensor:
        return V * 2


class UnitNorm(nn.Module):
    """Every layer [L, m, q] with spectral norm one."""

    def forward(self, X: Tensor) -> Tensor:
        return X / torch.linalg.matrix_norm(X, ord=2, keepdim=True)


def make_block(maps: bool = False, **options: Any) -> tuple[Any, Tensor]:
    """A block, in float64, and an input for it."""
    options = {"activation": "tanh", "bias": True, "dtype": torch.float64, **options}
    if maps:
        return DeepConvResBlock(3, DEPTH, 4, **options), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    return DeepResBlock(4, DEPTH, 5, **options), torch.randn(6, 4, dtype=torch.float64)


def under_parametrization(block: nn.Module) -> None:
    for name in ("V", "W"):
        parametrize.register_parametrization(block, name, Halves())


def under_weight_norm(block: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(block, "V", dim=0)


def under_pruning(block: nn.Module) -> None:
    prune.l1_unstructured(block, "V", 0.3)
    prune.random_structured(block, "W", amount=0.3, dim=1)


def under_a_hook(block: nn.Module) -> None:
    nn.utils.weight_norm(block, "V", dim=0)


WAYS = (under_parametrization, under_weight_norm, under_pruning, under_a_hook)
ways = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
kinds = pytest.mark.parametrize("maps", [False, True], ids=["rows", "maps"])


def train(block: nn.Module, x: Tensor, steps: int = 1) -> None:
    """Moves the parameters: what was computed from them before is old."""
    optimizer = torch.optim.SGD(block.parameters(), lr=1.0)
    for _ in range(steps):
        optimizer.zero_grad()
        block(x).square().sum().backward()
        optimizer.step()


@ways
@kinds
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_gradients_reach_the_parameters_beneath(way: Callable[[nn.Module], None], maps: bool) -> None:
    block, x = make_block(maps)
    way(block)
    twin = reference.deep_conv_residual if maps else reference.deep_residual
    parameters = list(block.parameters())
    found = torch.autograd.grad(block(x).square().sum(), parameters, retain_graph=True)
    y = twin(x, block.V, block.W, block.hidden_bias, block.output_bias, activation="tanh")
    torch.testing.assert_close(found, torch.autograd.grad(y.square().sum(), parameters))


@ways
@kinds
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_what_one_does_with_depth(way: Callable[[nn.Module], None], maps: bool) -> None:
    """After a step of an optimiser, and where nothing is differentiated."""
    block, x = make_block(maps)
    way(block)
    for _ in range(2):  # twice: every call has a graph of its own
        train(block, x)
        states = block.trajectory(x, every=2)
        states.sum().backward()
        assert all(p.grad.any() for p in block.parameters())
    train(block, x)
    with torch.no_grad():
        states, parts, same = block.trajectory(x, every=2), block.split(4), block.resample(DEPTH)
        layers, V = block.to_layers(), limit.fields(block)["V"](1.0)
        euler = x + block.vector_field()(1 / DEPTH, x) / DEPTH
        y = block(x)
    assert torch.equal(states[-1], y)
    assert torch.equal(parts(x), y)
    assert torch.equal(same(x), y)
    assert torch.equal(V, block.V[-1])
    assert torch.equal(type(same).from_layers(layers)(x), y)
    torch.testing.assert_close(euler, block.trajectory(x)[1])
    for new in (*parts, same):
        assert type(new) is (DeepConvResBlock if maps else DeepResBlock)
        assert set(dict(new.named_parameters())) == {"V", "W", "hidden_bias", "output_bias"}
        assert all(p.requires_grad for p in new.parameters())
        copy.deepcopy(new)


def test_frozen_weights_stay_frozen() -> None:
    block, _ = make_block()
    under_parametrization(block)
    block.parametrizations.V.original.requires_grad_(False)
    for new in (block.resample(5), *block.split(2)):
        trained = {name for name, p in new.named_parameters() if p.requires_grad}
        assert trained == {"W", "hidden_bias", "output_bias"}


@pytest.mark.parametrize("method", ["forward", "trajectory", "split", "resample", "to_layers"])
def test_a_weight_is_computed_once_a_call(method: str) -> None:
    """Some are dear, and some change with every look: a power iteration, dropout of weights."""
    block, x = make_block()
    under_parametrization(block)
    halves = [block.parametrizations[name][0] for name in ("V", "W")]
    for half in halves:
        half.calls = 0
    arguments = {"forward": (x,), "trajectory": (x,), "split": (3,), "resample": (5,), "to_layers": ()}
    getattr(block, method)(*arguments[method])
    assert [half.calls for half in halves] == [1, 1]


def test_spectral_norm_over_depth() -> None:
    block, x = make_block()
    parametrize.register_parametrization(block, "W", UnitNorm())
    train(block, x, steps=3)
    norms = torch.linalg.matrix_norm(torch.stack([layer[0].weight for layer in block.to_layers()]), ord=2)
    torch.testing.assert_close(norms, torch.ones(DEPTH, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="does not implement right_inverse"):
        block.reset_parameters()


@kinds
def test_parameters_beneath_are_drawn_anew(maps: bool) -> None:
    options = {"norm": "batch"} if maps else {}
    block, _ = make_block(maps, **options)
    plain, _ = make_block(maps, **options)
    under_parametrization(block)
    if maps:
        parametrize.register_parametrization(block, "hidden_norm_weight", Halves())
        with torch.no_grad():
            block.parametrizations.hidden_norm_weight.original.zero_()
    for drawn in (block, plain):
        torch.manual_seed(1)
        drawn.reset_parameters()
    torch.testing.assert_close(block.V, plain.V)
    torch.testing.assert_close(block.W, plain.W)
    if maps:
        assert torch.equal(block.hidden_norm_weight, plain.hidden_norm_weight)
    pruned, _ = make_block(maps)
    prune.l1_unstructured(pruned, "V", 0.3)
    with pytest.raises(RuntimeError, match="V: expected parameters to draw anew, got weights that hooks"):
        pruned.reset_parameters()


def test_copies_and_checkpoints() -> None:
    block, x = make_block()
    under_parametrization(block)
    train(block, x)
    assert torch.equal(copy.deepcopy(block)(x), block(x))
    other, _ = make_block()
    under_parametrization(other)
    buffer = io.BytesIO()
    torch.save(block.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(x), block(x))
    torch.save(block.split(2), buffer := io.BytesIO())  # plain blocks, which can be pickled
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), block(x))
    for name in ("V", "W"):
        parametrize.remove_parametrizations(block, name)
    assert type(block) is DeepResBlock
    assert torch.equal(other(x), block(x))


def test_pruning_across_tensors_and_for_good() -> None:
    block, x = make_block()
    prune.global_unstructured([(block, "V"), (block, "W")], prune.L1Unstructured, amount=0.5)
    train(block, x, steps=2)
    y = block(x)
    for name in ("V", "W"):
        prune.remove(block, name)
    assert torch.equal(block(x), y)
    zeros = sum(int((p == 0).sum()) for p in (block.V, block.W))
    assert zeros == (block.V.numel() + block.W.numel()) // 2


def test_parameters_beneath_move_at_the_rate_of_the_flow() -> None:
    block, _ = make_block()
    under_parametrization(block)
    (group,) = gradient_flow_groups(block, lr=0.5)
    assert group["lr"] == 0.5 * DEPTH
    assert set(group["params"]) == set(block.parameters())


class Same(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x

    def right_inverse(self, x: Tensor) -> Tensor:
        return x


class Tied(nn.Module):
    """One layer's weights for all."""

    def forward(self, x: Tensor) -> Tensor:
        return x.expand(12, *x.shape[1:])

    def right_inverse(self, x: Tensor) -> Tensor:
        return x[:1]


@pytest.mark.parametrize("kind", [Same, Tied])
def test_what_is_drawn_anew_goes_through_the_inverse_alone(kind: type[nn.Module]) -> None:
    block = DeepResBlock(4, 12)
    parametrize.register_parametrization(block, "V", kind())
    before = block.V.clone()
    block.reset_parameters()
    assert not torch.equal(block.V, before)


def test_without_an_inverse_nothing_is_drawn_in_place() -> None:
    block = DeepResBlock(4, 12)
    parametrize.register_parametrization(block, "V", nn.Identity())
    before = block.V.clone()
    with pytest.raises(RuntimeError, match="right_inverse"):
        block.reset_parameters()
    assert torch.equal(block.V, before)


def test_a_pruned_model_is_resampled() -> None:
    model = nn.Sequential(nn.Linear(4, 4), DeepResBlock(4, 6))
    prune.l1_unstructured(model[1], "V", 0.5)
    x = torch.randn(3, 4)
    found = limit.resample(model, 6, lambda model: model(x).sum())
    assert found.before == found.after
    assert limit.ode_gap(model[1], x) < 1
