"""Whether mistakes in the CPU kernels are seen: something must be wrong with every mutant in mutants.txt.

A mutant is a text of ``csrc`` (``-``) and what takes its place (``+``). The text must be there exactly
once, so that a mutant which does not apply any more is an error, as is one that does not compile. The
kernels are compiled with it for AVX2, without optimisation and for float32 alone where that will do, and
linked to core_host.cpp. Of what that program finds is asked what the tests ask of the core: the rule of
oracle.py on the shapes of test_core.py, the same bits for any number of threads and any neighbours
(test_gradients.py, test_conv_kernels.py), the adjoint's word where it fails and its twin's decisions
(test_adjoint.py), and nothing for the sanitizers to find. Where only tests in Python see a mistake (``?
test_...``), they run on a core that has it.

Most are seen by check_rule on the first shapes; what was not seen at first led to tests.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pybind11
import pytest
import test_adjoint
import test_core
import torch
from oracle import Case, Eager, check_against, check_results, make_case, rounded, run
from test_core import (
    CSRC,
    FLAGS,
    INSTRUCTIONS,
    MAPS,
    NORMALISED,
    PLANS,
    ROOT,
    SHAPES,
    SHARED,
    STOPS,
    check_normalised_case,
    run_host,
)
from test_norm_kernels import make_normalised
from torch import Tensor

from odeblock import build_info, native
from odeblock.checkpointing import Plan
from odeblock.drift import DRIFT_TOLERANCE

pytestmark = pytest.mark.skipif("avx2" not in build_info()["cpu_builds"], reason="mutants are built for AVX2")


@dataclass(frozen=True)
class Mutant:
    """``file`` of csrc, text and replacement; notes: how it is built, who sees it, whether CI asks."""

    file: str
    right: str
    wrong: str
    notes: tuple[str, ...]

    @property
    def tests(self) -> list[str]:
        return [note for note in self.notes if note.startswith("test_")]

    def apply(self, csrc: Path) -> None:
        text = (csrc / self.file).read_text()
        assert text.count(self.right) == 1, f"{self.file} has {text.count(self.right)} of {self.right!r}"
        (csrc / self.file).write_text(text.replace(self.right, self.wrong))


def read_mutants() -> dict[str, Mutant]:
    """Each a line ``file: name``, then lines that begin with a mark, to an empty line."""
    found: dict[str, Mutant] = {}
    for block in (ROOT / "tests" / "mutants.txt").read_text().rstrip("\n").split("\n\n"):
        title, *lines = block.split("\n")
        file, name = title.split(": ")
        marked = {mark: [line[2:] for line in lines if line[0] == mark] for mark in "?-+"}
        assert name not in found, name
        found[name] = Mutant(file, "\n".join(marked["-"]), "\n".join(marked["+"]), tuple(marked["?"]))
    return found


MUTANTS = read_mutants()

# ---- what is asked of a program ----------------------------------------------------------------------------

# Shapes and options. More rows than are summed at once; steps enough for every order of prediction.
ROWS: list[Any] = [(shape, {}) for shape in (*SHAPES, (1400, 9, 7, 6), (16, 40, 48, 64))]
OF_MAPS: list[Any] = [
    (shape, {"maps": maps, "kernel": kernel}) for *shape, maps, kernel in (*MAPS, (3, 9, 8, 128, (4, 3), 3))
]
ADJOINT = Plan(0, True, 0)


@functools.cache
def prepared(i: int, of_maps: bool, dtype: torch.dtype) -> tuple[Case, dict[str, Tensor], Eager]:
    """Case number i, its truth and the error of eager PyTorch."""
    shape, maps = (OF_MAPS if of_maps else ROWS)[i]
    case = make_case(*shape, activation=("tanh", "gelu", "relu")[i % 3], smooth=shape[3] > 20, **maps)
    case = rounded(case, dtype)
    truth = run(case.reference, case, torch.float64)
    return case, truth, Eager(case, dtype, truth)


def drifts(results: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> bool:
    """Whether odeblock would warn."""
    return not bool((results["report"][:2] <= DRIFT_TOLERANCE[dtype]).all())


def check_rule(command: list[str], of_maps: bool, dtypes: Sequence[torch.dtype]) -> None:
    for i in range(len(OF_MAPS if of_maps else ROWS)):
        for dtype in dtypes:
            case, truth, eager = prepared(i, of_maps, dtype)
            for j, make_plan in enumerate(PLANS):
                plan = make_plan(len(case.tensors["V"]))
                results = run_host(command, case, dtype, plan, threads=1 + (i + j) % 3)
                check_against(results, case, dtype, truth, eager, plan.reconstruct)
                assert not plan.reconstruct or not drifts(results, dtype)


def check_bits(command: list[str], of_maps: bool, dtypes: Sequence[torch.dtype]) -> None:
    """Of all results for any number of threads, of y and dh in any batch."""
    rows: list[Any] = [((3, 70, 93, 9), {}), ((77, 40, 50, 9), {}), ((300, 310, 9, 5), {})]
    for shape, maps in OF_MAPS[:3] if of_maps else rows:
        case = rounded(make_case(*shape, **maps), torch.float32)
        for make_plan in PLANS[::2]:
            plan = make_plan(shape[3])
            alone = run_host(command, case, torch.float32, plan, threads=1)
            for threads in (2, 3, 5):
                found = run_host(command, case, torch.float32, plan, threads)
                assert all(torch.equal(found[name], alone[name]) for name in case.tensors)
            for part in (slice(5, 13), slice(3, 20)):
                if shape[0] >= part.stop:
                    tensors = case.tensors | {"h": case.tensors["h"][part]}
                    few = replace(case, tensors=tensors, grad=case.grad[part])
                    found = run_host(command, few, torch.float32, plan, threads=2)
                    assert all(torch.equal(found[name], alone[name][part]) for name in ("y", "h"))


def check_drift(command: list[str], of_maps: bool, dtypes: Sequence[torch.dtype]) -> None:
    """What cannot be inverted is said to be so, whichever row it is. Weights of one sign are like others."""
    maps: dict[str, Any] = {"maps": (5, 5)} if of_maps else {}
    for batch in (2, 40, 300):
        steep = make_case(batch, 8, 8, 3, activation="tanh", hidden_bias=False, output_bias=False, **maps)
        for name in ("V", "W"):
            steep.tensors[name] *= 30 * 8**0.5
        for plan in (ADJOINT, Plan(2, True, 0)):
            assert drifts(run_host(command, steep, torch.float32, plan, threads=2))
        for row in (0, -1):
            case = make_case(batch, 40, 50, 9, activation="tanh", **maps)
            case.tensors["h"][row].view(-1)[3] = torch.nan
            assert drifts(run_host(command, case, torch.float32, ADJOINT, threads=3))
    for batch in (2, 8):
        case = make_case(batch, 17, 23, 64, activation="tanh", smooth=True, **maps)
        case.tensors["W"] = -case.tensors["W"].abs() / 4
        case = rounded(case, torch.float32)
        check_results(run_host(command, case, torch.float32, ADJOINT, threads=1), case, torch.float32)


@functools.cache
def twin(weights: str, depth: int) -> tuple[Case, dict[str, float]]:
    """A case of test_adjoint.py, and what the adjoint in PyTorch reports of it."""
    case = rounded(test_adjoint.weights_case(weights, depth), torch.float32)
    record: dict[str, float] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "core", None)
        run(test_adjoint.adjoint(record), case, torch.float32)
    return case, record


def check_decisions(command: list[str], of_maps: bool, dtypes: Sequence[torch.dtype]) -> None:
    """The adjoint evaluates as often as its twin in PyTorch, and predicts by the same order."""
    for weights, depth in (("smooth", 128), ("noisy", 64), ("iid", 64)):
        case, expected = twin(weights, depth)
        report = run_host(command, case, torch.float32, ADJOINT, threads=1)["report"]
        for number, name in enumerate(("evaluations", "order"), start=2):
            assert float(report[number]) == pytest.approx(expected[name], rel=0.05, abs=0.05)


def check_sanitizer(command: list[str], of_maps: bool, dtypes: Sequence[torch.dtype]) -> None:
    """Neither in whole calls nor in those that are stopped."""
    for sizes in (sizes for sizes in SHARED if (len(sizes) > 4) == of_maps):
        shape, maps = sizes[:4], {"maps": sizes[4], "kernel": sizes[5]} if of_maps else {}
        case = rounded(make_case(*shape, **maps), torch.float32)
        for make_plan in PLANS:
            plan = make_plan(shape[3])
            for stop_after in (-1, *STOPS):
                results = run_host(command, case, torch.float32, plan, 4, stop_after)
                if stop_after < 0:
                    check_results(results, case, torch.float32, rebuilt=plan.reconstruct)


def check_normalised(command: list[str], dtypes: Sequence[torch.dtype], stops: Sequence[int] = ()) -> None:
    """The rule and the bits of batches that are normalised, on any number of threads."""
    for i, sizes in enumerate(NORMALISED):
        for dtype in dtypes:
            for number in (i, i + 1):
                check_normalised_case(command, sizes, dtype, number, threads=2 + i % 3, stops=stops)
    case = rounded(make_normalised(*NORMALISED[-1]), torch.float32)
    for plan in (Plan(1, False, 0), Plan(6, False, 2)):
        alone, *others = (run_host(command, case, torch.float32, plan, threads) for threads in (1, 2, 3))
        for other in others:
            assert all(torch.equal(other[name], found) for name, found in alone.items())


# ---- programs ----------------------------------------------------------------------------------------------

Look = Callable[[list[str], bool, Sequence[torch.dtype]], None]
LOOKS: tuple[Look, ...] = (check_rule, check_bits, check_drift, check_decisions)
SANITIZERS = {"threads": "-fsanitize=thread", "bounds": "-fsanitize=address"}
ONLY_MAPS = ("maps.h", "convolution.h", "correlation.h", "images.h", "images_backward.h")
ONLY_NORMALISED = ("normalised.h", "normalised_backward.h")
ONLY_ROWS = ("few.h", "few_products.h", "backward.h", "chain.h", "reconstruction.h")
OTHER_TYPES = Mutant(
    "cpu/kernels.cpp",
    """    case Dtype::float64: return f(double());
    case Dtype::bfloat16: return f(Bfloat16());
    case Dtype::float16: return f(Float16());
