"""Memory that runs out in a call: MemoryError or PyTorch's, nothing is lost, and the next call works."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_soak import MEASURED

from odeblock import build_info

pytestmark = [
    pytest.mark.skipif(not build_info()["native"], reason="of the native core's memory"),
    pytest.mark.skipif(sys.platform != "linux", reason="limits the address space, and reads /proc"),
]

LIMITED = (
    MEASURED
    + """
import resource

MB = 1 << 20

def mapped():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()

def limit(more):
    soft = mapped() + more if more else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_AS, (soft, resource.RLIM_INFINITY))

def attempt(call):
    try:
        return call()
    except (MemoryError, RuntimeError) as error:
        assert isinstance(error, MemoryError) or "allocate memory" in str(error), error
        return None
"""
)

# Ever more memory, until a step succeeds: each allocation of it is once the one that fails.
STEP = (
    LIMITED
    + """
kind, strategy, stride = sys.argv[1], sys.argv[2], float(sys.argv[3])
torch.manual_seed(0)
make, sizes, shape, options = {
    "rows": (DeepResBlock, (64, 256), (4096, 64), {}),  # 268 MB of states and as much hidden; gradients 8 MB
    "maps": (DeepConvResBlock, (16, 64), (64, 16, 16, 16), {}),  # 67 MB
    "normalised": (DeepConvResBlock, (16, 64), (64, 16, 16, 16), {"norm": "batch"}),
}[kind]
block, h = make(*sizes, init="tied", backward=strategy, **options), torch.randn(shape)

def step(h):
    y = block(h)
    return (y.detach(), *torch.autograd.grad(y.sum(), [block.V, block.W]))

def forgotten():
    release_memory()
    return held()["malloc"]

few = step(h[:8])
right = [x.clone() for x in step(h)]
before, failures, more = forgotten(), 0, MB
while True:
    limit(more)
    found = attempt(lambda: step(h))
    limit(0)
    if found is not None:
        break
    failures += 1
    more += int(stride * MB)
    assert forgotten() - before < MB / 4, (forgotten() - before, more)
    assert all(map(torch.equal, step(h[:8]), few))
assert all(map(torch.equal, found, right))
print(failures)
"""
)

# What is kept of earlier calls is given back before memory runs out.
KEPT = (
    LIMITED
    + """
block = DeepResBlock(64, 256, backward="store")
block(torch.randn(8, 64))
block(torch.randn(2000, 64))  # 262 MB of states, kept
limit(150 * MB)
assert attempt(lambda: block(torch.randn(2400, 64))) is not None  # 315 MB: not within what is kept
"""
)


def run(program: str, *arguments: str) -> str:
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, check=True, timeout=600, text=True, stdout=subprocess.PIPE).stdout


LONG: Any = pytest.mark.long


@pytest.mark.parametrize(
    ("kind", "strategy", "stride"),
    [
        ("rows", "store", "100"),
        *(
            pytest.param(kind, strategy, "1", marks=LONG)
            for kind in ("rows", "maps", "normalised")
            for strategy in ("store", "checkpoint", "auto", "adjoint")
            if (kind, strategy) != ("normalised", "adjoint")  # PyTorch's operators, and 1 MB at a time
        ),
    ],
)
def test_a_step_that_finds_no_memory(kind: str, strategy: str, stride: str) -> None:
    assert int(run(STEP, kind, strategy, stride)) > 1


def test_what_is_kept_is_given_back_first() -> None:
    run(KEPT)


# Of the command line: 4 GB of weights, and a limit of 1 GB more than PyTorch has mapped.
COMMAND = (
    LIMITED
    + """
from odeblock.__main__ import main

limit(1000 * MB)
sys.exit(main(sys.argv[1:]))
"""
)


def test_a_command_says_that_memory_ran_out(tmp_path: Path) -> None:
    options = ["--dim", "4096", "--hidden-dim", "4096", "--depth", "30", "--output", str(tmp_path)]
    command = [sys.executable, "-c", COMMAND, "bench", "--quick", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("python -m odeblock: error: out of memory")
