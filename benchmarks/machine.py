"""The machine's own measure: multiply-adds a second, and the peak memory of a piece of work.

``python benchmarks/machine.py WORK CONTENDER SHAPE`` prints the peak bytes of one run (``peak_bytes``); SHAPE
is B q m L, or B C M L H k.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from odeblock import native

HERE = Path(__file__).resolve().parent
FMA_ROUNDS = 3_000_000  # some milliseconds


@functools.cache
def _fma_library() -> ctypes.CDLL | None:
    """``fma_peak.c``, compiled for this processor; None where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    build = native.build_info() or {}
    width = {"avx512": 64, "avx2": 32}.get(build.get("cpu_features", ""), 16)
    target = Path(tempfile.mkdtemp()) / "fma_peak.so"
    options = [
        "-O3",
        "-march=native",
        "-ffp-contract=fast",
        f"-DVECTOR_BYTES={width}",
        "-fopenmp",
        "-shared",
        "-fPIC",
    ]
    subprocess.run([compiler, *options, str(HERE / "fma_peak.c"), "-o", str(target)], check=True)
    library = ctypes.CDLL(str(target))
    library.fma_peak.restype = ctypes.c_double
    library.fma_peak.argtypes = [ctypes.c_long, ctypes.c_int]
    return library


def fma_peak() -> float:
    """float32 operations a second of all PyTorch's threads, in vectors of the core's width; 0: unknown."""
    library = _fma_library()
    if library is None:
        return 0.0
    begin = time.perf_counter()
    done: float = library.fma_peak(FMA_ROUNDS, torch.get_num_threads())
    return done / (time.perf_counter() - begin)


def peak_bytes(work: str, contender: str, shape: tuple[int, ...]) -> int | None:
    """Peak memory of one run in a fresh process, beyond inputs and results; None where it cannot be seen."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, __file__, work, contender, *map(str, shape)]
    # Every tensor is mapped by itself: what was freed before must not count as held, and be used again.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    return int(json.loads(subprocess.check_output(command, env=environment, text=True).splitlines()[-1]))


def _status(key: str) -> int:
    """Bytes; VmHWM is the peak of this process alone, where ru_maxrss would be inherited from the parent."""
    found = re.search(key + r":\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main() -> None:
    import contenders

    work, name, *sizes = sys.argv[1:]
    batch, dim, hidden, depth, *maps = map(int, sizes)
    run = contenders.WORKS[work]
    run(name, contenders.make_inputs(batch, dim, hidden, 2, *maps))  # libraries, thread pools, compiled steps
    inputs = contenders.make_inputs(batch, dim, hidden, depth, *maps)
    native.release_memory()  # what the first run left
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    results = run(name, inputs)
    spent = _status("VmHWM") - before - sum(x.numel() * x.element_size() for x in results)
    print(json.dumps(max(0, spent)))


if __name__ == "__main__":
    main()