""",
    "",
    (),
)


def compiler(*flags: str) -> list[str]:
    quiet = [flag for flag in FLAGS if not flag.startswith("-W")]
    return [os.environ.get("CXX", "g++"), *quiet, "-O0", "-pthread", *INSTRUCTIONS["avx2"], *flags]


def compile_parts(csrc: Path, folder: Path, *flags: str) -> list[str]:
    """Of the core. Its kernels are those of the baseline, so that no processor chooses others."""
    defines = ["-DODEBLOCK_KERNELS=cpu_kernels_baseline", '-DODEBLOCK_KERNELS_NAME="avx2"']
    objects = []
    for name in ("kernels", "dispatch", "threads"):
        objects.append(str(folder / f"{name}.o"))
        command = [*compiler(*flags), *defines, "-c", str(csrc / "cpu" / f"{name}.cpp"), "-o", objects[-1]]
        subprocess.run(command, check=True)
    return objects


def ask(mutant: Mutant | None, notes: Sequence[str], folder: Path) -> None:
    """Raises an AssertionError, or TimeoutExpired, where something is wrong."""
    csrc = shutil.copytree(CSRC, folder / "csrc")
    if "every type" not in notes:
        OTHER_TYPES.apply(csrc)
    if mutant:
        mutant.apply(csrc)
    flags = [SANITIZERS[note] for note in notes if note in SANITIZERS]
    program = str(folder / "program")
    objects = compile_parts(csrc, folder, *flags)
    host = str(ROOT / "tests" / "core_host.cpp")
    subprocess.run([*compiler(*flags), f"-I{csrc}", host, *objects, "-o", program], check=True)

    file = Path(mutant.file).name if mutant else ""
    dtypes = test_core.DTYPES if "every type" in notes else [torch.float32]
    if not mutant or file in ONLY_NORMALISED:
        check_normalised([program], dtypes[:3], STOPS if flags else ())
    kinds = [of_maps for of_maps, others in ((False, ONLY_MAPS), (True, ONLY_ROWS)) if file not in others]
    for look in (check_sanitizer,) if flags else LOOKS:
        for of_maps in kinds if file not in ONLY_NORMALISED else ():
            look([program], of_maps, dtypes)


BY_PROGRAMS = [name for name, mutant in MUTANTS.items() if not mutant.tests]


def test_every_mutant_applies(tmp_path: Path) -> None:
    for name, mutant in MUTANTS.items():
        mutant.apply(shutil.copytree(CSRC, tmp_path / name))


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if "short" in MUTANTS[n].notes else [pytest.mark.long]) for n in BY_PROGRAMS],
)
def test_mutants_are_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_core, "LIMIT", 120)  # those that find no end are found
    with pytest.raises((AssertionError, subprocess.TimeoutExpired)) as found:
        ask(MUTANTS[name], MUTANTS[name].notes, tmp_path)
    print(f"{name}: {str(found.value)[:200]}")


@pytest.mark.parametrize(
    "notes", [[], *(pytest.param([n], marks=pytest.mark.long) for n in ("every type", *SANITIZERS))]
)
def test_nothing_is_found_in_what_is_right(notes: list[str], tmp_path: Path) -> None:
    """Else every mutant would be found, by that."""
    ask(None, notes, tmp_path)


# ---- the package -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package and its tests, to be joined by a core; of that the part that no mutant changes."""
    folder = tmp_path_factory.mktemp("tree")
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for part in ("odeblock", "tests", "benchmarks", "csrc"):
        shutil.copytree(ROOT / part, folder / part, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}", f"-I{CSRC}"]
    defines = ['COMPILER="a"', "CUDA_VERSION=nullptr", 'CUDA_ARCHITECTURES=""']
    options = [*includes, *(f"-DODEBLOCK_{define}" for define in defines), "-fPIC", "-fvisibility=hidden"]
    source, target = str(CSRC / "bindings.cpp"), str(folder / "bindings.o")
    subprocess.run([*compiler(*options), "-c", source, "-o", target], check=True)
    return folder


