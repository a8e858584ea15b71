"""The native CPU core without Python, built for other processors and under sanitizers, against the oracle.

The sources are plain C++, so the same program (core_host.cpp) shows that the aarch64 build computes the right
numbers (under emulation; skipped where no cross compiler is installed), that no access is out of bounds, that
threads do not race, and how much of the sources these problems reach.
"""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import NAMES, Case, check_results, make_case, rounded
from test_norm_kernels import check_normalised, make_normalised
from torch import Tensor

from odeblock import build_info, checkpointing, native
from odeblock.activations import ACTIVATIONS
from odeblock.normalised import AFFINE, STATISTICS
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
    weight_gradients: bool = True,
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
    biases = [bias is not None for bias in tensors[3:]]
    affine = [case.tensors[name] for name in AFFINE if name in case.tensors]
    options = [threads, *biases, weight_gradients, stop_after, bool(affine)]
    header = struct.pack("19qd", *sizes, *plan, *options, scale)
    computed = state_dtype(dtype)
    given = [t.to(dtype) for t in tensors if t is not None] + [t.to(computed) for t in affine]
    arrays = [*given, case.grad.to(dtype), probe(tensors[0].shape[1:].numel(), computed)]
    data = [t.contiguous().view(torch.uint8).numpy().tobytes() for t in arrays]
    problem = header + b"".join(data)
    out = subprocess.run(command, input=problem, capture_output=True, check=False, timeout=LIMIT)
    assert out.returncode == 0, out.stderr.decode()[-3000:]
    size = len(out.stdout) - (REPORT.size if plan.reconstruct else 0)
    ours = size
    moved: dict[str, Tensor] = {}
    for i in reversed(range(len(affine))):  # gradients and statistics, behind the others
        for name in (STATISTICS[i], AFFINE[i])[: 1 + weight_gradients]:
            ours -= affine[i].numel() * computed.itemsize
            part = torch.frombuffer(
                bytearray(out.stdout[ours:][: affine[i].numel() * computed.itemsize]), dtype=computed
            )
            moved[name] = part.view(affine[i].shape).double()
    numbers = bytearray(out.stdout[:ours])
    found = torch.frombuffer(numbers, dtype=dtype).double() if numbers else torch.empty(0)
    names = [name for name in NAMES if case.tensors[name] is not None] if weight_gradients else ["h"]
    shapes = [case.tensors[name].shape for name in ("h", *names)]
    parts = found.split([shape.numel() for shape in shapes])
    results = {name: part.view(shape) for name, part, shape in zip(("y", *names), parts, shapes, strict=True)}
    results |= moved
    if not affine:
        results["increment"] = results["y"] - case.tensors["h"]
    if plan.reconstruct:
        results["report"] = torch.tensor(REPORT.unpack(out.stdout[size:]))
    return results


