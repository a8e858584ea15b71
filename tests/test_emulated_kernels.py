"""The CUDA kernels, emulated on the CPU (``tests/emulation``), against the oracle."""

from __future__ import annotations

import math
import os
import shutil
import struct
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracle import NAMES, Case, Eager, check_results, errors, make_case, rounded, run
from test_emulation import ROOT, TESTS, build_emulated, compile_emulated, link_emulated
from torch import Tensor

from odeblock import reference
from odeblock.activations import ACTIVATIONS
from odeblock.gpu_adjoint import DOUBT, SIGHT_WIDTH, SPREAD
from odeblock.gpu_layers import padded
from odeblock.native import NATIVE_DTYPES
from odeblock.reconstruction import rounding_unit

CSRC = ROOT / "csrc"
ALL_WIDTHS, ONE_WIDTH = CSRC / "cuda" / "kernels.cu", TESTS / "emulation" / "one_width.cu"
PRODUCTS = {  # what CMakeLists.txt compiles kernels.cu for
    "float32": ("FloatProducts", torch.float32),
    "tf32": ("Tf32Products", torch.float32),
    "float64": ("DoubleProducts", torch.float64),
    "bfloat16": ("HalfProducts<true>", torch.bfloat16),
    "float16": ("HalfProducts<false>", torch.float16),
    "bfloat16_warpgroup": ("WarpgroupProducts<true>", torch.bfloat16),
    "float16_warpgroup": ("WarpgroupProducts<false>", torch.float16),
}
MAP_PRODUCTS = [name for name in PRODUCTS if not name.endswith("warpgroup")]  # .. and map_kernels.cu
SANITIZERS = ("thread", "address,undefined")
# B, q, m, L: one of everything; tails of rows, features, units and chunks; several blocks and warps; aligned
# and not; every number of features that kernels are compiled for.
SHAPES = [(1, 1, 1, 2), (3, 17, 5, 4), (150, 32, 48, 3), (70, 64, 40, 3), (9, 100, 130, 2), (20, 200, 24, 2)]
# What warpgroups are chosen for: likewise; fewer chunks than stages and more; a cluster, and an odd block.
OF_WARPGROUPS = [(64, 40, 8, 1), (150, 64, 48, 3), (130, 48, 328, 2), (300, 128, 136, 3), (70, 200, 72, 3)]


def shapes_of(products: str) -> list[tuple[int, int, int, int]]:
    return OF_WARPGROUPS if products.endswith("warpgroup") else SHAPES


def compile_kernels(
    target: Path, name: str, *flags: str, csrc: Path = CSRC, source: Path = ALL_WIDTHS
) -> Path:
    defines = (f"-DODEBLOCK_PRODUCTS={PRODUCTS[name][0]}", f"-DODEBLOCK_CUDA_KERNELS=cuda_kernels_{name}")
    return compile_emulated(source, target, *defines, *flags, csrc=csrc)


def compile_rest(folder: Path, names: Iterable[str], *flags: str, of_maps: Iterable[str] = ()) -> list[Path]:
    """Object files of the CUDA part but for the kernels of ``names``, and those ``of_maps``; it ends where
    others are asked for."""
    missing = [name for name in PRODUCTS if name not in names]
    missing_of_maps = [name for name in MAP_PRODUCTS if name not in of_maps]
    stub = folder / "missing.cpp"
    stub.write_text(
        '#include "cuda/kernels.h"\n#include "cuda/map_kernels.h"\n#include <cstdlib>\nnamespace odeblock {\n'
        "template <class P> CudaKernel<P> none() {\n"
        "  return {0, 16, 1, 8, 0, 1, [](int) { return size_t(0); },\n"
        "          [](CudaArguments<P>) { std::abort(); }};\n}\n"
        + "".join(
            f"CudaKernels cuda_kernels_{name}(int64_t) {{ return {{none<ForwardProblem>(), "
            "none<SweepProblem>(), none<ReconstructionProblem>()}; }\n"
            for name in missing
        )
        + "".join(
            f"MapKernels cuda_map_kernels_{name}(bool) {{ std::abort(); }}\n" for name in missing_of_maps
        )
        + "}\n"
    )
    return [
        compile_emulated(CSRC / "cuda" / "launch.cu", folder / "launch.o", *flags),
        compile_emulated(CSRC / "cuda" / "map_launch.cu", folder / "map_launch.o", *flags),
        compile_emulated(stub, folder / "missing.o", *flags),
    ]


