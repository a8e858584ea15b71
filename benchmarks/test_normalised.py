"""A training step with batch normalisation against the loops that a user would write; ``make bench``.

As in ``test_speed.py`` the rounds are interleaved, everyone is checked against float64 before, and only the
ratios in ``extra_info`` mean anything on a shared machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from odeblock import DeepConvResBlock

SHAPES = [(64, 16, 256, 10), (64, 32, 64, 16), (16, 64, 32, 8)]  # B, C = M, L, H; kernels 3 x 3
QUICK = [(3, 5, 4, 4)]
STRATEGIES = ("store", "auto")
ROUNDS = 5


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("shape", QUICK if metafunc.config.getoption("quick") else SHAPES, ids=str)


def loop(h: Tensor, *stacks: Tensor, layout: torch.memory_format) -> Tensor:
    """Weights unbound once, the step added in one operation. stacks: V, W, γ and β of either convolution."""
    h, scale = h.contiguous(memory_format=layout), 1 / len(stacks[0])
    for V, W, *affine in zip(*(stack.unbind() for stack in stacks), strict=True):
        z = F.conv2d(h, W.contiguous(memory_format=layout), padding=1)
        s = F.gelu(F.batch_norm(z, None, None, *affine[:2], training=True))
        o = F.conv2d(s, V.contiguous(memory_format=layout), padding=1)
        h = torch.add(h, F.batch_norm(o, None, None, *affine[2:], training=True), alpha=scale)
    return h.contiguous()


def test_normalised_step(
    benchmark: BenchmarkFixture, shape: tuple[int, int, int, int], measure: bool
) -> None:
    batch, channels, depth, size = shape
    torch.manual_seed(0)
    block = DeepConvResBlock(channels, depth, norm="batch")
    names = ("V", "W", "hidden_norm_weight", "hidden_norm_bias", "output_norm_weight", "output_norm_bias")
    parameters = [getattr(block, name) for name in names]
    h, grad = torch.randn(2, batch, channels, size, size)  # of the sum of y next to nothing depends

    def step(name: str, dtype: torch.dtype = torch.float32) -> Sequence[Tensor]:
        x = h.to(dtype, copy=True).requires_grad_()
        stacks = [p if dtype == p.dtype else p.detach().to(dtype).requires_grad_() for p in parameters]
        if name in STRATEGIES:
            block.backward = name
            y = block(x)
        else:
            last = torch.channels_last if name == "channels_last" else torch.contiguous_format
            y = loop(x, *stacks, layout=last)
        return y.detach(), *torch.autograd.grad(y, [x, *stacks], grad.to(dtype))

    peers = ("eager", "channels_last")
    first, *others = [*STRATEGIES, *peers]
    expected = step("eager", torch.float64)
    for name in (first, *others):  # and warm
        for a, b in zip(step(name), expected, strict=True):
            assert (a - b).abs().max() <= 1e-3 * b.abs().max(), name
    seconds: dict[str, list[float]] = {name: [] for name in others}

    def run_others() -> None:
        for name in others:
            begin = time.perf_counter()
            step(name)
            seconds[name].append(time.perf_counter() - begin)

    benchmark.pedantic(lambda: step(first), setup=run_others, rounds=ROUNDS if measure else 1)
    if benchmark.stats is None:  # under --benchmark-disable
        return
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    medians[first] = benchmark.stats.stats.median
    fastest = min(peers, key=lambda name: medians[name])
    ratio = {name: medians[fastest] / medians[name] for name in STRATEGIES}
    benchmark.extra_info.update(normalised=shape, seconds=medians, fastest_peer=fastest, ratio=ratio)
