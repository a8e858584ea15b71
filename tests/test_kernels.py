"""The native kernels against the float64 oracle, forward and backward, by the rule of oracle.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import check_rule, make_case

from odeblock import build_info
from odeblock.activations import ACTIVATIONS
from odeblock.functional import deep_residual

STRATEGIES = ("auto", "store", "checkpoint", "adjoint")
DTYPES = (torch.float32, torch.float64)
# (B, q, m): nothing is a multiple of anything.
SHAPES = [
    (1, 1, 1),
    (3, 1, 5),
    (1, 17, 3),
    (3, 17, 23),
    (129, 17, 64),
    (3, 64, 17),
    (129, 64, 100),
    (3, 100, 64),
    (129, 100, 1),
    (1, 257, 130),
    (129, 257, 33),
]


def test_the_native_core_is_what_is_tested() -> None:
    assert build_info()["native"]
    assert build_info()["paths"]["cpu float32, float64"] == "native core"


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, dtype: torch.dtype, strategy: str) -> None:
    case = make_case(7, 17, 23, 12, activation=activation)
    check_rule(deep_residual, case, dtype, rebuilt=strategy == "adjoint", backward=strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, int, int], dtype: torch.dtype, strategy: str) -> None:
    case = make_case(*shape, 11, activation="tanh")
    check_rule(deep_residual, case, dtype, rebuilt=strategy == "adjoint", backward=strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("hidden_bias", "output_bias"), [(False, False), (True, False), (False, True)])
def test_biases(hidden_bias: bool, output_bias: bool, dtype: torch.dtype, strategy: str) -> None:
    case = make_case(5, 9, 13, 10, hidden_bias=hidden_bias, output_bias=output_bias, scale=0.07)
    check_rule(deep_residual, case, dtype, rebuilt=strategy == "adjoint", backward=strategy)


@pytest.mark.parametrize("strategy", ["auto", "store", "checkpoint"])
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5, 16, 17, 99])
def test_depths(depth: int, strategy: str) -> None:
    check_rule(deep_residual, make_case(10, 6, 7, depth), torch.float32, backward=strategy)


@pytest.mark.parametrize("smooth", [True, False], ids=["smooth", "iid"])
@pytest.mark.parametrize("depth", [64, 256, 1024])
@pytest.mark.parametrize("strategy", ["checkpoint", "adjoint"])
def test_deep(strategy: str, depth: int, smooth: bool) -> None:
    case = make_case(16, 48, 40, depth, activation="tanh", smooth=smooth)
    check_rule(deep_residual, case, torch.float32, rebuilt=strategy == "adjoint", backward=strategy)


@pytest.mark.parametrize("strategy", ["store", "checkpoint", "adjoint"])
def test_several_row_tiles(strategy: str) -> None:
    # Wide enough that a batch of this size is swept tile after tile, weight gradients added up.
    check_rule(deep_residual, make_case(700, 300, 20, 8), torch.float32, backward=strategy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_scale_may_be_negative_or_zero(dtype: torch.dtype) -> None:
    for scale in (-0.1, 0.0):
        check_rule(deep_residual, make_case(4, 5, 6, 7, scale=scale), dtype)


def test_the_baseline_instruction_set(request: pytest.FixtureRequest) -> None:
    """The same tests with the kernels that run on every processor of the architecture."""
    if build_info()["cpu_features"] == "baseline":
        return  # it is what the other tests of this file have just run
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            __file__,
            "-k",
            "activations or shapes or biases or tiles",
        ],
        env={**os.environ, "ODEBLOCK_CPU": "baseline"},
        cwd=Path(request.config.rootpath),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:]
