"""Ctrl-C during a long call of the native core: it ends within a second, and everything works afterwards."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import pytest
import torch

from odeblock import DeepConvResBlock, DeepResBlock, build_info

pytestmark = pytest.mark.skipif(
    not build_info()["native"], reason="the native core alone can be long in a call"
)

# dim, depth, shape of h: what takes some seconds in a call.
LONG: dict[str, tuple[Any, tuple[int, int], tuple[int, ...]]] = {
    "rows": (DeepResBlock, (64, 1024), (8192, 64)),
    "a wide layer": (DeepResBlock, (2048, 8), (2048, 2048)),
    "maps": (DeepConvResBlock, (16, 1024), (64, 16, 16, 16)),
}


def interrupted(call: Any, after: float) -> float:
    """Seconds from Ctrl-C to the end of a call."""
    sent = []

    def send() -> None:
        sent.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(after, send)
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            call()
        return time.perf_counter() - sent[0]
    finally:
        timer.join()


@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("what", ["forward", "checkpoint", "adjoint"])
def test_a_call_ends_when_it_is_interrupted(what: str, kind: str) -> None:
    make, sizes, shape = LONG[kind]
    block, h = make(*sizes, init="tied", backward="auto" if what == "forward" else what), torch.randn(shape)
    if what == "forward":
        with torch.no_grad():
            assert interrupted(lambda: block(h), 0.2) < 1
        return
    y = block(h)
    assert interrupted(lambda: torch.autograd.grad(y, [block.V, block.W], torch.ones_like(y)), 0.2) < 1


def test_what_was_interrupted_works_again() -> None:
    torch.manual_seed(0)
    block, h = DeepResBlock(64, 2048), torch.randn(8192, 64)
    few = h[:100].clone().requires_grad_()
    expected = torch.autograd.grad(block(few).sum(), [few, block.V])
    interrupted(lambda: block(h), 0.1)
    found = torch.autograd.grad(block(few).sum(), [few, block.V])
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_handlers_of_other_signals_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that raises nothing: the call goes on."""
    block, h = DeepResBlock(64, 512), torch.randn(4096, 64)
    expected = block(h)
    seen: list[float] = []
    before = signal.signal(signal.SIGALRM, lambda *_: seen.append(time.perf_counter()))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        found, end = block(h), time.perf_counter()
        while time.perf_counter() < end + 0.1:
            pass
    finally:
        signal.signal(signal.SIGALRM, before)
    assert len(seen) == 1
    assert torch.equal(found, expected)
