"""All that a GPU has to show, in the order in which a fault is best understood: ``make gpu-check``.

Each step runs in a process of its own, whatever became of those before; what it printed goes to
``outputs/gpu-check``. Needs PyTorch with CUDA, nvcc, pytest, pybind11, cmake and ninja, and no package index.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "outputs" / "gpu-check"
PYTHON = sys.executable
SMALL = (
    "import torch, odeblock\n"
    "for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):\n"
    "    for sizes in ((20, 9, 7, 33), (64, 3, 64, 70), (100, 4, 100, 130)):\n"
    "        dim, depth, hidden, batch = sizes\n"
    "        block = odeblock.DeepResBlock(dim, depth, hidden, bias=True, device='cuda', dtype=dtype)\n"
    "        with torch.inference_mode():\n"
    "            block(torch.randn(batch, dim, device='cuda', dtype=dtype))\n"
    "torch.cuda.synchronize()\n"
)
STEPS: dict[str, list[str]] = {
    "device": ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv"],
    "build": [PYTHON, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-e", "."],
    "info": [PYTHON, "-m", "odeblock", "info"],
    "primitives": [PYTHON, "-m", "pytest", "-q", "tests/test_emulation.py", "-k", "primitives"],
    "tests": [PYTHON, "-m", "pytest", "-q", "tests/test_cuda.py"],
    "memcheck": ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1", PYTHON, "-c", SMALL],
    "racecheck": ["compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "1", PYTHON, "-c", SMALL],
    "benchmark": [PYTHON, "benchmarks/gpu.py", *sys.argv[1:]],
}


def main() -> int:
    OUTPUT.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "ODEBLOCK_CUDA": "ON", "ODEBLOCK_NATIVE": "ON"}
    major, minor = torch.cuda.get_device_capability()
    architecture = f"{major}{minor}{'a' if major == 9 else ''}-real"  # of this GPU alone: minutes less
    environment.setdefault("CMAKE_ARGS", f"-DCMAKE_CUDA_ARCHITECTURES={architecture}")
    failed = []
    for name, command in STEPS.items():
        if shutil.which(command[0]) is None:
            print(f"{name}: left out, {command[0]} is not here", flush=True)
            continue
        begin = time.perf_counter()
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        output = run.stdout + run.stderr
        (OUTPUT / f"{name}.log").write_text(output)
        if run.returncode == 0:
            verdict, shown = "ok", 40 if name == "benchmark" else 3
        elif command[0] == "compute-sanitizer" and "not supported" in output:
            verdict, shown = "refused by this machine", 3
        else:
            verdict, shown = f"exit {run.returncode}", 60
            failed.append(name)
        print(f"{name}: {verdict}, {time.perf_counter() - begin:.0f} s", flush=True)
        print("\n".join(output.splitlines()[-shown:]), flush=True)
        if "build" in failed:
            break
    print(f"failed: {', '.join(failed)}" if failed else "all is well")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
