"""Options of the benchmark suite, and what its results say of the machine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import odeblock
from odeblock import native


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="tiny shapes: whether every benchmark still runs")


@pytest.fixture
def measure(request: pytest.FixtureRequest) -> bool:
    """Whether times are taken."""
    return not request.config.getoption("benchmark_disable")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.update(
        odeblock=odeblock.__version__,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        core=native.build_info(),
    )
