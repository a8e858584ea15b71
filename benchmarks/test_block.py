"""Speed of the block against the eager PyTorch loop, and of its strategies against ``store``, float32.

Rounds are interleaved: the set-up of every round of ours runs and times one round of the peer, so that both
meet the same machine. `extra_info` holds the ratio of medians and the peer's time; only ratios mean anything
on a shared machine. Both are checked against float64 before they are timed.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from odeblock import initializers, reference
from odeblock.functional import deep_residual

ROUNDS = 10
# (B, q, m, L)
SHAPES = [(64, 16, 32, 1024), (256, 64, 64, 256), (1024, 64, 64, 256), (1024, 128, 128, 256)]
STRATEGIES = ("auto", "store", "checkpoint", "adjoint")


def make_inputs(batch: int, dim: int, hidden: int, depth: int) -> tuple[Tensor, Tensor, Tensor]:
    V, W = torch.empty(depth, dim, hidden), torch.empty(depth, hidden, dim)
    initializers.smooth_(V, W)
    return torch.randn(batch, dim), V, W


def forward(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], **options: str
) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return (function(*inputs, activation="gelu_tanh", **options),)


def training_step(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], **options: str
) -> tuple[Tensor, ...]:
    inputs = tuple(tensor.detach().requires_grad_() for tensor in inputs)
    y = function(*inputs, activation="gelu_tanh", **options)
    return torch.autograd.grad(y, inputs, torch.ones_like(y))


def compare(
    benchmark: BenchmarkFixture,
    work: Callable[..., tuple[Tensor, ...]],
    shape: tuple[int, int, int, int],
    flops: int,
    peer_function: Callable[..., Tensor] = reference.deep_residual,
    peer_name: str = "eager loop",
    **options: str,
) -> None:
    inputs = make_inputs(*shape)
    truth = work(reference.deep_residual, tuple(tensor.double() for tensor in inputs))
    for function, chosen in ((peer_function, {}), (deep_residual, options)):
        for found, value in zip(work(function, inputs, **chosen), truth, strict=True):
            assert (found - value).abs().max() < 1e-5 * value.abs().max()

    peer: list[float] = []

    def run_peer() -> None:
        begin = time.perf_counter()
        work(peer_function, inputs)
        peer.append(time.perf_counter() - begin)

    benchmark.pedantic(
        lambda: work(deep_residual, inputs, **options), setup=run_peer, rounds=ROUNDS, warmup_rounds=1
    )
    if benchmark.stats is not None:  # None under --benchmark-disable
        batch, dim, hidden, depth = shape
        seconds = benchmark.stats.stats.median
        benchmark.extra_info.update(
            peer=peer_name,
            peer_median=statistics.median(peer[1:]),
            ratio=statistics.median(peer[1:]) / seconds,
            gigaflops=flops * batch * dim * hidden * depth / seconds / 1e9,
        )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(benchmark: BenchmarkFixture, shape: tuple[int, int, int, int]) -> None:
    compare(benchmark, forward, shape, 4)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training_step(benchmark: BenchmarkFixture, shape: tuple[int, int, int, int], strategy: str) -> None:
    compare(benchmark, training_step, shape, 16, backward=strategy)


@pytest.mark.parametrize("strategy", ["checkpoint", "adjoint"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_strategy_over_store(
    benchmark: BenchmarkFixture, shape: tuple[int, int, int, int], strategy: str
) -> None:
    """What not storing costs: 1 / ``ratio`` of a step with ``store``."""
    store = functools.partial(deep_residual, backward="store")
    compare(benchmark, training_step, shape, 16, store, "store", backward=strategy)
