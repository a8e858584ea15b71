"""The emulation of a GPU (``tests/emulation``): each primitive as PTX has it, and the faults it must find."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
SEEDS = range(4)


def compile_emulated(source: Path, target: Path, *flags: str, csrc: Path = ROOT / "csrc") -> Path:
    """An object file of kernels for the CPU."""
    command = [
        os.environ.get("CXX", "g++"),
        "-std=c++17",
        "-O1",
        "-g1",  # lines, for the sanitizers' reports; what debuggers also want is a quarter of the time
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
    ]
    command += ["-DODEBLOCK_EMULATED", f"-I{csrc}", f"-I{TESTS / 'emulation'}"]
    command += ["-ftrivial-auto-var-init=pattern", *flags, "-x", "c++", "-c", str(source), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


def build_emulated(source: Path, target: Path, *flags: str, objects: Sequence[Path] = ()) -> Path:
    """A program of kernels for the CPU."""
    own = compile_emulated(source, target.with_suffix(".o"), *flags)
    return link_emulated([own, *objects], target, *(flag for flag in flags if flag.startswith("-fsanitize")))


def link_emulated(objects: Sequence[Path], target: Path, *flags: str) -> Path:
    command = [os.environ.get("CXX", "g++"), *flags, *map(str, objects), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


def check_primitives(output: str) -> None:
    """What ``primitives.cu`` prints, on a GPU or emulated."""
    found = {line.split()[0]: np.array(line.split()[1:], float) for line in output.splitlines()}
    A, B = found["A"], found["B"]
    D = np.arange(128.0).reshape(16, 8)
    for name in ("mma_bfloat16", "mma_float16"):
        np.testing.assert_array_equal(
            found[name].reshape(16, 8), D + A.reshape(16, 16) @ B.reshape(16, 8), name
        )
    expected = D + A[:128].reshape(16, 8) @ B[:64].reshape(8, 8)
    np.testing.assert_array_equal(found["mma_tf32"].reshape(16, 8), expected)
    expected = D[:8] + A[:32].reshape(8, 4) @ B[:32].reshape(4, 8)
    np.testing.assert_array_equal(found["mma_float64"].reshape(8, 8), expected)

    for name in [name for name in found if name.startswith("warpgroup")]:  # on a GPU that has them
        _, rows, row_bytes, j = name.split("_")
        M = found["M"][: int(rows) * int(row_bytes) // 2].reshape(int(rows), -1)[:, 16 * int(j) :][:, :16]
        before = np.arange(64.0 * int(rows)).reshape(64, -1) % 1000
        product = before + 2 * found["A_rows"].reshape(64, 16) @ M.T
        np.testing.assert_array_equal(found[name].reshape(64, -1), product, name)

    for name, j in (("transposed_32_64", 1), ("transposed_64_128", 3), ("transposed_128_128", 2)):
        if name in found:
            columns = int(name.split("_")[1])
            M = found["M"][: 64 * columns].reshape(64, columns)[16 * j :][:16]
            before = np.arange(64.0 * columns).reshape(64, -1) % 1000
            product = before + 2 * found["A_rows"].reshape(64, 16) @ M
            np.testing.assert_array_equal(found[name].reshape(64, -1), product, name)

    layers = np.zeros((3, 40, 128), int)  # zero beyond the matrix
    layers[:, :20, :72] = np.arange(3 * 20 * 72).reshape(3, 20, 72)
    for name in [name for name in found if name.startswith("boxes")]:
        blocks, columns = map(int, name.split("_")[1:])
        results = found[name].reshape(blocks, 2, 1024 + 16)
        place = np.arange(16 * columns)  # pieces of 8 numbers trade places
        place ^= (place >> 6 & columns // 8 - 1) << 3
        for turn, row in ((0, 12), (1, 4)):
            box = layers[1 + turn, row : row + 16, 32 : 32 + columns].reshape(-1)
            for block in range(blocks):
                np.testing.assert_array_equal(results[block, turn, place], box, name)
                expected = np.arange(16) + 16 * (block + turn)
                np.testing.assert_array_equal(results[block, turn, 1024:], expected)

    matrices = np.arange(256).reshape(4, 8, 8)
    for name, rows in (("matrices", matrices), ("matrices_transposed", matrices.transpose(0, 2, 1))):
        pairs = rows.reshape(4, 8, 4, 2)  # lane 4 g + t has of row g the columns 2 t and the next
        expected = (pairs[..., 0] | pairs[..., 1] << 16).reshape(4, 32).T
        np.testing.assert_array_equal(found[name].reshape(32, 4), expected, name)

    words = np.arange(256) % 255 + 1
    data = np.repeat(words, 4).astype(np.uint8).reshape(2, 32, 16)
    for lane in range(32):
        data[0, lane, 16 - lane % 17 :] = 0
    expected = data[:, ::-1].copy().view(np.uint32).reshape(-1)
    np.testing.assert_array_equal(found["copies"], expected)

    threads = np.arange(64)
    received = (threads + 5 * 33) % 64
    expected = received[threads // 32 * 32 + (threads % 32 ^ 5)] + 100 * (threads // 32)
    np.testing.assert_array_equal(found["barriers"], expected)

    x = found["numbers"].astype(np.float32)
    y = x[::-1]
    results = found["conversions"].astype(np.uint32).reshape(32, 4)
    half = lambda a: a.astype(np.float16).view(np.uint16).astype(np.uint32)  # noqa: E731
    np.testing.assert_array_equal(results[:, 0], bfloat16(x) | bfloat16(y) << 16)
    np.testing.assert_array_equal(results[:, 1], half(x) | half(y) << 16)
    np.testing.assert_array_equal(results[:, 2], (x.view(np.uint32) + 0x1000) & 0xFFFFE000)
    widened = (bfloat16(x) << 16).view(np.float32) == x.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(results[:, 3], widened)

    x = found["approximated"]
    tanh, power, reciprocal = found["approximations"].reshape(3, 32)
    np.testing.assert_allclose(tanh, np.tanh(x), rtol=2.0**-10.9)
    np.testing.assert_array_equal(tanh[abs(x) > 9], np.sign(x[abs(x) > 9]))
    with np.errstate(over="ignore"):
        expected = np.exp2(x).astype(np.float32).astype(float)  # beyond 2^128 infinite
    expected[x < -126] = 0
    np.testing.assert_allclose(power, expected, rtol=2.0**-21)
    np.testing.assert_allclose(reciprocal[x != 0], 1 / x[x != 0], rtol=2.0**-21)


def check_rounding(output: str) -> dict[str, tuple[int, bool]]:
    """That tensor cores cut sums off toward zero, no worse than A100's (``emulation/tensor_core.h``).

    By type: the bits of fraction that addends keep, up to 26, and whether all products are added at once.
    """
    found = {line.split()[0]: np.array(line.split()[1:], float) for line in output.splitlines()}
    rounding = {}
    for name, columns in (("bfloat16", 16), ("float16", 16), ("tf32", 8)):
        A, B, D = (found[f"rounding_{columns}_{matrix}"] for matrix in "ABD")
        A, B, D = A.reshape(16, columns), B.reshape(columns, 8), D.reshape(16, 8)
        y = found[f"rounding_{name}"].reshape(16, 8)
        products, size, exact = A @ B, np.abs(A).max() * np.abs(B).max(0), D + A @ B
        # What 24 bits of fraction hold of every addend; of what they do not, all may be lost.
        unit = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(D), size))) - 24)
        lost = np.where(size % unit == 0, 0, np.abs(products))
        away = D * products < 0  # a product that is lost leaves the sum too large
        assert (np.abs(y) <= np.abs(exact) + np.where(away, lost, 0)).all(), name
        ulp = np.spacing(np.abs(exact).astype(np.float32)).astype(float)
        assert (np.abs(y) > np.abs(exact) - np.where(away, 0, lost) - 2 * ulp).all(), name
        apart = np.arange(16) == 4  # a product in each half
        certain = (lost == 0) & ~apart[:, None]
        cut = np.sign(exact) * np.floor(np.abs(exact) / ulp) * ulp
        np.testing.assert_array_equal(y[certain], cut[certain], name)
        kept = [y[j, j + 1] > 1 for j in (1, 2, 3)]  # 2^j products of 2^-(23 + j) and 1
        rounding[name] = 23 + [*kept, False].index(False), bool(y[4, 2] > 1)
    return rounding


def bfloat16(x: np.ndarray) -> np.ndarray:
    """Bits, rounded to nearest even."""
    bits = x.view(np.uint32)
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def test_emulated_primitives(tmp_path: Path) -> None:
    program = build_emulated(TESTS / "primitives.cu", tmp_path / "primitives")
    for capability, rounding in ((80, (24, False)), (90, (25, True))):
        output = subprocess.check_output([program, str(capability)], text=True)
        check_primitives(output)
        assert check_rounding(output) == dict.fromkeys(("bfloat16", "float16", "tf32"), rounding)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_primitives_compile_for_a_gpu(tmp_path: Path) -> None:
    for architecture in ("sm_80", "sm_90a", "sm_100"):
        command = ["nvcc", "-std=c++17", f"-I{ROOT / 'csrc'}", f"-arch={architecture}", "-cubin"]
        command += ["-o", str(tmp_path / "cubin"), str(TESTS / "primitives.cu")]
        subprocess.run(command, check=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_primitives_on_a_gpu(tmp_path: Path) -> None:
    major, minor = torch.cuda.get_device_capability()
    name = f"{major}{minor}{'a' if major == 9 else ''}"
    command = ["nvcc", "-std=c++17", f"-I{ROOT / 'csrc'}", f"-gencode=arch=compute_{name},code=sm_{name}"]
    command += ["-o", str(tmp_path / "primitives")]
    subprocess.run([*command, str(TESTS / "primitives.cu")], check=True)
    output = subprocess.check_output([tmp_path / "primitives"], text=True)
    check_primitives(output)
    print("\n".join(line for line in output.splitlines() if line.startswith("rounding")))
    print("bits of fraction kept, all products at once:", check_rounding(output))


FAULTS = {
    "no_fault": "",
    "no_barrier": "",
    "no_warp_barrier": "",
    "a_barrier_that_half_reaches": "deadlock",
    "divergence": "diverged",
    "a_write_beyond": "a write outside of shared memory",
    "a_copy_beyond": "cp.async: byte 256, of 256",
    "an_unaligned_copy": "cp.async: not aligned",
    "a_copy_not_waited_for": "left the kernel without waiting for its copies",
    "a_group_too_early": "",
    "no_fault_of_bulk": "",
    "a_box_not_waited_for": "",
    "a_box_of_other_bytes": "deadlock",
    "the_wrong_parity": "deadlock",
    "one_arrival_more": "more arrivals than the 1 of a phase",
    "an_unpublished_barrier": "without fence.mbarrier_init",
    "a_barrier_written_over": "a barrier that was written over",
    "a_copy_to_one_that_left": "while copies to it are under way",
    "a_barrier_of_one_that_left": "a block that has left the kernel",
    "a_warp_apart": "without a barrier of the warp",
}
# Those that depend on who is faster.
OF_SOME_SCHEDULES = ("a_copy_to_one_that_left", "a_barrier_of_one_that_left")


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, source = tmp_path_factory.mktemp("faults"), TESTS / "emulation" / "faults.cpp"
    sanitizers = {"plain": [], "thread": ["-fsanitize=thread"], "address": ["-fsanitize=address,undefined"]}
    return {name: build_emulated(source, folder / name, *flags) for name, flags in sanitizers.items()}


@pytest.mark.sanitizers
@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_emulated_kernels_are_found(name: str, faults: dict[str, Path]) -> None:
    def run(build: str, seed: int) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "TSAN_OPTIONS": "exitcode=66", "ASAN_OPTIONS": "detect_leaks=0"}
        command = [str(faults[build]), name, str(seed)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    right = " ".join(map(str, reversed(range(64))))
    plain = [run("plain", seed).stdout.strip() for seed in SEEDS]
    thread = run("thread", 0)
    if name.startswith("no_fault"):
        assert plain == [right] * len(SEEDS)
        assert thread.returncode == 0, thread.stderr[-3000:]
        assert run("address", 0).returncode == 0, run("address", 0).stderr[-3000:]
    elif FAULTS[name]:
        found = any if name in OF_SOME_SCHEDULES else all
        assert found(FAULTS[name] in text for text in plain), plain
    else:  # wrong numbers: in some schedule, and always what the poison or the thread sanitizer shows
        assert any(text != right for text in plain)
        assert "data race" in thread.stderr or all("-1" in text for text in plain), thread.stderr[-3000:]
