"""deep_conv_residual: the oracle's rule, derivatives, layouts, and what it refuses."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from oracle import NAMES, baseline, check_rule, check_strategies, errors, make_case, rounded, run
from torch import Tensor, nn

from odeblock import DriftWarning, functional, reference
from odeblock.activations import ACTIVATIONS
from odeblock.functional import deep_conv_residual

STRATEGIES = ("auto", "store", "checkpoint", "adjoint")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ENTRY_POINTS = (functional.deep_conv_residual, reference.deep_conv_residual)
# (B, C, M), (H, W), k: nothing is a multiple of anything.
SHAPES = [
    ((1, 1, 1), (1, 1), 1),
    ((3, 3, 5), (7, 9), 3),
    ((3, 11, 7), (9, 7), 3),
    ((2, 16, 24), (10, 10), 3),
    ((5, 24, 3), (1, 1), 3),
    ((17, 3, 16), (2, 1), 5),
    ((2, 5, 4), (7, 9), 5),
    ((3, 16, 7), (10, 10), 1),
    ((2, 3, 23), (32, 32), 3),
]


def arguments(**changes: Any) -> dict[str, Any]:
    case = make_case(3, 4, 5, 6, maps=(7, 9))
    return {**{name: case.tensors[name].float() for name in NAMES}, **changes}


def results(tensors: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """y and every gradient."""
    y = deep_conv_residual(**tensors, **options)
    grad = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    return [y.detach(), *torch.autograd.grad(y, list(tensors.values()), grad)]


# ---- by the oracle ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "maps", "kernel"), SHAPES, ids=str)
def test_shapes(shape: tuple[int, int, int], maps: tuple[int, int], kernel: int, dtype: torch.dtype) -> None:
    case = make_case(*shape, 11, activation="tanh", maps=maps, kernel=kernel)
    check_strategies(deep_conv_residual, case, dtype, STRATEGIES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, dtype: torch.dtype) -> None:
    case = make_case(3, 9, 8, 12, activation=activation, maps=(6, 5))
    check_strategies(deep_conv_residual, case, dtype, STRATEGIES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("hidden_bias", "output_bias"), [(False, False), (True, False), (False, True)])
def test_biases(hidden_bias: bool, output_bias: bool, dtype: torch.dtype) -> None:
    biases = {"hidden_bias": hidden_bias, "output_bias": output_bias}
    case = make_case(3, 9, 8, 10, scale=0.07, maps=(6, 5), **biases)
    check_strategies(deep_conv_residual, case, dtype, STRATEGIES)


@pytest.mark.parametrize("smooth", [True, False], ids=["smooth", "iid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deep(dtype: torch.dtype, smooth: bool) -> None:
    case = make_case(2, 7, 10, 256, activation="tanh", smooth=smooth, maps=(5, 6))
    check_strategies(deep_conv_residual, case, dtype, ["checkpoint", "adjoint"])


@pytest.mark.parametrize("channels", [(1, 1), (3, 3), (1, 6)])
def test_few_channels_round_as_little_as_eager(channels: tuple[int, int]) -> None:
    """Where a block amplifies what rounding does, and little is summed in which it might cancel."""
    ratios = []
    for seed in range(24):
        maps = ((3, 3), (3, 4), (4, 4), (5, 5), (7, 9), (6, 6))[seed % 6]
        case = make_case(2, *channels, 3, activation="tanh", scale=1, maps=maps, seed=seed, hidden_bias=False)
        for name in ("V", "W"):
            case.tensors[name] *= 6
        case = rounded(case, torch.float32)
        truth = run(case.reference, case, torch.float64)
        worst = baseline(case, torch.float32, truth)
        found = errors(run(deep_conv_residual, case, torch.float32, backward="store"), truth)
        ratios.append(max(found[name] / worst[name] for name in truth))
    assert statistics.median(ratios) <= 1.3


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_the_reference_is_the_loop_of_modules_it_stands_for(kernel: int, bias: bool) -> None:
    depth, scale = 5, 0.3
    options = {"padding": kernel // 2, "bias": bias, "dtype": torch.float64}
    first = [nn.Conv2d(3, 4, kernel, **options) for _ in range(depth)]
    second = [nn.Conv2d(4, 3, kernel, **options) for _ in range(depth)]
    h = x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    for w, v in zip(first, second, strict=True):
        h = h + scale * v(torch.relu(w(h)))
    stacked = {
        "V": torch.stack([v.weight for v in second]),
        "W": torch.stack([w.weight for w in first]),
        "hidden_bias": torch.stack([w.bias for w in first]) if bias else None,
        "output_bias": torch.stack([v.bias for v in second]) if bias else None,
    }
    for function in ENTRY_POINTS:
        y = function(x, **stacked, activation="relu", scale=scale)
        torch.testing.assert_close(y, h, rtol=1e-14, atol=1e-14)


def test_a_kernel_of_one_tap_is_a_matrix_at_every_pixel() -> None:
    tensors = arguments(V=torch.randn(6, 4, 5, 1, 1), W=torch.randn(6, 5, 4, 1, 1))
    y = deep_conv_residual(**tensors)
    rows = {**tensors, "h": tensors["h"].movedim(1, -1), "V": tensors["V"][..., 0, 0]}
    rows["W"] = tensors["W"][..., 0, 0]
    torch.testing.assert_close(y, functional.deep_residual(**rows).movedim(-1, 1))


# ---- derivatives -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_hidden", [False, True])
def test_the_reference_ops_against_autograd_of_the_loop(keep_hidden: bool) -> None:
    case = make_case(3, 4, 3, 10, activation="silu", maps=(5, 4))
    truth = run(case.reference, case, torch.float64)
    tensors = [case.tensors[name] for name in NAMES]
    for every, reconstruct, slots in (
        (1, False, 0),
        (4, False, 3),
        (10, False, 2),
        (0, True, 0),
        (4, True, 0),
    ):
        options = (every, reconstruct, keep_hidden)
        y, *saved = reference.forward(*tensors, "silu", 0.1, *options)
        torch.testing.assert_close(y, truth["y"], rtol=1e-13, atol=1e-13)
        plan = (every, reconstruct, slots, keep_hidden)
        gradients = reference.backward(case.grad, *tensors, *saved, "silu", 0.1, *plan, True)
        for name, gradient in zip(NAMES, gradients, strict=False):
            torch.testing.assert_close(gradient, truth[name], rtol=1e-11, atol=1e-12, msg=name)


def test_only_what_requires_a_gradient_gets_one() -> None:
    for strategy in STRATEGIES:
        everything = results({k: t.requires_grad_() for k, t in arguments().items()}, backward=strategy)[1:]
        for chosen, whole in zip(NAMES, everything, strict=True):
            tensors = {name: t.requires_grad_(name == chosen) for name, t in arguments().items()}
            y = deep_conv_residual(**tensors, backward=strategy)
            y.backward(torch.linspace(-1, 2, y.numel()).view(y.shape))
            assert [name for name, t in tensors.items() if t.grad is not None] == [chosen]
            torch.testing.assert_close(tensors[chosen].grad, whole)


def test_checkpoint_is_store_bit_for_bit_and_the_adjoint_close() -> None:
    tensors = {name: t.requires_grad_() for name, t in arguments().items()}
    store = results(tensors, backward="store")
    for a, b in zip(store, results(tensors, backward="checkpoint", memory_budget=9000), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(store, results(tensors, backward="adjoint", anchors=2), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_sample_does_not_feel_its_neighbours() -> None:
    for strategy in ("store", "adjoint"):
        tensors = {name: t.requires_grad_() for name, t in arguments(h=torch.randn(9, 4, 7, 9)).items()}
        y = deep_conv_residual(**tensors, backward=strategy)
        (dh,) = torch.autograd.grad(y.square().sum(), tensors["h"])
        part = {**tensors, "h": tensors["h"][2:7]}
        part_y = deep_conv_residual(**part, backward=strategy)
        (part_dh,) = torch.autograd.grad(part_y.square().sum(), part["h"])
        torch.testing.assert_close(part_y, y[2:7])
        torch.testing.assert_close(part_dh, dh[2:7])


def test_the_adjoint_says_when_a_step_cannot_be_inverted() -> None:
    h, V, W = torch.randn(2, 8, 5, 5), 30 * torch.randn(3, 8, 8, 3, 3), 30 * torch.randn(3, 8, 8, 3, 3)
    h.requires_grad_()
    with pytest.warns(DriftWarning, match='use backward="auto"'):
        deep_conv_residual(h, V, W, activation="tanh", backward="adjoint").sum().backward()


def test_negative_weights_see_their_channels() -> None:
    case = make_case(3, 4, 5, 64, activation="tanh", maps=(5, 4), smooth=True)
    case.tensors["W"] = -case.tensors["W"].abs()
    check_rule(deep_conv_residual, case, torch.float32, backward="adjoint")


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("sample", [0, -1])
def test_no_sample_drifts_away_unseen(sample: int) -> None:
    """Whichever thread has it."""
    torch.set_num_threads(3)
    tensors = arguments(h=torch.randn(40, 4, 7, 9))
    tensors["h"][sample, 0, 0, 0] = torch.nan
    tensors["h"].requires_grad_()
    with pytest.warns(DriftWarning):
        deep_conv_residual(**tensors, backward="adjoint").sum().backward()


# ---- layouts and shapes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ENTRY_POINTS, ids=["functional", "reference"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_empty_batch(function: Any, strategy: str) -> None:
    tensors = {name: t.requires_grad_() for name, t in arguments(h=torch.randn(0, 4, 7, 9)).items()}
    y = function(**tensors, backward=strategy)
    assert y.shape == (0, 4, 7, 9)
    y.sum().backward()
    for name, tensor in tensors.items():
        assert tensor.grad.shape == tensor.shape
        assert not tensor.grad.any(), name


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_map_without_a_batch(strategy: str) -> None:
    tensors = {name: t.requires_grad_() for name, t in arguments(h=torch.randn(4, 7, 9)).items()}
    one = results(tensors, backward=strategy)
    batch = results({**tensors, "h": tensors["h"].detach()[None].requires_grad_()}, backward=strategy)
    batch[:2] = batch[0][0], batch[1][0]
    for a, b in zip(one, batch, strict=True):
        assert torch.equal(a, b)


def strided(tensor: Tensor, how: str) -> Tensor:
    """The same values in another memory layout."""
    if how == "channels_last":
        return tensor.movedim(-3, -1).contiguous().movedim(-1, -3) if tensor.dim() > 3 else tensor
    if how == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "sliced":
        wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), float("nan"), dtype=tensor.dtype)
        wide[..., ::2] = tensor
        return wide[..., ::2]
    return tensor[:1].expand_as(tensor)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("how", ["channels_last", "transposed", "sliced", "expanded"])
def test_strides(how: str, strategy: str) -> None:
    layouts = {name: strided(tensor, how).requires_grad_() for name, tensor in arguments().items()}
    dense = {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in layouts.items()}
    assert not layouts["V"].is_contiguous()
    outputs = []
    for tensors in (layouts, {name: t.requires_grad_() for name, t in dense.items()}):
        y = deep_conv_residual(**tensors, backward=strategy)
        assert y.is_contiguous()
        grad = strided(torch.linspace(-1, 1, y.numel()).view_as(y), how)
        outputs.append([y, *torch.autograd.grad(y, list(tensors.values()), grad)])
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b)


# ---- refusals --------------------------------------------------------------------------------------------

REFUSED = [
    (
        {"h": torch.randn(3, 5, 7, 9)},
        ValueError,
        r"h: expected shape \[B, 4, H, W\] or \[4, H, W\].*got \[3, 5,",
    ),
    ({"h": torch.randn(4, 7)}, ValueError, r"h: expected shape .*got \[4, 7\]"),
    ({"h": torch.randn(1, 3, 4, 7, 9)}, ValueError, r"h: expected shape"),
    (
        {"h": torch.randn(3, 4, 0, 9)},
        ValueError,
        r"h: expected maps of at least one pixel.*got \[3, 4, 0, 9\]",
    ),
    ({"h": [1.0]}, TypeError, "h: expected a torch.Tensor, got list"),
    ({"h": torch.ones(3, 4, 7, 9, dtype=torch.int64)}, TypeError, "h: expected one of .*got torch.int64"),
    ({"V": torch.randn(6, 4, 5)}, ValueError, r"V: expected shape \[L, C, M, k, k\].*got \[6, 4, 5\]"),
    ({"V": torch.randn(0, 4, 5, 3, 3)}, ValueError, r"V: .*L, C, M >= 1.*got \[0, 4, 5, 3, 3\]"),
    ({"V": torch.randn(6, 4, 5, 2, 2)}, ValueError, r"V: .*one odd k.*got \[6, 4, 5, 2, 2\]"),
    ({"V": torch.randn(6, 4, 5, 3, 1)}, ValueError, r"V: .*one odd k.*got \[6, 4, 5, 3, 1\]"),
    (
        {"W": torch.randn(6, 5, 4, 5, 5)},
        ValueError,
        r"W: expected shape \[L, M, C, k, k\] = \[6, 5, 4, 3, 3\]",
    ),
    ({"W": torch.randn(6, 5, 4, 3, 3).double()}, TypeError, "W: expected the dtype of h, torch.float32"),
    (
        {"W": torch.randn(6, 5, 4, 3, 3, device="meta")},
        ValueError,
        "W: expected the device of h, cpu; got meta",
    ),
    ({"hidden_bias": torch.randn(6, 4)}, ValueError, r"hidden_bias: expected shape \[L, M\] = \[6, 5\]"),
    ({"output_bias": torch.randn(6, 5)}, ValueError, r"output_bias: expected shape \[L, C\] = \[6, 4\]"),
    ({"activation": "swish"}, ValueError, "activation: expected one of identity, relu,.*got 'swish'"),
    ({"scale": float("nan")}, ValueError, "scale: expected a finite number, got nan"),
    ({"backward": "reversible"}, ValueError, "backward: expected one of auto, .*got 'reversible'"),
    ({"anchors": 2}, ValueError, "anchors: expected 0 unless"),
    ({"memory_budget": 100, "backward": "store"}, ValueError, "memory_budget: expected None unless"),
]


@pytest.mark.parametrize("function", ENTRY_POINTS, ids=["functional", "reference"])
@pytest.mark.parametrize(("changes", "error", "message"), REFUSED)
def test_bad_arguments(function: Any, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        function(**arguments(**changes))


def test_a_budget_counts_the_pixels() -> None:
    tensors = {name: t.requires_grad_() for name, t in arguments().items()}
    state = reference.padded_rows(3) * 4 * 7 * 9 * 4
    with pytest.raises(ValueError, match=f"memory_budget: expected at least {2 * state} bytes"):
        deep_conv_residual(**tensors, backward="checkpoint", memory_budget=2 * state - 1)
    deep_conv_residual(**tensors, backward="checkpoint", memory_budget=2 * state).sum().backward()
