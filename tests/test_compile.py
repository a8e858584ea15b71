"""Blocks in torch.compile, torch.export, inference mode and TorchScript, and the ops that those see."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from oracle import NAMES, make_case
from torch import Tensor, nn

from odeblock import (
    DeepConvResBlock,
    DeepResBlock,
    DeepResNet,
    DriftError,
    DriftWarning,
    checkpointing,
    functional,
    ops,
)

OLD = not hasattr(torch.compiler, "is_exporting")  # torch 2.6
STRATEGIES = ("auto", "store", "checkpoint", "adjoint")


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch._dynamo.reset()


def make_block(maps: bool, depth: int = 9, **options: Any) -> nn.Module:
    options = {"activation": "tanh", **options}
    return DeepConvResBlock(4, depth, 5, 1, **options) if maps else DeepResBlock(4, depth, 5, **options)


def make_batch(maps: bool, size: int) -> Tensor:
    """Of sizes that no other is equal to: a compiler takes equal ones for the same."""
    return torch.randn(size, 4, *((6, 8) if maps else ()), requires_grad=True)


def same_training_step(
    plain: Callable[..., Tensor], compiled: Callable[..., Tensor], x: Tensor, *inputs: Tensor
) -> None:
    """Result and gradients, bit for bit."""
    found = []
    for function in (plain, compiled):
        y = function(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *inputs])])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


class Network(nn.Module):
    """Blocks of both kinds by every strategy."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Conv2d(3, 4, 1)
        self.maps = DeepConvResBlock(4, 30, backward="adjoint", bias=True)
        self.normalised = DeepConvResBlock(4, 5, norm="batch", backward="store").eval()
        self.rows = DeepResBlock(4, 40, backward="adjoint", anchors=2)
        self.end = DeepResNet(4, 6, 12, 2, backward="checkpoint")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.end(self.rows(self.normalised(self.maps(self.start(x))).mean((2, 3))))
        return y


# ---- torch.compile ---------------------------------------------------------------------------------------


def test_a_model_with_blocks_is_one_graph() -> None:
    model = Network()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = torch.randn(5, 3, 7, 9, requires_grad=True)
    same_training_step(model, compiled, x, *model.parameters())
    assert counter.frame_count == 1
    called = [str(node.target) for node in counter.graphs[0].graph.nodes if node.op == "call_function"]
    assert sum("autograd_function_apply" in name for name in called) == 4  # all blocks are in it


@pytest.mark.parametrize("maps", [False, True], ids=["rows", "maps"])
@pytest.mark.parametrize(
    "options", [{}, {"backward": "store"}, {"backward": "adjoint"}, {"memory_budget": 1 << 24}], ids=str
)
def test_one_graph_serves_every_batch(maps: bool, options: dict[str, Any]) -> None:
    """After the first batch, which has one of its own: the batch is a symbol then. (An old compiler takes one
    more where it compares symbols.)"""
    if OLD and "memory_budget" in options:
        pytest.skip("a compiler that knows no minimum of sizes, on which a plan with a budget depends")
    block = make_block(maps, **options)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for size in (7, 11, 3, 2, 70):
        same_training_step(block, compiled, make_batch(maps, size), *block.parameters())
    assert counter.frame_count <= 2 + OLD


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_function_compiles_like_the_block(strategy: str) -> None:
    """With all sizes symbols from the start, but the depth, which has to be a number."""
    block = make_block(False, backward=strategy)

    def function(x: Tensor) -> Tensor:
        options = {"activation": "tanh", "backward": strategy}
        return functional.deep_residual(x, block.V, block.W, **options)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (7, 3):
        same_training_step(block, compiled, make_batch(False, size), *block.parameters())


def test_inductor() -> None:
    """The default backend, with kernels of its own around the block."""
    model = nn.Sequential(make_block(False, backward="adjoint"), nn.SiLU())
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for size in (3, 7):
        x = make_batch(False, size)
        found = []
        for function in (model, compiled):
            y = function(x)
            found.append([y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("maps", [False, True], ids=["rows", "maps"])
def test_a_compiled_adjoint_reports_to_its_block(maps: bool) -> None:
    """To each block of a graph, to copies as to the original, and loudly where it cannot be trusted."""
    blocks = nn.Sequential(*(make_block(maps, 40, backward="adjoint") for _ in range(2)))
    blocks.append(pickle.loads(pickle.dumps(copy.deepcopy(blocks[0]))))
    compiled = torch.compile(blocks, fullgraph=True, backend="aot_eager")
    x = make_batch(maps, 3)
    blocks(x).sum().backward()
    expected = [block.last_drift for block in blocks]
    for block in blocks:
        block._drift.last.clear()
    compiled(x).sum().backward()
    assert [block.last_drift for block in blocks] == expected
    assert expected[0] != expected[2]

    steep = make_block(maps, 3, backward="adjoint", scale=30.0)
    with pytest.warns(DriftWarning) as told:
        torch.compile(steep, fullgraph=True, backend="aot_eager")(x).sum().backward()
    assert told[0].filename == __file__
    assert steep.last_drift["drift"] > 1e-5
    steep.strict = True
    y = torch.compile(steep, fullgraph=True, backend="aot_eager")(x)
    with pytest.raises(DriftError):
        y.sum().backward()


def test_a_graph_may_outlive_its_block() -> None:
    block = make_block(False, 3, backward="adjoint", scale=30.0)
    y = torch.compile(block, fullgraph=True, backend="aot_eager")(make_batch(False, 3))
    watched = weakref.ref(block._drift)
    del block
    torch._dynamo.reset()
    gc.collect()
    assert watched() is None
    with pytest.warns(DriftWarning):
        y.sum().backward()


# ---- torch.export ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    """For batches of any size, saved and loaded; nothing is kept for a backward, which there is none of."""
    model = Network().eval()
    batch = torch.export.Dim("batch")
    x = torch.randn(5, 3, 7, 9)
    with torch.set_grad_enabled(not OLD):  # which does not say that it exports
        program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: batch}}, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for size in (1, 2, 3, 17):
        x = torch.randn(size, 3, 7, 9)
        assert torch.equal(loaded(x), model(x))
    calls = [
        node.args
        for module in program.graph_module.modules()
        for node in module.graph.nodes
        if node.target is torch.ops.odeblock.deep_residual.default
    ]
    assert [call[7:] for call in calls] == [(0, False, False)] * 4


