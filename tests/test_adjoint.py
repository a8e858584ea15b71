"""The adjoint's contract: gradients as good as autograd's for few evaluations, and never wrong in silence."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import FLOOR_ULP, Case, baseline, check_results, errors, make_case, rounded, run
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from odeblock import (
    DeepConvResBlock,
    DeepResBlock,
    DriftError,
    DriftWarning,
    functional,
    initializers,
    native,
    reference,
)
from odeblock.drift import DriftRecord
from odeblock.functional import deep_residual, residual_scan

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import peers

STRATEGIES = ("auto", "store", "checkpoint", "adjoint")
GRADIENTS = ("h", "V", "W")
SHAPES = [(8, 17, 23), (5, 12, 9)]  # B, q, m
NOISE = 1e-3  # what an optimiser leaves on smooth weights, in units of their standard deviation


def adjoint(record: dict[str, float], *, strict: bool = False, anchors: int = 0) -> Callable[..., Tensor]:
    """``deep_residual`` by the adjoint, with its report in ``record``."""

    def function(*tensors: Tensor | None, activation: str, scale: float | None) -> Tensor:
        options = (activation, scale, "adjoint", strict, anchors, None)
        y: Tensor = functional.recorded(DriftRecord(record), *tensors, *options)
        return y

    return function


def weights_case(
    weights: str, depth: int, shape: tuple[int, int, int] = SHAPES[0], activation: str = "tanh", seed: int = 0
) -> Case:
    """weights: smooth, noisy (smooth and ``NOISE``) or iid, as the initializers draw them."""
    case = make_case(*shape, depth, activation=activation, hidden_bias=False, output_bias=False, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    V, W = case.tensors["V"], case.tensors["W"]
    initializers.get_initializer("iid" if weights == "iid" else "smooth")(V, W, generator=generator)
    if weights == "noisy":
        for p in (V, W):
            p += NOISE * p.std() * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return case


def catch(function: Callable[[], Any]) -> tuple[Any, bool]:
    """What ``function`` returns, and whether it issued a DriftWarning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DriftWarning)
        result = function()
    return result, any(w.category is DriftWarning for w in caught)


# ---- gradients and evaluations -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("activation", ["tanh", "gelu", "softplus"])
@pytest.mark.parametrize(
    ("weights", "depth", "most"),
    [("smooth", 64, 2), ("smooth", 128, 1.1), ("smooth", 256, 1.05), ("noisy", 256, 1.9), ("iid", 256, 3)],
)
def test_error_and_evaluations(weights: str, depth: int, most: float, activation: str, seed: int) -> None:
    case = rounded(weights_case(weights, depth, SHAPES[seed], activation, seed), torch.float32)
    record: dict[str, float] = {}
    results = run(adjoint(record), case, torch.float32)
    assert 1 <= record["evaluations"] <= most
    check_results(results, case, torch.float32)


