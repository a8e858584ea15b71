"""A small call costs no more than the operators it stands for, and the shortcut that checks take is safe."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from odeblock import validation
from odeblock.functional import deep_conv_residual, deep_residual

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import overhead

ALLOWED = 1.1
"""A tenth for what a busy machine makes of the least of many rounds; measured are 0.7 and 0.9."""


@pytest.fixture
def untraced() -> Iterator[None]:
    """Without coverage, which would be a part of what is measured."""
    tracer = sys.gettrace()
    sys.settrace(None)
    yield
    sys.settrace(tracer)


@pytest.mark.usefixtures("threads", "untraced")
@pytest.mark.parametrize("work", overhead.WORKS)
def test_a_small_call_costs_no_more_than_its_operators(work: str) -> None:
    torch.set_num_threads(1)  # two threads take PyTorch longer
    for _ in range(8):  # others may have the machine for a while
        found = overhead.ratios(overhead.least_seconds(work, rounds=100))
        if max(found.values()) <= ALLOWED:
            break
    assert max(found.values()) <= ALLOWED, found


def arguments(**changes: Any) -> dict[str, Any]:
    return {"h": torch.randn(2, 4), "V": torch.randn(3, 4, 5), "W": torch.randn(3, 5, 4), **changes}


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ({"strict": True}, {"strict": 1}),
        ({"anchors": 1, "backward": "adjoint"}, {"anchors": True, "backward": "adjoint"}),
        ({"scale": 1}, {"scale": True}),
        ({"hidden_bias": torch.randn(3, 5)}, {"hidden_bias": torch.randn(3, 4)}),
        ({"hidden_bias": torch.randn(3, 5)}, {"output_bias": torch.randn(3, 5)}),
        ({"W": torch.randn(3, 5, 4)}, {"W": torch.randn(3, 5, 4).double()}),
        ({"W": torch.randn(3, 5, 4)}, {"W": torch.randn(3, 5, 4, device="meta")}),
        ({"W": torch.randn(3, 5, 4)}, {"W": torch.randn(3, 5, 4).to_sparse()}),
        ({"h": torch.randn(2, 4)}, {"h": torch.randn(2, 4).numpy()}),
        ({"activation": "tanh"}, {"activation": ["tanh"]}),
        ({"h": torch.randn(4)}, {"h": torch.randn(5)}),
    ],
)
def test_a_call_that_looks_like_one_that_passed_is_refused_all_the_same(
    good: dict[str, Any], bad: dict[str, Any]
) -> None:
    for _ in range(2):
        deep_residual(**arguments(**good))
        with pytest.raises((TypeError, ValueError), match="expected"):
            deep_residual(**arguments(**bad))


def test_maps_and_rows_are_told_apart() -> None:
    V, W = torch.randn(3, 4, 5, 1, 1), torch.randn(3, 5, 4, 1, 1)
    deep_conv_residual(torch.randn(4, 4, 4), V, W)
    with pytest.raises(ValueError, match=r"V: expected shape \[L, q, m\]"):
        deep_residual(torch.randn(4, 4, 4), V, W)


def test_what_passed_is_remembered_without_its_tensors() -> None:
    tensors = arguments()
    options = [
        {"scale": 0.5},
        {"anchors": torch.tensor(2), "backward": "adjoint"},  # an option of which the value may change
    ]
    for option in options:
        deep_residual(**tensors, **option)
    kept = [weakref.ref(x) for x in (*tensors.values(), options[1]["anchors"])]
    del tensors, options, option
    gc.collect()
    assert not any(ref() is not None for ref in kept)


def test_not_more_is_remembered_than_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "MOST_ACCEPTED", 4)
    for batch in range(20):
        deep_residual(**arguments(h=torch.randn(batch, 4)))
        assert len(validation._accepted) <= 4