def compile_map_kernels(target: Path, name: str, *flags: str, csrc: Path = CSRC) -> Path:
    source = csrc / "cuda" / "map_kernels.cu"
    defines = [f"-DODEBLOCK_PRODUCTS={PRODUCTS[name][0]}"]
    defines += [f"-DODEBLOCK_CUDA_MAP_KERNELS=cuda_map_kernels_{name}"]
    return compile_emulated(source, target, *defines, *flags, csrc=csrc)


def compile_parts(folder: Path, names: Iterable[str], *flags: str, source: Path = ALL_WIDTHS) -> list[Path]:
    """Object files of the CUDA part with the kernels of ``names``."""
    folder.mkdir(exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        kernels = pool.map(
            lambda name: compile_kernels(folder / f"{name}.o", name, *flags, source=source), names
        )
        return [*compile_rest(folder, names, *flags), *kernels]


def build(folder: Path, names: Iterable[str], *flags: str, source: Path = ALL_WIDTHS) -> Path:
    """The program with those kernels."""
    parts = compile_parts(folder, names, *flags, source=source)
    return build_emulated(TESTS / "emulation" / "kernels.cpp", folder / "program", *flags, objects=parts)


LIMIT: int | None = None
"""Seconds of the processor's time for a program, which other work does not spend."""


def launch(
    program: Path,
    case: Case,
    products: str,
    *arrays: Tensor,
    sweep: int = 0,
    seed: int = 0,
    save_every: int = 0,
    resumes: bool = False,
    limit: float = 0,
) -> bytes:
    """What a kernel leaves: weights of a case, and ``arrays`` in."""
    dtype = PRODUCTS[products][1]
    h, V, W, b, c = (case.tensors[name] for name in NAMES)
    (batch, dim), (depth, hidden, _) = h.shape, W.shape
    header = struct.pack(
        "14q2d",
        sweep,
        NATIVE_DTYPES[dtype],
        products == "tf32",
        ACTIVATIONS[case.activation].native_id,
        batch,
        dim,
        hidden,
        depth,
        save_every,
        resumes,
        b is not None,
        90 if products.endswith("warpgroup") else 80,
        1 + seed % 3,  # multiprocessors, which decide on the warps of a block
        seed,
        1 / depth if case.scale is None else case.scale,
        limit,
    )
    weights = [padded(t.to(dtype)) for t in (V, W, b, c) if t is not None]
    given = [t.contiguous().view(torch.uint8).numpy().tobytes() for t in (*weights, *arrays)]
    environment = {**os.environ, "TSAN_OPTIONS": "exitcode=66", "ASAN_OPTIONS": "detect_leaks=0"}
    data = header + b"".join(given)
    limited = ["prlimit", f"--cpu={LIMIT}"] if LIMIT else []
    out = subprocess.run([*limited, program], input=data, capture_output=True, env=environment, check=False)
    assert out.returncode == 0, out.stderr.decode()[-3000:]
    assert "bank conflicts 0" in out.stderr.decode()
    return out.stdout


def take(data: bytes, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Arrays of these shapes, which follow each other."""
    arrays, place = [], 0
    for shape in shapes:
        size = math.prod(shape) * dtype.itemsize
        part = bytearray(data[place : place + size])
        arrays.append(torch.frombuffer(part, dtype=dtype).view(shape) if part else torch.empty(shape))
        place += size
    return arrays


def forward(
    program: Path, case: Case, products: str, *, seed: int = 0, save_every: int = 0
) -> tuple[dict[str, Tensor], Tensor]:
    """y and y - h in float64, and the saved states."""
    dtype = PRODUCTS[products][1]
    h, W = case.tensors["h"], case.tensors["W"]
    out = launch(program, case, products, h.to(dtype), seed=seed, save_every=save_every)
    (y,) = take(out, dtype, tuple(h.shape))
    y = y.double()
    shape = reference.states_shape(*h.shape, W.shape[1], W.shape[0], save_every, False, False)
    (states,) = take(out[h.numel() * dtype.itemsize :], reference.state_dtype(dtype), shape)
    return {"y": y, "increment": y - h}, states[:, : len(h)]


def check(program: Path, case: Case, products: str, seed: int = 0) -> None:
    dtype = PRODUCTS[products][1]
    case = rounded(case, dtype)
    results, _ = forward(program, case, products, seed=seed)
    truth = run(reference.deep_residual, case, torch.float64)
    if products != "tf32":
        check_results({**truth, **results}, case, dtype)
        return
    # tf32 has the 11 bits of float16.
    eager, found = Eager(case, torch.float16, truth), errors({**truth, **results}, truth)
    assert all(eager.allows(name, found[name], 2.0**-10) for name in found), (found, eager.worst)


def sweep(program: Path, case: Case, products: str, seed: int = 0) -> None:
    """That a sweep runs and finds dℓ/dh_0, roughly: tests/test_emulated_backward.py has the rule."""
    dtype = PRODUCTS[products][1]
    case = rounded(case, dtype)
    if not ACTIVATIONS[case.activation].smooth:  # where rounding decides on the side of a kink
        case = replace(case, activation="tanh")
    tensors = [case.tensors[name] for name in NAMES]
    h, V = tensors[:2]
    _, states, _ = reference.forward(*tensors, case.activation, 1 / len(V), 1, False, False)
    computed = reference.state_dtype(dtype)
    states, grad = states.to(computed), case.grad.to(computed)
    out = launch(program, case, products, states, grad, sweep=2, seed=seed)
    (a,) = take(out, computed, tuple(h.shape))
    expected = run(reference.deep_residual, case, torch.float64)["h"]
    torch.testing.assert_close(a.double(), expected, rtol=0.02, atol=0.02)


def reconstruct(program: Path, case: Case, products: str, seed: int = 0) -> None:
    """That the adjoint's states are the forward's, roughly; weights that take several evaluations."""
    dtype = PRODUCTS[products][1]
    case = replace(rounded(case, dtype), activation="tanh", scale=0.1)
    tensors = [case.tensors[name] for name in NAMES]
    (batch, dim), depth = tensors[0].shape, len(tensors[1])
    computed = reference.state_dtype(dtype)
    padded = reference.padded_rows(batch)
    known = reference.forward(*tensors, "tanh", 0.1, 0, True, False)[1]
    states = torch.full((depth + 1, padded, dim), torch.nan, dtype=computed)
    states[-1] = known[0]
    sight = torch.zeros(depth, SIGHT_WIDTH, dtype=computed)
    sight[:, :dim] = 1
    rows = torch.zeros(20, batch, dtype=computed)
    rows[DOUBT], rows[SPREAD:] = 1, -1
    unit = rounding_unit(torch.float16 if products == "tf32" else dtype)
    given = (states, sight, torch.zeros(SIGHT_WIDTH, dtype=computed), rows)
    out = launch(program, case, products, *given, sweep=3, seed=seed, limit=unit / 2)
    (found,) = take(out, computed, (depth, padded, dim))
    expected = reference.forward(*tensors, "tanh", 0.1, 1, False, False)[1]
    torch.testing.assert_close(found[:, :batch].double(), expected[:, :batch], rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("products", "shape"), [(p, shape) for p in PRODUCTS for shape in shapes_of(p)], ids=str
)
def test_emulated_forward(products: str, shape: tuple[int, ...], program: Path) -> None:
    for seed in range(2):
        biases = (shape[0] + seed) % 2 == 1
        case = make_case(*shape, activation="gelu_tanh", hidden_bias=biases, output_bias=biases)
        check(program, case, products, seed)


def test_emulated_forward_of_warpgroups_leaves_odd_shapes(program: Path) -> None:
    """Rows that do not begin at multiples of 16 bytes are not theirs."""
    for shape in ((70, 65, 40, 2), (70, 64, 41, 2), (63, 64, 40, 2)):
        check(program, make_case(*shape), "bfloat16_warpgroup")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_emulated_forward_of_every_activation(activation: str, program: Path) -> None:
    for products in ("float32", "float64", "bfloat16"):
        check(program, make_case(5, 12, 10, 3, activation=activation), products)


@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-30])
def test_emulated_forward_of_any_scale(scale: float, program: Path) -> None:
    for products in ("float32", "float64", "float16"):
        check(program, make_case(4, 8, 6, 3, scale=scale), products)


@pytest.mark.parametrize("save_every", [1, 3])
def test_emulated_forward_saves_states(save_every: int, program: Path) -> None:
    case = make_case(70, 20, 37, 7)
    _, states = forward(program, case, "float64", save_every=save_every)
    tensors = [case.tensors[name] for name in NAMES]
    expected = reference.forward(*tensors, case.activation, 1 / 7, save_every, False, False)[1]
    torch.testing.assert_close(states, expected[:, :70], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("products", PRODUCTS)
def test_emulated_forward_goes_on_from_a_state(products: str, program: Path) -> None:
    """In two parts, the second from the state that the first left, bit for bit as in one."""
    case = rounded(make_case(70, 40, 24, 5, scale=0.2), PRODUCTS[products][1])
    whole = forward(program, case, products, save_every=1)[1]
    computed = whole.dtype
    upper = {name: t[3:] if name != "h" and t is not None else t for name, t in case.tensors.items()}
    out = launch(
        program, replace(case, tensors=upper), products, whole[3].contiguous(), save_every=1, resumes=True
    )
    end, states = take(out, computed, (70, 40), (2, reference.padded_rows(70), 40))
    assert torch.equal(states[:, :70], whole[3:])
    y = forward(program, case, products)[0]["y"]
    assert torch.equal(end.to(PRODUCTS[products][1]).double(), y)


def test_emulated_rows_do_not_depend_on_each_other(program: Path) -> None:
    case = rounded(make_case(150, 24, 40, 3), torch.float32)
    results, _ = forward(program, case, "float32")
    damaged = {**case.tensors, "h": case.tensors["h"].clone()}
    damaged["h"][7] = float("nan")
    others, _ = forward(program, replace(case, tensors=damaged), "float32", seed=1)
    assert others["y"][7].isnan().all()
    kept = torch.arange(150) != 7
    assert torch.equal(results["y"][kept], others["y"][kept])


@pytest.mark.parametrize("products", PRODUCTS)
def test_an_emulated_empty_batch(products: str, program: Path) -> None:
    results, _ = forward(program, make_case(0, 40, 4, 3), products)
    assert results["y"].shape == (0, 40)


def test_an_infinite_number_stays_where_eager_has_it(program: Path) -> None:
    case = make_case(20, 6, 5, 3, activation="sigmoid")
    case.tensors["h"][3, 2] = float("inf")
    expected = run(reference.deep_residual, case, torch.float64)["y"]
    assert expected[3].isfinite().any()
    for products in ("float64", "bfloat16"):
        y = forward(program, rounded(case, PRODUCTS[products][1]), products)[0]["y"]
        assert torch.equal(y.isfinite(), expected.isfinite())


@pytest.mark.sanitizers
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_emulated_forward_under_sanitizers(sanitizer: str, tmp_path: Path) -> None:
    shapes = {
        "bfloat16": (70, 44, 72, 2),
        "bfloat16_warpgroup": (140, 40, 328, 1),
        "float32": (3, 37, 72, 2),
        "float64": (40, 64, 40, 2),
    }
    program = build(tmp_path, shapes, f"-fsanitize={sanitizer}", source=ONE_WIDTH)
    for products, shape in shapes.items():
        for look in (check, sweep, reconstruct):
            look(program, make_case(*shape), products)


@pytest.mark.long
@pytest.mark.sanitizers
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_emulated_forward_over_seeds(sanitizer: str, program: Path, tmp_path: Path) -> None:
    """Every kind of product on random shapes and schedules, and under the sanitizers."""
    watched = build(tmp_path, PRODUCTS, f"-fsanitize={sanitizer}")
    generator = torch.Generator().manual_seed(len(sanitizer))
    for seed in range(60):
        drawn = [int(torch.randint(1, most, (), generator=generator)) for most in (200, 257, 150, 5)]
        for products in PRODUCTS:
            if products.endswith("warpgroup") and seed % 8:
                drawn[:3] = max(drawn[0], 64), (max(drawn[1], 33) + 7) // 8 * 8, (drawn[2] + 7) // 8 * 8
            activation = list(ACTIVATIONS)[seed % len(ACTIVATIONS)]
            case = make_case(
                *drawn, activation=activation, hidden_bias=seed % 2 == 0, output_bias=seed % 2 == 0
            )
            for look in (check, sweep, reconstruct):
                look(program, case, products, seed)
                if seed < 6:
                    look(watched, case, products, seed)


# What orders the threads of a block (file, text, its replacement): without one of them the emulation must see
# that something is wrong.
MUTANTS = {
    "no barrier": ("chunks", "simt::sync_block();", ";"),
    "a chunk too early": ("chunks", "wait_copies<kAhead - 1>", "wait_copies<kAhead>"),
    "a chunk that is in use": ("chunks", "kAhead = Stages - 1", "kAhead = Stages"),
    # Of warpgroups.
    "z too early": ("forward", "P::end(z);", ""),
    "sums too early": ("forward", "P::end(sums);", ""),
    "s and g too early": ("sweep", "P::end(s);\n      P::end(g);", ""),
    "sums of a sweep too early": ("sweep", "P::end(sums);", ""),
    "registers not ordered": ("products", "simt::before_products<kFresh>(d, a);", ""),
    "products in no group": ("products", "simt::commit_products();", ""),
    "a box too early": ("chunks", "simt::wait_phase(full(this->chunk_), this->chunk_ / Stages % 2);", ""),
    "a box that is in use": ("chunks", "simt::wait_phase(empty(again), again / Stages % 2);", ""),
    "a box about to be read": ("chunks", "read = this->chunk_ - 1", "read = this->chunk_"),
    "a box filled too soon": ("chunks", "kLag = Stages > 3 ? 2 : 1", "kLag = 0"),
    "a box that lanes still read": ("chunks", "simt::sync_warp();  // all lanes have read", ""),
    "chunks never released": ("sweep", "chunks.release();", ""),
    "a warp that is apart": ("chunks", "simt::sync_warp();  // together again", ""),
    "barriers not made": ("chunks", "simt::fence_barriers();", ""),
    "barriers made too late": ("chunks", "simt::sync_cluster();  // barriers are made", ""),
    "zeros not fenced": ("chunks", "simt::fence_async();", ""),
    "a block that leaves": ("chunks", "void end() { simt::sync_cluster(); }", "void end() {}"),
    "a block that leaves a sweep": ("sweep", "chunks.end();", ""),
    "a block that is not asked": ("reconstruction", "simt::any_of_block(open)", "open"),
    "sums of a step too early": ("reconstruction", "P::end(sums);", ""),
    "rates that lanes still read": ("reconstruction", "simt::sync_warp();  // all have read rates", ""),
    "orders that lanes still read": ("reconstruction", "simt::sync_warp();  // all have read orders", ""),
    "what a row remembers too early": ("reconstruction", "simt::sync_warp();  // rows remember", ""),
    "a layer's chunks not again": ("reconstruction", "chunks.again();", ""),
    "chunks of the next layer where one comes again": (
        "chunks",
        "while (this->chunk_ + 1 < asked) wait(), release();",
        "",
    ),
    "no chunks again at the end": ("chunks", "chunk < ahead && chunk < this->all()", "chunk < 0"),
    "one block's warps": ("chunks", "threads() / 32 * simt::cluster_blocks()", "threads() / 32"),
}
OF_WARPGROUPS_MUTANTS = list(MUTANTS)[3:]


@pytest.fixture(scope="session")
def watched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """What the programs of all mutants have in common, by products."""
    parts = {}
    for products in ("bfloat16", "bfloat16_warpgroup"):
        folder = tmp_path_factory.mktemp(products)
        own = compile_emulated(TESTS / "emulation" / "kernels.cpp", folder / "own.o", "-fsanitize=thread")
        parts[products] = [own, *compile_rest(folder, [products], "-fsanitize=thread")]
    return parts


@pytest.mark.parametrize("mutant", [None, *MUTANTS])
def test_emulated_mutants_are_found(
    mutant: str | None, watched: dict[str, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    csrc = tmp_path / "csrc"
    shutil.copytree(CSRC, csrc)
    file, right, wrong = MUTANTS[mutant] if mutant else ("chunks", "", "")
    if mutant:
        monkeypatch.setitem(globals(), "LIMIT", 60)  # what finds no end is found
        source = csrc / "cuda" / f"{file}.cuh"
        assert source.read_text().count(right) == 1
        source.write_text(source.read_text().replace(right, wrong))
    looks = {"sweep": sweep, "reconstruction": reconstruct}
    look = reconstruct if "again" in str(mutant) else looks.get(file, check)
    for products in ("bfloat16", "bfloat16_warpgroup"):
        if mutant and (products == "bfloat16") == (mutant in OF_WARPGROUPS_MUTANTS):
            continue
        kernels = compile_kernels(
            tmp_path / "kernels.o", products, "-fsanitize=thread", csrc=csrc, source=ONE_WIDTH
        )
        program = link_emulated([kernels, *watched[products]], tmp_path / "program", "-fsanitize=thread")
        if mutant:
            with pytest.raises(AssertionError):
                look(program, make_case(200, 40, 360, 2), products)
        else:  # there is nothing to find in what is right
            for look in (check, sweep, reconstruct):
                look(program, make_case(200, 40, 360, 2), products)
