"""Which states are stored: the schedules are optimal, keep their budget, and change no bit."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from oracle import NAMES, make_case
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from odeblock import DeepResBlock, checkpointing, native, ops, reference
from odeblock.functional import deep_residual


@functools.cache
def fewest_steps(length: int, slots: int) -> int:
    """The least number of steps run again, by trying every cut: the state at it takes a slot."""
    if length == 1:
        return 0
    if slots == 0:
        return 10**9
    return min(
        cut + fewest_steps(length - cut, slots - 1) + fewest_steps(cut, slots) for cut in range(1, length)
    )


@pytest.mark.parametrize("slots", range(1, 8))
def test_the_sweep_is_optimal(slots: int) -> None:
    for length in range(1, 50):
        run = most = 0
        visited = []
        live: set[int] = set()

        class State:
            """h_k, counted while it is referred to."""

            def __init__(self, k: int, live: set[int] = live) -> None:
                nonlocal most
                self.k, self.live = k, live
                live.add(id(self))
                most = max(most, len(live))

            def __del__(self) -> None:
                self.live.discard(id(self))

        def advance(state: State, k: int, State: type[State] = State) -> State:
            nonlocal run
            assert state.k == k
            run += 1
            return State(k + 1)

        def visit(state: State, k: int, visited: list[int] = visited) -> None:
            assert state.k == k
            visited.append(k)

        checkpointing.sweep(State(5), 5, 5 + length, slots, *checkpointing.by_layers(advance, visit))
        assert visited == list(reversed(range(5, 5 + length)))
        assert run == checkpointing.steps_again(length, slots) == fewest_steps(length, slots)
        assert most <= slots + 2  # the first state, the slots, and one that replaces another


@pytest.mark.parametrize("depth", [1, 2, 7, 64, 100, 1000])
def test_plans_keep_the_budget_and_gain_by_more(depth: int) -> None:
    state, slot = 1000, 300
    before = None
    for budget in range(state + slot, (3 * depth + 3) * state, 700):
        for strategy in ("checkpoint", "auto"):
            every, reconstruct, slots, keep = checkpointing.plan(
                strategy, depth, 0, budget, state, slot, hidden_bytes=(2 * state, slot)
            )
            assert not reconstruct
            stored = -(-depth // every)
            if every == 1:
                held = (3 if keep else 1) * stored * state
                assert keep == (strategy == "auto" and 3 * depth * state <= budget)
            else:
                held = stored * state + (2 if keep else 1) * slots * slot
            assert held <= budget or depth == 1
        steps = sum(
            checkpointing.steps_again(min(every, depth - n * every), slots) if every > 1 else 0
            for n in range(stored)
        )
        products = 2 * steps + (stored if keep and every > 1 else 0 if keep else depth)  # z again
        assert before is None or products <= before
        before = products


def test_a_budget_of_less_than_two_states_is_refused() -> None:
    h, V, W = torch.randn(16, 8), torch.randn(9, 8, 8, requires_grad=True), torch.randn(9, 8, 8)
    with pytest.raises(ValueError, match=r"memory_budget: expected at least 1024 bytes, .*got 1023"):
        deep_residual(h, V, W, backward="checkpoint", memory_budget=1023)
    deep_residual(h, V, W, backward="checkpoint", memory_budget=1024).sum().backward()
    with torch.no_grad():  # nothing is stored
        deep_residual(h, V, W, backward="checkpoint", memory_budget=1)


@pytest.mark.parametrize("natively", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_budget_changes_a_bit(dtype: torch.dtype, natively: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not natively:
        monkeypatch.setattr(native, "core", None)
    depth, (batch, dim, hidden) = 23, (19, 7, 11)
    case = make_case(batch, dim, hidden, depth)
    inputs = [case.tensors[name].to(dtype).requires_grad_() for name in NAMES]

    def results(**options: object) -> list[Tensor]:
        y = deep_residual(*inputs, **options)
        return [y, *torch.autograd.grad(y.square().sum(), inputs)]

    expected = results(backward="store")
    state = reference.padded_rows(batch) * dim * 4
    for states in range(2, depth + 3):
        for strategy in ("checkpoint", "auto"):
            found = results(backward=strategy, memory_budget=states * state)
            for a, b in zip(expected, found, strict=True):
                assert torch.equal(a, b)


@pytest.mark.skipif(native.core is None, reason="the sizes of its slots")
@pytest.mark.parametrize("shape", [(1000, 8), (64, 4, 7, 9), (100, 4, 2, 2)], ids=str)
def test_the_native_core_uses_all_of_a_budget(shape: tuple[int, ...]) -> None:
    """States, and the workspace of slots as the core lays it out: another slot would be too much."""
    h = torch.randn(shape)
    V = torch.randn(50, 4 if h.dim() > 2 else 8, 5, *[3] * (2 * (h.dim() > 2)))
    threads = torch.get_num_threads()

    def held(plan: checkpointing.Plan, slots: int) -> int:
        workspaces = [
            native.core.backward_workspace(
                *ops._sizes(h, V, "gelu"), plan.save_every, False, n, plan.keep_hidden, threads
            )
            for n in (0, slots)
        ]
        states = -(-50 // plan.save_every) * reference.padded_rows(shape[0]) * h[0].numel() * 4
        return states + workspaces[1] - workspaces[0]

    for states in (3, 5, 9):
        budget = states * h.numel() * 4
        plan = ops.plan(h, V, "gelu", "checkpoint", 0, budget)
        assert held(plan, plan.slots) <= budget
        assert plan.slots == plan.save_every - 1 or held(plan, plan.slots + 1) > budget


def test_a_block_takes_a_budget() -> None:
    block = DeepResBlock(8, 40, memory_budget=2048)
    block(torch.randn(16, 8)).sum().backward()
    assert "memory_budget=2048" in repr(block)
    with pytest.raises(ValueError, match="memory_budget: expected at least"):
        block(torch.randn(160, 8))


def test_a_small_budget_does_not_recurse_with_the_depth() -> None:
    visited: list[int] = []
    steps = checkpointing.by_layers(lambda state, k: k + 1, lambda state, k: visited.append(state))
    checkpointing.sweep(0, 0, 3000, 1, *steps)
    assert visited == list(reversed(range(3000)))
    V = torch.zeros(3000, 1, 1, requires_grad=True)
    deep_residual(torch.ones(16, 1), V, V, backward="checkpoint", memory_budget=128).sum().backward()


def test_saved_states_may_come_back_in_another_layout_but_not_as_something_else() -> None:
    h, V, W = (torch.randn(*shape, requires_grad=True) for shape in ((16, 8), (9, 8, 8), (9, 8, 8)))

    def gradients(unpack: Callable[[Tensor], Tensor]) -> list[Tensor]:
        with saved_tensors_hooks(lambda tensor: tensor, unpack):
            y = deep_residual(h, V, W, backward="store")
            return list(torch.autograd.grad(y.sum(), (h, V, W)))

    def transposed(tensor: Tensor) -> Tensor:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)

    for a, b in zip(gradients(lambda tensor: tensor), gradients(transposed), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match=r"states: expected a tensor \[9, 16, 16\], torch.float32"):
        gradients(lambda tensor: tensor.double() if tensor.dim() == 3 and tensor.shape[1] == 16 else tensor)
