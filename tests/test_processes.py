"""A block in forked and spawned processes, in DataLoader's workers, and in several threads at once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from odeblock import DeepConvResBlock, DeepResBlock, build_info, release_memory

STRATEGIES = ("store", "checkpoint", "auto", "adjoint")

# ---- forks -----------------------------------------------------------------------------------------------

# Ends by a signal where a child hangs. Children leave by os._exit: with 0, or 1 after an error.
FORKS = """
import os, signal, sys, traceback
import torch
from odeblock import DeepConvResBlock, DeepResBlock, build_info

def in_child(check):
    pid = os.fork()
    if pid:
        assert os.waitpid(pid, 0)[1] == 0, check
        return
    signal.alarm(60)
    try:
        check()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)

torch.set_num_threads(2)
"""

# An import starts no threads of OpenMP, for which PyTorch's operators would wait in the child.
IMPORTED = FORKS + "in_child(lambda: torch.empty(1000, 1000).tanh())"

# A block has been used before the fork, with threads, and is used after it.
USED = (
    FORKS
    + """
torch.manual_seed(0)
blocks = [DeepResBlock(16, 64, backward=strategy) for strategy in ("store", "checkpoint", "auto", "adjoint")]
calls = [(block, torch.randn(rows, 16)) for block in blocks for rows in (500, 3)]
calls += [(DeepConvResBlock(4, 16, backward="checkpoint"), torch.randn(40, 4, 8, 8))]

def results():
    return [torch.autograd.grad(block(h).square().sum(), list(block.parameters())) for block, h in calls]

def check():
    info = build_info()
    assert info["native"] and not info["openmp"]
    for found, expected in zip(results(), before):
        assert all(map(torch.equal, found, expected))

before = results()
in_child(check)
in_child(lambda: in_child(check))
check_parent = results()
assert all(torch.equal(a, b) for x, y in zip(check_parent, before) for a, b in zip(x, y))
"""
)


@pytest.mark.skipif(not build_info()["native"], reason="PyTorch's operators do not come back in such a child")
@pytest.mark.parametrize("program", [IMPORTED, USED], ids=["imported", "used"])
def test_a_forked_child_comes_back(program: str) -> None:
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


# ---- workers ---------------------------------------------------------------------------------------------


class Features(Dataset[Tensor]):
    """What a block makes of an item; its gradients as well."""

    def __init__(self, blocks: list[nn.Module], h: Tensor) -> None:
        self.blocks, self.h = blocks, h

    def __len__(self) -> int:
        return len(self.h)

    def __getitem__(self, index: int) -> Tensor:
        h = self.h[index : index + 1].clone().requires_grad_()
        outputs = [block(h) for block in self.blocks]
        return torch.cat([*outputs, *torch.autograd.grad(sum(y.sum() for y in outputs), h)]).detach()


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_data_loader(start: str) -> None:
    blocks: list[nn.Module] = [DeepResBlock(8, 32, backward=strategy) for strategy in STRATEGIES]
    data = Features(blocks, torch.randn(12, 8))
    expected = torch.stack([data[i] for i in range(len(data))])
    loader = DataLoader(data, batch_size=3, num_workers=2, multiprocessing_context=start, timeout=120)
    assert torch.equal(torch.cat(list(loader)), expected)


# ---- threads ---------------------------------------------------------------------------------------------

CALLERS = 6


@pytest.fixture
def callers() -> Iterator[ThreadPoolExecutor]:
    """Python threads, which have the interpreter in turns of a hundredth of the usual time."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    with ThreadPoolExecutor(CALLERS) as pool:
        yield pool
    sys.setswitchinterval(interval)


def gradients(block: nn.Module, h: Tensor) -> tuple[Tensor, ...]:
    """The output and every gradient."""
    h = h.clone().requires_grad_()
    y = block(h)
    return (y.detach(), *torch.autograd.grad(y.square().sum(), [h, *block.parameters()]))


@pytest.mark.parametrize("rounds", [3, pytest.param(300, marks=pytest.mark.long)])
@pytest.mark.parametrize("same", [True, False], ids=["same module", "different modules"])
@pytest.mark.parametrize("kind", ["rows", "maps"])
def test_calls_from_several_threads(
    kind: str, same: bool, rounds: int, callers: ThreadPoolExecutor, threads: None
) -> None:
    """Forward and backward, together and apart, give the bits of one call after another."""
    torch.set_num_threads(2)
    make: Any = DeepResBlock if kind == "rows" else DeepConvResBlock
    blocks = {s: [make(8, 24, backward=s, init="tied") for _ in range(CALLERS)] for s in STRATEGIES}
    shapes = [((2, 40, 300)[i % 3], 8) if kind == "rows" else (1 + 4 * i, 8, 7, 7) for i in range(CALLERS)]
    work = [
        (blocks[strategy][0 if same else i], torch.randn(shape))
        for i, shape in enumerate(shapes)
        for strategy in STRATEGIES
    ]
    expected = [tuple(x.clone() for x in gradients(*call)) for call in work]
    for _ in range(rounds):
        begun = [callers.submit(gradients, *call) for call in work]
        release_memory()  # while they run
        for found, right in zip(begun, expected, strict=True):
            assert all(map(torch.equal, found.result(), right))
    # Forwards here, backwards there.
    starts = [h.clone().requires_grad_() for _, h in work]
    outputs = [block(h) for (block, _), h in zip(work, starts, strict=True)]
    begun = [
        callers.submit(torch.autograd.grad, y.square().sum(), [h, *block.parameters()])
        for (block, _), h, y in zip(work, starts, outputs, strict=True)
    ]
    for found, right in zip(begun, expected, strict=True):
        assert all(map(torch.equal, found.result(), right[1:]))
