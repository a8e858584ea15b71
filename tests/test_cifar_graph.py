"""Training steps on CIFAR-10 in a CUDA graph, against the same steps without; rehearsals leave no trace."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from odeblock.experiments.config import CIFAR_QUICK, CifarConfig

pytest.importorskip("rich")

from odeblock.experiments.cifar import data
from odeblock.experiments.cifar.graph import GraphedStep, rehearse
from odeblock.experiments.cifar.run import Run, read_checkpoint
from odeblock.experiments.cifar.training import Training

SMALL = CifarConfig(**{**CIFAR_QUICK, "epochs": 2, "images": 160, "batch_size": 24})
IMAGES = data.load(None, 160)  # 144 for training: 6 batches

needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def graphs_alive() -> int:
    """Nodes of autograd's graphs that functions written in Python have, of a block's at least."""
    return sum(issubclass(type(x), torch.autograd.function.BackwardCFunction) for x in gc.get_objects())


@pytest.mark.parametrize("backward", ["store", "auto"])
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_a_rehearsal_leaves_no_trace(norm: str, backward: str) -> None:
    """Weights, running statistics, and what comes of the next step; nor a graph of autograd's."""
    rehearsed, plain = (Training(replace(SMALL, norm=norm, backward=backward), IMAGES) for _ in range(2))
    before = {name: t.clone() for name, t in rehearsed.network.state_dict().items()}
    gc.collect()
    gc.disable()
    try:
        graphs = graphs_alive()
        rehearse(rehearsed._gradients, rehearsed.network, *plain.batches.next())
        assert graphs_alive() == graphs
    finally:
        gc.enable()
    for name, t in rehearsed.network.state_dict().items():
        assert torch.equal(t, before[name]), name
    assert all(p.grad is None for p in rehearsed.network.parameters())
    rehearsed.batches.next()
    for _ in range(2):
        assert torch.equal(rehearsed._train_step(), plain._train_step())
    for a, b in zip(
        rehearsed.network.state_dict().values(), plain.network.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)


def test_only_a_gpu_has_a_graph() -> None:
    assert not isinstance(Training(SMALL, IMAGES)._differentiate, GraphedStep)


def near(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float) -> None:
    """Each relative to its largest entry: sums of weight gradients may come in any order."""
    assert a.keys() == b.keys()
    for name, right in b.items():
        error = (a[name].double() - right.double()).abs().max()
        assert error <= tolerance * right.double().abs().max(), f"{name}: {error:.1e}"


@needs_a_gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("backward", ["store", "auto"])
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_graphed_steps_are_steps(norm: str, backward: str, precision: str) -> None:
    config = replace(
        SMALL, norm=norm, backward=backward, precision=precision, device="cuda", depth=20, channels=16
    )
    graphed, eager = (Training(config, IMAGES) for _ in range(2))
    assert isinstance(graphed._differentiate, GraphedStep)
    eager._differentiate = eager._gradients
    found = [[run._train_step() for _ in range(4)] for run in (graphed, eager)]
    tolerance = {"float32": 1e-3, "bfloat16": 2e-2}[precision]  # tf32 may round
    torch.testing.assert_close(*(torch.stack(steps) for steps in found), rtol=tolerance, atol=0)
    assert len({float(step[0]) for step in found[0]}) == 4  # none overwritten
    near(graphed.network.state_dict(), eager.network.state_dict(), tolerance)
    if norm == "batch":
        assert graphed.network.block.num_batches_tracked == 4
        assert graphed.network.stem[1].num_batches_tracked == 4
    graphed.evaluate(IMAGES.validation)  # between steps, with another shape
    torch.testing.assert_close(graphed._train_step(), eager._train_step(), rtol=tolerance, atol=0)


@needs_a_gpu
def test_an_adjoint_has_no_graph(tmp_path: Path) -> None:
    run = Run(tmp_path, replace(SMALL, backward="adjoint", device="cuda", epochs=1), IMAGES)
    assert not isinstance(run.training._differentiate, GraphedStep)
    assert run.go()


@needs_a_gpu
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_a_graphed_run_goes_on(norm: str, tmp_path: Path) -> None:
    config = replace(SMALL, norm=norm, device="cuda")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    assert Run(whole, config, IMAGES).go()
    run = Run(parts, config, IMAGES)
    assert not run.go(stop=lambda: run.training.step >= 6)
    assert Run(parts, config, IMAGES, read_checkpoint(parts)).go()
    first, second = read_checkpoint(whole), read_checkpoint(parts)
    assert first is not None
    assert second is not None
    assert first["step"] == second["step"] == 12
    near(first["state_dict"], second["state_dict"], 1e-3)
