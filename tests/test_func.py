"""torch.func: derivatives of every kind and order, ``vmap`` over inputs and ensembles, and their mixtures."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import NAMES, make_case
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)

from odeblock import DeepConvResBlock, DeepResBlock, DriftError, DriftWarning, ops, reference
from odeblock.functional import deep_conv_residual, deep_residual

STRATEGIES = ("auto", "store", "checkpoint", "adjoint")
KINDS = ("rows", "maps")
EVERY = tuple(range(len(NAMES)))
SAMPLES = (0, None, None, None, None)
ENSEMBLE = (None, 0, 0, 0, 0)
Function = Callable[..., Tensor]


def both(kind: str, strategy: str = "auto", **options: Any) -> tuple[Function, Function]:
    """The block and the loop in PyTorch, of h, V, W and biases."""
    ours, plain = (
        (deep_residual, reference.deep_residual)
        if kind == "rows"
        else (deep_conv_residual, reference.deep_conv_residual)
    )

    def block(*tensors: Tensor) -> Tensor:
        return ours(*tensors, activation="tanh", backward=strategy, **options)

    def loop(*tensors: Tensor) -> Tensor:
        return plain(*tensors, activation="tanh")

    return block, loop


def make_tensors(kind: str, batch: int = 2, depth: int = 3, kernel: int = 3) -> tuple[Tensor, ...]:
    maps = None if kind == "rows" else (3, 2)
    case = make_case(batch, 3, 2, depth, maps=maps, kernel=kernel, smooth=True)
    return tuple(case.tensors[name] for name in NAMES)


def ensemble(*tensors: Tensor) -> list[Tensor]:
    return [torch.stack([x, 0.5 * x, -x]) for x in tensors]


def squares(function: Function) -> Function:
    return lambda *tensors: function(*tensors).square().sum()


def assert_close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


# ---- derivatives -----------------------------------------------------------------------------------------


def linear(function: Function, *tensors: Tensor) -> Any:
    y, moving = linearize(function, *tensors)
    return y, moving(*(x.cos() for x in tensors))


DERIVATIVES: dict[str, Callable[..., Any]] = {
    "grad": lambda f, *x: grad(squares(f), EVERY)(*x),
    "vjp": lambda f, *x: vjp(f, *x)[1](x[0].cos()),
    "jvp": lambda f, *x: jvp(f, x, tuple(t.cos() for t in x)),
    "jvp of some": lambda f, h, V, *x: jvp(lambda V: f(h, V, *x), (V,), (V.cos(),)),
    "linearize": linear,
    "jacrev": lambda f, *x: jacrev(f, EVERY)(*x),
    "jacrev of h": lambda f, *x: jacrev(f)(*x),
    "jacfwd": lambda f, *x: jacfwd(f, EVERY)(*x),
    "hessian": lambda f, *x: hessian(squares(f), EVERY)(*x),
    "hessian of h": lambda f, *x: hessian(squares(f))(*x),
    "jacrev of jacrev": lambda f, *x: jacrev(jacrev(squares(f), (0, 4)), (1, 3))(*x),
    "jacfwd of jacfwd": lambda f, *x: jacfwd(jacfwd(squares(f), (0, 4)), (1, 3))(*x),
    "third": lambda f, *x: grad(squares(grad(squares(grad(squares(f))))), EVERY)(*x),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives(name: str, kind: str) -> None:
    tensors = make_tensors(kind)
    found, expected = (DERIVATIVES[name](function, *tensors) for function in both(kind))
    assert_close(found, expected)


@pytest.mark.parametrize(("kind", "kernel"), [("rows", 0), ("maps", 1), ("maps", 3)])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradcheck(strategy: str, kind: str, kernel: int) -> None:
    inputs = [x.requires_grad_() for x in make_tensors(kind, kernel=kernel)]
    block, _ = both(kind, strategy)
    assert torch.autograd.gradcheck(block, inputs, check_forward_ad=True, check_batched_grad=True)
    # Of maps along random directions: the whole takes half a minute.
    fast = kind == "maps"
    assert torch.autograd.gradgradcheck(block, inputs, check_fwd_over_rev=True, fast_mode=fast)
    # A gradient penalty, where the incoming gradient itself is a constant.
    (gradient,) = torch.autograd.grad(block(*inputs).sum(), inputs[0], create_graph=True)
    assert gradient.requires_grad


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_come_from_the_native_backward(kind: str, strategy: str) -> None:
    """Of torch.func and with create_graph, too, to the bit; and after the transform is over."""
    tensors = make_tensors(kind, batch=5, depth=9)
    block, _ = both(kind, strategy)
    leaves = [x.clone().requires_grad_() for x in tensors]
    y = block(*leaves)
    expected = torch.autograd.grad(squares(block)(*leaves), leaves)
    assert_equal(grad(squares(block), EVERY)(*tensors), expected)
    assert_equal(torch.autograd.grad(squares(block)(*leaves), leaves, create_graph=True), expected)
    _, pull = vjp(block, *tensors)
    assert_equal(pull(2 * y.detach()), expected)
    # The second derivatives of a pull-back that outlived its transform.
    found = grad(lambda g: squares(lambda g: pull(g)[1])(g))(y.detach())
    leaf = y.detach().requires_grad_()
    (dV,) = torch.autograd.grad(block(*leaves), leaves[1:2], leaf, create_graph=True)
    assert_close(found, torch.autograd.grad(dV.square().sum(), leaf)[0])


def assert_equal(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_a_tangent_alone_needs_the_derivative() -> None:
    """Forward mode without torch.func, where nothing requires a gradient."""
    tensors = make_tensors("rows")
    block, loop = both("rows")
    tangents = tuple(x.cos() for x in tensors)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(tensors, tangents, strict=True)]
        found = tuple(forward_ad.unpack_dual(block(*duals)))
    assert_close(found, jvp(loop, tensors, tangents))


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_around_a_backward_changes_nothing(kind: str) -> None:
    block, _ = both(kind)
    leaves = [x.float().requires_grad_() for x in make_tensors(kind)]
    first = torch.autograd.grad(squares(block)(*leaves), leaves, create_graph=True)
    along = [x.detach().cos() for x in leaves]
    expected = torch.autograd.grad(first, leaves, along, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(torch.autograd.grad(first, leaves, along), expected)


# ---- vmap ------------------------------------------------------------------------------------------------


def per_sample(f: Function, h: Tensor, *weights: Tensor) -> Any:
    return vmap(grad(squares(f), EVERY), SAMPLES)(h, *weights)


# Of f, h, samples [3, *h.shape], V, W and biases.
MAPPED: dict[str, Callable[..., Any]] = {
    "inputs": lambda f, h, x, *w: vmap(f, SAMPLES)(x, *w),
    "inputs last": lambda f, h, x, *w: vmap(f, (-1, *SAMPLES[1:]), -1)(x.movedim(0, -1), *w),
    "inputs of inputs": lambda f, h, x, *w: vmap(vmap(f, SAMPLES), SAMPLES)(torch.stack([x, -x]), *w),
    "ensemble": lambda f, h, x, *w: vmap(f, ENSEMBLE)(h, *ensemble(*w)),
    "ensemble and inputs": lambda f, h, x, *w: vmap(f)(x, *ensemble(*w)),
    "one bias": lambda f, h, x, V, W, b, c: vmap(f, (None, None, None, 1, None))(
        h, V, W, torch.stack([b, b.cos()], 1), c
    ),
    "inputs of an ensemble": lambda f, h, x, *w: vmap(vmap(f, SAMPLES), ENSEMBLE)(x, *ensemble(*w)),
    "ensemble of inputs": lambda f, h, x, *w: vmap(vmap(f, ENSEMBLE), SAMPLES)(x, *ensemble(*w)),
    "ensemble of ensembles": lambda f, h, x, V, W, *biases: vmap(
        vmap(f, (None, 0, None, None, None)), (None, None, 0, 0, 0)
    )(h, *ensemble(V, W, *biases)),
    "ensemble and inputs of an ensemble": lambda f, h, x, V, W, *biases: vmap(
        vmap(f, (None, 0, None, None, None)), (0, None, 0, 0, 0)
    )(x, *ensemble(V, W, *biases)),
    "gradients of samples": lambda f, h, x, *w: vmap(grad(squares(f), EVERY), SAMPLES)(x, *w),
    "gradients of h of samples": lambda f, h, x, *w: vmap(grad(squares(f)), SAMPLES)(x, *w),
    "gradients of all samples": lambda f, h, x, *w: grad(squares(vmap(f, SAMPLES)), EVERY)(x, *w),
    "gradients of an ensemble": lambda f, h, x, *w: grad(squares(vmap(f, ENSEMBLE)), EVERY)(h, *ensemble(*w)),
    "gradients of samples of an ensemble": lambda f, h, x, *w: vmap(
        vmap(grad(squares(f), EVERY), SAMPLES), ENSEMBLE
    )(x, *ensemble(*w)),
    "gradients of an ensemble of samples": lambda f, h, x, *w: vmap(
        vmap(grad(squares(f), EVERY), ENSEMBLE), SAMPLES
    )(x, *ensemble(*w)),
    "jvp of an ensemble": lambda f, h, x, *w: jvp(
        vmap(f, ENSEMBLE), (h, *ensemble(*w)), (h.cos(), *ensemble(*w))
    ),
    "jvps of an ensemble": lambda f, h, x, *w: vmap(lambda *w: jvp(f, (h, *w), (h.cos(), *w)))(*ensemble(*w)),
    "jacobians of an ensemble": lambda f, h, x, *w: vmap(jacrev(f, (0, 3)), ENSEMBLE)(h, *ensemble(*w)),
    "hessians of samples": lambda f, h, x, *w: vmap(hessian(squares(f), (0, 3)), SAMPLES)(x, *w),
    "hessians of an ensemble": lambda f, h, x, *w: vmap(hessian(squares(f), (0, 4)), ENSEMBLE)(
        h, *ensemble(*w)
    ),
    "hessian of all samples": lambda f, h, x, *w: hessian(squares(vmap(f, SAMPLES)), (0, 3))(x, *w),
    "hessian through an ensemble": lambda f, h, x, *w: hessian(
        lambda h: squares(vmap(f, ENSEMBLE))(h, *ensemble(*w))
    )(h),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MAPPED)
def test_vmap(name: str, kind: str) -> None:
    h, *weights = make_tensors(kind, batch=2, depth=2)
    samples = torch.stack([h, h.sin(), 2 * h])
    found, expected = (MAPPED[name](function, h, samples, *weights) for function in both(kind))
    assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_vmap_takes_the_native_way(strategy: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs are rows of one call, members and per-sample gradients of weights are calls of their own: the
    bits of these."""
    calls = dict.fromkeys(("forward", "backward"), 0)

    def counted(name: str) -> Callable[..., Any]:
        op = getattr(ops, name)

        def call(*arguments: Any) -> Any:
            calls[name] += 1
            return op(*arguments)

        return call

    def after(expected: tuple[int, int]) -> None:
        assert tuple(calls.values()) == expected
        calls.update(forward=0, backward=0)

    for name in calls:
        monkeypatch.setattr(ops, name, counted(name))
    block, _ = both(kind, strategy)
    h, *weights = make_tensors(kind, batch=5, depth=9)
    samples, stacked = torch.stack([h, h.sin(), 2 * h]), ensemble(*weights)

    rows = block(samples.flatten(0, 1), *weights).view(samples.shape)
    after((1, 0))
    assert torch.equal(vmap(block, SAMPLES)(samples, *weights), rows)
    after((1, 0))
    leaf = samples.clone().requires_grad_()
    (expected,) = torch.autograd.grad(squares(block)(leaf.flatten(0, 1), *weights), leaf)
    after((1, 1))
    assert torch.equal(grad(squares(vmap(block, SAMPLES)))(samples, *weights), expected)
    after((1, 1))
    assert torch.equal(vmap(grad(squares(block)), SAMPLES)(samples, *weights), expected)
    after((2, 1))  # the forward once more, with what the backward needs

    each = [block(x, *w) for x, *w in zip(samples, *stacked, strict=True)]
    after((3, 0))
    assert torch.equal(vmap(block)(samples, *stacked), torch.stack(each))
    after((3, 0))
    leaves = [x.clone().requires_grad_() for x in stacked]
    squares(vmap(block, ENSEMBLE))(h, *leaves).backward()
    after((3, 3))
    for e in range(3):
        single = grad(squares(block), EVERY)(h, *(x[e] for x in stacked))
        for x, g in zip(leaves, single[1:], strict=True):
            assert torch.equal(x.grad[e], g)


