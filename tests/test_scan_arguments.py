"""What residual_scan refuses: an f that is seen not to be pure, and arguments that do not fit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from odeblock.functional import residual_scan

Residual = Callable[[Tensor, Any], Tensor]


class Scaled(nn.Module):
    """A residual whose module has a state."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.weight = nn.Parameter(torch.ones(()), requires_grad=how == "parameter")
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, h: Tensor, Z: Tensor) -> Tensor:
        if self.how == "in place":
            self.steps.add_(1)
        elif self.how == "replaced":
            self.steps = self.steps + 1
        return self.weight * h * Z


def impure() -> dict[str, tuple[Residual, str]]:
    captured = torch.ones(4, requires_grad=True)
    counter = Scaled("in place")
    norm = nn.BatchNorm1d(4, affine=False)
    order = iter(range(1000))
    partial = functools.partial(lambda module, h, Z: module(h, Z), Scaled("replaced"))
    return {
        "captured": (lambda h, Z: h * Z * captured, "another tensor that requires one"),
        "parameter": (Scaled("parameter"), "pass that tensor, stacked over depth, in params"),
        "random": (lambda h, Z: F.dropout(h * Z), "without random numbers"),
        "changes h": (lambda h, Z: h.mul_(Z), "leave its arguments alone, but it changed h in place"),
        "changes Z": (lambda h, Z: h * Z["z"].mul_(2), r"it changed Z_k\['z'\] in place"),
        "module": (counter, r"changed the buffer 'steps' of f \(Scaled\)"),
        "method": (counter.forward, r"changed the buffer 'steps' of f \(Scaled\)"),
        "partial": (partial, r"changed the buffer 'steps' of argument 0 of f \(Scaled\)"),
        "closure": (lambda h, Z: counter(h, Z), r"changed the buffer 'steps' of counter \(Scaled\)"),
        "statistics": (lambda h, Z: norm(h) * Z, r"changed the buffer '.*' of norm \(BatchNorm1d\)"),
        "unrepeatable": (lambda h, Z: h * Z + next(order), "a second call gave another"),
    }


@pytest.mark.parametrize("name", impure())
def test_what_is_not_pure_is_refused(name: str) -> None:
    f, message = impure()[name]
    h, Z = torch.randn(3, 4), torch.randn(5, 4)
    params = {"z": Z.requires_grad_()} if name == "changes Z" else Z.requires_grad_()
    before = h.clone(), Z.clone()
    with pytest.raises(ValueError, match=f"f: expected .*{message}"):
        residual_scan(f, h, params)
    assert torch.equal(h, before[0])
    assert torch.equal(Z, before[1])


def test_a_tangent_that_would_be_lost_is_refused() -> None:
    """Where params need gradients; where they do not, the loop has it."""
    h, Z, x = torch.randn(3, 4), torch.randn(5, 4), torch.randn(4)

    def tangent(params: Tensor) -> Tensor:
        return forward_ad.unpack_dual(residual_scan(lambda h, Z: moving * h * Z, h, params)).tangent

    with forward_ad.dual_level():
        moving = forward_ad.make_dual(x, torch.ones_like(x))
        assert tangent(Z).abs().max() > 0
        with pytest.raises(ValueError, match="f: expected to move only with h and Z_k"):
            tangent(Z.requires_grad_())
        dual = forward_ad.make_dual(h, torch.ones_like(h))  # those of h are not lost
        assert forward_ad.unpack_dual(residual_scan(torch.mul, dual, Z)).tangent is not None


def test_what_is_pure_is_not_refused() -> None:
    h, Z = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True)
    norm, frozen = nn.BatchNorm1d(4, affine=False).eval(), torch.randn(4)
    for f in (
        lambda h, Z: norm(h) * Z + frozen,
        lambda h, Z: h * Z + torch.nan,
        lambda h, Z: h,
        torch.mul,
        functools.partial(torch.add, alpha=2),
    ):
        residual_scan(f, h, Z).sum().backward()
    with torch.no_grad():  # inference may draw random numbers
        residual_scan(lambda h, Z: F.dropout(h) * Z, h, Z)


def arguments(**changes: Any) -> dict[str, Any]:
    return {"f": torch.mul, "h": torch.randn(3, 4), "params": torch.randn(5, 4), **changes}


REFUSED = [
    ({"f": None}, TypeError, r"f: expected a function f\(h, Z_k\), got NoneType"),
    ({"f": lambda h, Z: (h, Z)}, TypeError, "f: expected a torch.Tensor from it, got tuple"),
    ({"f": lambda h, Z: h[:1]}, ValueError, r"f: .*the shape of h, \[3, 4\]; got \[1, 4\]"),
    ({"f": lambda h, Z: h.double()}, TypeError, "f: .*dtype of h, torch.float32; got torch.float64"),
    ({"h": [1.0]}, TypeError, "h: expected a torch.Tensor, got list"),
    ({"h": torch.tensor(1.0)}, ValueError, r"h: expected shape \[B, ...\].*got \[\]"),
    ({"h": torch.ones(3, 4, dtype=torch.int64)}, TypeError, "h: expected one of .*got torch.int64"),
    ({"params": {}}, TypeError, "params: expected at least one tensor, got {}"),
    ({"params": {"a": [torch.ones(2), 1.0]}}, TypeError, r"params\['a'\]\[1\]: .*got float"),
    ({"params": (torch.ones(2), None)}, TypeError, r"params\[1\]: .*got NoneType"),
    ({"params": nn.Linear(2, 2)}, TypeError, "params: expected a torch.Tensor, in lists.*got Linear"),
    ({"params": {"a": torch.tensor(1.0)}}, ValueError, r"params\['a'\]: .*L >= 1, got \[\]"),
    ({"params": [torch.ones(0, 4)]}, ValueError, r"params\[0\]: .*L >= 1, got \[0, 4\]"),
    (
        {"params": {"a": torch.ones(5, 4), "b": torch.ones(6)}},
        ValueError,
        r"params\['b'\]: expected shape \[5, \.\.\.\] \(L of params\['a'\]\), got \[6\]",
    ),
    ({"params": torch.ones(5, 4).to_sparse()}, TypeError, "params: expected a dense"),
    ({"scale": float("nan")}, ValueError, "scale: expected a finite number, got nan"),
    ({"scale": "0.1"}, TypeError, "scale: expected a number"),
    ({"backward": "reversible"}, ValueError, "backward: expected one of auto"),
    ({"strict": 1}, TypeError, "strict: expected True or False"),
    ({"anchors": 2}, ValueError, 'anchors: expected 0 unless backward is "adjoint"'),
    ({"memory_budget": 9, "backward": "store"}, ValueError, "memory_budget: expected None unless"),
]


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        residual_scan(**arguments(**changes))
