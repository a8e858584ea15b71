"""The CUDA kernels of convolutions, emulated on the CPU (``tests/emulation``), against the oracle."""

from __future__ import annotations

import math
import os
import random
import shutil
import struct
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import NAMES, Case, Eager, check_results, errors, make_case, rounded, run
from test_emulated_backward import STORE, Core
from test_emulated_backward import run as run_on_a_gpu
from test_emulated_kernels import (
    CSRC,
    MAP_PRODUCTS,
    PRODUCTS,
    SANITIZERS,
    compile_map_kernels,
    compile_rest,
    take,
)
from test_emulation import TESTS, build_emulated, compile_emulated, link_emulated
from torch import Tensor

from odeblock import checkpointing, gpu, gpu_maps, native, reference
from odeblock.activations import ACTIVATIONS
from odeblock.native import NATIVE_DTYPES

# B, C, M, L, H, W, k: one of almost everything; channels that fill products or not; several samples a block
# and several blocks; taps that are never of the map.
SHAPES = [
    (1, 1, 2, 2, 1, 1, 1),
    (3, 3, 16, 3, 7, 9, 3),
    (5, 16, 24, 2, 10, 10, 3),
    (2, 12, 3, 3, 5, 4, 5),
    (7, 16, 16, 2, 3, 5, 1),
    (1, 20, 40, 2, 1, 2, 3),
]


def make_map_case(
    *shape: int,
    activation: str = "gelu",
    biases: bool = True,
    scale: float | None = None,
) -> Case:
    """Of B, C, M, L, H, W and k (3 unless given)."""
    *sizes, height, width, kernel = shape if len(shape) == 7 else (*shape, 3)
    options: dict[str, Any] = {"activation": activation, "scale": scale, "kernel": kernel}
    return make_case(*sizes, hidden_bias=biases, output_bias=biases, maps=(height, width), **options)


def layers_of(case: Case, dtype: torch.dtype) -> gpu_maps.MapLayers:
    h, V, W, b, c = (None if t is None else t.to(dtype) for t in (case.tensors[name] for name in NAMES))
    assert h is not None
    assert V is not None
    assert W is not None
    return gpu_maps.MapLayers((h.shape[2], h.shape[3]), V, W, b, c, case.activation, 1)


def launch(
    program: Path,
    case: Case,
    products: str,
    given: Tensor,
    out_bytes: int = 0,
    *,
    seed: int = 0,
    save_every: int = 0,
    states_bytes: int = 0,
    states: Tensor | None = None,
    resumes: bool = False,
) -> bytes:
    """What a kernel leaves: the forward, or the sweep down ``states``."""
    dtype = PRODUCTS[products][1]
    layers = layers_of(case, dtype)
    h, V, W = case.tensors["h"], layers.V, layers.W
    assert h is not None
    weights = layers.forward_weights if states is None else layers.backward_weights
    arrays = [*weights, given.contiguous()]
    saved = [] if states is None else [states.contiguous()]
    header = struct.pack(
        "21qd",
        states is not None,
        NATIVE_DTYPES[dtype],
        products == "tf32",
        ACTIVATIONS[case.activation].native_id,
        *h.shape[:2],
        W.shape[1],
        len(W),
        *h.shape[2:],
        W.shape[-1],
        save_every,
        resumes,
        90 if seed % 2 else 80,
        1 + seed % 3,  # multiprocessors, which decide on the samples of a block
        seed,
        *(t.numel() * t.element_size() for t in arrays),
        out_bytes,
        sum((t.numel() * t.element_size() for t in saved), states_bytes),
        1 / len(V) if case.scale is None else case.scale,
    )
    data = header + b"".join(t.view(torch.uint8).numpy().tobytes() for t in (*arrays, *saved))
    environment = {**os.environ, "TSAN_OPTIONS": "exitcode=66", "ASAN_OPTIONS": "detect_leaks=0"}
    out = subprocess.run([program], input=data, capture_output=True, env=environment, check=False)
    assert out.returncode == 0, out.stderr.decode()[-3000:]
    assert "bank conflicts 0" in out.stderr.decode()
    return out.stdout


