"""The native CPU core without Python, built for other processors and under sanitizers, against the oracle.

The sources are plain C++, so the same program (core_host.cpp) shows that the aarch64 build computes the right
numbers (under emulation; skipped where no cross compiler is installed), and that no access is out of bounds.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import NAMES, Case, check_results, make_case, rounded
from torch import Tensor

from odeblock import build_info, checkpointing, native
from odeblock.activations import ACTIVATIONS
from odeblock.reconstruction import probe
from odeblock.reference import state_dtype

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
FLAGS = [
    "-std=c++17",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-Werror",
]
LIMIT = 600.0  # seconds a run
REPORT = struct.Struct("4d")  # estimate, drift, evaluations and order per step
CROSS = "aarch64-linux-gnu-g++"
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
BUILDS = [name for name in build_info()["cpu_builds"] if name != "baseline"]


AVX2 = ["-mavx2", "-mfma", "-mf16c"]
INSTRUCTIONS = {"baseline": [], "avx2": AVX2, "avx512": [*AVX2, "-mavx512f", "-mavx512dq"]}


def compile_host(folder: Path, compiler: str, *flags: str) -> Path:
    """core_host with one build of the kernels, for the processor that ``flags`` say."""
    program = folder / "core_host"
    sources = [CSRC / "cpu" / name for name in ("kernels.cpp", "dispatch.cpp", "threads.cpp")]
    defines = ["-DODEBLOCK_KERNELS=cpu_kernels_baseline", '-DODEBLOCK_KERNELS_NAME="baseline"']
    command = [compiler, *FLAGS, *flags, *defines, f"-I{CSRC}", *map(str, sources)]
    subprocess.run([*command, str(ROOT / "tests" / "core_host.cpp"), "-o", str(program)], check=True)
    return program


def run_host(
    command: list[str],
    case: Case,
    dtype: torch.dtype,
    plan: checkpointing.Plan,
    threads: int,
    stop_after: int = -1,
) -> dict[str, Tensor]:
    """What ``oracle.run`` returns, and the adjoint's report; of a call that is stopped, some numbers."""
    tensors = [case.tensors[name] for name in NAMES]
    depth, dim, hidden, *kernel = tensors[1].shape
    maps = (*tensors[0].shape[2:], kernel[0]) if kernel else (0, 0, 0)
    sizes = [
        native.NATIVE_DTYPES[dtype],
        ACTIVATIONS[case.activation].native_id,
        len(tensors[0]),
        dim,
        hidden,
        depth,
        *maps,
    ]
    scale = 1 / depth if case.scale is None else case.scale
    biases = tensors[3] is not None
    header = struct.pack("16qd", *sizes, *plan, threads, biases, stop_after, scale)
    arrays = [t.to(dtype) for t in (*tensors, case.grad) if t is not None]
    arrays.append(probe(tensors[0][0].numel(), state_dtype(dtype)))
    data = [t.contiguous().view(torch.uint8).numpy().tobytes() for t in arrays]
    given = header + b"".join(data)
    out = subprocess.run(command, input=given, capture_output=True, check=False, timeout=LIMIT)
    assert out.returncode == 0, out.stderr.decode()[-3000:]
    size = len(out.stdout) - (REPORT.size if plan.reconstruct else 0)
    found = torch.frombuffer(bytearray(out.stdout[:size]), dtype=dtype).double()
    names = [name for name in NAMES if case.tensors[name] is not None]
    shapes = [case.tensors[name].shape for name in ("h", *names)]
    parts = found.split([shape.numel() for shape in shapes])
    results = {name: part.view(shape) for name, part, shape in zip(("y", *names), parts, shapes, strict=True)}
    results["increment"] = results["y"] - case.tensors["h"]
    if plan.reconstruct:
        results["report"] = torch.tensor(REPORT.unpack(out.stdout[size:]))
    return results


