"""Shared set-up: the tests run against the installed package, from a fixed seed."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# `python -m pytest` puts the checkout on the path, where it would hide an installed package that has the
# native core behind sources that have none.
_root = Path(__file__).resolve().parents[1]
if not any((_root / "odeblock").glob("_core*.so")):
    sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != _root]

# Idle OpenMP threads sleep rather than spin: tests and their subprocesses share few cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch  # noqa: E402

# Fixtures that take long: made by one worker (pytest-xdist) for all tests of a file that ask for them, the
# emulated kernels for those of all files.
SHARED = {
    "watched",
    "parts",
    "rest",
    "faults",
    "folder",
    "tree",
    "uninterrupted",
    "finished",
    "quick",
    "emulated_parts",
    "both",
    "outputs",
    "everyone",
}


@pytest.hookimpl(tryfirst=True)  # pytest-xdist's own hook comes next, and takes the groups that it finds
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        shared = SHARED & set(getattr(item, "fixturenames", ()))
        if shared:
            group = "emulated kernels" if "emulated_parts" in shared else f"{item.path.name}: {min(shared)}"
            item.add_marker(pytest.mark.xdist_group(group))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What tests record of themselves, workers' too."""
    for report in terminalreporter.stats.get("passed", []):
        for name, text in report.user_properties:
            terminalreporter.section(name)
            terminalreporter.write(text)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads that a test changes."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def emulated_parts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Object files of every CUDA kernel, compiled for the CPU."""
    from test_emulated_kernels import PRODUCTS, compile_parts

    return compile_parts(tmp_path_factory.mktemp("emulated"), PRODUCTS, "-fPIC")


@pytest.fixture(scope="session")
def program(emulated_parts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program that runs one of them."""
    from test_emulation import TESTS, build_emulated

    target = tmp_path_factory.mktemp("program") / "program"
    return build_emulated(TESTS / "emulation" / "kernels.cpp", target, objects=emulated_parts)
