"""The native kernels for batch normalisation in training: the oracle's rule, threads, instruction sets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import Case, errors, make_case, rounded
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from odeblock import DeepConvResBlock, build_info, native, normalised, normalised_ops, ops
from odeblock.activations import get_activation
from odeblock.drift import DriftRecord
from odeblock.normalised import AFFINE, STATISTICS
from odeblock.reference import padded_rows, state_dtype

NAMES = ("V", "W", *AFFINE)
# B, C, M, L, (H, W), k: odd channels, maps and kernels; strips of rows of few samples, groups of many; tiles
# and taps.
SHAPES: list[Any] = [
    (64, 16, 16, 4, (10, 10), 3),
    (5, 3, 24, 6, (7, 9), 3),
    (17, 24, 3, 5, (6, 5), 3),
    (40, 3, 16, 5, (1, 1), 3),
    (2, 16, 7, 4, (32, 32), 3),
    (1, 10, 9, 7, (7, 9), 3),
    (33, 5, 6, 6, (4, 3), 1),
    (3, 7, 2, 5, (9, 8), 5),
    (130, 2, 3, 3, (2, 2), 3),
]


def make_normalised(
    *shape: Any, activation: str = "gelu", scale: float | None = None, bias: bool = False, seed: int = 0
) -> Case:
    """A case with γ and β, far from what they start as, and maps that are not centred."""
    *sizes, maps, kernel = shape
    case = make_case(
        *sizes,
        maps=maps,
        kernel=kernel,
        activation=activation,
        scale=scale,
        hidden_bias=bias,
        output_bias=bias,
        seed=seed,
    )
    generator = torch.Generator().manual_seed(seed + 1)
    depth, dim, hidden = case.tensors["V"].shape[:3]
    for i, (name, size) in enumerate(zip(AFFINE, (hidden, hidden, dim, dim), strict=True)):
        drawn = torch.randn(depth, size, generator=generator, dtype=torch.float64)
        case.tensors[name] = 0.5 * drawn + (1 - i % 2)
    case.tensors["h"] = 2 * case.tensors["h"] + 1
    return case


def loop(case: Case, dtype: torch.dtype, order: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """Eager PyTorch in ``dtype``, with a state in float32 at least, on rows, channels and hidden channels in
    an order on which nothing depends: y, gradients and statistics, in float64 and the case's own order."""
    rows, features, units = order

    def ordered(name: str, x: Tensor) -> Tensor:
        if name in ("h", "y"):
            return x[rows][:, features]
        if name in ("V", "W"):
            first, second = (features, units) if name == "V" else (units, features)
            return x[:, first][:, :, second]
        return x[:, units if name.startswith("hidden") else features]

    given = {
        name: ordered(name, x).to(dtype, copy=True).requires_grad_()
        for name, x in case.tensors.items()
        if x is not None
    }
    h, V, W, *affine = given["h"], given["V"], given["W"], *(given[name] for name in AFFINE)
    state, sigma = h.to(state_dtype(dtype)), get_activation(case.activation).function
    scale = 1 / len(V) if case.scale is None else case.scale
    biases = [given[n].unbind() if n in given else [None] * len(V) for n in ("hidden_bias", "output_bias")]
    statistics: list[list[Tensor]] = [[], [], [], []]

    def batch_norm(x: Tensor, i: int, k: int) -> Tensor:
        x = x.to(state.dtype)
        for found, value in zip(
            statistics[i:], (x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)), strict=False
        ):
            found.append(value.detach())
        return F.batch_norm(
            x, None, None, affine[i][k].to(x.dtype), affine[i + 1][k].to(x.dtype), training=True
        )

    for k, (v, w) in enumerate(zip(V.unbind(), W.unbind(), strict=True)):
        s = sigma(batch_norm(F.conv2d(state.to(dtype), w, biases[0][k], padding="same"), 0, k))
        state = state + scale * batch_norm(F.conv2d(s.to(dtype), v, biases[1][k], padding="same"), 2, k)
    wanted = [name for name in ("h", *NAMES) if name in given]
    found = torch.autograd.grad(
        state.to(dtype), [given[n] for n in wanted], ordered("y", case.grad).to(dtype)
    )
    results = {"y": state.detach().to(dtype), **dict(zip(wanted, found, strict=True))}
    results |= {name: torch.stack(of) for name, of in zip(STATISTICS, statistics, strict=True)}
    rows, features, units = (permutation.argsort() for permutation in order)
    return {name: ordered(name, x).double() for name, x in results.items()}