@pytest.mark.parametrize("kind", KINDS)
def test_an_ensemble_of_modules(kind: str) -> None:
    """As in PyTorch's tutorials: stacked states, functional_call, and gradients of every sample."""
    make = DeepResBlock if kind == "rows" else DeepConvResBlock
    blocks = [make(3, 4, 2, bias=True, dtype=torch.float64) for _ in range(3)]
    for block in blocks:
        nn.init.normal_(block.hidden_bias)
        nn.init.normal_(block.output_bias)
    params, buffers = stack_module_state(blocks)
    skeleton = copy.deepcopy(blocks[0]).to("meta")
    x = make_tensors(kind, batch=6)[0]

    def run(params: Any, buffers: Any, x: Tensor) -> Tensor:
        return functional_call(skeleton, (params, buffers), (x,))

    assert_close(vmap(run, (0, 0, None))(params, buffers, x), torch.stack([block(x) for block in blocks]))

    def loss(params: Any, buffers: Any, sample: Tensor) -> Tensor:
        return run(params, buffers, sample[None]).square().sum()

    found = vmap(vmap(grad(loss), (None, None, 0)), (0, 0, None))(params, buffers, x)
    for e, block in enumerate(blocks):
        for i, sample in enumerate(x):
            block.zero_grad()
            block(sample[None]).square().sum().backward()
            for name, parameter in block.named_parameters():
                assert_close(found[name][e, i], parameter.grad)