# B, q, m, L: no row, one, few for several threads, one feature; several tiles, tails of every kind; deep
# enough for the adjoint.
SHAPES = [
    (0, 5, 3, 2),
    (1, 1, 1, 24),
    (2, 70, 130, 11),
    (37, 17, 23, 9),
    (50, 64, 5, 10),
    (300, 310, 3, 12),
    (3, 70, 130, 11),
]
# B, C, M, L, (H, W), k: samples and strips of rows in groups; odd widths; none; more tiles than are kept;
# taps where the kernel is not 3 x 3, the maps are small, or the channels few.
MAPS = [
    (1, 7, 10, 9, (7, 9), 3),
    (37, 6, 11, 7, (4, 3), 3),
    (20, 3, 2, 8, (5, 6), 5),
    (3, 9, 8, 9, (2, 1), 3),
    (6, 4, 3, 7, (9, 7), 1),
    (0, 9, 8, 2, (3, 3), 3),
    (16, 48, 2, 7, (14, 13), 3),
    (5, 3, 5, 7, (5, 7), 3),
]
# For several threads: few rows, one tile, a tile for each and more of them; groups of maps likewise.
SHARED: list[Any] = [
    (2, 70, 130, 11),
    (37, 64, 66, 9),
    (150, 20, 24, 9),
    (600, 9, 7, 6),
    MAPS[1],
    MAPS[2],
]
# The same of maps that are normalised by the batch: strips, taps, threads with several groups each.
NORMALISED = [
    (1, 7, 10, 9, (7, 9), 3),
    (37, 6, 11, 7, (4, 3), 3),
    (20, 3, 2, 8, (5, 6), 5),
    (3, 9, 8, 9, (2, 1), 3),
    (70, 5, 14, 6, (6, 7), 3),
]
# Questions after which these are stopped: at once, in the forward, at its end, in the backward.
STOPS = (0, 3, 10, 12, 16, 25)
PLANS = (
    lambda depth: checkpointing.Plan(1, False, 0, True),  # store
    lambda depth: checkpointing.Plan(1, False, 0),  # and only states
    lambda depth: checkpointing.Plan(4, False, 3, True),  # checkpoint
    lambda depth: checkpointing.Plan(depth, False, 2),  # recursive checkpoints
    lambda depth: checkpointing.Plan(0, True, 0),  # adjoint
    lambda depth: checkpointing.Plan(3, True, 0),  # with anchors
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_case(
    command: list[str],
    sizes: Any,
    dtype: torch.dtype,
    plan: checkpointing.Plan,
    draw: random.Random,
    *,
    threads: int,
    activation: str = "tanh",
    stops: Sequence[int] | None = None,
) -> None:
    """Rows or maps, by the rule; the same dh without gradients of weights; stopped anywhere."""
    shape, maps = (sizes, {}) if len(sizes) == 4 else (sizes[:4], {"maps": sizes[4], "kernel": sizes[5]})
    biases = {"hidden_bias": draw.random() < 0.5, "output_bias": draw.random() < 0.5}
    case = rounded(make_case(*shape, activation=activation, **biases, **maps), dtype)
    results = run_host(command, case, dtype, plan, threads)
    check_results(results, case, dtype, rebuilt=plan.reconstruct)
    alone = run_host(command, case, dtype, plan, threads, weight_gradients=False)
    assert all(torch.equal(found, results[name]) for name, found in alone.items())
    for stop_after in stops or [draw.randrange(30)]:
        run_host(command, case, dtype, plan, threads, stop_after)


def check_normalised_case(
    command: list[str], sizes: Any, dtype: torch.dtype, number: int, *, threads: int, stops: Sequence[int]
) -> None:
    """The same of a batch that is normalised. number: which plan, whether biases."""
    case = rounded(make_normalised(*sizes, activation="tanh", bias=number % 2 == 1), dtype)
    plan = PLANS[(1, 3, 2)[number % 3]](sizes[3])._replace(keep_hidden=False)
    results = run_host(command, case, dtype, plan, threads)
    check_normalised(results, case=case, dtype=dtype)
    alone = run_host(command, case, dtype, plan, threads, weight_gradients=False)
    assert all(torch.equal(found, results[name]) for name, found in alone.items())
    for stop_after in stops:
        run_host(command, case, dtype, plan, threads, stop_after)


def check_program(command: list[str]) -> None:
    """Every shape and every activation in every dtype; strategies, biases and threads by turns."""
    for i, sizes in enumerate((*SHAPES, *MAPS)):
        for j, dtype in enumerate(DTYPES):
            number = len(DTYPES) * i + j
            activation = list(ACTIVATIONS)[number % len(ACTIVATIONS)]
            plan, threads = PLANS[(i + j) % len(PLANS)](sizes[3]), 1 + (i + 2 * j) % 3
            draw = random.Random(number)
            check_case(command, sizes, dtype, plan, draw, threads=threads, activation=activation)
    for i, sizes in enumerate(NORMALISED):
        for j, dtype in enumerate(DTYPES[:3]):
            check_normalised_case(command, sizes, dtype, i + j, threads=1 + (i + j) % 3, stops=[i + 4 * j])


@pytest.mark.skipif(
    shutil.which(CROSS) is None or EMULATOR is None,
    reason=f"needs {CROSS} and an emulator (qemu-user-static)",
)
def test_aarch64_under_emulation(tmp_path: Path) -> None:
    program = compile_host(tmp_path, CROSS, "-O2", "-static", "-pthread")
    check_program([str(EMULATOR), str(program)])


SANITIZERS = {
    "thread": ["-fsanitize=thread", "-O1", "-Wno-maybe-uninitialized"],  # of a sum's first run
    # Not optimised: half the compiler's time, which is most of it here, and no access is left out.
    "address,undefined": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O0"],
}


@pytest.fixture
def sanitized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], list[str]]:
    """The command of a build under sanitizers; on own threads, for none knows OpenMP's synchronisation."""
    # Memory that nobody has written is NaN in every type.
    monkeypatch.setenv("ASAN_OPTIONS", "detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size=1000000000")
    monkeypatch.setenv("TSAN_OPTIONS", "halt_on_error=1")

    def build(sanitizer: str, instructions: str) -> list[str]:
        flags = [*SANITIZERS[sanitizer], *INSTRUCTIONS[instructions]]
        return [str(compile_host(tmp_path, os.environ.get("CXX", "g++"), "-pthread", *flags))]

    return build


