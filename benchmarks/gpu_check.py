"""All that a GPU has to show, in the order in which a fault is best understood: ``make gpu-check``.

Each step runs in a process of its own, whatever became of those before. What they print goes to gpu-check.log
in the output folder, after what is there, and what they measure to a JSON each beside it. Full results of
benchmarks that ended well also go to ``benchmarks/results``, by the name of the GPU. Needs PyTorch with CUDA,
nvcc, pytest, pybind11, cmake and ninja, and no package index.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO

import torch

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
# For a sanitizer: few rows, inputs that begin anywhere; float32 also by products in tf32.
SMALL = """
import itertools, torch, odeblock
odeblock.gpu.kernels_agree = lambda *_: True  # which a sanitizer would take minutes for
kinds = [(dtype, False) for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)]
kinds.append((torch.float32, True))
rows = ((20, 9, 7, 33), (64, 3, 64, 70), (65, 3, 67, 130), (200, 2, 40, 70))
maps = ((16, 16, 3, 33, 10, 10), (3, 20, 5, 300, 7, 9))

for (dtype, tf32), shape in itertools.product(kinds, rows + maps):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    options = {"bias": True, "device": "cuda", "dtype": dtype}
    if shape in rows:
        dim, depth, hidden, *size = shape
        block = odeblock.DeepResBlock(dim, depth, hidden, **options)
        size, strategies = (*size, dim), ("store", "checkpoint", "adjoint")
    else:
        dim, hidden, kernel, batch, *size = shape
        block = odeblock.DeepConvResBlock(dim, 3, hidden, kernel, **options)
        size, strategies = (batch, dim, *size), ("store", "checkpoint")
    x = torch.randn(torch.Size(size).numel() + 1, device="cuda", dtype=dtype)[1:].view(size)
    with torch.inference_mode():
        block(x)
    for strategy in strategies:
        block.backward = strategy
        block(x).sum().backward()
torch.cuda.synchronize()
"""
SANITIZER = ["compute-sanitizer", "--error-exitcode", "1", "--tool"]
STEPS: dict[str, list[str]] = {
    "device": ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv"],
    "build": [PYTHON, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-e", "."],
    "info": [PYTHON, "-m", "odeblock", "info"],
    "primitives": [PYTHON, "-m", "pytest", "-q", "-rP", "tests/test_emulation.py", "-k", "primitives"],
    "tests": [PYTHON, "-m", "pytest", "-q", "tests/test_cuda.py", "tests/test_cifar_graph.py"],
    "memcheck": [*SANITIZER, "memcheck", PYTHON, "-c", SMALL],
    "racecheck": [*SANITIZER, "racecheck", PYTHON, "-c", SMALL],
    "benchmark": [PYTHON, "benchmarks/gpu.py", "--only", "forward"],
    "benchmark-step": [PYTHON, "benchmarks/gpu.py", "--only", "step"],
    "benchmark-maps": [PYTHON, "benchmarks/gpu_maps.py"],
    "benchmark-depth": [PYTHON, "benchmarks/gpu.py", "--only", "depth"],
}


def run(command: list[str], environment: dict[str, str], log: BinaryIO, seconds: float) -> int | None:
    """The exit code of a command, or None if it was cut off, with all that it had started."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", default=",".join(STEPS), help="which of them, by commas; default: all")
    parser.add_argument("--quick", action="store_true", help="of the benchmarks, one shape a type")
    parser.add_argument("--limit", type=float, default=540, help="seconds of a step; default: 540")
    parser.add_argument("--budget", type=float, help="seconds of all steps together; default: no limit")
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "outputs" / "gpu-check",
        help="folder; default: outputs/gpu-check",
    )
    arguments = parser.parse_args()
    unknown = [name for name in arguments.steps.split(",") if name not in STEPS]
    if unknown:
        parser.error(f"--steps: expected some of {', '.join(STEPS)}, got {', '.join(unknown)}")
    if not torch.cuda.is_available():
        parser.error(f"PyTorch {torch.__version__} sees no GPU here")
    arguments.output = arguments.output.resolve()  # steps run elsewhere
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, command in STEPS.items():
        if name.startswith("benchmark"):
            command += ["--output", str(arguments.output / f"{name}.json")]
            command += ["--quick"] if arguments.quick else []

    major, minor = torch.cuda.get_device_capability()
    architecture = f"{major}{minor}{'a' if major == 9 else ''}-real"  # of this GPU alone: minutes less
    environment = {
        "CMAKE_ARGS": f"-DCMAKE_CUDA_ARCHITECTURES={architecture}",
        **os.environ,
        "ODEBLOCK_CUDA": "ON",
        "ODEBLOCK_NATIVE": "ON",
        "PATH": f"{Path(PYTHON).parent}{os.pathsep}{os.environ['PATH']}",  # cmake and ninja
    }
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a step ends with this
    begin, failed = time.perf_counter(), []
    gpu, results = torch.cuda.get_device_name(), ROOT / "benchmarks" / "results"
    log = arguments.output / "gpu-check.log"
    for name in arguments.steps.split(","):
        command, start = STEPS[name], time.perf_counter()
        if shutil.which(command[0]) is None:
            print(f"{name}: left out, {command[0]} is not here", flush=True)
            continue
        seconds = arguments.limit
        if arguments.budget is not None:
            seconds = min(seconds, begin + arguments.budget - start)
        if seconds <= 0:
            print(f"{name}: not begun, the budget is spent", flush=True)
            failed.append(name)
            continue
        # Every tensor by itself, so that a sanitizer sees where it ends.
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if command[0] == SANITIZER[0] else {}
        with log.open("ab+") as file:
            file.write(f"\n==== {name}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
            file.flush()
            place = file.tell()
            code = run(command, {**environment, **uncached}, file, seconds)
            file.seek(place)
            printed = file.read().decode(errors="replace")
            verdict = (
                f"cut off after {seconds:.0f} s" if code is None else "ok" if code == 0 else f"exit {code}"
            )
            if uncached and re.search("^=+ .*Device not supported", printed, re.MULTILINE):
                verdict = "refused by this machine"
            elif code != 0:
                failed.append(name)
            verdict = f"{name}: {verdict}, {time.perf_counter() - start:.0f} s"
            file.write(f"\n==== {verdict}\n".encode())
        shown = 40 if name.startswith("benchmark") or name in failed else 3
        print("\n".join([verdict, *printed.splitlines()[-shown:]]), flush=True)
        if name.startswith("benchmark") and name not in failed and not arguments.quick:
            kept = f"{name}.json".replace("benchmark", gpu.replace(" ", "_"))
            shutil.copy(arguments.output / f"{name}.json", results / kept)
        if "build" in failed:
            break
    print(f"failed: {', '.join(failed)}" if failed else "all is well")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