def test_a_memory_budget_holds_for_what_runs_together() -> None:
    """Twenty states of a sample: enough for one member after another, too little for the rows of one call."""
    block, loop = both("rows", "checkpoint", memory_budget=20 * 16 * 3 * 8)
    h, *weights = make_tensors("rows", batch=16, depth=40)
    samples = torch.stack([h] * 30)
    found, expected = (vmap(grad(squares(f), EVERY), SAMPLES)(samples, *weights) for f in (block, loop))
    assert_close(found, expected)
    with pytest.raises(ValueError, match="memory_budget: expected at least"):
        vmap(grad(squares(block)), SAMPLES)(samples, *weights)


# ---- the adjoint's report --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_adjoint_is_judged_once_for_all(kind: str) -> None:
    make = DeepResBlock if kind == "rows" else DeepConvResBlock
    blocks = [make(3, 40, activation="tanh", backward="adjoint") for _ in range(3)]
    with torch.no_grad():
        for parameter in blocks[1].parameters():
            parameter.mul_(100)
    params, _ = stack_module_state(blocks)
    x = make_tensors(kind)[0].float()

    def loss(params: Any, block: nn.Module = blocks[0]) -> Tensor:
        return functional_call(block, params, (x,)).square().sum()

    drifts = []
    for block in blocks:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            loss(dict(block.named_parameters()), block).backward()
        assert [w.category for w in told] == [DriftWarning] * (block is blocks[1])
        drifts.append(block.last_drift)
    with pytest.warns(DriftWarning) as told:
        vmap(grad(loss))(params)
    assert len(told) == 1
    found = blocks[0].last_drift
    for name in ("estimate", "drift"):
        assert found[name] == max(drift[name] for drift in drifts)
    for name in ("evaluations", "order"):
        assert found[name] == pytest.approx(sum(drift[name] for drift in drifts) / 3)
    blocks[0].strict = True
    with pytest.raises(DriftError, match='use backward="auto"'):
        vmap(grad(loss))(params)
    with pytest.raises(DriftError, match='use backward="auto"'):  # the derivative of a gradient, too
        torch.autograd.grad(loss(dict(blocks[1].named_parameters())), blocks[1].V, create_graph=True)


