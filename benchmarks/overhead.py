"""What a call costs where there is next to nothing to compute: ours against the operators that it stands for.

One row of 16 features, one step, float32: ``h + scale * F.linear(F.gelu(F.linear(h, W[0])), V[0])`` as a user
would write it, as a function and as a module. Rounds are interleaved, and the least of each is taken: other
programs only ever add time.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odeblock import DeepResBlock
from odeblock.functional import deep_residual

DIM = 16
CALLS = 10
"""Of a round, after one that finds the caches as it left them."""

Contender = Callable[[Tensor], Tensor]


def operators(h: Tensor, V: Tensor, W: Tensor, scale: float = 1.0) -> Tensor:
    return h + scale * F.linear(F.gelu(F.linear(h, W[0])), V[0])


class Step(nn.Module):
    """The module of one step that a list of them is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.V, self.W = (nn.Parameter(torch.randn(1, DIM, DIM)) for _ in range(2))

    def forward(self, h: Tensor) -> Tensor:
        return operators(h, self.V, self.W)


def contenders(work: str) -> dict[str, Contender]:
    """Ours and theirs, function and module."""
    weights = [torch.randn(1, DIM, DIM, requires_grad=work == "training") for _ in range(2)]
    return {
        "function": lambda h: deep_residual(h, *weights),
        "operators": lambda h: operators(h, *weights),
        "module": DeepResBlock(DIM, 1),
        "module of operators": Step(),
    }


PEERS = {"function": "operators", "module": "module of operators"}


def inference(call: Contender, h: Tensor, grad: Tensor) -> None:
    with torch.no_grad():
        call(h)


def training(call: Contender, h: Tensor, grad: Tensor) -> None:
    call(h).backward(grad)


WORKS = {"inference": inference, "training": training}


def least_seconds(work: str, rounds: int) -> dict[str, float]:
    """Of a call by each contender."""
    run, calls = WORKS[work], contenders(work)
    h, grad = torch.randn(1, DIM, requires_grad=work == "training"), torch.ones(1, DIM)
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            run(call, h, grad)
            begin = time.perf_counter()
            for _ in range(CALLS):
                run(call, h, grad)
            least[name] = min(least[name], (time.perf_counter() - begin) / CALLS)
    return least


def ratios(least: dict[str, float]) -> dict[str, float]:
    """Ours over theirs: 1 is as much."""
    return {name: least[name] / least[peer] for name, peer in PEERS.items()}