def run_tests(tests: Sequence[str], mutant: Mutant | None, tree: Path, folder: Path) -> str | None:
    """The first of the tests that fails on such a core, or how their process ended; None where all pass."""
    csrc = shutil.copytree(CSRC, folder / "csrc")
    if mutant:
        mutant.apply(csrc)
    core = tree / "odeblock" / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"
    core.unlink(missing_ok=True)
    # Optimised: the tests take less time, and some are of speed.
    options = ["-fPIC", "-fvisibility=hidden", "-O2"]
    objects = [str(tree / "bindings.o"), *compile_parts(csrc, folder, *options)]
    subprocess.run([*compiler("-shared"), *objects, "-o", str(core)], check=True)

    command = [sys.executable, "-m", "pytest", "-qx", "--tb=no", "-rf", "-p", "no:cacheprovider"]
    environment = {k: v for k, v in os.environ.items() if k != "ODEBLOCK_CPU"} | {"PYTHONPATH": str(tree)}
    done = subprocess.run(
        [*command, *(f"tests/{test}" for test in tests)],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if done.returncode < 0:
        return f"signal {-done.returncode}"
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert (done.returncode, len(failed)) in ((0, 0), (1, 1)), done.stdout[-3000:] + done.stderr[-3000:]
    return failed[0] if failed else None


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in MUTANTS if name not in BY_PROGRAMS])
def test_mutants_are_found_by_tests(name: str, tree: Path, tmp_path: Path) -> None:
    found = run_tests(MUTANTS[name].tests, MUTANTS[name], tree, tmp_path)
    assert found
    print(f"{name}: {found}")


@pytest.mark.long
def test_these_tests_pass_on_what_is_right(tree: Path, tmp_path: Path) -> None:
    tests = dict.fromkeys(test for mutant in MUTANTS.values() for test in mutant.tests)
    assert run_tests(list(tests), None, tree, tmp_path) is None