# ---- what others transform -------------------------------------------------------------------------------


def reference_and_ours() -> tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]:
    tensors = [torch.randn(*shape, dtype=torch.float64) for shape in ((3, 4), (6, 4, 5), (6, 5, 4))]
    return reference.deep_residual, deep_residual, tensors


def test_a_compiler_takes_transforms_apart() -> None:
    loop, ours, (h, V, W) = reference_and_ours()

    def gradients(function: Callable[..., Tensor]) -> Any:
        def compute(h: Tensor, V: Tensor) -> Any:
            of_both = torch.func.grad(lambda h, V: function(h, V, W).sum(), (0, 1))(h, V)
            return *of_both, torch.func.jvp(lambda V: function(h, V, W), (V,), (V,))[1]

        return compute

    torch.compiler.reset()
    found = torch.compile(gradients(ours), backend="eager", fullgraph=True)(h, V)
    torch.testing.assert_close(found, gradients(loop)(h, V))


@pytest.mark.parametrize("strategy", ["store", "adjoint"])
def test_batched_gradients_can_be_differentiated(strategy: str) -> None:
    loop, ours, (h, V, W) = reference_and_ours()

    def second(function: Callable[..., Tensor], **options: str) -> Tensor:
        x = V.clone().requires_grad_()
        jacobian = torch.autograd.functional.jacobian(
            lambda V: function(h, V, W, scale=0.01, **options), x, vectorize=True, create_graph=True
        )
        return torch.autograd.grad(jacobian.square().sum(), x)[0]

    torch.testing.assert_close(second(ours, backward=strategy), second(loop))


def test_forward_over_reverse_needs_no_graph() -> None:
    loop, ours, (h, V, W) = reference_and_ours()

    def moving(function: Callable[..., Tensor]) -> Tensor:
        with forward_ad.dual_level():
            x = forward_ad.make_dual(V.clone().requires_grad_(), W.transpose(1, 2))
            (gradient,) = torch.autograd.grad(function(h, x, W).sum(), x)
            return forward_ad.unpack_dual(gradient).tangent

    torch.testing.assert_close(moving(ours), moving(loop))


def test_vmap_over_nothing() -> None:
    block = DeepResBlock(4, 6)
    assert torch.vmap(block)(torch.randn(0, 3, 4)).shape == (0, 3, 4)
