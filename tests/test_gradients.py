"""Autograd: gradcheck, agreement of the strategies, determinism, and the adjoint's word when it fails."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import pytest
import torch
from oracle import NAMES, make_case, run
from torch import Tensor

from odeblock import DeepResBlock, DriftError, DriftWarning, checkpointing, native, reference
from odeblock.activations import ACTIVATIONS
from odeblock.build import build_info
from odeblock.drift import spoil
from odeblock.functional import deep_residual

STRATEGIES = ("auto", "store", "checkpoint", "adjoint")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation: str, strategy: str) -> None:
    case = make_case(3, 4, 5, 8, activation=activation)
    inputs = [case.tensors[name].clone().requires_grad_() for name in NAMES]

    def block(*tensors: Tensor) -> Tensor:
        return deep_residual(*tensors, activation=activation, backward=strategy)

    assert torch.autograd.gradcheck(block, inputs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_of_the_reference_ops(activation: str) -> None:
    """The plain PyTorch backward, which serves other dtypes and devices, against autograd of the loop."""
    case = make_case(5, 4, 6, 10, activation=activation)
    truth = run(reference.deep_residual, case, torch.float64)
    tensors = [case.tensors[name] for name in NAMES]
    for plan in (
        checkpointing.Plan(1, False, 0),
        checkpointing.Plan(1, False, 0, keep_hidden=True),
        checkpointing.Plan(4, False, 3),
        checkpointing.Plan(10, False, 2),
        checkpointing.Plan(0, True, 0),
        checkpointing.Plan(4, True, 0),
    ):
        options = (plan.save_every, plan.reconstruct, plan.keep_hidden)
        y, *saved = reference.forward(*tensors, activation, 0.1, *options)
        torch.testing.assert_close(y, truth["y"], rtol=1e-13, atol=1e-13)
        gradients = reference.backward(
            case.grad, tensors[0], *tensors[1:], *saved, activation, 0.1, *plan, True
        )
        for name, gradient in zip(NAMES, gradients, strict=False):
            torch.testing.assert_close(gradient, truth[name], rtol=1e-11, atol=1e-12, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_half_precision_on_the_reference(
    dtype: torch.dtype, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Float32 states: gradients within a few roundings of the storage dtype at depth 200."""
    monkeypatch.setattr(native, "core", None)
    case = make_case(9, 16, 12, 200, activation="tanh", smooth=True)
    truth = run(reference.deep_residual, case, torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = run(deep_residual, case, dtype, backward=strategy)
    for name, value in truth.items():
        error = float((found[name] - value).abs().max() / value.abs().max())
        assert error < 4 * torch.finfo(dtype).eps, (name, error)


def random_inputs(batch: int, dim: int, hidden: int, depth: int, dtype: torch.dtype) -> list[Tensor]:
    case = make_case(batch, dim, hidden, depth)
    return [case.tensors[name].to(dtype) for name in NAMES]


def results(inputs: list[Tensor], strategy: str) -> list[Tensor]:
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    y = deep_residual(*inputs, backward=strategy)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), inputs)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(50, 20, 30, 17), (400, 310, 7, 5)], ids=str)
def test_checkpoint_is_store_bit_for_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = random_inputs(*shape, dtype)
    for a, b in zip(results(inputs, "store"), results(inputs, "checkpoint"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("strategy", ["store", "checkpoint", "adjoint"])
@pytest.mark.parametrize(
    "shape", [(1, 40, 50, 9), (3, 70, 93, 9), (77, 40, 50, 9), (520, 310, 9, 5)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_number_of_threads_changes_no_bit(
    dtype: torch.dtype, shape: tuple[int, ...], strategy: str
) -> None:
    inputs = random_inputs(*shape, dtype)
    torch.set_num_threads(1)
    alone = results(inputs, strategy)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        for _ in range(5):
            for a, b in zip(alone, results(inputs, strategy), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strategy", ["store", "adjoint"])
def test_a_row_does_not_feel_its_neighbours(strategy: str, dtype: torch.dtype) -> None:
    h, *weights = random_inputs(60, 24, 31, 12, dtype)
    y, dh, *_ = results([h, *weights], strategy)
    for rows in (slice(5, 13), slice(3, 20), slice(37, 60)):
        part_y, part_dh, *_ = results([h[rows], *weights], strategy)
        assert torch.equal(part_y, y[rows])
        assert torch.equal(part_dh, dh[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strategy", ["store", "adjoint"])
def test_few_rows_agree_with_many(strategy: str, dtype: torch.dtype) -> None:
    """At most four rows go another way (csrc/cpu/few.h): alike among themselves, else to rounding."""
    h, *weights = random_inputs(60, 24, 71, 12, dtype)
    y, dh, *_ = results([h, *weights], strategy)
    vector = {"avx512": 64, "avx2": 32}.get(build_info()["cpu_features"], 16)  # bytes
    few = min(4, vector // reference.state_dtype(dtype).itemsize // 2)
    few_y, few_dh, *_ = results([h[8 : 8 + few], *weights], strategy)
    for i in range(few):
        one_y, one_dh, *_ = results([h[8 + i : 9 + i], *weights], strategy)
        assert torch.equal(one_y, few_y[i : i + 1])
        assert torch.equal(one_dh, few_dh[i : i + 1])
    torch.testing.assert_close(few_y, y[8 : 8 + few])
    torch.testing.assert_close(few_dh, dh[8 : 8 + few])


def test_inference_and_training_give_the_same_bits() -> None:
    h, *weights = random_inputs(33, 20, 30, 25, torch.float32)
    with torch.no_grad():
        y = deep_residual(h, *weights)
    for strategy in STRATEGIES:
        assert torch.equal(y, results([h, *weights], strategy)[0])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_only_what_requires_a_gradient_gets_one(strategy: str) -> None:
    inputs = random_inputs(6, 5, 4, 9, torch.float64)
    everything = results(inputs, strategy)[1:]
    for chosen in range(len(inputs)):
        tensors = [t.clone().requires_grad_(i == chosen) for i, t in enumerate(inputs)]
        deep_residual(*tensors, backward=strategy).square().sum().backward()
        for i, tensor in enumerate(tensors):
            assert (tensor.grad is not None) == (i == chosen)
        torch.testing.assert_close(tensors[chosen].grad, everything[chosen])


def test_parameters_get_their_gradient_without_a_copy() -> None:
    block = DeepResBlock(8, 20)
    y = block(torch.randn(3, 8))
    y.sum().backward()
    first = block.V.grad
    assert first is not None
    assert first.is_contiguous()
    block(torch.randn(3, 8)).sum().backward()  # accumulated in place
    assert block.V.grad is first


def test_an_output_may_be_changed_in_place() -> None:
    for strategy in STRATEGIES:
        block = DeepResBlock(4, 30, backward=strategy)
        x = torch.randn(2, 4, requires_grad=True)
        (expected,) = torch.autograd.grad((2 * block(x)).sum(), x)
        y = block(x)
        y.mul_(2)
        y.sum().backward()
        torch.testing.assert_close(x.grad, expected)


def test_the_adjoint_says_when_a_step_cannot_be_inverted() -> None:
    torch.manual_seed(0)
    weights = 30 * torch.randn(2, 3, 8, 8)
    x = torch.randn(5, 8, requires_grad=True)
    with pytest.warns(DriftWarning, match='use backward="auto"'):
        deep_residual(x, weights[0], weights[1], activation="tanh", backward="adjoint").sum().backward()


def test_strict_raises_where_the_adjoint_would_warn() -> None:
    torch.manual_seed(0)
    block = DeepResBlock(8, 3, activation="tanh", backward="adjoint", strict=True)
    with torch.no_grad():
        block.V.normal_(0, 30)
        block.W.normal_(0, 30)
    x = torch.randn(5, 8, requires_grad=True)
    assert block.last_drift is None
    with pytest.raises(DriftError, match='use backward="auto"'):
        block(x).sum().backward()
    assert block.last_drift is not None
    assert block.last_drift["drift"] > 1e-3
    block.backward = "auto"  # exact: nothing to be strict about
    block(x).sum().backward()
    assert "strict=True" in repr(block)
    assert block.split(2)[0].strict
    with pytest.raises(TypeError, match="strict: expected True or False, got int"):
        DeepResBlock(8, 3, strict=1)


def test_last_drift() -> None:
    torch.manual_seed(0)
    block = DeepResBlock(12, 300, backward="adjoint")
    x = torch.randn(5, 12)
    block(x)
    assert block.last_drift is None  # before the backward
    block(x).sum().backward()
    drift = block.last_drift
    assert drift is not None
    assert set(drift) == {"estimate", "drift", "evaluations", "order"}
    assert 0 < drift["estimate"] < 1e-6
    assert 0 <= drift["drift"] < 1e-5
    assert 1 <= drift["evaluations"] < 3
    drift.clear()
    assert block.last_drift


@pytest.mark.parametrize("report", [[1e-7, 1e-6, 1, 3], [2e-5, 0, 1, 3], [0, float("nan"), 1, 3]], ids=str)
def test_gradients_are_spoiled_on_the_device(report: list[float]) -> None:
    gradients = [torch.ones(3, 2), torch.ones(0), torch.ones(4, dtype=torch.bfloat16)]
    spoil(gradients, torch.tensor(report, dtype=torch.float64), 1e-5)
    expected = report[0] == 1e-7
    assert all(
        bool(gradient.isfinite().all()) == (expected or not gradient.numel()) for gradient in gradients
    )


def test_the_report_of_a_gpu_is_judged_when_it_has_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        """Of a report that is on its way."""

        def __init__(self, arrived: bool) -> None:
            self.arrived = arrived

        def query(self) -> bool:
            return self.arrived

        def synchronize(self) -> None:
            self.arrived = True

    def report(estimate: float) -> torch.Tensor:
        return torch.tensor([estimate, 0, 1, 2], dtype=torch.float64)

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    torch.manual_seed(0)
    block = DeepResBlock(4, 3)
    x = torch.randn(2, 4)
    events = [Event(False), Event(True)]
    block._drift.waiting.extend((report(1e-3), event, 1e-5) for event in events)
    block(x)  # the first is under way
    assert len(block._drift.waiting) == 2
    events[0].arrived = True
    with pytest.warns(DriftWarning) as told:
        block(x)
    assert len(told) == 2
    assert not block._drift.waiting
    block._drift.waiting.append((report(1e-6), Event(False), 1e-5))
    again = pickle.loads(pickle.dumps(copy.deepcopy(block)))  # of a report under way nothing is copied
    assert again.last_drift == {"estimate": 1e-3, "drift": 0, "evaluations": 1, "order": 2}
    assert block.last_drift == {"estimate": 1e-6, "drift": 0, "evaluations": 1, "order": 2}
    replayed = report(1e-7)  # by a CUDA graph, every time anew
    block._drift.captured.append([replayed, 1e-5, None])
    assert block.last_drift["estimate"] == 1e-7
    block._drift.waiting.append((report(1e-8), Event(True), 1e-5))  # of a call outside of it
    assert block.last_drift["estimate"] == 1e-8
    for estimate in (1, math.nan):
        replayed[0] = estimate
        with pytest.warns(DriftWarning):
            assert str(block.last_drift["estimate"]) == str(float(estimate))
        assert block.last_drift is not None  # and is silent


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nan_in_nan_out(strategy: str) -> None:
    h, *weights = random_inputs(20, 6, 7, 12, torch.float32)
    h[3, 2] = float("nan")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y, dh, dV, dW, *_ = results([h, *weights], strategy)
    assert y[3].isnan().all()
    assert dh[3].isnan().all()
    rest = torch.arange(20) != 3
    assert y[rest].isfinite().all()
    assert dh[rest].isfinite().all()
    assert dV.isnan().any()
    assert dW.isnan().any()
    assert any(w.category is DriftWarning for w in caught) == (strategy == "adjoint")
