"""All that a GPU has to show, in the order in which a fault is best understood: ``make gpu-check``.

Each step runs in a process of its own, whatever became of those before. What they print and measure goes to
the output folder, the benchmark's figures also to ``benchmarks/results``, by the name of the GPU. Needs
PyTorch with CUDA, nvcc, pytest, pybind11, cmake and ninja, and no package index.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
# For a sanitizer: few rows, inputs that begin anywhere.
SMALL = """
import torch, odeblock
odeblock.gpu.kernels_agree = lambda *_: True  # which a sanitizer would take minutes for
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for dim, depth, hidden, batch in ((20, 9, 7, 33), (64, 3, 64, 70), (65, 3, 67, 130), (200, 2, 40, 70)):
        block = odeblock.DeepResBlock(dim, depth, hidden, bias=True, device="cuda", dtype=dtype)
        x = torch.randn(batch * dim + 1, device="cuda", dtype=dtype)[1:].view(batch, dim)
        with torch.inference_mode():
            block(x)
        for strategy in ("store", "checkpoint", "adjoint"):
            block.backward = strategy
            block(x).sum().backward()
    for channels, hidden, kernel, batch, height, width in ((16, 16, 3, 33, 10, 10), (3, 20, 5, 300, 7, 9)):
        block = odeblock.DeepConvResBlock(channels, 3, hidden, kernel, bias=True, device="cuda", dtype=dtype)
        x = torch.randn(batch * channels * height * width + 1, device="cuda", dtype=dtype)[1:]
        x = x.view(batch, channels, height, width)
        with torch.inference_mode():
            block(x)
        for strategy in ("store", "checkpoint"):
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", default=",".join(STEPS), help="which of them, by commas; default: all")
    parser.add_argument("--quick", action="store_true", help="of the benchmark, one shape a type")
    parser.add_argument("--limit", type=float, default=540, help="seconds of a step; default: 540")
    parser.add_argument("--output", type=Path, default=os.environ.get("OUT", ROOT / "outputs" / "gpu-check"))
    arguments = parser.parse_args()
    unknown = [name for name in arguments.steps.split(",") if name not in STEPS]
    if unknown:
        parser.error(f"--steps: expected some of {', '.join(STEPS)}, got {', '.join(unknown)}")
    if not torch.cuda.is_available():
        parser.error(f"PyTorch {torch.__version__} sees no GPU here")
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
    failed = []
    for name in arguments.steps.split(","):
        command = STEPS[name]
        if shutil.which(command[0]) is None:
            print(f"{name}: left out, {command[0]} is not here", flush=True)
            continue
        # Every tensor by itself, so that a sanitizer sees where it ends.
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if command[0] == SANITIZER[0] else {}
        log, begin = arguments.output / f"{name}.log", time.perf_counter()
        with log.open("w") as file:
            try:
                code = subprocess.run(
                    command,
                    cwd=ROOT,
                    env={**environment, **uncached},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=arguments.limit,
                    check=False,
                ).returncode
                verdict = "ok" if code == 0 else f"exit {code}"
            except subprocess.TimeoutExpired:
                verdict = f"cut off after {arguments.limit:.0f} s"
        printed = log.read_text()
        if uncached and verdict != "ok" and "not supported" in printed:
            verdict = "refused by this machine"
        elif verdict != "ok":
            failed.append(name)
        shown = 40 if name.startswith("benchmark") or name in failed else 3
        print(f"{name}: {verdict}, {time.perf_counter() - begin:.0f} s", flush=True)
        print("\n".join(printed.splitlines()[-shown:]), flush=True)
        if "build" in failed:
            break
    gpu = torch.cuda.get_device_name().replace(" ", "_")
    for results in arguments.output.glob("benchmark*.json"):
        shutil.copy(results, ROOT / "benchmarks" / "results" / results.name.replace("benchmark", gpu))
    print(f"failed: {', '.join(failed)}" if failed else "all is well")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
