"""Blocks on a GPU; skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from oracle import NAMES, make_case

from odeblock.functional import deep_residual

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
