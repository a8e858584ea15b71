"""Blocks on a GPU; skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from oracle import NAMES, check_rule, make_case

from odeblock import DeepResBlock
from odeblock.functional import deep_residual, residual_scan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("strategy", ["auto", "store", "checkpoint", "adjoint"])
def test_a_cuda_block_agrees_with_the_cpu(strategy: str) -> None:
    case = make_case(9, 12, 10, 40)
    found = []
    for device in ("cpu", "cuda"):
        inputs = [case.tensors[name].to(device).requires_grad_() for name in NAMES]
        y = deep_residual(*inputs, backward=strategy)
        assert y.device.type == device
        found.append([y, *torch.autograd.grad(y, inputs, case.grad.to(device))])
    for cpu, cuda in zip(*found, strict=True):
        torch.testing.assert_close(cpu, cuda.cpu(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("strategy", ["auto", "adjoint"])
def test_the_rule_on_a_gpu(strategy: str, dtype: torch.dtype) -> None:
    def on_the_gpu(*tensors: torch.Tensor | None, **options: object) -> torch.Tensor:
        return deep_residual(*(None if t is None else t.cuda() for t in tensors), **options).cpu()

    case = make_case(16, 48, 40, 256, activation="tanh", smooth=True)
    check_rule(on_the_gpu, case, dtype, backward=strategy)


def test_what_one_does_with_depth_on_a_gpu() -> None:
    block = DeepResBlock(6, 20, 9, bias=True, dtype=torch.float64)
    x = torch.randn(4, 6, dtype=torch.float64)

    def results(block: DeepResBlock, x: torch.Tensor) -> list[torch.Tensor]:
        again = DeepResBlock.from_layers(block.to_layers())
        modules = (block.resample(33), block.split(3), again)
        return [block.trajectory(x, 6), block.vector_field()(0.3, x), *(module(x) for module in modules)]

    expected = results(block, x)
    for cpu, cuda in zip(expected, results(block.cuda(), x.cuda()), strict=True):
        assert cuda.is_cuda
        torch.testing.assert_close(cpu, cuda.cpu(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("strategy", ["auto", "store", "checkpoint", "adjoint"])
def test_any_residual_on_a_gpu(strategy: str) -> None:
    params = torch.linspace(-1, 1, 60 * 7 * 7, dtype=torch.float64).view(60, 7, 7)
    x = torch.randn(5, 7, dtype=torch.float64)
    found = []
    for device in ("cpu", "cuda"):
        h, Z = (tensor.to(device).requires_grad_() for tensor in (x, params))
        y = residual_scan(lambda h, Z_k: torch.tanh(h @ Z_k), h, Z, backward=strategy)
        assert y.device.type == device
        found.append([y, *torch.autograd.grad(y.square().sum(), (h, Z))])
    for cpu, cuda in zip(*found, strict=True):
        torch.testing.assert_close(cpu, cuda.cpu(), rtol=1e-11, atol=1e-11)
