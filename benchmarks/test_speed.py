"""Speed and memory of the block against what a user would pick instead; ``make bench``.

One benchmark is one kind of work at one shape. Its rounds are interleaved: pytest-benchmark times the first
of our strategies, the set-up of every round the others, each peer and the processor's multiply-adds, once
each, so that all meet the same machine. Who takes less than ``WARMED`` seconds runs once more before,
untimed: a training loop finds the caches and the allocator as its own last step left them, not as another
way to compute did (whose freed memory is given back to the system, milliseconds of it, by the next who
frees anything). Everyone is checked against float64 before. ``extra_info`` has everyone's median, peak
memory and share of the machine's peak, and the ratios of the fastest peer to ours; only ratios mean
anything on a shared machine. ``report.py`` makes tables and figures of the results.
"""

from __future__ import annotations

import functools
import statistics
import time

import contenders
import machine
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from odeblock import reference

SHAPES: list[contenders.Shape] = [  # B, q, m, L
    (1, 16, 16, 1024),
    (1, 64, 64, 1024),
    (1, 256, 256, 128),
    (1, 512, 512, 64),
    (32, 16, 32, 1024),
    (32, 64, 64, 1024),
    (32, 256, 256, 128),
    (32, 512, 512, 64),
    (64, 16, 32, 1024),
    (256, 64, 64, 64),
    (256, 64, 64, 256),
    (256, 64, 64, 1024),
    (256, 64, 64, 4096),
    (1024, 64, 64, 256),
    (1024, 64, 64, 1024),
    (1024, 128, 128, 256),
    (1024, 256, 256, 128),
    (1024, 512, 512, 64),
    # of maps: B, C, M, L, H, k
    (64, 16, 16, 256, 10, 3),
    (1, 16, 16, 256, 10, 3),
    (64, 16, 16, 256, 10, 5),
    (64, 32, 32, 64, 16, 3),
    (16, 64, 64, 64, 8, 3),
    (4, 16, 16, 64, 32, 3),
]
QUICK: list[contenders.Shape] = [(3, 5, 7, 8), (3, 5, 7, 8, 4, 3)]
ROUNDS = 3, 30  # at least, at most
SECONDS = 8.0  # that the rounds of a benchmark may take, beyond the fewest
WARMED = 0.2


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.getoption("quick")
    metafunc.parametrize("shape", QUICK if quick else SHAPES, ids=str)


@functools.lru_cache(maxsize=1)
def truth(work: str, shape: contenders.Shape) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Inputs, and the results of ``work`` in float64."""
    torch.manual_seed(0)
    torch.compiler.reset()
    inputs = contenders.make_inputs(*shape)
    h, V, W = (x.double().requires_grad_() for x in inputs)
    block = reference.deep_residual if len(shape) == 4 else reference.deep_conv_residual
    y = block(h, V, W, activation=contenders.ACTIVATION)
    results = [y.detach()]
    if work == "training":
        results += torch.autograd.grad(y, (h, V, W), torch.ones_like(y))
    return inputs, tuple(results)


@functools.cache
def memory(work: str, name: str, shape: contenders.Shape) -> int | None:
    return machine.peak_bytes(work, name, shape)


@pytest.mark.parametrize("work", contenders.WORKS)
def test_speed(
    benchmark: BenchmarkFixture,
    work: str,
    shape: contenders.Shape,
    measure: bool,
    request: pytest.FixtureRequest,
) -> None:
    run = contenders.WORKS[work]
    inputs, expected = truth(work, shape)
    ours, peers = contenders.strategies_of(work), contenders.peers_of(work, shape)
    first, *others = [*ours, *peers]
    seconds: dict[str, list[float]] = {name: [] for name in others}
    peak: list[float] = []

    def timed(name: str) -> float:
        begin = time.perf_counter()
        run(name, inputs)
        return time.perf_counter() - begin

    once: dict[str, float] = {}
    errors = {}
    for name in (first, *others):
        found = run(name, inputs)
        errors[name] = max(
            float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)
        )
        assert errors[name] < contenders.TOLERANCE[name], (name, errors[name])
        del found
        once[name] = timed(name)

    def warm(name: str) -> None:
        if measure and once[name] < WARMED:
            run(name, inputs)

    def run_others() -> None:
        peak.append(machine.fma_peak())
        for name in others:
            warm(name)
            seconds[name].append(timed(name))
        warm(first)

    cost = sum(2 * t if t < WARMED else t for t in once.values())
    rounds = max(ROUNDS[0], min(ROUNDS[1], int(SECONDS / cost))) if measure else 1
    benchmark.pedantic(lambda: run(first, inputs), setup=run_others, rounds=rounds)
    if benchmark.stats is None:  # under --benchmark-disable
        return
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    medians[first] = benchmark.stats.stats.median
    fastest = min(peers, key=lambda name: medians[name])
    operations = contenders.operations(work, shape)
    most = statistics.median(peak)
    # A process each, of seconds: in short one, for here they have all run.
    alone = [first] if request.config.getoption("quick") else list(medians)
    benchmark.extra_info.update(
        work=work,
        shape=shape,
        rounds=rounds,
        seconds=medians,
        fastest_peer=fastest,
        ratio={name: medians[fastest] / medians[name] for name in ours},
        share_of_peak={name: operations / t / most if most else None for name, t in medians.items()},
        errors=errors,
        peak_bytes={name: memory(work, name, shape) if name in alone else None for name in medians},
    )