@pytest.mark.parametrize(("activation", "seed"), [("tanh", 0), ("silu", 1)])
@pytest.mark.parametrize(("weights", "most"), [("smooth", 1.05), ("noisy", 1.6), ("iid", 2.1)])
def test_error_and_evaluations_at_depth_1024(weights: str, most: float, activation: str, seed: int) -> None:
    test_error_and_evaluations(weights, 1024, most, activation, seed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("weights", ["smooth", "noisy", "iid"])
def test_other_dtypes(weights: str, dtype: torch.dtype) -> None:
    case = rounded(weights_case(weights, 256), dtype)
    check_results(run(adjoint({}), case, dtype), case, dtype, rebuilt=True)


@pytest.mark.long
@pytest.mark.parametrize("weights", ["iid", "noisy"])
def test_states_do_not_drift_away_at_great_depth(weights: str) -> None:
    case = rounded(weights_case(weights, 4096), torch.float32)
    check_results(run(adjoint({}), case, torch.float32), case, torch.float32)


def test_500_times_less_error_than_in_2022_for_half_the_evaluations() -> None:
    case = rounded(weights_case("smooth", 256, (16, 32, 32), "gelu"), torch.float32)
    truth = run(reference.deep_residual, case, torch.float64)
    record: dict[str, Any] = {}
    found = []
    for function in (adjoint(record), partial(peers.adjoint_2022, {})):
        error = errors(run(function, case, torch.float32), truth)
        found.append(max(error[name] for name in GRADIENTS))
    assert record["evaluations"] <= 1.05
    assert found[1] >= 500 * found[0]


DECISIONS = [("smooth", 128, "tanh"), ("noisy", 64, "tanh"), ("iid", 64, "tanh"), ("smooth", 128, "relu")]


@pytest.mark.parametrize(("weights", "depth", "activation"), DECISIONS)
def test_the_pytorch_twin_decides_alike(
    weights: str, depth: int, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = rounded(weights_case(weights, depth, activation=activation), torch.float32)
    ours: dict[str, float] = {}
    twin: dict[str, float] = {}
    run(adjoint(ours), case, torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr(native, "core", None)
        results = run(adjoint(twin), case, torch.float32)
    check_results(results, case, torch.float32)
    assert twin["evaluations"] == pytest.approx(ours["evaluations"], rel=0.05)
    assert twin["order"] == pytest.approx(ours["order"], rel=0.05, abs=0.05)


def test_a_rough_row_changes_nothing_for_its_neighbours() -> None:
    case = weights_case("noisy", 128)
    h, V, W = (case.tensors[name].float() for name in GRADIENTS)

    def dh(h: Tensor) -> Tensor:
        h = h.clone().requires_grad_()
        deep_residual(h, V, W, activation="tanh", backward="adjoint").square().sum().backward()
        return h.grad

    alone = dh(h)
    for value in (float("nan"), 1e4):
        with_rough, _ = catch(lambda value=value: dh(torch.cat([torch.full_like(h[:1], value), h])))
        assert torch.equal(with_rough[1:], alone)


# ---- never wrong in silence --------------------------------------------------------------------------------


def adversarial() -> Iterator[tuple[str, Case]]:
    """Steps that are large, singular, folded, saturated or kinked."""
    for depth in (1, 2, 3, 16, 64):
        for activation in ("tanh", "relu", "gelu", "identity"):
            for factor in (1, 3, 10, 30, 100, 1000):
                for kind in ("iid", "smooth", "alternating", "saturated"):
                    case = weights_case("iid" if kind == "iid" else "smooth", depth, (5, 12, 9), activation)
                    V, W = case.tensors["V"], case.tensors["W"]
                    if kind == "saturated":
                        W *= factor
                    else:
                        V *= factor**0.5
                        W *= factor**0.5
                    if kind == "alternating":
                        V *= (-1.0) ** torch.arange(depth).view(-1, 1, 1)
                    yield f"{kind} {activation} L={depth} x{factor}", case
            for gap in (0.0, 1e-6, 1e-3, 0.1, 0.5, 0.9):  # h' = gap h, where activations are linear
                for upper_half in (False, True):
                    case = weights_case("iid", depth, (5, 8, 8), activation)
                    identity = torch.eye(8, dtype=torch.float64).expand(depth, 8, 8)
                    case.tensors["W"] = identity.clone()
                    case.tensors["V"] = -(1 - gap) * depth * identity
                    if upper_half:
                        case.tensors["V"][: depth // 2] *= 0.01
                    yield f"singular {activation} L={depth} gap {gap} {upper_half}", case


WRONG = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 5e-2}


def wrong(results: dict[str, Tensor], case: Case, dtype: torch.dtype) -> bool:
    """Whether gradients are off by more than ``WRONG``, and by 10 times more than eager's."""
    truth = run(reference.deep_residual, case, torch.float64)
    found = errors(results, truth)
    bad = [name for name in GRADIENTS if not found[name] <= WRONG[dtype]]
    if not bad:
        return False
    eager = errors(run(reference.deep_residual, case, dtype), truth)
    # Where eager itself is not finite there is nothing to compare with.
    return any(torch.isfinite(truth[name]).all() and found[name] > 10 * eager[name] for name in bad)


@pytest.mark.parametrize("dtype", WRONG, ids=str)
def test_no_gradient_is_wrong_without_a_warning(dtype: torch.dtype) -> None:
    silent, warned = [], 0
    for name, case in adversarial():
        case = rounded(case, dtype)
        results, was_warned = catch(lambda case=case: run(adjoint({}), case, dtype))
        if was_warned:
            warned += wrong(results, case, dtype)
        elif wrong(results, case, dtype):
            silent.append(name)
    assert not silent
    assert warned > 50  # the suite does hold cases that the adjoint gets wrong


def test_strict_raises_wherever_there_is_a_warning() -> None:
    for _, case in list(adversarial())[::17]:
        case = rounded(case, torch.float32)
        _, warned = catch(lambda case=case: run(adjoint({}), case, torch.float32))
        if warned:
            with pytest.raises(DriftError):
                run(adjoint({}, strict=True), case, torch.float32)
        else:
            run(adjoint({}, strict=True), case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_auto_is_exact_in_every_case(dtype: torch.dtype) -> None:
    checked = 0
    for name, case in list(adversarial())[::5]:
        case = rounded(case, dtype)
        truth = run(reference.deep_residual, case, torch.float64)
        eager = baseline(case, dtype, truth)
        # Not where eager overflows, is chaotic, or differentiates relu at sums that are exactly zero.
        chaotic = not all(0 < eager[n] < 1e-2 for n in GRADIENTS)
        if chaotic or (name.startswith("singular relu") and dtype == torch.float32):
            continue
        results, warned = catch(lambda case=case: run(deep_residual, case, dtype))
        assert not warned, name
        found = errors(results, truth)
        floor = FLOOR_ULP[dtype] * torch.finfo(dtype).eps
        for n in GRADIENTS:
            assert found[n] <= max(2 * eager[n], floor), (name, n, found[n], eager[n])
        checked += 1
    assert checked > 40


@pytest.mark.parametrize("size", [1e2, 1e3, 1e5])
@pytest.mark.parametrize("natively", [True, False])
def test_a_large_feature_does_not_hide_the_others(
    size: float, natively: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No weight touches feature 0, which is ``size`` times as large as the others."""
    case = weights_case("smooth", 64)
    case.tensors["h"][:, 0] = size
    case.tensors["V"][:, 0] = 0
    case.tensors["W"][:, :, 0] = 0
    case = rounded(case, torch.float32)
    if not natively:
        monkeypatch.setattr(native, "core", None)
    check_results(run(adjoint({}, strict=True), case, torch.float32), case, torch.float32)


@pytest.mark.parametrize("unit", [1e-3, 1e3])
def test_features_in_other_units_give_the_same_gradients(unit: float) -> None:
    case = weights_case("smooth", 64)
    case.tensors["h"][:, 3] *= unit
    case.tensors["V"][:, 3] *= unit
    case.tensors["W"][:, :, 3] /= unit
    case = rounded(case, torch.float32)
    check_results(run(adjoint({}, strict=True), case, torch.float32), case, torch.float32)


@pytest.mark.parametrize("natively", [True, False])
@pytest.mark.parametrize("batch", [2, 8])
def test_hidden_units_in_other_units_change_nothing(
    batch: int, natively: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """relu(c z) = c relu(z), so with powers of 2 there is no other rounding: neither is there a decision."""
    case = weights_case("noisy", 64, (batch, 16, 24), "relu")
    if not natively:
        monkeypatch.setattr(native, "core", None)
    found: list[tuple[dict[str, Tensor], dict[str, float]]] = []
    for exponent in (0, 12):
        record: dict[str, float] = {}
        unit = 2.0 ** (exponent * torch.arange(64).remainder(3) - exponent).view(-1, 1, 1)
        scaled = {"W": case.tensors["W"] * unit, "V": case.tensors["V"] / unit}
        other = rounded(replace(case, tensors=case.tensors | scaled), torch.float32)
        results = run(adjoint(record), other, torch.float32)
        found.append((results | {"W": results["W"] * unit, "V": results["V"] / unit}, record))
    (results, record), (others, other_record) = found
    assert record == other_record
    for name in ("y", "h", "V", "W"):
        assert torch.equal(results[name], others[name]), name


@pytest.mark.parametrize("batch", [2, 8])
def test_negative_weights_see_their_features(batch: int) -> None:
    case = weights_case("smooth", 64, (batch, 17, 23))
    case.tensors["W"] = -case.tensors["W"].abs() / 4
    case = rounded(case, torch.float32)
    check_results(run(adjoint({}), case, torch.float32), case, torch.float32)


@pytest.mark.parametrize("natively", [True, False])
@pytest.mark.parametrize("batch", [2, 8])
def test_features_that_every_other_layer_sees(
    batch: int, natively: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer must not leave errors in what only the others see, however small its own are beside them."""
    case = weights_case("iid", 64, (batch, 16, 24), seed=2)
    V, W = case.tensors["V"], case.tensors["W"]
    for k in range(len(W)):
        others = slice(8, 16) if k % 2 else slice(8)
        W[k, :, others] = 0
        V[k, others] *= 20
    case = rounded(case, torch.float32)
    if not natively:
        monkeypatch.setattr(native, "core", None)
    check_results(run(adjoint({}), case, torch.float32), case, torch.float32)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("row", [0, -1])
@pytest.mark.parametrize("batch", [3, 40, 300])
def test_no_row_drifts_away_unseen(batch: int, row: int) -> None:
    """Whichever thread has it."""
    torch.set_num_threads(3)
    case = weights_case("smooth", 64, (batch, 40, 50))
    case.tensors["h"][row, 3] = float("nan")
    assert catch(lambda: run(adjoint({}), case, torch.float32))[1]


@pytest.mark.parametrize("batch", [4, 8])
def test_a_wrong_input_does_not_hide_behind_a_large_result(batch: int) -> None:
    """The first step folds, so that its input is found wrong; 60 more make h 7 million times as large."""
    depth, tiny = 61, 1e-10  # h' = h - 4 tanh(h), then h' = 1.3 h
    case = weights_case("iid", depth, (batch, 8, 8), "tanh")
    identity = torch.eye(8, dtype=torch.float64).expand(depth, 8, 8)
    case.tensors["h"] = 0.2 + 0.1 * case.tensors["h"].abs()
    case.tensors["W"], case.tensors["V"] = identity * tiny, identity * depth * 0.3 / tiny
    case.tensors["W"][0], case.tensors["V"][0] = identity[0], -4 * depth * identity[0]
    case = rounded(case, torch.float32)
    record: dict[str, float] = {}
    results, warned = catch(lambda: run(adjoint(record), case, torch.float32))
    assert wrong(results, case, torch.float32)
    assert record["estimate"] < 1e-5  # every step was solved
    assert warned


@pytest.mark.parametrize("made", ["meta", "fake"])
def test_a_default_device_and_fake_tensors_leave_nothing_behind(made: str) -> None:
    """The direction of projections is kept for all calls of as many features, and made on the CPU."""
    dim = {"meta": 211, "fake": 223}[made]  # that no other test has
    h, Z = torch.randn(2, dim), torch.full((3, dim), 0.1, requires_grad=True)

    def f(h: Tensor, Z: Tensor) -> Tensor:
        return torch.tanh(h * Z)

    if made == "meta":
        with torch.device("meta"):
            residual_scan(f, h, Z, backward="adjoint").sum().backward()
    else:
        with FakeTensorMode() as mode:
            y = residual_scan(f, mode.from_tensor(h), mode.from_tensor(Z), backward="adjoint")
        assert y.shape == h.shape
    block = DeepResBlock(dim, 3, 4, init="zero_v", backward="adjoint")
    block(h).sum().backward()
    assert block.last_drift is not None


def test_repeated_warnings_are_one_at_the_line_of_the_user() -> None:
    block = DeepResBlock(8, 4, backward="adjoint", activation="tanh")
    with torch.no_grad():
        block.V.mul_(30)
        block.W.mul_(30)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            block(torch.randn(4, 8)).sum().backward()
    drift = [w for w in caught if w.category is DriftWarning]
    assert [w.filename for w in drift] == [__file__]


@pytest.mark.parametrize("where", ["h", "V", "W"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen(where: str, value: float) -> None:
    case = weights_case("smooth", 64)
    case.tensors[where].view(-1)[7] = value
    results, warned = catch(lambda: run(adjoint({}), case, torch.float32))
    # tanh makes an infinite sum finite on the way up; the way down shows it.
    assert warned or not all(torch.isfinite(results[name]).all() for name in GRADIENTS)


@pytest.mark.parametrize("natively", [True, False])
def test_no_step_is_solved_where_a_pixel_is_not_finite(
    natively: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each says so, whatever its last entries are; the drift of the whole does as well."""
    case = make_case(3, 4, 5, 16, activation="tanh", smooth=True, maps=(9, 8))
    tensors = [None if t is None else t.float().requires_grad_() for t in case.tensors.values()]
    with torch.no_grad():
        tensors[0][1, 0, 0, 0] = float("nan")
    if not natively:
        monkeypatch.setattr(native, "core", None)
    block = DeepConvResBlock(4, 16, 5, activation="tanh", bias=True, backward="adjoint")
    with torch.no_grad():
        for p, t in zip((block.V, block.W, block.hidden_bias, block.output_bias), tensors[1:], strict=True):
            p.copy_(t)
    _, warned = catch(lambda: block(tensors[0]).sum().backward())
    assert warned
    assert all(math.isnan(block.last_drift[name]) for name in ("estimate", "drift"))


@pytest.mark.parametrize("anchors", [0, 3])
def test_a_state_that_changed_in_between_is_seen(anchors: int) -> None:
    case = weights_case("smooth", 64)
    h, V, W = (case.tensors[name].float().requires_grad_() for name in GRADIENTS)

    def damage(tensor: Tensor) -> Tensor:
        saved_states = tensor.dim() == 3 and tensor.shape[1] == reference.ROW_PADDING
        return tensor * 1.001 if saved_states else tensor

    with saved_tensors_hooks(damage, lambda tensor: tensor):
        y = deep_residual(h, V, W, activation="tanh", backward="adjoint", anchors=anchors)
    with pytest.warns(DriftWarning):
        y.sum().backward()


@pytest.mark.parametrize("maps", [None, (4, 5)])
@pytest.mark.parametrize("batch", [2, 8])
def test_a_projection_that_changed_in_between_is_seen(batch: int, maps: tuple[int, int] | None) -> None:
    case = make_case(batch, 17, 23, 64, activation="tanh", smooth=True, maps=maps)
    tensors = {name: t.float().requires_grad_() for name, t in case.tensors.items() if t is not None}

    def damage(tensor: Tensor) -> Tensor:
        return tensor * 1.01 if tensor.shape == reference.checks_shape(batch, 64, True) else tensor

    block = deep_residual if maps is None else functional.deep_conv_residual
    with saved_tensors_hooks(damage, lambda tensor: tensor):
        y = block(**tensors, activation="tanh", backward="adjoint", strict=True)
    with pytest.raises(DriftError):
        y.sum().backward()


# ---- anchors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("anchors", [0, 1, 3, 15, 63, 64, 1000])
def test_anchors_are_kept_evenly_and_restart_the_sweep(anchors: int) -> None:
    depth = 64
    case = rounded(weights_case("smooth", depth), torch.float32)
    kept: list[int] = []

    def count(tensor: Tensor) -> Tensor:
        if tensor.dim() == 3 and tensor.shape[1] == reference.ROW_PADDING:
            kept.append(len(tensor))
        return tensor

    with saved_tensors_hooks(count, lambda tensor: tensor):
        results = run(adjoint({}, anchors=anchors), case, torch.float32)
    check_results(results, case, torch.float32)
    assert kept == [min(anchors, depth - 1) + 1]


@pytest.mark.parametrize("batch", [3, 5])
def test_anchors_help_where_the_way_back_expands(batch: int) -> None:
    """Some directions decay by e^-12 on the way up, so that rounding errors grow as much on the way down."""
    depth = 256
    case = weights_case("iid", depth, (batch, 8, 8), "identity")
    Q, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
    decay = torch.tensor([0.0, 0, 0, 0, 12, 12, 12, 12], dtype=torch.float64)
    case.tensors["V"] = (-Q * decay).expand(depth, 8, 8).clone()
    case.tensors["W"] = Q.t().expand(depth, 8, 8).clone()
    case = rounded(case, torch.float32)
    drift = {}
    for anchors in (0, 31):
        record: dict[str, float] = {}
        catch(
            lambda record=record, anchors=anchors: run(adjoint(record, anchors=anchors), case, torch.float32)
        )
        drift[anchors] = record["drift"]
    assert drift[0] > 1e-5
    assert drift[31] < 1e-5


def test_the_options_of_a_block_go_with_it() -> None:
    block = DeepResBlock(4, 20, backward="adjoint", anchors=3)
    assert "anchors=3" in repr(block)
    assert block.resample(40).anchors == 3
    assert block.split(2)[1].anchors == 3
    budget = DeepResBlock(4, 20, memory_budget=10_000)
    assert budget.resample(9).memory_budget == 10_000