def natively(case: Case, dtype: torch.dtype, strategy: str, **options: Any) -> dict[str, Tensor]:
    """The same of the kernels."""
    given = {
        name: x.to(dtype, copy=True).requires_grad_() for name, x in case.tensors.items() if x is not None
    }
    weights = [given.get(name) for name in ("V", "W", "hidden_bias", "output_bias")]
    y, statistics = normalised.normalised_residual(
        DriftRecord(),
        *(given["h"], weights, [given[name] for name in AFFINE], case.activation, case.scale),
        *(strategy, False, 0, options.get("memory_budget")),
    )
    wanted = ["h", *NAMES]
    found = torch.autograd.grad(y, [given[n] for n in wanted], case.grad.to(dtype))
    results = {"y": y.detach(), **dict(zip(wanted, found, strict=True))}
    return {n: x.double() for n, x in (results | dict(zip(STATISTICS, statistics, strict=True))).items()}


def worst_of_eager(case: Case, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The truth, and the largest errors of 8 eager runs in orders on which nothing depends."""
    batch, dim, hidden = len(case.tensors["h"]), *case.tensors["V"].shape[1:3]
    truth = loop(case, torch.float64, (torch.arange(batch), torch.arange(dim), torch.arange(hidden)))
    generator = torch.Generator().manual_seed(1)
    worst = dict.fromkeys(truth, 0.0)
    for _ in range(8):
        rows, features, units = (torch.randperm(n, generator=generator) for n in (batch, dim, hidden))
        found = errors(loop(case, dtype, (rows, features, units)), truth)
        worst = {name: max(worst[name], found[name]) for name in worst}
    return truth, worst


def check_normalised(*several: dict[str, Tensor], case: Case, dtype: torch.dtype) -> None:
    """The rule for results on a case that ``dtype`` holds exactly. Biases are normalised away."""
    truth, worst = worst_of_eager(case, dtype)
    floor = (4 if dtype.itemsize > 2 else 1) * torch.finfo(dtype).eps
    for results in several:
        for name, error in errors({name: results[name] for name in truth}, truth).items():
            assert error <= max(2 * worst[name], floor), f"{name}: {error:.2e}, eager {worst[name]:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_rule(shape: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(normalised.NormalisedSteps, "measure")  # which the kernels do without
    activation = "gelu" if shape[0] % 2 else "tanh"
    case = rounded(make_normalised(*shape, activation=activation, seed=1), dtype)
    found = [natively(case, dtype, strategy) for strategy in ("store", "checkpoint")]
    check_normalised(*found, case=case, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], SHAPES[6], (70, 7, 10, 9, (7, 9), 3)], ids=str)
def test_nothing_depends_on_threads_or_strategy(threads: None, shape: Any, dtype: torch.dtype) -> None:
    """Bit by bit; the last with states that are run again more than once."""
    case = make_normalised(*shape, bias=True)
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found += [natively(case, dtype, strategy) for strategy in ("store", "checkpoint")]
    state = padded_rows(shape[0]) * case.tensors["h"][0].numel() * state_dtype(dtype).itemsize
    found.append(natively(case, dtype, "checkpoint", memory_budget=3 * state))
    for other in found[1:]:
        assert all(torch.equal(x, other[name]) for name, x in found[0].items())


@pytest.mark.parametrize("maps", [(64, 64), (5, 300)], ids=str)
def test_constant_maps_are_their_own_mean(maps: tuple[int, int]) -> None:
    """Where every sum of equal numbers rounds the same way."""
    h = torch.full((1, 3, *maps), 77.7)
    zero, bias = torch.zeros(1, 3, 3, 1, 1), torch.full((1, 3), 0.1)
    affine = [f(1, 3) for f in (torch.ones, torch.zeros, torch.ones, torch.zeros)]
    y, (mean, var, *_) = normalised.normalised_residual(
        DriftRecord(),
        h,
        (zero, zero + torch.eye(3)[:, :, None, None], bias, bias),
        affine,
        "tanh",
        1.0,
        "store",
        False,
        0,
        None,
    )
    assert (mean - (77.7 + 0.1)).abs().max() <= 8e-6  # an ulp
    assert var.max() <= 1e-10
    assert torch.equal(y, h)


def test_a_constant_channel_has_no_variance() -> None:
    """Exactly, so that γ and the gradients are what 1/√ε makes of them; NaN is passed on."""
    case = make_normalised(20, 4, 5, 1, (6, 5), 3)
    case.tensors["W"][:, 2] = 0
    results = natively(case, torch.float32, "store")
    truth, _ = worst_of_eager(rounded(case, torch.float32), torch.float32)
    assert results["hidden_running_var"][0, 2] == 0
    for name in ("y", "h", "V", *AFFINE):
        torch.testing.assert_close(results[name], truth[name], rtol=1e-5, atol=1e-5)
    case.tensors["h"][3, 1, 2, 2] = torch.nan
    results = natively(case, torch.float32, "checkpoint")
    assert all(results[name].isnan().all() for name in ("y", "h", "output_running_var"))


def test_only_the_gradients_that_are_wanted() -> None:
    block = DeepConvResBlock(7, 5, 9, norm="batch", bias=True, backward="checkpoint")
    x = torch.randn(6, 7, 8, 8, requires_grad=True)
    (block(x).square().sum()).backward()
    expected = {"h": x.grad, **{name: p.grad for name, p in block.named_parameters()}}
    for wanted in (("h",), ("h", "W"), ("output_norm_bias",)):
        for name, p in block.named_parameters():
            p.requires_grad_(name in wanted)
            p.grad = None
        h = x.detach().requires_grad_("h" in wanted)
        (block(h).square().sum()).backward()
        found = {"h": h.grad, **{name: p.grad for name, p in block.named_parameters()}}
        for name, gradient in found.items():
            assert torch.equal(gradient, expected[name]) if name in wanted else gradient is None, name


@pytest.mark.parametrize("shape", [(3, 4), (2, 16, 100)], ids=["statistics", "states"])
@pytest.mark.parametrize("change", [torch.Tensor.double, lambda t: t[:, :-1]], ids=["dtype", "shape"])
def test_saved_tensors_in_another_form_are_refused(change: Any, shape: tuple[int, ...]) -> None:
    block = DeepConvResBlock(4, 3, norm="batch", backward="checkpoint")

    def unpack(t: Tensor) -> Tensor:
        return change(t) if t.shape[-len(shape) :] == shape and not t.requires_grad else t

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        y = block(torch.randn(10, 4, 5, 5))
    with pytest.raises(RuntimeError, match=r"(hidden_mean|states): expected a tensor"):
        y.sum().backward()


def test_saved_tensors_with_other_strides_are_taken() -> None:
    block = DeepConvResBlock(4, 3, norm="batch", backward="checkpoint")
    x = torch.randn(10, 4, 5, 5, requires_grad=True)
    expected = torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()])
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t, lambda t: t.mT.contiguous().mT if t.dim() < 4 else t
    ):
        y = block(x)
    found = torch.autograd.grad(y.square().sum(), [x, *block.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("strategy", ["store", "adjoint"])
def test_a_backward_after_a_jvp(strategy: str) -> None:
    """Whose forward does not see that gradients are wanted, and saves nothing."""
    block = DeepConvResBlock(4, 3, norm="batch", backward=strategy, scale=0.1).requires_grad_(False)
    x = torch.randn(3, 4, 6, 6, requires_grad=True)
    run = lambda h: block._run(h, *block._stacks())  # noqa: E731
    y, _ = torch.func.jvp(run, (x,), (torch.ones_like(x),))
    (found,) = torch.autograd.grad(y.square().sum(), x)
    (expected,) = torch.autograd.grad(run(x).square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_the_kernels_must_not_see() -> None:
    block, x = DeepConvResBlock(4, 3, 5, norm="batch"), torch.randn(2, 4, 6, 6)
    y = block(x)
    for name, value, message in (
        ("hidden_norm_weight", torch.ones(1, 1), r"hidden_norm_weight: expected shape \[L, M\] = \[3, 5\]"),
        ("output_norm_bias", torch.ones(3, 5), r"output_norm_bias: expected shape \[L, C\] = \[3, 4\]"),
        ("hidden_norm_bias", torch.ones(3, 5, device="meta"), "hidden_norm_bias: expected a tensor on cpu"),
        ("output_norm_weight", torch.ones(3, 4, dtype=torch.int), "output_norm_weight: expected one of"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            torch.func.functional_call(block, {name: value}, (x,))
    for name in AFFINE:  # of another type than V, or with other strides
        value = getattr(block, name).detach().double().t().contiguous().t()
        torch.testing.assert_close(torch.func.functional_call(block, {name: value}, (x,)), y)
    case = make_normalised(3, 4, 5, 2, (6, 5), 3)
    tensors = [None if t is None else t.float() for t in case.tensors.values()]
    normalised_ops.forward(*tensors, "gelu", 0.1, 1)
    for place, wrong, message in (
        (0, tensors[0][:0], "h: expected maps of at least one sample"),
        (2, tensors[1], "W: expected shape"),
        (5, tensors[7], "hidden_weight: expected shape"),
        (6, None, "hidden_shift: expected a torch.Tensor"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            normalised_ops.forward(*tensors[:place], wrong, *tensors[place + 1 :], "gelu", 0.1, 1)


@pytest.mark.parametrize("batch", [16, 33])
def test_states_fit_the_budget(batch: int) -> None:
    """Those stored and those held, of a batch rounded up to whole vectors."""
    h, V = torch.randn(batch, 8, 10, 10), torch.randn(40, 8, 8, 3, 3)
    state = -(-batch // 16) * 16 * 800 * 4
    for count in (2, 3, 7, 20):
        plan = normalised_ops.plan(h, V, "checkpoint", 0, count * state)
        states = -(-40 // plan.save_every) * state
        sizes = (*ops._sizes(h, V, "gelu"), plan.save_every)
        held, none = (native.core.normalised_backward_workspace(*sizes, n, 2) for n in (plan.slots, 0))
        assert states + held - none <= count * state


def test_operations_are_those_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = DeepConvResBlock(4, 30, 5, norm="batch"), torch.randn(3, 4, 6, 6)

    def count() -> int:
        with FlopCounterMode(display=False) as counter:
            block(x).sum().backward()
        return counter.get_total_flops()

    for strategy in ("store", "checkpoint"):
        block.backward = strategy
        found = count()
        with monkeypatch.context() as patch:
            patch.setattr(native, "core", None)
            expected = count()
        assert expected <= found <= expected * 16 / 15  # z and o of the top layer of a segment are made again


def test_the_same_without_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_normalised(5, 6, 7, 9, (6, 5), 3, bias=True)
    expected = natively(case, torch.float64, "store")
    monkeypatch.setattr(native, "core", None)
    for strategy in ("store", "checkpoint"):
        for name, found in natively(case, torch.float64, strategy).items():
            torch.testing.assert_close(found, expected[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(bias: bool, dtype: torch.dtype) -> None:
    case = make_normalised(3, 4, 5, 6, (6, 5), 3, bias=bias)
    tensors = [None if x is None else x.to(dtype) for x in case.tensors.values()]
    h, *weights = tensors
    settings = ("gelu", 0.1, 2)
    torch.library.opcheck(normalised_ops.forward, (h, *weights, *settings))
    _, states, *statistics = normalised_ops.forward(h, *weights, *settings)
    for gradients in (False, True):
        rest = (*statistics, states, *settings, 1, gradients)
        torch.library.opcheck(normalised_ops.backward, (h, *weights, *rest))


@pytest.mark.parametrize(
    "build", [b for b in build_info()["cpu_builds"] if b != build_info()["cpu_features"]]
)
def test_every_instruction_set(build: str, request: pytest.FixtureRequest) -> None:
    """Those of float32 with the other builds of the kernels."""
    chosen = "(rule or threads) and float32 or constant"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", chosen],
        env={**os.environ, "ODEBLOCK_CPU": build},
        cwd=Path(request.config.rootpath),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:]