# ---- inference, meta, TorchScript ------------------------------------------------------------------------


@pytest.mark.parametrize("maps", [False, True], ids=["rows", "maps"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_inference_mode(strategy: str, maps: bool) -> None:
    """Also before a block is ever trained: what is kept from then does not get in the way."""
    block = make_block(maps, backward=strategy)
    x = make_batch(maps, 3)
    with torch.inference_mode():
        y = block(x)
        assert y.is_inference()
    trained = block(x)
    assert torch.equal(trained, y)
    trained.sum().backward()
    again = copy.deepcopy(block)
    with torch.inference_mode():
        assert torch.equal(again(x), y)


@pytest.mark.parametrize("maps", [False, True], ids=["rows", "maps"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_block_on_meta_trains(strategy: str, maps: bool) -> None:
    """Shapes alone: what tools do that count or place the tensors of a model."""
    block = make_block(maps, backward=strategy, device="meta")
    x = make_batch(maps, 3).detach().to("meta").requires_grad_()
    y = block(x)
    assert y.is_meta
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert block.V.grad.is_meta


@pytest.mark.parametrize(
    "model",
    [make_block(False), make_block(True), DeepConvResBlock(4, 3, norm="batch"), DeepResNet(4, 5, 3, 1)],
    ids=["rows", "maps", "norm", "network"],
)
def test_torchscript_is_refused_with_advice(model: nn.Module) -> None:
    advice = "use torch.export.export .* or torch.compile"
    with pytest.raises(RuntimeError, match=f"torch.jit.script cannot .*{advice}"):
        torch.jit.script(nn.Sequential(model))
    x = make_batch(isinstance(model, DeepConvResBlock), 3)
    with pytest.raises(RuntimeError, match=f"torch.jit.trace cannot .*{advice}"):
        torch.jit.trace(nn.Sequential(model), x)


# ---- the ops ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maps", [False, True], ids=["rows", "maps"])
@pytest.mark.parametrize(
    ("batch", "dtype"),
    [(3, torch.float32), (3, torch.float64), (3, torch.bfloat16), (0, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize(
    "plan",
    [
        checkpointing.NOTHING,
        checkpointing.Plan(1, False, 0),
        checkpointing.Plan(1, False, 0, keep_hidden=True),
        checkpointing.Plan(3, False, 2),
        checkpointing.Plan(7, False, 2, keep_hidden=True),
        checkpointing.Plan(0, True, 0),
        checkpointing.Plan(3, True, 0),
    ],
    ids=str,
)
def test_opcheck(plan: checkpointing.Plan, batch: int, dtype: torch.dtype, maps: bool) -> None:
    case = make_case(batch, 4, 5, 7, smooth=True, maps=(5, 4) if maps else None)
    h, V, W, b, c = (case.tensors[name].to(dtype) for name in NAMES)
    grad = case.grad.to(dtype)
    settings = ("tanh", 0.1, plan.save_every, plan.reconstruct, plan.keep_hidden)
    torch.library.opcheck(ops.forward, (h, V, W, b, c, *settings))
    _, *saved = ops.forward(h, V, W, b, c, *settings)
    if plan == checkpointing.NOTHING:
        torch.library.opcheck(ops.forward, (h, V, W, None, None, *settings))
        return
    if maps:
        assert saved[0].shape[2] == (4 + 5 * (plan.keep_hidden and plan.save_every == 1)) * 20
        h, grad = (t.to(memory_format=torch.channels_last) for t in (h, grad))
    for weight_gradients in (True, False) if dtype == torch.float32 else (True,):
        rest = ("tanh", 0.1, *plan, weight_gradients, True, 0)
        torch.library.opcheck(ops.backward, (grad, h, V, W, b, c, *saved, *rest))


def test_equal_blocks_share_a_graph() -> None:
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounter()
    for _ in range(10):
        block = DeepResBlock(4, 6)
        block.compile(fullgraph=True, backend=counter)
        block(torch.randn(3, 4, requires_grad=True)).sum().backward()
    assert counter.frame_count == 1