def forward(
    program: Path, case: Case, products: str, *, seed: int = 0, save_every: int = 0
) -> tuple[dict[str, Tensor], Tensor]:
    """y and y - h in float64, and the saved states."""
    dtype = PRODUCTS[products][1]
    h, V = case.tensors["h"], case.tensors["V"]
    assert h is not None
    assert V is not None
    computed = reference.state_dtype(dtype)
    shape = reference.states_shape(len(h), h[:1].numel(), 0, len(V), save_every, False, False)
    size, states_bytes = h.numel() * dtype.itemsize, math.prod(shape) * computed.itemsize
    saved = {"save_every": save_every, "states_bytes": states_bytes}
    out = launch(program, case, products, h.to(dtype), size, seed=seed, **saved)
    (y,) = take(out, dtype, tuple(h.shape))
    (states,) = take(out[size:], computed, shape)
    return {"y": y.double(), "increment": y.double() - h}, states[:, : len(h)]


def check(program: Path, case: Case, products: str, seed: int = 0) -> None:
    dtype = PRODUCTS[products][1]
    case = rounded(case, dtype)
    results, _ = forward(program, case, products, seed=seed)
    truth = run(case.reference, case, torch.float64)
    if products != "tf32":
        check_results({**truth, **results}, case, dtype)
        return
    # tf32 has the 11 bits of float16.
    eager, found = Eager(case, torch.float16, truth), errors({**truth, **results}, truth)
    assert all(eager.allows(name, found[name], 2.0**-10) for name in found), (found, eager.worst)


def sweep(program: Path, case: Case, products: str, seed: int = 0) -> None:
    """That a sweep runs and finds the gradients, roughly: test_emulated_backward_of_maps has the rule."""
    dtype = PRODUCTS[products][1]
    case = rounded(case, dtype)
    tensors = [case.tensors[name] for name in NAMES]
    computed = reference.state_dtype(dtype)
    states = reference.forward(*tensors, case.activation, 1 / len(tensors[1]), 1, False, False)[1].to(
        computed
    )
    out = launch(program, case, products, case.grad.to(computed), states=states, seed=seed)
    (a,) = take(out, computed, tuple(case.grad.shape))
    layers = layers_of(case, dtype)
    shape = len(states), -1, sum(layers.numbers)
    sums = torch.frombuffer(bytearray(out[a.numel() * computed.itemsize :]), dtype=computed).view(shape)
    gradients = layers.gradients([sums], states, len(a))
    truth = run(case.reference, case, torch.float64)
    torch.testing.assert_close(a.double(), truth["h"], rtol=0.02, atol=0.02)
    for name, found in zip(NAMES[1:], gradients, strict=True):
        if found is not None:
            error = (found.double() / len(states) - truth[name]).abs().max()
            assert error < 0.02 * truth[name].abs().max(), (name, error)


