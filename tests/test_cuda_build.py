"""The CUDA part without a GPU: kernels compile, hold in registers what they should, and are used if right."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from test_emulated_kernels import CSRC, MAP_PRODUCTS, PRODUCTS

from odeblock import gpu, native, reference

needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="no nvcc: CUDA code is not compiled here"
)


def resources(name: str, architecture: str, folder: Path, kind: str) -> dict[str, tuple[int, int]]:
    """Registers and bytes of memory for what they do not hold, by kernel: what ptxas reports."""
    command = [
        "nvcc",
        "-std=c++17",
        f"-arch={architecture}",
        "-Werror",
        "all-warnings",
        "-Xptxas",
        "-v",
        "-cubin",
    ]
    command += [f"-DODEBLOCK_PRODUCTS={PRODUCTS[name][0]}"]
    command += [f"-DODEBLOCK_CUDA_{kind.upper()}=cuda_{kind}_{name}"]
    command += ["-o", str(folder / f"{name}.{architecture}"), str(CSRC / "cuda" / f"{kind}.cu")]
    report = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ).stdout
    # Products of a warpgroup that the compiler makes wait for each other, or puts waits between.
    assert not re.search(r"\(C75\d\d\)", report), report
    kernels = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame.*?Used (\d+) registers", report, re.S
    )
    return {kernel: (int(registers), int(stack)) for kernel, stack, registers in kernels}


def check_spills(name: str, architecture: str, folder: Path, kind: str = "kernels") -> None:
    kernels = resources(name, architecture, folder, kind)
    of_maps = 2 if name in ("float32", "float64") else 4  # for the usual size apart
    assert len(kernels) == (of_maps if kind == "map_kernels" else 7 if name.endswith("warpgroup") else 15)
    for kernel, (registers, stack) in kernels.items():
        assert stack == 0, f"{kernel} for {architecture}: {stack} bytes beside {registers} registers"


def halves_once(names: Iterable[str]) -> list[Any]:
    """The 16-bit types have the same sources, and instructions that differ in a name: float16 is long."""
    return [pytest.param(n, marks=[pytest.mark.long] if n.startswith("float16") else []) for n in names]


@needs_nvcc
@pytest.mark.parametrize("name", halves_once(PRODUCTS))
def test_kernels_compile_without_spills(name: str, tmp_path: Path) -> None:
    architectures = ["sm_90a"] if name.endswith("warpgroup") else ["sm_80", "sm_90a"]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda architecture: check_spills(name, architecture, tmp_path), architectures))


@needs_nvcc
@pytest.mark.parametrize("name", halves_once(MAP_PRODUCTS))
def test_kernels_of_maps_compile_without_spills(name: str, tmp_path: Path) -> None:
    for architecture in ("sm_80", "sm_90a", "sm_100"):
        check_spills(name, architecture, tmp_path, "map_kernels")


@pytest.mark.long
@needs_nvcc
@pytest.mark.parametrize("name", [name for name in PRODUCTS if not name.endswith("warpgroup")])
def test_kernels_compile_without_spills_for_a_later_gpu(name: str, tmp_path: Path) -> None:
    """Whose driver compiles them from PTX."""
    check_spills(name, "sm_100", tmp_path)


@pytest.mark.parametrize("dtype", native.NATIVE_DTYPES, ids=str)
def test_kernels_that_are_wrong_on_a_gpu_are_left_alone(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong: dict[str, list[tuple[int, ...]]] = {"state": [], "dW": [], "adjoint": []}
    broken: list[tuple[int, ...]] = []

    def forward(*arguments: Any) -> tuple[torch.Tensor, ...]:
        y, states, checks = reference.forward(*arguments, False)
        if tuple(y.shape) in wrong["state"]:
            states[-1, 39, 90] += 1
        return y, states, checks

    def backward(grad: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
        *given, slots, weight_gradients = arguments
        if tuple(grad.shape) in broken:
            raise fault_of_a_launch
        gradients = reference.backward(grad, *given, slots, False, weight_gradients)
        if tuple(grad.shape) in wrong["dW"]:
            gradients[2][0, 0, 0] += 100 * gradients[2].abs().max()
        if tuple(grad.shape) in wrong["adjoint"] and given[-1]:
            gradients[1][1, 2, 3] = float("nan")
        return gradients

    def agree() -> bool:
        return gpu.kernels_agree(torch.device("cpu"), dtype)

    monkeypatch.setattr(gpu, "BATCHES", (40, 64, 70, 1000))
    monkeypatch.setattr(gpu, "MAP_BATCHES", (1, 300))
    monkeypatch.setattr(gpu, "forward", forward)
    monkeypatch.setattr(gpu, "backward", backward)
    fault_of_a_launch = RuntimeError("too many resources requested for launch")
    assert agree()
    for fault, shape in (("state", (40, 96)), ("dW", (64, 32)), ("adjoint", (70, 13))):
        wrong[fault].append(shape)
        expected = f"{dtype}, {shape[0]} rows of {shape[1]} features: error .*please report it"
        with pytest.warns(RuntimeWarning, match=expected):
            assert not agree()
    assert gpu.kernels_agree(torch.device("cpu"), dtype, maps=True)
    wrong["dW"].append((300, 3, 7, 9))
    with pytest.warns(RuntimeWarning, match=f"{dtype}, 300 maps of 3 x 7 x 9: error .*please report it"):
        assert not gpu.kernels_agree(torch.device("cpu"), dtype, maps=True)
    broken.append((1000, 13))
    wrong["adjoint"].clear()
    with pytest.warns(RuntimeWarning, match="1000 rows of 13 features: too many resources"):
        assert not agree()
    fault_of_a_launch = torch.OutOfMemoryError("CUDA out of memory")  # which says nothing of the kernels
    with pytest.raises(torch.OutOfMemoryError):
        agree()
    monkeypatch.setattr(gpu, "has_kernels", lambda index: True)
    monkeypatch.setattr(gpu, "_agreed", {})
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    row = torch.empty(1, 13, dtype=dtype)
    with pytest.warns(RuntimeWarning, match="too little memory is free on cpu"):
        assert not gpu.has_kernels_for(row)
    for shapes in (broken, *wrong.values()):
        shapes.clear()
    assert gpu.has_kernels_for(row)  # asked again


def test_a_gpu_without_kernels_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Core:
        build_info = staticmethod(lambda: {"cuda_architectures": ["80-real", "90a-real"]})
        cuda_unsupported = staticmethod(lambda index: "no kernel image is available")

    monkeypatch.setattr(native, "core", Core)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "an old GPU")
    gpu.has_kernels.cache_clear()
    expected = r"an old GPU \(sm_75; built for 80-real, 90a-real\): no kernel"
    with pytest.warns(RuntimeWarning, match=expected) as told:
        found = [gpu.has_kernels(0) for _ in range(2)]
    gpu.has_kernels.cache_clear()
    assert found == [False, False]
    assert len(told) == 1


def test_figures_of_a_gpu(tmp_path: Path) -> None:
    """Of made-up results, where eager runs out of memory at the greatest depth."""
    steps = []
    for products, *shape in (
        ("bfloat16", 65536, 128, 128, 256),
        ("float32", 16384, 64, 64, 256),
        *(("bfloat16", 4096, 64, 64, depth) for depth in (64, 1024, 8192)),
    ):
        names = ["store", "auto", "adjoint", *(["eager"] if shape[3] < 8192 else [])]
        numbers = {name: 1e9 * shape[3] * (n + 1) for n, name in enumerate(names)}
        shown = dict.fromkeys(("peak_bytes", "operations_per_second", "row_layers_per_second"), numbers)
        steps.append({"products": products, "shape": shape, **shown})
    results = {"gpu": "a GPU", "matrix_product": {"bfloat16": 8e14, "float32": 5e13}, "steps": steps}
    (tmp_path / "gpu.json").write_text(json.dumps(results))
    command = [sys.executable, CSRC.parent / "benchmarks" / "gpu_report.py", tmp_path / "gpu.json"]
    subprocess.run([*command, "--output", tmp_path / "images"], check=True)
    for name in ("gpu_depth.png", "gpu_steps.png"):
        image = imread(tmp_path / "images" / name)
        assert image.shape[0] > 200
        assert image.std() > 0.05
