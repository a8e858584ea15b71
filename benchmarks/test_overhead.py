"""The cost of a call beside its arithmetic (``overhead.py``); ``make bench``."""

from __future__ import annotations

import overhead
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

ROUNDS = 300


@pytest.mark.parametrize("work", overhead.WORKS)
def test_overhead(
    benchmark: BenchmarkFixture, work: str, measure: bool, request: pytest.FixtureRequest
) -> None:
    rounds = ROUNDS if measure and not request.config.getoption("quick") else 1
    least = benchmark.pedantic(overhead.least_seconds, (work, rounds))
    benchmark.extra_info.update(overhead=work, seconds=least, ratio=overhead.ratios(least))
