"""sigma and sigma' element by element: inside a block the factor 1/L would hide a wrong one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import mpmath
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from odeblock.activations import ACTIVATIONS
from odeblock.functional import deep_residual

DTYPES = (torch.float32, torch.float64)
GRID = torch.cat(
    [
        *(torch.linspace(-30, 30, 2001), torch.linspace(-2, 2, 2001), torch.linspace(-1e-3, 1e-3, 201)),
        torch.zeros(1),
    ]
)
CSRC = Path(__file__).resolve().parents[1] / "csrc"


def through_a_block(name: str, z: Tensor) -> tuple[Tensor, Tensor]:
    """sigma(z), sigma'(z) from one step: the first feature carries z, the second receives sigma(z)."""
    h = torch.stack([z, torch.zeros_like(z)], 1).requires_grad_()
    W = torch.tensor([[[1.0, 0.0]]], dtype=z.dtype)
    V = torch.tensor([[[0.0], [1.0]]], dtype=z.dtype)
    y = deep_residual(h, V, W, activation=name, scale=1.0)
    (gradient,) = torch.autograd.grad(y[:, 1].sum(), h)
    return y[:, 1].detach(), gradient[:, 0]


def exact(name: str, z: float) -> tuple[float, float]:
    """The same in 40 digits."""
    with mpmath.workdps(40):
        x = mpmath.mpf(z)
        one = mpmath.mpf(1)
        logistic = 1 / (1 + mpmath.exp(-x))
        if name == "tanh":
            value, slope = mpmath.tanh(x), mpmath.sech(x) ** 2
        elif name == "sigmoid":
            value, slope = logistic, logistic / (1 + mpmath.exp(x))
        elif name == "softplus":
            value, slope = (x, one) if z > 20 else (mpmath.log1p(mpmath.exp(x)), logistic)
        elif name == "silu":
            value, slope = x * logistic, logistic + x * logistic / (1 + mpmath.exp(x))
        elif name == "gelu":
            value, slope = x * mpmath.ncdf(x), mpmath.ncdf(x) + x * mpmath.npdf(x)
        elif name == "gelu_tanh":
            c, k = mpmath.sqrt(2 / mpmath.pi), mpmath.mpf("0.044715")
            p = 1 / (1 + mpmath.exp(-2 * c * (x + k * x**3)))
            value = x * p
            slope = p + x * p * (1 - p) * 2 * c * (1 + 3 * k * x**2)
        elif name == "relu":
            value, slope = max(x, mpmath.mpf(0)), one if z > 0 else 0 * one
        elif name == "leaky_relu":
            value, slope = (x, one) if z > 0 else (x / 100, one / 100)
        else:
            value, slope = x, one
        return float(value), float(slope)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_and_derivatives(name: str, dtype: torch.dtype) -> None:
    z = GRID.to(dtype)
    s, d = through_a_block(name, z)
    true_s, true_d = torch.tensor([exact(name, x) for x in z.tolist()], dtype=torch.float64).unbind(1)
    eps = torch.finfo(dtype).eps
    # Relative where sigma is not in a vanishing tail, where only the absolute error can be kept.
    error_s = (s.double() - true_s).abs() / true_s.abs().clamp_min(1e-2)
    error_d = (d.double() - true_d).abs() / true_d.abs().clamp_min(1.0)
    small = z.abs() < 1e-3
    relative = ((s.double() - true_s).abs() / true_s.abs().clamp_min(1e-300))[small]
    assert float(error_s.max()) <= 4 * eps
    assert float(error_d.max()) <= 4 * eps
    assert float(relative.max()) <= 4 * eps


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nan_in_nan_out(name: str) -> None:
    z = torch.tensor([float("nan"), 0.5])
    s, d = through_a_block(name, z)
    assert s.isnan().tolist() == [True, False]
    assert not d[1].isnan()


def test_softplus_is_linear_where_pytorch_has_it_so() -> None:
    z = torch.tensor([19.5, 20.0, 20.0 + 1e-12, 20.5, 40.0], dtype=torch.float64)
    s, d = through_a_block("softplus", z)
    x = z.clone().requires_grad_()
    torch.testing.assert_close(s, F.softplus(z), rtol=1e-15, atol=0)
    (slope,) = torch.autograd.grad(F.softplus(x).sum(), x)
    torch.testing.assert_close(d, slope, rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    ("dtype", "zero"), [(torch.float32, 1e-20), (torch.float64, 1e-290)], ids=["float32", "float64"]
)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_large_arguments_saturate(name: str, dtype: torch.dtype, zero: float) -> None:
    z = torch.tensor([-1e4, 1e4], dtype=dtype)
    s, d = through_a_block(name, z)
    true = torch.tensor([exact(name, x) for x in z.tolist()], dtype=torch.float64).to(dtype)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(s, true[:, 0], rtol=4 * eps, atol=zero)
    torch.testing.assert_close(d, true[:, 1], rtol=4 * eps, atol=zero)


@pytest.fixture(scope="session")
def gpu_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``activations_host.cpp``: activations.h on the functions of cuda/math.cuh, run on the host."""
    program = tmp_path_factory.mktemp("activations") / "activations"
    source = Path(__file__).parent / "activations_host.cpp"
    compiler = shutil.which("c++") or shutil.which("g++")
    assert compiler, "a C++ compiler is needed"
    options = ["-std=c++17", "-O1", "-DODEBLOCK_EMULATED", f"-I{CSRC}", f"-I{source.parent / 'emulation'}"]
    subprocess.run([compiler, *options, source, "-o", program], check=True)
    return program


# Largest error, relative to z from 1 to 10, which may be a factor (of sigma in double: to sigma): rounding;
# what the hardware's 1/x and 2^x leave, and the polynomial of gelu; what its tanh leaves, 2^-11, times some.
@pytest.mark.parametrize(("bits", "allowed"), [(53, 2e-15), (24, 4e-7), (11, 1e-5), (8, 2e-3)])
def test_the_gpu_table(bits: int, allowed: float, gpu_table: Path) -> None:
    points = [0.0, 1e-4, 0.07, 0.3, 0.7, 2.5, 4.6, 9.5, 11.0, 50.0, 200.0, 1e4]
    points = torch.tensor(
        [*points, *(-x for x in points)], dtype=torch.float64 if bits > 24 else torch.float32
    )
    for activation in ACTIVATIONS.values():
        arguments = [str(bits), str(activation.native_id), *map(repr, points.tolist())]
        lines = subprocess.check_output([gpu_table, *arguments], text=True).splitlines()
        for x, line in zip(points.tolist(), lines, strict=True):
            s, d = map(float, line.split())
            true_s, true_d = exact(activation.name, x)
            size = min(max(1.0, abs(x)), 10.0)
            error = abs(s - true_s) / max(size if bits <= 24 else 1e-6, abs(true_s))
            assert error <= allowed, (activation.name, x, s)
            assert abs(d - true_d) <= allowed * size, (activation.name, x, d)
        output = subprocess.check_output([gpu_table, *arguments[:2], "nan"], text=True)
        assert output.startswith(("nan", "-nan")), activation.name


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc: CUDA code is not compiled here")
def test_the_table_compiles_for_a_gpu(tmp_path: Path) -> None:
    source = Path(__file__).parent / "activations_device.cu"
    command = ["nvcc", "-std=c++17", "-arch=sm_80", "-Werror", "all-warnings", f"-I{CSRC}", "-c", source]
    subprocess.run([*command, "-o", tmp_path / "activations.o"], check=True)
