"""Programs of torch.export, with the op as it is and in PyTorch's operators, and ONNX made of the latter."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import odeblock
from odeblock import DeepConvResBlock, DeepResBlock, DeepResNet

dynamic = {0: torch.export.Dim("batch", min=1, max=64)}
needs_exporting = pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"), reason="PyTorch 2.6 does not say when it exports"
)


def normalised() -> DeepConvResBlock:
    block = DeepConvResBlock(3, 5, 4, activation="silu", norm="batch", bias=True)
    for _ in range(3):
        block(torch.randn(4, 3, 4, 4))
    return block.eval()


MODELS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "network": (lambda: DeepResNet(5, 4, 6, 2, bias=True), (5,)),
    "adjoint": (lambda: DeepResBlock(4, 6, activation="tanh", backward="adjoint"), (3, 4)),
    "maps": (lambda: DeepConvResBlock(3, 5, 4, activation="gelu_tanh"), (3, 4, 4)),
    "normalised": (normalised, (3, 4, 4)),
}
models = pytest.mark.parametrize("name", MODELS)


def make(name: str) -> tuple[nn.Module, Callable[[int], Tensor]]:
    """A model, and a function that draws a batch of a size for it."""
    build, shape = MODELS[name]
    return build(), lambda batch: torch.randn(batch, *shape)


def ops_of(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@needs_exporting
@models
@pytest.mark.parametrize("grad", [True, False])
def test_a_program_for_any_batch(name: str, grad: bool) -> None:
    """Of one op that saves nothing, though the parameters have gradients; then of PyTorch's."""
    model, draw = make(name)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(model, (draw(5),), dynamic_shapes=(dynamic,))
        plain = program.run_decompositions(odeblock.export.decompositions())
    calls = [node for node in program.graph.nodes if "odeblock" in str(node.target)]
    assert [call.args[7:9] for call in calls] == [(0, False)]
    assert not [op for op in ops_of(plain) if "odeblock" in op]
    for batch in (1, 3, 17):
        x = draw(batch)
        assert torch.equal(program.module()(x), model(x))
        torch.testing.assert_close(plain.module()(x), model(x))


def test_a_program_in_pytorchs_operators_runs_without_odeblock(tmp_path: Path) -> None:
    model, draw = make("normalised")
    x = draw(5)
    with torch.no_grad():
        program = torch.export.export(model, (x,)).run_decompositions(odeblock.export.decompositions())
        torch.save((x, model(x)), tmp_path / "case.pt")
    torch.export.save(program, tmp_path / "model.pt2")
    code = """
import sys, torch
x, y = torch.load("case.pt")
torch.testing.assert_close(torch.export.load("model.pt2").module()(x), y)
assert "odeblock" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_a_program_in_pytorchs_operators_can_be_trained() -> None:
    model, draw = make("network")
    x = draw(5)
    with torch.no_grad():
        program = torch.export.export(model, (x,)).run_decompositions(odeblock.export.decompositions())
    trained = program.module()
    for net in (model, trained):
        net(x).square().sum().backward()
    for name, p in trained.named_parameters():
        torch.testing.assert_close(p.grad, model.get_parameter(name).grad)


@needs_exporting
def test_gradients_within_a_model_are_exported() -> None:
    """A force is minus the gradient of an energy: what a program of the gradient needs is not left out."""

    class Force(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.energy = DeepResBlock(4, 6, activation="tanh", dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            return -torch.autograd.grad(self.energy(x).sum(), x)[0]

    model, x = Force(), torch.randn(5, 4, dtype=torch.float64)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("strict", [True, False])
def test_a_residual_of_ones_own_is_exported(strict: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return odeblock.functional.residual_scan(lambda h, Z: torch.tanh(h @ Z), x, self.weight)

    model, x = Model(), torch.randn(2, 3)
    program = torch.export.export(model, (x,), strict=strict).module()
    torch.testing.assert_close(program(x), model(x))


@pytest.mark.parametrize(
    "change",
    [torch.Tensor.half, lambda W: W.to("meta"), lambda W: W[:1]],
    ids=["another dtype", "another device", "fewer layers"],
)
def test_a_program_whose_weights_were_changed_says_so(change: Callable[[Tensor], Tensor]) -> None:
    """Nothing checks its arguments but the op."""
    x = torch.randn(5, 3)
    program = torch.export.export(DeepResBlock(3, 4), (x,)).module()
    program.W = nn.Parameter(change(program.W.detach()))
    with pytest.raises((TypeError, ValueError), match="W: expected"):
        program(x)


def test_an_op_that_saves_states_stays_as_it_is() -> None:
    (written_out,) = odeblock.export.decompositions().values()
    block = DeepResBlock(4, 6)
    arguments = (torch.randn(3, 4), block.V, block.W, None, None, "gelu", 0.1)
    assert written_out(*arguments, 2, False, True) is NotImplemented
    assert written_out(*arguments, 0, True, False) is NotImplemented
    y, states, checks = written_out(*arguments, 0, False, False)
    expected = torch.ops.odeblock.deep_residual(*arguments, 0, False, False)
    torch.testing.assert_close(y, expected[0])
    assert states.numel() == checks.numel() == 0


@needs_exporting
@pytest.mark.parametrize("name", ["network", "normalised"])
def test_onnx(name: str) -> None:
    onnx_reference = pytest.importorskip("onnx.reference")
    pytest.importorskip("onnxscript")
    model, draw = make(name)
    program = torch.export.export(model, (draw(5),), dynamic_shapes=(dynamic,))
    program = program.run_decompositions(odeblock.export.decompositions())
    exported = torch.onnx.export(program, dynamo=True, verbose=False)
    evaluator = onnx_reference.ReferenceEvaluator(exported.model_proto)
    (entry,) = exported.model_proto.graph.input
    for batch in (1, 3, 17):
        x = draw(batch)
        (y,) = evaluator.run(None, {entry.name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), model(x).detach())