# B, q, m, L: several tiles, tails of every kind, one row, one feature, few rows for several threads; deep
# enough for the adjoint.
SHAPES = [(1, 1, 1, 24), (37, 17, 23, 9), (50, 64, 5, 10), (300, 310, 3, 12), (3, 70, 130, 11)]
# B, C, M, L, (H, W), k: groups of samples, strips of rows and both; empty strips, odd widths.
MAPS = [
    (1, 3, 5, 9, (7, 9), 3),
    (37, 2, 3, 7, (4, 3), 3),
    (20, 3, 2, 8, (5, 6), 5),
    (3, 5, 4, 9, (2, 1), 3),
    (6, 4, 3, 7, (9, 7), 1),
]
PLANS = (
    lambda depth: checkpointing.Plan(1, False, 0, True),  # store
    lambda depth: checkpointing.Plan(1, False, 0),  # and only states
    lambda depth: checkpointing.Plan(4, False, 3, True),  # checkpoint
    lambda depth: checkpointing.Plan(depth, False, 2),  # recursive checkpoints
    lambda depth: checkpointing.Plan(0, True, 0),  # adjoint
    lambda depth: checkpointing.Plan(3, True, 0),  # with anchors
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def map_case(sizes: Any) -> tuple[Any, dict[str, Any]]:
    """What ``make_case`` takes, of one of ``MAPS``."""
    *shape, maps, kernel = sizes
    return shape, {"maps": maps, "kernel": kernel}


def check_program(command: list[str], activation: str = "tanh", shapes: Any = (*SHAPES, *MAPS)) -> None:
    for i, sizes in enumerate(shapes):
        shape, maps = (sizes, {}) if len(sizes) == 4 else map_case(sizes)
        for j, dtype in enumerate(DTYPES):
            plan = PLANS[(i + 2 * j) % len(PLANS)](shape[3])
            biases = (i + j) % 2 == 0
            case = make_case(*shape, activation=activation, hidden_bias=biases, output_bias=biases, **maps)
            case = rounded(case, dtype)
            results = run_host(command, case, dtype, plan, threads=1 + (i + j) % 3)
            check_results(results, case, dtype, rebuilt=plan.reconstruct)
            run_host(command, case, dtype, plan, threads=1 + (i + j) % 3, stop_after=3 * (i + j))


@pytest.mark.skipif(
    shutil.which(CROSS) is None or EMULATOR is None,
    reason=f"needs {CROSS} and an emulator (qemu-user-static)",
)
def test_aarch64_under_emulation(tmp_path: Path) -> None:
    program = compile_host(tmp_path, CROSS, "-O2", "-static", "-pthread")
    command = [str(EMULATOR), str(program)]
    check_program(command)
    for activation in ACTIVATIONS:
        check_program(command, activation, [SHAPES[1]])


def test_threads_do_not_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without OpenMP, whose own synchronisation the sanitizer does not know."""
    flags = ["-fsanitize=thread", "-O1", "-pthread", "-Wno-maybe-uninitialized"]  # of a sum's first run
    program = compile_host(tmp_path, os.environ.get("CXX", "g++"), *flags)
    monkeypatch.setenv("TSAN_OPTIONS", "halt_on_error=1")
    rows = [(shape, {}) for shape in ((2, 70, 130, 11), (37, 64, 66, 9), (150, 20, 24, 9))]
    for shape, maps in [*rows, map_case(MAPS[1]), map_case(MAPS[2])]:
        case = rounded(make_case(*shape, hidden_bias=True, output_bias=True, **maps), torch.float32)
        for make_plan in PLANS:
            plan = make_plan(shape[3])
            results = run_host([str(program)], case, torch.float32, plan, threads=4)
            check_results(results, case, torch.float32, rebuilt=plan.reconstruct)
            for stop_after in (0, 3, 12, 20):  # at once, in the forward, at its end, in the backward
                run_host([str(program)], case, torch.float32, plan, 4, stop_after)


@pytest.mark.parametrize("build", ["baseline", *BUILDS])
def test_no_access_is_out_of_bounds(build: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-pthread"]
    program = compile_host(tmp_path, os.environ.get("CXX", "g++"), *sanitizers, *INSTRUCTIONS[build])
    monkeypatch.setenv("ASAN_OPTIONS", "detect_leaks=0")
    check_program([str(program)])
