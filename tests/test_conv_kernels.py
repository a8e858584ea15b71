"""The native kernels for maps: what the layout of samples in vectors must not change; instruction sets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import make_case
from torch import Tensor

from odeblock import build_info
from odeblock.functional import deep_conv_residual

STRATEGIES = ("store", "checkpoint", "adjoint")


def gradients(
    batch: int, maps: tuple[int, int], kernel: int, strategy: str, dtype: torch.dtype
) -> list[Tensor]:
    """y, dh, dV, dW and dbiases of the first samples of a batch of 40."""
    channels = (7, 10) if kernel == 3 else (3, 5)  # of which products are made in tiles, or by taps
    case = make_case(40, *channels, 6, maps=maps, kernel=kernel, scale=0.05)
    h, *weights = (t.to(dtype) for t in case.tensors.values())
    tensors = [x.clone().requires_grad_() for x in (h[:batch], *weights)]
    y = deep_conv_residual(*tensors, scale=case.scale, backward=strategy)
    return [y.detach(), *torch.autograd.grad(y, tensors, case.grad[:batch].to(dtype))]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("maps", "kernel"), [((10, 10), 3), ((7, 9), 3), ((1, 5), 3), ((6, 7), 5), ((3, 2), 7)]
)
def test_a_sample_does_not_see_its_batch(
    maps: tuple[int, int], kernel: int, dtype: torch.dtype, strategy: str
) -> None:
    """Bit by bit: few samples lie in the vectors as strips of rows, more as fewer strips, then as wholes."""
    y, dh, *_ = gradients(40, maps, kernel, strategy, dtype)
    for batch in (1, 2, 3, 5, 8, 17, 33):
        few_y, few_dh, *_ = gradients(batch, maps, kernel, strategy, dtype)
        assert torch.equal(few_y, y[:batch]), batch
        assert torch.equal(few_dh, dh[:batch]), batch


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 40])
def test_nothing_depends_on_the_threads(batch: int, dtype: torch.dtype, strategy: str) -> None:
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(gradients(batch, (7, 9), 3, strategy, dtype))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_infinite_samples_stay_where_they_are() -> None:
    """And their gradients: the lanes beside them, and those without a sample, are not touched."""
    case = make_case(5, 7, 10, 6, maps=(6, 5))
    tensors = [x.float() for x in case.tensors.values()]
    y = deep_conv_residual(*tensors)
    tensors[0][2] = torch.inf
    changed = deep_conv_residual(*tensors)
    others = [0, 1, 3, 4]
    assert torch.equal(changed[others], y[others])
    assert not changed[2].isfinite().any()


def test_weights_without_samples_have_zero_gradients() -> None:
    for dtype in (torch.float32, torch.float64, torch.float16):
        y, dh, *others = gradients(0, (4, 4), 3, "store", dtype)
        assert y.shape == dh.shape == (0, 7, 4, 4)
        assert all(torch.equal(g, torch.zeros_like(g)) for g in others)


@pytest.mark.parametrize(
    "build", [b for b in build_info()["cpu_builds"] if b != build_info()["cpu_features"]]
)
def test_every_instruction_set(build: str, request: pytest.FixtureRequest) -> None:
    """These tests, and the oracle's rule on all shapes, with the other builds of the kernels."""
    files = [__file__, str(Path(__file__).parent / "test_conv.py")]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *files, "-k", "sample or threads or test_shapes"],
        env={**os.environ, "ODEBLOCK_CPU": build},
        cwd=Path(request.config.rootpath),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:]
