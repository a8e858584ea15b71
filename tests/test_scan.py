"""residual_scan: any residual, the block's strategies, judged by the plain loop."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import check_rule, make_case
from residuals import (
    CASES,
    case,
    cast,
    counted,
    errors,
    mlp,
    plain,
    results,
    smooth,
)
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, grad_and_value, hessian, jvp, vjp, vmap
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_flatten, tree_map

from odeblock import DriftError, DriftWarning
from odeblock.functional import residual_scan

STRATEGIES = ("auto", "store", "checkpoint", "adjoint")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_block_written_as_a_residual(strategy: str, dtype: torch.dtype) -> None:
    """By the rule that the native kernels pass."""

    def block(*tensors: Tensor, activation: str, scale: float | None, backward: str) -> Tensor:
        h, *weights = tensors

        def f(h: Tensor, Z: Any) -> Tensor:
            V, W, b, c = Z
            return F.linear(F.gelu(F.linear(h, W, b)), V, c)

        return residual_scan(f, h, weights, scale=scale, backward=backward)

    rebuilt = strategy == "adjoint"
    check_rule(block, make_case(5, 17, 12, 40), dtype, rebuilt=rebuilt, backward=strategy)
    check_rule(block, make_case(5, 17, 12, 100, scale=0.02), dtype, rebuilt=rebuilt, backward=strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", CASES)
def test_every_residual_and_strategy(name: str, strategy: str) -> None:
    arguments = case(name, 60)
    truth = results(plain, *arguments)
    found = results(residual_scan, *arguments, backward=strategy)
    assert max(errors(found, truth)) < 1e-13
    if strategy == "adjoint":
        found = results(residual_scan, *arguments, backward=strategy, anchors=4)
        assert max(errors(found, truth)) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_checkpoint_is_store_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    f, h, params = case(name, 50)
    h = h.transpose(0, -1).contiguous().transpose(0, -1)
    stored = results(residual_scan, f, h, params, dtype, backward="store")
    f, calls = counted(f)
    steps = []
    for states in (None, 20, 4, 2):
        budget = None if states is None else states * h.numel() * 4
        calls[0] = 0
        found = results(residual_scan, f, h, params, dtype, backward="checkpoint", memory_budget=budget)
        assert all(torch.equal(a, b) for a, b in zip(stored, found, strict=True))
        steps.append(calls[0])
    assert steps[0] <= 3 * 50 + 2  # every step once forward, once again, once for its graph
    assert steps[0] < steps[2] < steps[3]
    with pytest.raises(ValueError, match="memory_budget: expected at least"):
        results(residual_scan, f, h, params, dtype, backward="checkpoint", memory_budget=h.numel() * 4)


def test_a_smooth_adjoint_evaluates_once_and_is_as_good_as_autograd() -> None:
    depth = 256
    Z = {"W": smooth(depth, 30, 20), "b": smooth(depth, 30), "V": smooth(depth, 20, 30)}
    h, (f, calls) = torch.randn(8, 20), counted(mlp)
    rounded = tree_map(lambda leaf: leaf.float().double(), (h, Z))
    truth = results(plain, mlp, *rounded)
    eager = errors(results(plain, mlp, h, Z, torch.float32), truth)
    found = errors(results(residual_scan, f, h, Z, torch.float32, backward="adjoint"), truth)
    for a, b in zip(found, eager, strict=True):
        assert a <= max(2 * b, 5e-7)
    assert calls[0] < 2.15 * depth  # forward and backward


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_half_precision_keeps_float32_states(strategy: str, dtype: torch.dtype) -> None:
    f, h, params = case("mlp", 200, batch=9)
    h, params = tree_map(lambda leaf: leaf.to(dtype).double(), (h, params))
    truth = results(plain, f, h, params)
    found = results(residual_scan, f, h, params, dtype, backward=strategy, strict=True)
    assert all(g.dtype == dtype for g in found)
    assert max(errors(found, truth)) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_autocast_is_the_same_in_the_backward(strategy: str) -> None:
    f, h, params = case("mlp", 100)
    truth = results(plain, f, h, params)

    def scan(*arguments: Any, **options: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return residual_scan(*arguments, **options)

    found = results(scan, f, h, params, torch.float32, backward=strategy, strict=True)
    assert all(g.dtype == torch.float32 for g in found)
    assert 1e-5 < max(errors(found, truth)) < 4 * torch.finfo(torch.bfloat16).eps
    stored = results(scan, f, h, params, torch.float32, backward="store")
    assert strategy == "adjoint" or all(torch.equal(a, b) for a, b in zip(stored, found, strict=True))


@pytest.mark.parametrize("depth", [64, 256])
def test_a_large_feature_does_not_hide_the_others(depth: int) -> None:
    """No weight touches feature 0, which is 10000 times as large as the others."""
    f, h, params = case("mlp", depth, 8)
    h[:, 0] = 1e4
    params["W"][:, :, 0] = 0
    params["V"][:, 0] = 0
    h, params = (tree_map(lambda x: x.float().double(), inputs) for inputs in (h, params))
    truth = results(residual_scan, f, h, params, backward="store")
    eager = errors(results(residual_scan, f, h, params, torch.float32, backward="store"), truth)
    found = errors(results(residual_scan, f, h, params, torch.float32, backward="adjoint"), truth)
    assert all(a <= max(2 * b, 4e-7) for a, b in zip(found, eager, strict=True)), (found, eager)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_derivatives_of_every_order_and_mode(strategy: str) -> None:
    params = {"W": smooth(3, 3, 2), "b": smooth(3, 3), "V": smooth(3, 2, 3)}
    inputs = [cast(x, torch.float64) for x in (torch.randn(2, 2), *params.values())]

    def scan(h: Tensor, *leaves: Tensor) -> Tensor:
        return residual_scan(mlp, h, dict(zip(params, leaves, strict=True)), scale=0.1, backward=strategy)

    assert torch.autograd.gradcheck(scan, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(scan, inputs, check_fwd_over_rev=True)
    (gradient,) = torch.autograd.grad(scan(*inputs).sum(), inputs[0], create_graph=True)
    assert gradient.requires_grad


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_function_transforms(strategy: str) -> None:
    f, h, params = case("attention", 6)
    dh, tangents = tree_map(torch.randn_like, (h, params))

    def derivatives(scan: Callable[..., Tensor]) -> list[Tensor]:
        def loss(h: Tensor, params: Any) -> Tensor:
            return scan(f, h, params, backward=strategy).square().mean()

        gradient = grad(loss, argnums=(0, 1))
        _, pull = vjp(lambda h, p: scan(f, h, p, backward=strategy), h, params)
        (y, dy), second = (
            jvp(lambda h, p: scan(f, h, p, backward=strategy), (h, params), (dh, tangents)),
            jvp(gradient, (h, params), (dh, tangents)),
        )
        return [y, dy, *tree_flatten(second)[0], *tree_flatten(pull(dh))[0]]

    for a, b in zip(derivatives(residual_scan), derivatives(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    with forward_ad.dual_level():  # an input that needs gradients moves too, and the others stand still
        duals = forward_ad.make_dual(cast(h, torch.float64), dh)
        moving, expected = (
            forward_ad.unpack_dual(scan(f, duals, params, backward=strategy)).tangent
            for scan in (residual_scan, plain)
        )
    torch.testing.assert_close(moving, expected, rtol=1e-12, atol=1e-14)


CAPTURED: dict[str, Callable[..., Any]] = {  # of loss(Z, c), whose f captures c
    "jvp": lambda loss, Z, c: jvp(lambda c: loss(Z, c), (c,), (c.cos(),)),
    "jvp of a gradient": lambda loss, Z, c: jvp(lambda c: grad_and_value(loss)(Z, c), (c,), (c.cos(),)),
    "jvp of vjp": lambda loss, Z, c: jvp(lambda c: vjp(loss, Z, c)[0], (c,), (c.cos(),)),
    "gradient of a value": lambda loss, Z, c: grad(lambda c: grad_and_value(loss)(Z, c)[1])(c),
    "gradient of a gradient": lambda loss, Z, c: grad(lambda c: grad(loss)(Z, c).square().sum())(c),
    "autograd of a value": lambda loss, Z, c: torch.autograd.functional.jacobian(
        lambda c: grad_and_value(loss)(Z, c)[1], c
    ),
    "gradients of members": lambda loss, Z, c: vmap(grad(loss, (0, 1)))(
        torch.stack([Z, -Z]), torch.stack([c, c])
    ),
    "hessian": lambda loss, Z, c: hessian(loss, (0, 1))(Z, c),
}


@pytest.mark.parametrize("name", CAPTURED)
def test_derivatives_by_what_f_captures(name: str) -> None:
    """Of ``torch.func``, at every level."""
    h, Z, c = (torch.randn(*shape, dtype=torch.float64) for shape in ((3, 4), (5, 4), (4,)))

    def derivatives(scan: Callable[..., Tensor]) -> list[Any]:
        def loss(Z: Tensor, c: Tensor) -> Tensor:
            return scan(lambda h, Z: torch.tanh(h * Z) * c, h, Z, backward="adjoint").square().sum()

        return tree_flatten(CAPTURED[name](loss, Z, c))[0]

    for a, b in zip(derivatives(residual_scan), derivatives(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_the_adjoint_says_when_a_step_cannot_be_inverted() -> None:
    f, h, params = case("mlp", 3)
    params = tree_map(lambda leaf: 50 * leaf, params)
    with pytest.warns(DriftWarning, match='use backward="auto"'):
        results(residual_scan, f, h, params, torch.float32, backward="adjoint")
    with pytest.raises(DriftError, match='use backward="auto"'):
        results(residual_scan, f, h, params, torch.float32, backward="adjoint", strict=True)
    results(residual_scan, f, h, params, torch.float32, strict=True)


@pytest.mark.parametrize("depth", [1, 40])
def test_the_adjoint_notices_an_f_that_changed_before_the_backward(depth: int) -> None:
    h, Z, shift = torch.randn(3, 4, requires_grad=True), torch.ones(depth, 4) / depth, torch.zeros(4)
    y = residual_scan(lambda h, Z: torch.sin(h) * Z + shift, h, Z, scale=0.1, backward="adjoint", strict=True)
    shift.add_(0.01)
    with pytest.raises(DriftError, match="drift"):
        y.sum().backward()


def test_anchors_start_the_reconstruction_afresh() -> None:
    """What decays by exp(-12) drowns in the rounding of what does not, and grows by exp(12) backwards."""
    h, basis = torch.randn(5, 6).double(), torch.linalg.qr(torch.randn(6, 6).double())[0]
    generator = -basis @ torch.linspace(0, 12, 6).double().diag() @ basis.t()
    arguments = (torch.matmul, h, generator.expand(600, 6, 6))
    truth = results(plain, *arguments)
    with pytest.warns(DriftWarning):
        results(residual_scan, *arguments, torch.float32, backward="adjoint")
    found = results(residual_scan, *arguments, torch.float32, backward="adjoint", anchors=9)
    assert max(errors(found, truth)) < 1e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nan_in_nan_out(strategy: str, value: float) -> None:
    f, h, params = case("mlp", 12)
    h[1, 2] = value
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y, dh, *rest = results(residual_scan, f, h, params, torch.float32, backward=strategy)
    assert not y[1].isfinite().all()
    assert y[[0, 2]].isfinite().all()
    assert dh[[0, 2]].isfinite().all()
    assert any(gradient.isnan().any() for gradient in rest)
    assert any(w.category is DriftWarning for w in caught) == (strategy == "adjoint")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6), (6,), (1, 6), (2, 3, 6)], ids=str)
def test_shapes(shape: tuple[int, ...], strategy: str) -> None:
    f, _, params = case("mlp", 30)
    h = torch.randn(shape).double()
    found = results(residual_scan, f, h, params, backward=strategy)
    for a, b in zip(found, results(plain, f, h, params), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strides(strategy: str) -> None:
    f, h, params = case("convolution", 12)
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
        lambda x: x.repeat_interleave(2, -1)[..., ::2],
        lambda x: x[:1].expand_as(x),
    ]
    for layout in layouts:
        strided = [layout(h).requires_grad_(), *(layout(x).requires_grad_() for x in tree_flatten(params)[0])]
        outputs = []
        for tensors in (strided, [x.detach().contiguous().requires_grad_() for x in strided]):
            y = residual_scan(f, tensors[0], {"W": tensors[1], "V": tensors[2:]}, backward=strategy)
            grad = torch.ones(1, dtype=y.dtype).expand_as(y)
            outputs.append([y, *torch.autograd.grad(y, tensors, grad)])
        for a, b in zip(*outputs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_only_what_requires_a_gradient_gets_one(strategy: str) -> None:
    f, h, params = case("mlp", 9)
    everything = results(residual_scan, f, h, params, backward=strategy)[1:]
    for chosen in range(4):
        inputs = [x.clone().requires_grad_(i == chosen) for i, x in enumerate((h, *params.values()))]
        seen = []

        def watched(h: Tensor, Z: Any, seen: list[tuple[bool, ...]] = seen) -> Tensor:
            if torch.is_grad_enabled():
                seen.append(tuple(z.requires_grad for z in Z.values()))
            return f(h, Z)

        y = residual_scan(watched, inputs[0], dict(zip(params, inputs[1:], strict=True)), backward=strategy)
        y.backward(torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y))
        for i, tensor in enumerate(inputs):
            assert (tensor.grad is not None) == (i == chosen)
        torch.testing.assert_close(inputs[chosen].grad, everything[chosen])
        assert set(seen[2:]) == {tuple(i == chosen for i in range(1, 4))}  # after the check of f


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_parameters_that_are_not_used_get_zeros(strategy: str) -> None:
    h, unused, Z = torch.randn(3, 4), torch.randn(6, 2), torch.randn(6, 4)
    sometimes = torch.arange(6) % 2 == 0
    tensors = [x.requires_grad_() for x in (h, unused, Z)]

    def f(h: Tensor, Z: Any) -> Tensor:
        return torch.sin(h + Z[1]) if Z[2] else torch.zeros_like(h)

    y = residual_scan(f, h, (unused, Z, sometimes), backward=strategy)
    for create_graph in (False, True):
        dh, dunused, dZ = torch.autograd.grad(y.sum(), tensors, retain_graph=True, create_graph=create_graph)
        assert not dunused.any()
        assert torch.equal(dZ.any(dim=1), sometimes)
        assert dh.all()


def test_inference_keeps_nothing_and_has_the_same_bits() -> None:
    f, h, params = case("mlp", 25)
    trained = [results(residual_scan, f, h, params, torch.float32, backward=s)[0] for s in STRATEGIES]
    h, params = cast(h, torch.float32), cast(params, torch.float32)
    counting, calls = counted(f)
    with torch.no_grad():
        y = residual_scan(counting, h, params)
    assert y.grad_fn is None
    assert calls == [25]
    assert all(torch.equal(y, other) for other in trained)
    assert residual_scan(f, h.detach(), tree_map(Tensor.detach, params), backward="adjoint").grad_fn is None


def held(depth: int, strategy: str) -> tuple[int, int, int]:
    """Bytes that the forward saves besides the inputs; and the most that is alive in a call of f in the
    backward: of states and results of f, wherever they are held, and of tensors that Python holds."""
    f, h, params = case("mlp", depth)
    h, params = cast(h, torch.float32), cast(params, torch.float32)
    inputs = {x.data_ptr() for x in (h, *params.values())}
    saved: dict[int, int] = {}
    seen: list[StorageWeakRef] = []
    alive: list[int] = []
    tensors: list[int] = []

    def pack(x: Tensor) -> Tensor:
        if x.data_ptr() not in inputs:
            saved[x.data_ptr()] = x.numel() * x.element_size()
        return x

    def watched(h: Tensor, Z: Any) -> Tensor:
        y = f(h, Z)
        seen.extend(StorageWeakRef(x.untyped_storage()) for x in (h, y))
        seen[:] = [ref for ref in seen if not ref.expired()]
        alive.append(len({ref.cdata for ref in seen}))
        if len(alive) % 60 == 0:
            tensors.append(sum(issubclass(type(x), Tensor) for x in gc.get_objects()))
        return y

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = residual_scan(watched, h, params, backward=strategy)
    for record in (seen, alive, tensors):
        record.clear()
    gc.collect()
    y.sum().backward()
    return sum(saved.values()), max(alive), max(tensors)


def test_memory_of_the_adjoint_is_flat_in_depth() -> None:
    shallow, deep = held(60, "adjoint"), held(300, "adjoint")
    state = 3 * 6 * 4
    assert state <= shallow[0] <= deep[0] <= state + 16 * 3 * 4  # and a projection of 3 rows of 16 states
    assert deep[1] == shallow[1] == 2  # one graph, of h_k and f(h_k)
    assert deep[2] <= shallow[2] + 4
    everything, root = held(300, "store"), held(300, "checkpoint")
    assert everything[0] == 299 * state
    assert everything[1] > 290
    assert 15 * state < root[0] < 18 * state
    assert 30 < root[1] < 40


def test_autograd_around_it() -> None:
    """The output changed in place, a second backward, a parameter changed in between."""
    for strategy in STRATEGIES:
        f, h, params = case("mlp", 30)
        h, params = cast(h, torch.float32), cast(params, torch.float32)
        (expected,) = torch.autograd.grad(2 * residual_scan(f, h, params, backward=strategy).sum(), h)
        y = residual_scan(f, h, params, backward=strategy)
        y.mul_(2)
        for _ in range(2):
            torch.testing.assert_close(torch.autograd.grad(y.sum(), h, retain_graph=True)[0], expected)
        with torch.no_grad():
            params["W"].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_a_compiled_model_trains_it_eagerly() -> None:
    """Nothing is unrolled, what is around is compiled; f may be compiled by itself."""
    nodes = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        nodes.append(len(graph.graph.nodes))
        return graph.forward

    def model(*arguments: Any, **options: Any) -> Tensor:
        return residual_scan(*arguments, **options).sin().cos()

    f, h, params = case("mlp", 50)
    for strategy in ("checkpoint", "adjoint"):
        torch._dynamo.reset()  # PyTorch 2.6 would take what it compiled for the strategy before
        expected = results(model, f, h, params, torch.float32, backward=strategy)
        compiled = torch.compile(model, backend=backend)
        found = results(compiled, f, h, params, torch.float32, backward=strategy)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert 0 < sum(nodes) < 50
        nodes.clear()
        found = results(model, torch.compile(f, backend=backend), h, params, torch.float32, backward=strategy)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        nodes.clear()


def test_modules_stacked_over_depth() -> None:
    """The recipe of the docstring."""
    modules = [nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6)).double() for _ in range(10)]
    h = torch.randn(4, 6).double()
    expected = h
    for module in modules:
        expected = expected + 0.1 * module(expected)
    expected_gradient = torch.autograd.grad(expected.sum(), modules[7][0].weight)[0]
    params, _ = torch.func.stack_module_state(modules)
    y = residual_scan(lambda h, Z: torch.func.functional_call(modules[0], Z, (h,)), h, params)
    torch.testing.assert_close(y, expected)
    (gradient,) = torch.autograd.grad(y.sum(), params["0.weight"])
    torch.testing.assert_close(gradient[7], expected_gradient)


def test_a_scale_that_the_dtype_does_not_hold_is_infinite() -> None:
    """As in the block."""
    h, params = torch.ones(2, 3), torch.ones(4, 3)
    for scale in (1e300, -1e300):
        y = residual_scan(lambda h, Z: h * Z, h, params, scale=scale)
        assert not y.isfinite().any()
