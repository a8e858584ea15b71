"""Peak memory of one training step, measured in a fresh process: ``python -m odeblock.experiments.memory``.

On the CPU: VmHWM of /proc/self/status, the largest resident set of this very process (``ru_maxrss`` would be
inherited from the parent). On a GPU: PyTorch's own ``max_memory_allocated``.
"""

from __future__ import annotations

import ctypes
import json
import re
import statistics
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..drift import DriftWarning
from ..native import release_memory
from ..network import DeepResNet
from .networks import eager_twin

WARM_UP_DEPTH = 2

REPEATS = 3  # the kernel counts resident pages in batches per core: a single reading is off by some of them


def step_memory(network: dict[str, Any], batch: int, device: str, *, eager: bool) -> int | None:
    """Bytes that forward and backward of one step add at their peak to parameters and their gradients.

    Arguments:
        network: arguments of ``DeepResNet``, except the device. batch: rows B. device: where it runs.
        eager: measure the eager loop in place of the block.

    Returns:
        bytes, or None on a system without /proc/self/clear_refs (Linux has it).
    """
    if device == "cpu" and not Path("/proc/self/clear_refs").exists():
        return None
    request = json.dumps({"network": network, "batch": batch, "device": device, "eager": eager})
    command = [sys.executable, "-m", "odeblock.experiments.memory", request]
    # In a session of its own: Ctrl-C comes to the parent alone, which ends the child.
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, start_new_session=True)
    return int(child.stdout)


def _measure_here(network: dict[str, Any], batch: int, device: str, eager: bool) -> int:
    warnings.simplefilter("ignore", DriftWarning)  # of random gradients: memory is all that is measured

    def build(depth: int) -> DeepResNet:
        return DeepResNet(**{**network, "depth": depth}, device=device)

    def step(model: DeepResNet, x: Tensor, y: Tensor) -> None:
        run: nn.Module = eager_twin(model) if eager else model
        F.cross_entropy(run(x), y).backward()

    model = build(network["depth"])
    x = torch.randn(batch, network["in_features"], device=device)
    y = torch.randint(network["out_features"], (batch,), device=device)
    step(build(WARM_UP_DEPTH), x, y)  # libraries and threads are there before the measurement
    added = []
    for _ in range(REPEATS):
        model.zero_grad()
        before = _reset_peak(device)
        step(model, x, y)
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        added.append(_peak(device) - before - gradients)
    return max(0, int(statistics.median(added)))


def _reset_peak(device: str) -> int:
    """Forget the peak so far; returns the bytes in use now."""
    if device == "cpu":
        # What the core and malloc keep is resident already: a step that uses it again would seem to be free.
        release_memory()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS, see proc(5)
        return _status("VmRSS")
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: str) -> int:
    return _status("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated(device)


def _status(field: str) -> int:
    """A field of /proc/self/status, which counts in KiB, in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status: expected a line {field}, found none")
    return 1024 * int(found[1])


if __name__ == "__main__":
    print(_measure_here(**json.loads(sys.argv[1])))
