"""Some of the calls of ``fuzz.py``; ``make test-long`` makes more."""

from __future__ import annotations

import pytest
import torch
from fuzz import fuzz


@pytest.mark.parametrize("calls", [2000, pytest.param(100_000, marks=pytest.mark.long)])
@pytest.mark.filterwarnings("ignore:Casting complex values")
def test_calls_end_in_a_right_answer_or_an_error_that_names_an_argument(calls: int, threads: None) -> None:
    torch.set_num_threads(1)
    outcomes = fuzz(calls, seed=1)
    assert sum(outcomes.values()) == calls
    assert min(outcomes["right"], outcomes["TypeError"], outcomes["ValueError"]) > calls / 10
