"""Thousands of training steps hold as much memory as a few; what the core keeps between calls is bounded.

Measured in fresh processes, after a warm-up in which libraries, caches and optimisers fill up, and three
times in a row:

- bytes that malloc has given out, to the byte, over the three: 1 KiB is allowed;
- Python's own blocks, to the block: 100 are allowed in the least of the three. The interpreter now and then
  takes up to a few hundred at once; a leak of one a step shows in each 200 of them;
- resident memory, which nothing that maps memory by itself escapes, but which is counted in pages and which
  malloc cuts to pieces: 1 MiB is allowed, a hundred bytes a step in the long form.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

MEASURED = """
import ctypes, gc, json, re, sys, warnings
import torch
from odeblock import DeepConvResBlock, DeepResBlock, DriftWarning, release_memory

class Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Mallinfo

WARM_UP = 240
STRETCHES = 3

def held():
    gc.collect()
    info = mallinfo()
    rollup = open("/proc/self/smaps_rollup").read()
    return {"malloc": info.uordblks + info.hblkhd, "blocks": sys.getallocatedblocks(),
            "resident": int(re.search(r"Rss:\\s+(\\d+)", rollup)[1]) * 1024}

def growth(step, steps):
    for i in range(min(steps, WARM_UP)):
        step(i)
    counts = [held()]
    for _ in range(STRETCHES):
        for i in range(steps):
            step(i)
        counts.append(held())
    grown = {key: counts[-1][key] - counts[0][key] for key in counts[0]}
    stretches = [after["blocks"] - before["blocks"] for before, after in zip(counts, counts[1:])]
    return {**grown, "blocks": min(stretches)}
"""

STEPS = (
    MEASURED
    + """
def training(make, shape, options, strategy):
    torch.manual_seed(0)
    sizes = (6, 12) if len(shape) == 2 else (4, 3)
    block = make(*sizes, init="tied", backward=strategy, **options)
    x, target = torch.randn(shape), torch.randn(shape)
    optimizer = torch.optim.SGD(block.parameters(), 1e-6, momentum=0.9)

    def step(i):
        optimizer.zero_grad()
        (block(x) - target).square().mean().backward()
        optimizer.step()
    return step

warnings.simplefilter("error", DriftWarning)
kinds = {
    "rows": (DeepResBlock, (20, 6), {"bias": True}),
    "few rows": (DeepResBlock, (2, 6), {"bias": True}),
    "maps": (DeepConvResBlock, (3, 4, 6, 6), {"bias": True}),
    "normalised": (DeepConvResBlock, (3, 4, 6, 6), {"norm": "batch", "scale": 0.01}),  # without drift
}
steps = int(sys.argv[1])
print(json.dumps({f"{kind}, {strategy}": growth(training(*kinds[kind], strategy), steps)
                  for kind in kinds for strategy in ("store", "checkpoint", "auto", "adjoint")}))
"""
)

# A new block each time, of another depth, dtype and strategy, and another batch; some fail on the way.
BLOCKS = (
    MEASURED
    + """
def step(i):
    make, shape = ((DeepResBlock, (1 + i % 6, 6)), (DeepConvResBlock, (1 + i % 3, 4, 5, 5)))[i % 2]
    strategy = ("store", "checkpoint", "auto", "adjoint")[i // 2 % 4]
    dtype = (torch.float32, torch.float64, torch.bfloat16)[i % 3]
    options = {"norm": "batch"} if i % 2 and i // 8 % 2 else {}
    block = make(shape[1], 10 + i % 5, init="tied", backward=strategy, dtype=dtype, **options)
    y = block(torch.randn(shape, dtype=dtype))
    if i % 5:
        y.square().sum().backward()
    try:
        block(torch.randn(3, 5, dtype=dtype))
    except ValueError:
        pass
    else:
        raise AssertionError

warnings.simplefilter("ignore", DriftWarning)
print(json.dumps({"blocks": growth(step, int(sys.argv[1]))}))
"""
)

# What the core keeps after calls that hold up to 250 MB of states, of ever other sizes.
KEPT = (
    MEASURED
    + """
block = DeepResBlock(64, 64, backward="store")
block(torch.randn(8, 64))
release_memory()
before, kept = held()["resident"], []
for i in range(int(sys.argv[1])):
    block(torch.randn(2000 + 997 * i % 6000, 64))
    kept.append(held()["resident"] - before)
release_memory()
print(json.dumps({"kept": kept, "released": held()["resident"] - before}))
"""
)


def run(program: str, count: int) -> dict[str, Any]:
    # One thread: several wait for each other where others have the processors, and hold nothing of their own.
    # Without malloc's cache of each thread, whose free pieces it counts as given out.
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0",
    }
    command = [sys.executable, "-c", program, str(count)]
    found: dict[str, Any] = json.loads(subprocess.check_output(command, env=environment))
    return found


def check(grown: dict[str, dict[str, int]]) -> None:
    for name, growth in grown.items():
        assert growth["malloc"] <= 1024, (name, growth)
        assert growth["blocks"] <= 100, (name, growth)
        assert growth["resident"] <= 2**20, (name, growth)


LONG = pytest.mark.long


@pytest.mark.parametrize("steps", [200, pytest.param(3500, marks=LONG)])
def test_steps_of_every_strategy(steps: int) -> None:
    check(run(STEPS, steps))


@pytest.mark.parametrize("blocks", [420, pytest.param(2940, marks=LONG)])
def test_blocks_that_come_and_go(blocks: int) -> None:
    """420: every combination of its settings."""
    check(run(BLOCKS, blocks))


@pytest.mark.parametrize("calls", [12, pytest.param(200, marks=LONG)])
def test_what_is_kept_between_calls_is_bounded(calls: int) -> None:
    found = run(KEPT, calls)
    assert max(found["kept"]) > 400e6  # the bound is reached
    assert max(found["kept"]) <= (512 << 20) + 10e6
    assert found["released"] <= 10e6
