"""Peak memory of a training step, in fresh processes: the adjoint's does not grow with depth."""

from __future__ import annotations

import os
import subprocess
import sys

# The process's peak in bytes during one step (VmHWM: ru_maxrss would be inherited from the parent), beyond
# what it held before, parameters and their gradients.
PROGRAM = """
import re, sys
import torch
from odeblock import DeepConvResBlock, DeepResBlock, release_memory

def status(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

depth, strategy, budget, block_type = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]) or None, sys.argv[4]
block_type, channels, shape = {
    "rows": (DeepResBlock, 32, (8192, 32)),
    "narrow rows": (DeepResBlock, 4, (65536, 4)),
    "maps": (DeepConvResBlock, 4, (64, 4, 32, 32)),
}[block_type]
torch.manual_seed(0)
block_type(channels, 8)(torch.randn(shape)[:64]).sum().backward()
block = block_type(channels, depth, backward=strategy, memory_budget=budget)
x = torch.randn(shape)
release_memory()
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
block(x).square().sum().backward()
print(status("VmHWM") - before - sum(p.numel() * 4 for p in block.parameters()))
"""


def step_bytes(depth: int, strategy: str, budget: int = 0, block_type: str = "rows") -> int:
    command = [sys.executable, "-c", PROGRAM, str(depth), strategy, str(budget), block_type]
    # Every tensor is mapped by itself: what was freed before must not count as held, and be used again.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    return int(subprocess.check_output(command, env=environment, text=True))


STATE = 8192 * 32 * 4  # one state of the batch, of rows or of maps: 1 MiB


def test_the_adjoint_is_flat_in_depth() -> None:
    # Few weights, for the peak need not lie where their gradients are complete.
    shallow, deep = (step_bytes(L, "adjoint", 0, "narrow rows") for L in (64, 4096))
    assert shallow > 2 * STATE  # the measurement sees the step
    assert 0.95 * shallow < deep < 1.05 * shallow


def test_the_adjoint_of_maps_is_flat_in_depth() -> None:
    shallow, deep = (step_bytes(L, "adjoint", 0, "maps") for L in (32, 512))
    assert shallow > 2 * STATE
    assert abs(deep - shallow) < STATE  # the kernel counts resident pages in batches, up to half a megabyte
    assert step_bytes(512, "checkpoint", 0, "maps") - step_bytes(32, "checkpoint", 0, "maps") > 10 * STATE


def test_store_grows_linearly() -> None:
    shallow, deep = step_bytes(64, "store"), step_bytes(512, "store")
    stored = 2 * STATE  # with the hidden values, of which there are as many
    assert 0.9 * (512 - 64) * stored < deep - shallow < 1.1 * (512 - 64) * stored


def test_checkpoint_and_auto_grow_like_the_square_root() -> None:
    for strategy in ("checkpoint", "auto"):
        shallow, deep = step_bytes(64, strategy), step_bytes(1024, strategy)
        assert deep - shallow < 2.5 * (1024**0.5 - 64**0.5) * STATE


def test_a_step_keeps_its_memory_budget() -> None:
    """Beyond the budget only what every step takes: y and gradients of it, and the workspace of the tiles.
    (That is measured where two states are stored; there the peak need not lie in the backward: up to a state
    too much.)"""
    besides = step_bytes(2, "store") - 4 * STATE
    for states in (2, 8, 40):
        spent = step_bytes(1024, "checkpoint", states * STATE) - besides
        assert (states - 1.5) * STATE < spent < (states + 0.5) * STATE


def test_a_step_with_maps_keeps_its_memory_budget() -> None:
    besides = step_bytes(2, "store", 0, "maps") - 4 * STATE
    for states in (4, 20):
        spent = step_bytes(256, "checkpoint", states * STATE, "maps") - besides
        assert (states - 1.5) * STATE < spent < (states + 0.5) * STATE


def test_kept_memory_is_given_back() -> None:
    program = (
        PROGRAM
        + """
def held():
    return status("VmRSS")

del x, block
release_memory()
without = held()
block = DeepResBlock(32, 512, backward="store")
block(torch.randn(2048, 32)).sum().backward()  # 268 MB of states
kept = held()
release_memory()
print(kept - without, held() - without)
"""
    )
    command = [sys.executable, "-c", program, "64", "store", "0", "rows"]
    kept, released = map(int, subprocess.check_output(command, text=True).splitlines()[1].split())
    assert kept > 250e6
    assert released < 50e6
