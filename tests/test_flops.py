"""What PyTorch's profiler and its counter of floating-point operations see of a block."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from oracle import NAMES, make_case
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from odeblock import DeepResBlock, DeepResNet, checkpointing, flops, functional, native, ops, reference
from odeblock.drift import DriftRecord

kinds = pytest.mark.parametrize("maps", [None, (5, 4)], ids=["rows", "maps"])


def counted(run: Any, *arguments: Any, **options: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        run(*arguments, **options)
    return counter.get_total_flops()


def inputs(depth: int, maps: Any, batch: int = 3, trained: bool = True) -> tuple[Tensor, ...]:
    case = make_case(batch, 4, 6, depth, maps=maps, smooth=True)
    return tuple(case.tensors[name].float().requires_grad_(trained) for name in NAMES)


@kinds
def test_a_step_has_the_operations_of_the_loop(maps: Any) -> None:
    run, twin = functional.deep_residual, reference.deep_residual
    if maps:
        run, twin = functional.deep_conv_residual, reference.deep_conv_residual
    tensors = inputs(7, maps)
    assert counted(run, *tensors) == counted(twin, *tensors) > 0

    def step(function: Any) -> None:
        function(*tensors, backward="store").square().sum().backward()

    assert counted(step, run) == counted(step, twin)
    for t in tensors[1:]:
        t.requires_grad_(False)
    assert counted(step, run) == counted(step, twin)


@kinds
@pytest.mark.parametrize(
    "plan",
    [
        checkpointing.Plan(1, False, 0),
        checkpointing.Plan(1, False, 0, keep_hidden=True),
        checkpointing.Plan(3, False, 2),
        checkpointing.Plan(10, False, 3),
        checkpointing.Plan(10, False, 1),
    ],
    ids=str,
)
def test_a_backward_has_what_it_runs_again(maps: Any, plan: checkpointing.Plan) -> None:
    h, *weights = inputs(10, maps, trained=False)
    options = ("tanh", 0.1, plan.save_every, plan.reconstruct)
    _, states, checks = reference.forward(h, *weights, *options, plan.keep_hidden)
    arguments = (h, None, *weights, states, checks, *options, plan.slots, plan.keep_hidden, True)
    assert counted(ops.backward, *arguments, False, 0) == counted(reference.backward, *arguments)


def test_hidden_values_that_are_kept_are_not_computed_again() -> None:
    """Three segments of three steps: two run again, and z of the third. Without, z of all three."""
    assert flops.products_again(9, 3, 2, keep_hidden=True) == 3 * (2 * 2 + 1)
    assert flops.products_again(9, 3, 2, keep_hidden=False) == 3 * (2 * 2 + 3)


@kinds
@pytest.mark.parametrize("anchors", [0, 2])
def test_an_adjoint_has_the_evaluations_that_it_took(
    maps: Any, anchors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "runs_natively", lambda h: False)
    plan = checkpointing.plan("adjoint", 24, anchors, None, 1, 1)
    h, *weights = inputs(
        40, maps, batch=1, trained=False
    )  # the reference evaluates all rows while one has to
    options = ("tanh", 1 / 24, plan.save_every, plan.reconstruct)
    _, states, checks = reference.forward(h, *weights, *options, plan.keep_hidden)
    arguments = (h, h, *weights, states, checks, *options, plan.slots, plan.keep_hidden, True)
    record = DriftRecord()
    again = counted(ops.backward, *arguments, True, record.number)
    assert again == counted(reference.backward, *arguments)
    least = 2 * counted(reference.loop, h, *weights, activation="tanh", scale=1 / 24)  # dh, dV, dW
    assert again > 1.5 * least


def test_modules_and_tensors_without_values_are_counted() -> None:
    model = DeepResNet(5, 4, 9, 2, device="meta", backward="adjoint")
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(3, 5, device="meta")).sum().backward()
    by_module = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    step = 2 * 2 * 3 * 4 * 4
    assert by_module["DeepResNet.block"] == 9 * (step + 3 * step)  # forward; evaluation and gradients


@pytest.mark.parametrize("first", ["odeblock", "torch.utils.flop_counter"])
def test_the_counter_is_told_whichever_comes_first(first: str) -> None:
    """And importing odeblock does not import it, with Triton behind it."""
    code = f"""
import sys, {first}
assert ("torch.utils.flop_counter" in sys.modules) == ({first!r} != "odeblock")
import odeblock, torch
from torch.utils.flop_counter import flop_registry
assert torch.ops.odeblock.deep_residual in flop_registry
assert torch.ops.odeblock.deep_residual_backward in flop_registry
assert torch.ops.odeblock.deep_conv_normalised_backward in flop_registry
assert not any("WhenImported" in type(finder).__name__ for finder in sys.meta_path)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_trace_names_the_ops() -> None:
    block = DeepResBlock(4, 9)
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        block(torch.randn(3, 4)).sum().backward()
    names = {event.key: event.count for event in trace.key_averages()}
    assert names["odeblock::deep_residual"] == 1
    assert names["odeblock::deep_residual_backward"] == 1


def test_to_look_for_the_counter_is_not_to_import_it() -> None:
    program = """
import importlib.util, torch, odeblock
importlib.util.find_spec("torch.utils.flop_counter")
from torch.utils.flop_counter import FlopCounterMode
block = odeblock.DeepResBlock(4, 6)
with FlopCounterMode(display=False) as counter, torch.no_grad():
    block(torch.randn(3, 4))
assert counter.get_total_flops() == 2 * 2 * 6 * 3 * 4 * 4
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_members_of_an_adjoint_are_counted_by_their_evaluations() -> None:
    x, V, W = torch.randn(3, 4), torch.randn(64, 4, 4), torch.randn(64, 4, 4)

    def loss(x: Tensor) -> Tensor:
        return functional.deep_residual(x, V, W, backward="adjoint").sum()

    one = counted(torch.func.grad(loss), x)
    mapped = counted(torch.vmap(torch.func.grad(loss)), x[None])
    again = 2 * 2 * 64 * 3 * 4 * 4
    assert mapped in (one, one + again)
