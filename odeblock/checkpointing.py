"""Which states to store: the plan of ``store`` and ``checkpoint`` for a memory budget.

The forward stores h_0, h_K, h_2K, ... of the whole batch; the backward runs the K steps between two of them
forward again, from the top segment to the lowest, and holds the states of a segment in slots. Where a segment
has fewer slots than states, the segment is cut in two again and again where that costs the fewest steps:
binomial checkpointing (Griewank & Walther, "Algorithm 799: Revolve", ACM TOMS 26, 2000).
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple


class Plan(NamedTuple):
    """What a backward strategy stores.

    save_every: K, steps between two states that the forward stores. 0: none between.
    reconstruct: whether the states between are reconstructed from above (``adjoint``: h_K, h_2K, ... and h_L
        are stored), instead of run forward again from below (h_0, h_K, ...).
    slots: states that the backward may hold besides, where it runs segments again.
    keep_hidden: whether z = W_k h_k + b_k is kept with each stored state (K = 1) or in each slot (K > 1),
        instead of computed twice.
    """

    save_every: int
    reconstruct: bool
    slots: int
    keep_hidden: bool = False


NOTHING = Plan(0, False, 0)  # inference


def chain_length(s: int, r: int) -> int:
    """C(s + r, s): the longest chain that s stored states serve when no step is run more than r times."""
    return math.comb(s + r, s) if r >= 0 else 0


def best_cut(length: int, s: int) -> int:
    """Where to cut a chain that s states, its first among them, are too few for: store the state at the cut,
    go through the upper part with s - 1 states, then through the lower with s."""
    r = _repetitions(length, s)
    return max(1, chain_length(s, r - 2), length - chain_length(s - 1, r))


def steps_again(length: int, slots: int) -> int:
    """Steps that the backward of a chain runs forward again; Griewank & Walther 2000, theorem 1."""
    if length <= slots + 1:
        return length - 1
    r = _repetitions(length, slots)
    return r * length - chain_length(slots + 1, r - 1)


def _repetitions(length: int, s: int) -> int:
    r = 1
    while chain_length(s, r) < length:
        r += 1
    return r


def sweep(
    state: Any,
    bottom: int,
    top: int,
    slots: int,
    advance: Callable[[Any, int, int], Any],
    visit: Callable[[Any, int, int], None],
) -> None:
    """From the top to the bottom of a segment, from ``state`` = h_bottom, by parts that slots are enough for:
    visit(h_k, k, n) goes from n to k with the n - k - 1 states between held; advance(h_k, k, n) is h_n."""
    while top - bottom - 1 > slots:
        cut = bottom + best_cut(top - bottom, slots)
        sweep(advance(state, bottom, cut), cut, top, slots - 1, advance, visit)
        top = cut
    visit(state, bottom, top)


def by_layers(
    advance: Callable[[Any, int], Any], visit: Callable[[Any, int], None]
) -> tuple[Callable[[Any, int, int], Any], Callable[[Any, int, int], None]]:
    """What ``sweep`` wants of parts, by what is done at one layer: advance(h_k, k) is h_{k+1}."""

    def advance_part(state: Any, bottom: int, top: int) -> Any:
        for k in range(bottom, top):
            state = advance(state, k)
        return state

    def visit_part(state: Any, bottom: int, top: int) -> None:
        states = [state]
        del state
        for k in range(bottom, top - 1):
            states.append(advance(states[-1], k))
        for k in reversed(range(bottom, top)):
            visit(states.pop(), k)

    return advance_part, visit_part


@functools.lru_cache(maxsize=256)
def plan(
    backward: str,
    depth: int,
    anchors: int,
    memory_budget: int | None,
    state_bytes: int,
    slot_bytes: int,
    hidden_bytes: tuple[int, int] | None = None,
) -> Plan:
    """The plan of a strategy.

    state_bytes: of one state of the whole batch, as the forward stores it. slot_bytes: of one that the
    backward holds (of the rows that it takes through all layers together, at most the batch). hidden_bytes:
    of the hidden values that can be kept with either, or None.

    In a graph with symbolic sizes the depth and the plan become constants, and sizes only as far as the plan
    depends on them.

    Raises ValueError where the budget holds less than two states.
    """
    depth = operator.index(depth)
    if backward == "adjoint":
        return Plan(-(-depth // (anchors + 1)) if anchors else 0, True, 0)
    if memory_budget is None:
        root = math.isqrt(depth - 1) + 1  # ⌈√L⌉
        if backward == "store" or (backward == "auto" and depth <= 2 * root):
            # 2√L states are what checkpointing holds at its peak: √L stored, √L run again.
            return Plan(1, False, 0, hidden_bytes is not None)
        return Plan(root, False, root - 1, hidden_bytes is not None)
    if backward == "auto" and depth * state_bytes <= memory_budget:
        keep = hidden_bytes is not None and depth * (state_bytes + hidden_bytes[0]) <= memory_budget
        return Plan(1, False, 0, keep)
    if depth > 1 and memory_budget < state_bytes + slot_bytes:
        raise ValueError(
            f"memory_budget: expected at least {state_bytes + slot_bytes} bytes, what a stored state of this "
            f"batch and one that the backward holds take; got {memory_budget}"
        )
    plan, steps = _cheapest(depth, memory_budget, state_bytes, slot_bytes)
    if hidden_bytes is not None and memory_budget >= state_bytes + slot_bytes + hidden_bytes[1]:
        keeping, more = _cheapest(depth, memory_budget, state_bytes, slot_bytes + hidden_bytes[1])
        # A step takes two products, z of a layer one: what fewer slots cost against what they save. (All but
        # the top layer of a segment have theirs, unless the segment is cut again.)
        if keeping.slots == keeping.save_every - 1 and 2 * (more - steps) < depth - -(
            -depth // keeping.save_every
        ):
            return Plan(keeping.save_every, False, keeping.slots, True)
    return plan


def _cheapest(depth: int, budget: int, state_bytes: int, slot_bytes: int) -> tuple[Plan, float]:
    """The K and slots within the budget that run the fewest steps again, and their number."""
    best, fewest = Plan(depth, False, 1), math.inf
    candidate = 0
    while candidate < depth:
        candidate += 1
        every = -(-depth // candidate)
        stored = -(-depth // every)
        slots = max(0, budget - stored * state_bytes) // max(1, slot_bytes)
        if stored * state_bytes > budget or (every > 1 and slots < 1):
            break
        slots = operator.index(min(slots, every - 1))
        last = depth - (stored - 1) * every
        steps = (stored - 1) * steps_again(every, slots) + steps_again(last, min(slots, last - 1))
        if steps < fewest:
            best, fewest = Plan(every, False, slots), steps
    return best, fewest
