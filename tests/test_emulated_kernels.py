"""The CUDA kernels, emulated on the CPU (``tests/emulation``), against the oracle."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from oracle import NAMES, Case, baseline, check_results, errors, make_case, rounded, run
from test_emulation import ROOT, TESTS, build_emulated
from torch import Tensor

from odeblock import reference
from odeblock.activations import ACTIVATIONS

PRODUCTS = {  # as the program numbers them
    "float32": (0, torch.float32),
    "tf32": (1, torch.float32),
    "float64": (2, torch.float64),
    "bfloat16": (3, torch.bfloat16),
    "float16": (4, torch.float16),
}
# B, q, m, L: one of everything, several blocks, tails of rows, features, units and chunks; aligned and not.
SHAPES = [(1, 1, 1, 2), (3, 17, 5, 4), (150, 32, 48, 3), (70, 64, 40, 3), (9, 100, 130, 2)]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_emulated(TESTS / "emulation" / "forward.cpp", tmp_path_factory.mktemp("forward") / "plain")


def forward(
    program: Path, case: Case, products: str, seed: int = 0, save_every: int = 0
) -> tuple[dict[str, Tensor], Tensor]:
    """y and y - h in float64, and the saved states."""
    number, dtype = PRODUCTS[products]
    tensors = [case.tensors[name] for name in NAMES]
    (batch, dim), (depth, hidden, _) = tensors[0].shape, tensors[2].shape
    scale = 1 / depth if case.scale is None else case.scale
    sizes = (batch, dim, hidden, depth, save_every, tensors[3] is not None, seed)
    header = struct.pack("9qd", number, ACTIVATIONS[case.activation].native_id, *sizes, scale)
    given = [t.to(dtype).contiguous().view(torch.uint8) for t in tensors if t is not None]
    data = header + b"".join(t.numpy().tobytes() for t in given)
    environment = {**os.environ, "TSAN_OPTIONS": "exitcode=66", "ASAN_OPTIONS": "detect_leaks=0"}
    out = subprocess.run([program], input=data, capture_output=True, env=environment, check=False)
    assert out.returncode == 0, out.stderr.decode()[-3000:]
    assert "bank conflicts 0" in out.stderr.decode()
    split = batch * dim * dtype.itemsize
    y = torch.frombuffer(bytearray(out.stdout[:split]), dtype=dtype).view(batch, dim).double()
    states = torch.empty(0)
    if save_every:
        states = torch.frombuffer(bytearray(out.stdout[split:]), dtype=reference.state_dtype(dtype))
    return {"y": y, "increment": y - tensors[0]}, states.view(-1, batch, dim)


def check(program: Path, case: Case, products: str, seed: int = 0) -> None:
    dtype = PRODUCTS[products][1]
    case = rounded(case, dtype)
    results, _ = forward(program, case, products, seed)
    truth = run(reference.deep_residual, case, torch.float64)
    if dtype != torch.float32:
        check_results({**truth, **results}, case, dtype)
        return
    # tf32 has the 11 bits of float16. Two of them lose 2^-22 of an operand, float32 itself 2^-24.
    allowed = baseline(case, torch.float16 if products == "tf32" else torch.float32, truth)
    factor, floor = (2, 2.0**-10) if products == "tf32" else (8, 2.0**-18)
    found = errors({**truth, **results}, truth)
    assert all(found[name] <= max(factor * allowed[name], floor) for name in found), (found, allowed)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("products", PRODUCTS)
def test_emulated_forward(products: str, shape: tuple[int, ...], program: Path) -> None:
    biases = shape[0] % 2 == 1
    case = make_case(*shape, activation="gelu_tanh", hidden_bias=biases, output_bias=biases)
    for seed in range(2):
        check(program, case, products, seed)


@pytest.mark.parametrize("products", ["bfloat16", "float16"])
def test_emulated_forward_of_many_features(products: str, program: Path) -> None:
    check(program, make_case(3, 200, 24, 2, activation="tanh"), products)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_emulated_forward_of_every_activation(activation: str, program: Path) -> None:
    for products in ("float32", "float64"):
        check(program, make_case(5, 12, 10, 3, activation=activation), products)


@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-30])
def test_emulated_forward_of_any_scale(scale: float, program: Path) -> None:
    for products in ("float32", "float64", "float16"):
        check(program, make_case(4, 8, 6, 3, scale=scale), products)


def test_emulated_forward_saves_states(program: Path) -> None:
    case = make_case(70, 20, 12, 7)
    _, states = forward(program, case, "float64", save_every=3)
    expected = reference.forward(
        *(case.tensors[name] for name in NAMES), case.activation, 1 / 7, 3, False, False
    )[1]
    torch.testing.assert_close(states, expected[:, :70], rtol=1e-13, atol=1e-13)


def test_emulated_rows_do_not_depend_on_each_other(program: Path) -> None:
    case = rounded(make_case(150, 24, 40, 3), torch.float32)
    results, _ = forward(program, case, "float32")
    damaged = {**case.tensors, "h": case.tensors["h"].clone()}
    damaged["h"][7] = float("nan")
    others, _ = forward(program, Case(damaged, case.grad, case.activation, case.scale), "float32")
    assert others["y"][7].isnan().all()
    kept = torch.arange(150) != 7
    assert torch.equal(results["y"][kept], others["y"][kept])


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_emulated_forward_under_sanitizers(sanitizer: str, tmp_path: Path) -> None:
    source = TESTS / "emulation" / "forward.cpp"
    program = build_emulated(source, tmp_path / "forward", f"-fsanitize={sanitizer}")
    for products, shape in (
        ("bfloat16", (70, 20, 72, 2)),
        ("float32", (3, 17, 72, 2)),
        ("float64", (40, 32, 40, 2)),
    ):
        check(program, make_case(*shape), products)


# What keeps the warps of a block apart: without one of them, the emulation must see that something is wrong.
MUTANTS = {
    "no barrier": ("simt::sync_block();", ";"),
    "a chunk too early": ("wait_copies<kStages - 2>", "wait_copies<kStages - 1>"),
    "a chunk that is in use": ("fetch_chunk(chunk + kStages - 1)", "fetch_chunk(chunk + kStages)"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_emulated_mutants_are_found(mutant: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    kernel = tmp_path / "csrc" / "cuda" / "forward.cuh"
    right, wrong = MUTANTS[mutant]
    assert kernel.read_text().count(right) == 1
    kernel.write_text(kernel.read_text().replace(right, wrong))
    source = TESTS / "emulation" / "forward.cpp"
    program = build_emulated(source, tmp_path / "forward", "-fsanitize=thread", csrc=tmp_path / "csrc")
    with pytest.raises(AssertionError):
        check(program, make_case(70, 20, 136, 3), "bfloat16")