def compile_parts(folder: Path, names: Sequence[str], *flags: str) -> list[Path]:
    """Object files of the CUDA part with those kernels."""
    folder.mkdir(exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        kernels = pool.map(lambda name: compile_map_kernels(folder / f"{name}.o", name, *flags), names)
        return [*compile_rest(folder, (), *flags, of_maps=names), *kernels]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return compile_parts(tmp_path_factory.mktemp("maps"), MAP_PRODUCTS, "-fPIC")


@pytest.fixture(scope="module")
def program(parts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("program") / "program"
    return build_emulated(TESTS / "emulation" / "maps.cpp", target, objects=parts)


@pytest.fixture(scope="module")
def library(parts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    own = compile_emulated(TESTS / "emulation" / "library.cpp", folder / "library.o", "-fPIC")
    return link_emulated([own, *parts], folder / "library.so", "-shared")


@pytest.fixture
def core(library: Path, monkeypatch: pytest.MonkeyPatch) -> Core:
    core = Core(library)
    core.emulate()
    monkeypatch.setattr(native, "core", core)
    return core


@pytest.mark.parametrize(("products", "shape"), [(p, s) for p in MAP_PRODUCTS for s in SHAPES], ids=str)
def test_emulated_maps(products: str, shape: tuple[int, ...], program: Path) -> None:
    for seed in range(2):
        case = make_map_case(*shape, activation="gelu_tanh", biases=(shape[0] + seed) % 4 > 1)
        check(program, case, products, seed)


def test_emulated_maps_that_fill_shared_memory(program: Path) -> None:
    """One block a multiprocessor; two stages of weights, where there is no room for four."""
    check(program, make_map_case(2, 8, 8, 1, 32, 32), "bfloat16", seed=1)
    check(program, make_map_case(1, 40, 32, 1, 7, 6, 5), "float32", seed=1)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_emulated_maps_of_every_activation(activation: str, program: Path) -> None:
    for products in ("float32", "float64", "bfloat16"):
        check(program, make_map_case(1, 5, 4, 3, 4, 6, activation=activation, scale=-0.3), products)


@pytest.mark.parametrize("save_every", [1, 3])
def test_emulated_maps_save_states(save_every: int, program: Path) -> None:
    """And go on from one, bit for bit."""
    case = make_map_case(5, 18, 7, 7, 4, 3)
    tensors = [case.tensors[name] for name in NAMES]
    expected = reference.forward(*tensors, case.activation, 1 / 7, save_every, False, False)[1]
    for products in ("float64", "bfloat16"):
        dtype = PRODUCTS[products][1]
        computed = reference.state_dtype(dtype)
        results, states = forward(program, rounded(case, dtype), products, save_every=save_every)
        tolerance = 1e-13 if products == "float64" else 0.05
        torch.testing.assert_close(states.double(), expected[:, :5], rtol=tolerance, atol=tolerance)
        upper = {name: t[3:] if name != "h" and t is not None else t for name, t in case.tensors.items()}
        resumed = replace(case, tensors=upper, scale=1 / 7)
        given = states[3 // save_every]
        out = launch(program, resumed, products, given, given.numel() * computed.itemsize, resumes=True)
        (end,) = take(out, computed, tuple(results["y"].shape))
        assert torch.equal(end.to(dtype).double(), results["y"])


@pytest.mark.parametrize("products", MAP_PRODUCTS)
def test_emulated_maps_of_no_samples(products: str, program: Path) -> None:
    results, _ = forward(program, make_map_case(0, 3, 4, 2, 5, 5), products)
    assert results["y"].shape == (0, 3, 5, 5)


def test_emulated_samples_do_not_depend_on_each_other(program: Path) -> None:
    """And what is not finite stays where eager has it: in the reach of two layers' taps."""
    for products in ("float32", "bfloat16"):
        case = rounded(make_map_case(7, 6, 5, 1, 9, 8), PRODUCTS[products][1])
        results, _ = forward(program, case, products, seed=1)
        damaged = {**case.tensors, "h": case.tensors["h"].clone()}
        damaged["h"][3, 2, 0, 7] = float("nan")
        # Another odd seed, that tensor cores round the same.
        others, _ = forward(program, replace(case, tensors=damaged), products, seed=3)
        reached = torch.zeros(7, 6, 9, 8, dtype=torch.bool)
        reached[3, :, :3, 5:] = True
        assert others["y"][reached].isnan().all()
        assert torch.equal(results["y"][~reached], others["y"][~reached])


@pytest.mark.sanitizers
@pytest.mark.parametrize(("sanitizer", "products"), zip(SANITIZERS, ("float32", "bfloat16"), strict=True))
def test_emulated_maps_under_sanitizers(sanitizer: str, products: str, tmp_path: Path) -> None:
    flag = f"-fsanitize={sanitizer}"
    objects = compile_parts(tmp_path, [products], flag)
    program = build_emulated(TESTS / "emulation" / "maps.cpp", tmp_path / "program", flag, objects=objects)
    for look in (check, sweep):
        look(program, make_map_case(4, 18, 7, 2, 6, 5), products)


@pytest.mark.long
@pytest.mark.sanitizers
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_emulated_maps_over_seeds(sanitizer: str, program: Path, tmp_path: Path) -> None:
    """Every kind of product on random shapes and schedules, and under the sanitizers."""
    flag = f"-fsanitize={sanitizer}"
    objects = compile_parts(tmp_path, MAP_PRODUCTS, flag)
    watched = build_emulated(TESTS / "emulation" / "maps.cpp", tmp_path / "program", flag, objects=objects)
    for seed in range(40):
        draw = random.Random(seed)
        # Of one channel a gradient may be a number of which little is left, and sweep() asks for two digits.
        ranges = ((1, 9), (2, 16), (2, 16), (1, 4), (1, 9), (1, 9))
        shape = [draw.randint(*between) for between in ranges]
        activation, biases = list(ACTIVATIONS)[seed % len(ACTIVATIONS)], draw.random() < 0.5
        case = make_map_case(*shape, draw.choice((1, 3)), activation=activation, biases=biases)
        for products in MAP_PRODUCTS:
            # Rounding decides on the side of a kink.
            smooth = case if ACTIVATIONS[activation].smooth else replace(case, activation="tanh")
            number = 2 * seed + 1 if products == "float64" else seed  # which wants the room of capability 90
            for which in (program, watched) if seed < 8 else (program,):
                check(which, case, products, number)
                sweep(which, smooth, products, number)


@pytest.mark.parametrize(("products", "shape"), [(p, s) for p in MAP_PRODUCTS for s in SHAPES], ids=str)
def test_emulated_backward_of_maps(
    products: str, shape: tuple[int, ...], core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(2):
        core.emulate(capability=90, multiprocessors=1 + seed, seed=seed)
        *sizes, kernel = shape
        if products == "float64":  # for which the sweep has no room for more
            sizes[2], kernel = 16 if sizes[-1] == 10 else sizes[2], min(kernel, 3)
        case = make_map_case(*sizes, kernel, activation="gelu_tanh", biases=(shape[0] + seed) % 4 > 1)
        case = rounded(case, PRODUCTS[products][1])
        results = run_on_a_gpu(case, products, monkeypatch)
        # tf32 has the 11 bits of float16.
        check_results(results, case, torch.float16 if products == "tf32" else PRODUCTS[products][1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("capability", [80, 90])
def test_emulated_backward_of_float32_maps_as_each_gpu_rounds(
    capability: int, shape: tuple[int, ...], core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other bits of what tensor cores sum are cut off; the case of test_cuda.py."""
    core.emulate(capability=capability)
    case = rounded(make_map_case(*shape, activation="tanh"), torch.float32)
    check_results(run_on_a_gpu(case, "float32", monkeypatch), case, torch.float32)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_emulated_backward_of_maps_of_every_activation(
    activation: str, core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    for products in ("float32", "float64", "bfloat16"):
        case = make_map_case(1, 5, 4, 3, 4, 6, activation=activation, scale=-0.3)
        case = rounded(case, PRODUCTS[products][1])
        check_results(run_on_a_gpu(case, products, monkeypatch), case, PRODUCTS[products][1])


@pytest.mark.parametrize("products", ["float32", "bfloat16"])
def test_no_plan_changes_the_emulated_gradients_of_maps(
    products: str, core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = rounded(make_map_case(4, 6, 5, 7, 5, 6, activation="tanh"), PRODUCTS[products][1])
    expected = run_on_a_gpu(case, products, monkeypatch)
    for most, save_every, slots in ((1, 1, 0), (3, 1, 0), (64, 4, 3), (2, 4, 1), (64, 7, 2)):
        monkeypatch.setattr(gpu, "MOST_LAYERS", most)
        plan = checkpointing.Plan(save_every, False, slots)
        found = run_on_a_gpu(case, products, monkeypatch, plan)
        assert torch.equal(found["h"], expected["h"])
        for name, value in expected.items():  # PyTorch sums as many layers at a time as it is given
            torch.testing.assert_close(found[name], value, rtol=2e-6, atol=2e-6)
    alone = run_on_a_gpu(case, products, monkeypatch, STORE, False)
    assert torch.equal(alone["h"], expected["h"])
    assert alone.keys() == {"y", "h", "increment"}


def test_an_emulated_backward_of_no_maps(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    results = run_on_a_gpu(make_map_case(0, 3, 4, 2, 5, 5), "float32", monkeypatch)
    assert results["h"].shape == (0, 3, 5, 5)
    assert all(not results[name].any() for name in NAMES[1:])


# What a kernel is right by (file, text, its replacement): without one of them the emulation must see that
# something is wrong; the first ones the thread sanitizer.
RETURNS = "left <= 0) return;\n          "
OF_S, OF_G = f"{RETURNS}const Pair s", f"{RETURNS}const Number *const x"
MUTANTS = {
    "no barrier": ("maps.cuh", "simt::sync_block();\n    const T*", "const T*"),
    "a map not ready": ("maps.cuh", "simt::Words<4>{});\n    simt::sync_block();", "simt::Words<4>{});"),
    "a chunk in use": ("maps.cuh", "for (int i = 1; i < stages_; i++)", "for (int i = 0; i < stages_; i++)"),
    "a chunk too early": ("maps.cuh", "wait_copies<2>", "wait_copies<3>"),
    "sums too early": ("map_sweep.cuh", "simt::sync_block();\n      const", "const"),
    "no border": ("map_kernels.h", "pitch(static_cast<int>(p.width) + radius)", "pitch(p.width)"),
    "no rows between": ("map_kernels.h", "static_cast<int>(p.height) + radius) *", "p.height) *"),
    "another tap": ("maps.cuh", "shape.margin()) * width;", "shape.margin() + 1) * width;"),
    "a border that fills": ("map_forward.cuh", f"if (block.place(position) < 0 || {OF_S}", f"if ({OF_S}"),
    "a border of g that fills": ("map_sweep.cuh", f"if (block.place(position) < 0 || {OF_G}", f"if ({OF_G}"),
    "a border of s that fills": ("map_sweep.cuh", "block.place(position) >= 0 && left", "left"),
    "another tap of sums": ("map_gradients.cuh", "x - shape.margin())", "x + 1 - shape.margin())"),
    "an operand not turned": ("map_gradients.cuh", "lane / 8 % 2 * 8;", "lane / 16 * 8;"),
}
OF_THREADS = list(MUTANTS)[:4]
SWEEPS = ("map_sweep.cuh", "map_gradients.cuh")


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """What the programs of all mutants have in common, but for those of another shape."""
    parts = {}
    for flag in ("", "-fsanitize=thread"):
        folder, flags = tmp_path_factory.mktemp("rest"), [flag] if flag else []
        own = compile_emulated(TESTS / "emulation" / "maps.cpp", folder / "maps.o", *flags)
        parts[flag] = [own, *compile_rest(folder, (), *flags, of_maps=["bfloat16"])]
    return parts


@pytest.mark.parametrize("mutant", [None, *MUTANTS])
def test_mutants_of_emulated_maps_are_found(
    mutant: str | None, rest: dict[str, list[Path]], tmp_path: Path
) -> None:
    csrc = tmp_path / "csrc"
    shutil.copytree(CSRC, csrc)
    if mutant:
        file, right, wrong = MUTANTS[mutant]
        source = csrc / "cuda" / file
        assert source.read_text().count(right) == 1
        source.write_text(source.read_text().replace(right, wrong))
    flag = "-fsanitize=thread" if mutant is None or mutant in OF_THREADS else ""
    flags = [flag] if flag else []
    kernels = compile_map_kernels(tmp_path / "kernels.o", "bfloat16", *flags, csrc=csrc)
    program = link_emulated([kernels, *rest[flag]], tmp_path / "program", *flags)
    case = make_map_case(4, 18, 20, 2, 6, 5)
    if mutant:
        look = sweep if MUTANTS[mutant][0] in SWEEPS else check
        with pytest.raises(AssertionError):
            look(program, case, "bfloat16")
    else:
        for look in (check, sweep):
            look(program, case, "bfloat16")