@pytest.mark.sanitizers
def test_threads_do_not_race(sanitized: Callable[[str, str], list[str]]) -> None:
    command = sanitized("thread", "baseline")
    for i, sizes in enumerate(SHARED):
        for j, plan in enumerate(PLANS):
            dtype, draw = DTYPES[(i + j) % len(DTYPES)], random.Random(j)
            check_case(command, sizes, dtype, plan(sizes[3]), draw, threads=4, stops=STOPS)
    for i, sizes in enumerate(NORMALISED):
        check_normalised_case(command, sizes, DTYPES[i % 3], i, threads=4, stops=STOPS)


@pytest.mark.sanitizers
@pytest.mark.parametrize("build", ["baseline", *BUILDS])
def test_no_access_is_out_of_bounds(build: str, sanitized: Callable[[str, str], list[str]]) -> None:
    check_program(sanitized("address,undefined", build))


@pytest.mark.long
@pytest.mark.sanitizers
@pytest.mark.parametrize("build", ["baseline", *BUILDS])
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_core_over_seeds_under_sanitizers(
    sanitizer: str, build: str, sanitized: Callable[[str, str], list[str]]
) -> None:
    command = sanitized(sanitizer, build)
    for seed in range(200):
        draw = random.Random(seed)
        plan = draw.choice(PLANS)
        depth = draw.randint(9, 16) if plan in PLANS[4:] else draw.randint(1, 12)
        batch = draw.choice((1, 2, 3, 4, draw.randint(0, 20), draw.randint(0, 300)))
        if draw.random() < 0.5:
            sizes: Any = (batch, draw.randint(1, 200), draw.randint(1, 200), depth)
        else:
            channels, pixels = ((draw.randint(1, most), draw.randint(1, most)) for most in (20, 12))
            sizes = (batch % 40, *channels, depth, pixels, draw.choice((1, 3, 5)))
        options = {"threads": draw.randint(1, 8), "activation": draw.choice(list(ACTIVATIONS))}
        check_case(command, sizes, draw.choice(DTYPES), plan(depth), draw, **options)


@pytest.mark.skipif(shutil.which("gcov") is None, reason="needs GCC's gcov")
def test_these_problems_reach_the_core(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Nearly every line of it, in one build; the terminal's summary shows the table (conftest.py)."""
    flags = ["--coverage", "-fprofile-update=atomic", "-O0", "-pthread"]
    check_program([str(compile_host(tmp_path, "g++", *flags))])
    gcovr = [sys.executable, "-m", "gcovr", "--merge-lines", "--fail-under-line", "90"]
    command = [*gcovr, "--root", str(ROOT), "--filter", f"{CSRC}/", str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stdout + out.stderr
    record_property("coverage of the native core", out.stdout)
