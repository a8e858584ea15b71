"""The adjoint's states in PyTorch: each from the one above, by solving a residual step for its input.

    h_k = h_{k+1} - Δ_k,    Δ_k = scale f_k(h_k)

``docs/adjoint.md`` derives the method; (n) is its equation n. ``csrc/cpu/reconstruction.h`` is the same in
C++, which says how a row decides.
Nothing here knows what f is: it serves the block (``reference.py``) and any residual (``scan.py``).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

MAX_ORDER = 6
"""Highest order of the prediction (2)."""

HISTORY = MAX_ORDER + 1
"""Increments that are kept: one more than predict, so that every order can be measured."""

MEASURE_EVERY = 4
"""Steps between two measurements of the orders."""

ORDER_SLACK = 1.5
"""(3): an order whose error is within this factor of the least is as good."""

RATE_MEMORY = 0.95
"""(7): what is left of a rate ρ after the next measurement."""

PROBE_EVERY = 64
"""Steps after which the rate ρ is measured anew, before z is corrected again."""

MAX_EVALUATIONS = 64
"""A row that these did not settle is given up, and reported."""

FIRST_LIMIT, CHANGE_LIMIT = 0.15, 0.25
"""(9): the first change, and a later one, at which z may stay as it is, in √L units of rounding."""

STATE_LIMIT, DRIFT_LIMIT = 0.5, 4.0
"""(10): error of a state per step, in units of rounding: the first, and at most the second over √L."""

PEAK_SHARE = 0.036
"""(14): share, times √L, of the largest state of a row that its error is compared with."""

CHECKS = 16
"""The forward leaves projections of at most this many states, to compare the reconstructed ones with."""

REPORT_SIZE = 4
"""estimate (13), drift (14), evaluations and order per step."""

Hidden = TypeVar("Hidden")


def check_every(depth: int) -> int:
    """States k = c, 2c, ... below L are compared with their projections."""
    return (depth + CHECKS) // (CHECKS + 1)


def check_count(depth: int) -> int:
    """How many those are."""
    return (depth - 1) // check_every(depth)


def probe(dim: int, dtype: torch.dtype) -> Tensor:
    """The direction r [dim] that states are projected on, standard normal: the mean of (rᵀδ)² is |δ|².

    On the CPU, whatever the default device.
    """
    if torch._C._len_torch_dispatch_stack():  # it may be a fake tensor, which no other call must get
        return _probe.__wrapped__(dim, dtype)
    return _probe(dim, dtype)


@functools.lru_cache(maxsize=64)
def _probe(dim: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(dim)
    return torch.randn(dim, generator=generator, dtype=torch.float64, device="cpu").to(dtype)


def visibility(W: Tensor) -> Tensor:
    """c, how well a layer sees each feature: the largest entry of a column of W_k over that of all.

    [..., m, q] -> [..., q].
    """
    columns = W.detach().abs().amax(dim=-2).to(torch.promote_types(W.dtype, torch.float32))
    largest = columns.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(columns.dtype).tiny)
    return torch.where(columns < largest, columns / largest, 1)


def rounding_unit(storage: torch.dtype) -> float:
    """What a state is solved to: rounding of the type computed in, no less than 1/256 of the stored."""
    state = torch.promote_types(storage, torch.float32)
    return max(torch.finfo(state).eps, torch.finfo(storage).eps / 256)


def state_limit(depth: int, unit: float) -> float:
    """(10)"""
    return min(STATE_LIMIT, DRIFT_LIMIT / math.sqrt(depth)) * unit


class Reconstruction:
    """The sweep over the L steps from the top, for the rows of a batch, each by its own decisions.

    batch: rows. depth: L. unit: see ``rounding_unit``. floor: rounding of f itself, relative. smooth: whether
    σ' is continuous; where it is not, z is always corrected.
    """

    def __init__(
        self, batch: int, depth: int, unit: float, floor: float, like: Tensor, smooth: bool = True
    ) -> None:
        self.floor = floor
        self.change_unit = math.sqrt(depth) * unit if smooth else 0.0
        self.state_limit = state_limit(depth, unit)
        self.peak_share = min(1.0, PEAK_SHARE * math.sqrt(depth))
        self.visible: Tensor | None = None  # c; None: not known yet
        self.increments: list[Tensor] = []  # Δ_{k+1}, Δ_{k+2}, ...
        self.rate, self.doubt = like.new_ones(batch, 1), like.new_ones(batch, 1)
        self.seen, self.age = like.new_zeros(batch, 1), like.new_zeros(batch, 1)
        self.order = torch.zeros(batch, 1, dtype=torch.long, device=like.device)
        self.spread = like.new_full((batch, HISTORY), -1.0)
        self.squares, self.unsettled = like.new_zeros(batch, 1), like.new_zeros(batch, 1)
        self.peak = like.new_zeros(batch, 1)  # largest norm of a state since the last comparison
        self.evaluations, self.orders = like.new_zeros(batch, 1), like.new_zeros(batch, 1)
        self.drift = like.new_zeros(())
        self.steps = 0

    def enter(self, visible: Tensor) -> None:
        """Before a step: how well its f sees each feature, [q] or by row. The best sight so far counts."""
        self.visible = visible if self.visible is None else torch.maximum(self.visible, visible)

    def step(
        self,
        above: Tensor,
        evaluate: Callable[[Tensor], tuple[Hidden, Tensor]],
        keep: Callable[[Tensor, Hidden, Hidden], Hidden],
        correct: Callable[[Hidden, Tensor], Hidden] | None,
    ) -> tuple[Tensor, Hidden]:
        """h_k [B, q] from ``above`` = h_{k+1}, and what was left by the evaluation at it.

        evaluate(x) gives hidden values and the increment scale f_k(x); keep(rows, new, old) takes the new
        hidden values of the rows [B, 1] and the old ones of the others; correct(hidden, e) is the hidden
        values after x changed by e (8). Without it, they are good only where the last change is small.
        """
        delta = self._predict(above)
        norm = self._norm(above).clamp_min(torch.finfo(above.dtype).tiny)
        self.peak = torch.maximum(self.peak, norm)
        active = torch.ones_like(self.rate, dtype=torch.bool)
        corrected = torch.zeros_like(active)
        change, error, x = torch.zeros_like(norm), torch.zeros_like(norm), above - delta
        self.orders += self.order
        hidden: Hidden | None = None
        evaluation = 0
        while bool(active.any()):
            x = torch.where(active, above - delta, x)
            new, found = evaluate(x)
            hidden = new if hidden is None else keep(active, new, hidden)
            self.evaluations += active
            moved = self._norm(found - delta)
            delta = torch.where(active, found, delta)
            size = self._norm(delta)

            # Rounding of f, by Δ or by what its input moves it. Below it changes are noise, no rate near 1.
            floor = self.floor * size
            noise = floor  # c of any f is too rough for more
            if correct is not None:
                noise = torch.maximum(floor, self.floor * self.seen * norm)
            at_floor = moved <= (noise if evaluation else floor)
            # (7): the rate at which changes shrink.
            if evaluation > 0:
                ratio = moved / change
                shown = (moved > noise) | (ratio < self.seen.clamp(min=0.5))
                measured = active & (change > 0) & shown
                seen = torch.maximum(ratio, RATE_MEMORY * self.seen)
                self.seen = torch.where(measured, seen, self.seen)
                self.doubt = torch.where(measured, self.doubt / 2, self.doubt)
                self.rate = torch.maximum(self.seen, self.doubt).clamp(max=1)
                self.age = torch.where(measured, 0, self.age)
            left = 1 - self.rate
            # (9): z may stay as it is; (10): it need only be corrected.
            near = self.rate * moved <= left * self.state_limit * norm
            if self.visible is None and evaluation < 3:  # nothing is known of f yet: to be on the safe side
                near = at_floor
            limit = (CHANGE_LIMIT if evaluation else FIRST_LIMIT) * self.change_unit
            settled = active & (at_floor | (near & (moved <= left * limit * norm)))
            fix = active & ~settled & near
            if evaluation == 0:
                fix &= self.age < PROBE_EVERY
            if correct is None:
                fix = torch.zeros_like(fix)
            still = active & ~settled & ~fix
            hopeless = ~moved.isfinite()
            if evaluation + 1 >= 8:
                hopeless |= moved > 0.95 * change
            if evaluation + 1 >= MAX_EVALUATIONS:
                hopeless |= True
            lost = still & hopeless
            relative = moved / torch.maximum(norm, size)
            rest = left.clamp_min(0.01)
            error = torch.where(settled, relative, torch.where(fix, self.rate * relative / rest, error))
            self.unsettled = torch.where(lost, torch.maximum(self.unsettled, relative / rest), self.unsettled)
            corrected |= fix | lost
            change = torch.where(active, moved, change)
            active = still & ~hopeless
            evaluation += 1

        state = above - delta
        assert hidden is not None or not len(above)
        if hidden is None:
            hidden, _ = evaluate(above)
        if correct is not None and bool(corrected.any()):
            hidden = correct(hidden, torch.where(corrected, state - x, 0))
            self.evaluations += 0.5 * corrected
        self.squares += error.square()
        self.age += 1
        self.increments = [delta, *self.increments[: HISTORY - 1]]
        if self.steps < 2 * HISTORY or self.steps % MEASURE_EVERY == 0:
            self._measure()
        self.steps += 1
        return state, hidden

    def compare(self, error: Tensor, norm: Tensor) -> None:
        """(14), (15): the distance ``error`` of a row from what it should be, and the size of the row."""
        ratio = torch.where(error == 0, 0, error / norm)
        if ratio.numel():
            self.drift = torch.maximum(self.drift, ratio.max())
        self.peak.zero_()

    def compare_state(self, found: Tensor, true: Tensor, top: Tensor) -> None:
        """(14) at a state that is known in full."""
        tiny = torch.finfo(true.dtype).tiny
        seen = torch.maximum(self._norm(true), self.peak_share * self.peak).clamp_min(tiny)
        self.compare(self._norm(found - true), seen)
        norm = torch.maximum(_row_norm(true), _row_norm(top)).clamp_min(tiny)
        self.compare(_row_norm(found - true), norm)

    def report(self) -> Tensor:
        """float64 [REPORT_SIZE]."""
        estimate = torch.maximum((self.squares / max(1, self.steps)).sqrt(), self.unsettled)
        steps = max(1, self.steps * len(estimate))
        values = [
            estimate.max() if len(estimate) else self.drift,
            self.drift,
            self.evaluations.sum() / steps,
            self.orders.sum() / steps,
        ]
        return torch.stack([v.double() for v in values])

    def _norm(self, x: Tensor) -> Tensor:
        """(5) of each row: [B, q] -> [B, 1]."""
        return _row_norm(x if self.visible is None else self.visible * x)

    def _predict(self, above: Tensor) -> Tensor:
        """(2): Δ_k ≈ Σ_j (-1)^j C(p, j+1) Δ_{k+1+j}, every row with its own order p."""
        delta = torch.zeros_like(above)
        for j, increment in enumerate(self.increments[:MAX_ORDER]):
            c = above.new_tensor([(-1) ** j * math.comb(p, j + 1) for p in range(HISTORY)])
            used = self.order > j
            delta = torch.where(used, delta + c[self.order] * increment, delta)
        return delta

    def _measure(self) -> None:
        """(4), (3): how well each order would have predicted the newest increment; the best of them."""
        known = len(self.increments)
        differences = self.increments
        for p in range(known):
            worst = self._norm(differences[0])[:, 0]
            self.spread[:, p] = torch.maximum(worst, self.spread[:, p] / 4)
            differences = [a - b for a, b in itertools.pairwise(differences)]
        spread = torch.where(self.spread.isnan(), torch.inf, self.spread)[:, :known]
        least, self.order = spread.min(dim=1, keepdim=True)
        for p in range(2, known):
            as_good = (spread[:, p : p + 1] <= ORDER_SLACK * least) & (self.order < p)
            self.order = torch.where(as_good, p, self.order)
        if known <= MAX_ORDER:  # while the history grows, the order that could not be measured yet
            self.order = torch.where(self.order == known - 1, known, self.order)


def _row_norm(x: Tensor) -> Tensor:
    """The maximum norm of each row: [B, q] -> [B, 1]."""
    return x.abs().amax(dim=1, keepdim=True)
