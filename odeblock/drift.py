"""What an adjoint backward says of its own exactness: reports, where they are kept, and when they warn."""

from __future__ import annotations

import itertools
import math
import sys
import warnings
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .reconstruction import REPORT_SIZE


class DriftWarning(RuntimeWarning):
    """The adjoint could not reconstruct the activations to rounding: its gradients are not to be trusted."""


class DriftError(RuntimeError):
    """What ``strict=True`` raises in the place of a ``DriftWarning``."""


Drift = dict[str, float]
"""Report of an adjoint backward. Relative errors of the worst row: estimate (of the states that activations
were differentiated at, root mean square over depth), drift (of reconstructed states where the forward's are
known: h_0, anchors, up to 16 projections between). Means over steps and rows: evaluations (of a step's f; a
correction of W h alone counts one half), order (of the prediction it starts from). See docs/adjoint.md."""

DRIFT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 5e-4}
"""What estimate and drift of an adjoint backward may reach, per storage dtype, before it warns.

Rounding alone gives about one unit a step, a random walk over L steps: 1e-5 is 80 units of a float32 state.
Half-precision blocks round their gradients to 2^-8 and 2^-11; an error of their states may come out 20 times
as large in a gradient.
"""


def drift_tolerance(dtype: torch.dtype, rounded: bool) -> float:
    """rounded: whether products were rounded to ``dtype``, as PyTorch's are, and a GPU's. In half precision
    the states then drift by the rounding of f, and 4 times as much is allowed."""
    return DRIFT_TOLERANCE[dtype] * (4 if rounded and dtype.itemsize == 2 else 1)


_numbers = itertools.count()
_records: weakref.WeakValueDictionary[int, DriftRecord] = weakref.WeakValueDictionary()


class DriftRecord:
    """Reports of adjoint backwards: the last one that is known, and those that GPUs still have.

    Its ``number`` is what an op can be told of it, and a compiled graph can hold.
    """

    MOST_WAITING = 64

    def __init__(self, last: Drift | None = None) -> None:
        self.number = next(_numbers)
        _records[self.number] = self
        self.last: Drift = {} if last is None else last
        self.waiting: deque[tuple[Tensor, Any, float]] = deque()
        self.captured: deque[list[Any]] = deque(maxlen=self.MOST_WAITING)

    def __reduce__(self) -> tuple[Any, ...]:
        return DriftRecord, (dict(self.last),)  # what a GPU has is of the original

    @staticmethod
    def numbered(number: int) -> DriftRecord:
        """That one; a new one if nobody has it any more."""
        return _records.get(number) or DriftRecord()

    def wait_for(self, report: Tensor, tolerance: float) -> None:
        """A report on a GPU: on its way to the CPU, which nothing waits for. In a CUDA graph every replay
        writes it, and it stays there until it is asked for."""
        if torch.cuda.is_current_stream_capturing():
            self.captured.append([report, tolerance, None])
            return
        arriving = torch.empty(REPORT_SIZE, dtype=torch.float64, device="cpu", pin_memory=True)
        arriving.copy_(report, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(report.device))
        self.waiting.append((arriving, arrived, tolerance))
        if len(self.waiting) > self.MOST_WAITING:  # the first has arrived long ago
            self._take(wait=True)

    def settle(self) -> None:
        """Judge what has arrived."""
        if self.waiting and not torch.cuda.is_current_stream_capturing():
            while self._take(wait=False):
                pass

    def read(self) -> Drift | None:
        """The last report, waited for; None before there was one."""
        while self._take(wait=True):
            pass
        for captured in self.captured:
            report, tolerance, seen = captured
            captured[2] = str(report.tolist())  # in which NaN is NaN
            if captured[2] != seen:  # written since
                self.judge(report, tolerance)
        return dict(self.last) or None

    def _take(self, wait: bool) -> bool:
        """Judge the first report that is on its way, if there is one and it has arrived. (Other threads may
        take one at the same time.)"""
        try:
            report, arrived, tolerance = self.waiting.popleft()
        except IndexError:
            return False
        if wait:
            arrived.synchronize()
        elif not arrived.query():
            self.waiting.appendleft((report, arrived, tolerance))
            return False
        self.judge(report, tolerance)
        return True

    def judge(self, report: Tensor, tolerance: float, strict: bool = False) -> None:
        """Keep a report; warn, or raise if ``strict``, where it says that gradients cannot be trusted."""
        estimate, drift, evaluations, order = report.tolist()
        self.last.update(estimate=estimate, drift=drift, evaluations=evaluations, order=order)
        if estimate <= tolerance and drift <= tolerance:  # false where either is NaN
            return
        # Without the figures the warning is the same every time, so that Python's filter shows it once.
        message = (
            f"the adjoint reconstructed the activations with a relative error above {tolerance:g}: its "
            "gradients are unreliable. The residual steps are too large to be inverted at this depth; use "
            'backward="auto" or "checkpoint", or more anchors. The last_drift of a block has the figures.'
        )
        if strict:
            raise DriftError(f"{message} (estimate {estimate:.1e}, drift {drift:.1e})")
        warnings.warn(message, DriftWarning, stacklevel=_stacklevel())


def judge_drift(
    report: Tensor, gradients: Sequence[Tensor], tolerance: float, strict: bool, record: DriftRecord
) -> None:
    """Warn or raise where an adjoint backward cannot be trusted. On a GPU, for which nothing waits (unless
    ``strict``), its ``gradients`` become NaN at once, and the warning comes later."""
    if report.is_cuda:
        spoil(gradients, report, tolerance)
    if report.is_cuda and not strict:
        record.settle()  # a compiled block asks at no other time
        record.wait_for(report, tolerance)
    else:
        record.read()  # what came before
        record.judge(report, tolerance, strict)


def spoil(gradients: Sequence[Tensor], report: Tensor, tolerance: float) -> None:
    """NaN for all ``gradients`` where they cannot be trusted, decided where they are."""
    wrong = ~(report[:2] <= tolerance).all()  # NaN is wrong, too
    for gradient in gradients:
        gradient.masked_fill_(wrong, math.nan)


def _stacklevel() -> int:
    """That of ``warnings.warn`` at which the line is the user's that asked for gradients. (A compiler's code
    is of no module.)"""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "torch").split(".")[0] in ("odeblock", "torch"):
        level, frame = level + 1, frame.f_back
    return level
