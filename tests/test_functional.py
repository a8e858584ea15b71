"""What deep_residual accepts and refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from oracle import NAMES, make_case
from torch import Tensor, nn

from odeblock import DeepConvResBlock, DeepResBlock, checkpointing, functional, reference
from odeblock.activations import ACTIVATIONS

STRATEGIES = ("auto", "store", "checkpoint", "adjoint")
ENTRY_POINTS = (functional.deep_residual, reference.deep_residual)


def arguments(**changes: Any) -> dict[str, Any]:
    case = make_case(3, 4, 5, 6)
    return {**{name: case.tensors[name].float() for name in NAMES}, **changes}


REFUSED = [
    ({"h": torch.randn(3, 5)}, ValueError, r"h: expected shape \[\.\.\., 4\].*got \[3, 5\]"),
    ({"h": torch.tensor(1.0)}, ValueError, r"h: expected shape"),
    ({"h": [1.0, 2.0]}, TypeError, "h: expected a torch.Tensor, got list"),
    ({"h": torch.ones(3, 4, dtype=torch.int64)}, TypeError, r"h: expected one of .*got torch.int64"),
    ({"h": torch.ones(3, 4, dtype=torch.complex64)}, TypeError, r"h: expected one of .*got torch.complex64"),
    ({"h": torch.randn(3, 4).to_sparse()}, TypeError, "h: expected a dense"),
    ({"V": torch.randn(4, 5)}, ValueError, r"V: expected shape \[L, q, m\].*got \[4, 5\]"),
    ({"V": torch.randn(0, 4, 5)}, ValueError, r"V: .*L >= 1.*got \[0, 4, 5\]"),
    ({"V": torch.randn(6, 4, 0)}, ValueError, r"V: .*q, m >= 1"),
    ({"V": None}, TypeError, "V: expected a torch.Tensor, got NoneType"),
    (
        {"W": torch.randn(6, 4, 5)},
        ValueError,
        r"W: expected shape \[L, m, q\] = \[6, 5, 4\].*got \[6, 4, 5\]",
    ),
    ({"W": torch.randn(5, 5, 4)}, ValueError, r"W: .*got \[5, 5, 4\]"),
    (
        {"W": torch.randn(6, 5, 4).double()},
        TypeError,
        "W: expected the dtype of h, torch.float32; got torch.float64",
    ),
    ({"W": torch.randn(6, 5, 4, device="meta")}, ValueError, "W: expected the device of h, cpu; got meta"),
    ({"hidden_bias": torch.randn(6, 4)}, ValueError, r"hidden_bias: expected shape \[L, m\] = \[6, 5\]"),
    ({"hidden_bias": 1.0}, TypeError, "hidden_bias: expected a torch.Tensor, got float"),
    (
        {"output_bias": torch.randn(4)},
        ValueError,
        r"output_bias: expected shape \[L, q\] = \[6, 4\].*got \[4\]",
    ),
    ({"output_bias": torch.randn(6, 4).half()}, TypeError, "output_bias: expected the dtype of h"),
    ({"activation": "swish"}, ValueError, "activation: expected one of identity, relu,.*got 'swish'"),
    ({"activation": torch.tanh}, TypeError, "activation: expected a name"),
    ({"scale": float("nan")}, ValueError, "scale: expected a finite number, got nan"),
    ({"scale": float("inf")}, ValueError, "scale: expected a finite number, got inf"),
    ({"scale": 10**400}, ValueError, "scale: expected a number that a float can hold"),
    ({"V": nn.UninitializedParameter()}, TypeError, "V: expected a tensor with sizes"),
    ({"scale": "0.1"}, TypeError, "scale: expected a number"),
    ({"scale": True}, TypeError, "scale: expected a number"),
    ({"backward": "reversible"}, ValueError, "backward: expected one of auto, .*got 'reversible'"),
    ({"backward": None}, TypeError, "backward: expected a name"),
    ({"strict": "yes"}, TypeError, "strict: expected True or False, got str"),
    ({"anchors": -1, "backward": "adjoint"}, ValueError, "anchors: expected an int >= 0, got -1"),
    ({"anchors": 2}, ValueError, "anchors: expected 0 unless backward is \"adjoint\", got 2 with 'auto'"),
    ({"memory_budget": 10**5000}, ValueError, "memory_budget: expected an int from 1 to"),
    ({"anchors": 10**5000, "backward": "store"}, ValueError, "anchors: expected an int from 0 to"),
    ({"memory_budget": 1.5}, TypeError, "memory_budget: expected an int >= 1, got float"),
    (
        {"memory_budget": torch.tensor(9, device="meta")},
        TypeError,
        "memory_budget: expected an int >= 1, got",
    ),
    (
        {"memory_budget": 100, "backward": "store"},
        ValueError,
        "memory_budget: expected None unless .*got 100 with 'store'",
    ),
]


@pytest.mark.parametrize("function", ENTRY_POINTS, ids=["functional", "reference"])
@pytest.mark.parametrize(("changes", "error", "message"), REFUSED)
def test_bad_arguments(function: Any, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        function(**arguments(**changes))


def test_integers_of_other_libraries_are_taken_by_their_value() -> None:
    """Not by their type, of which 255 + 1 may be 0, nor by a tensor's identity, as its value changes."""
    block = DeepResBlock(4, 6, backward="adjoint", anchors=np.uint8(255))
    assert type(block.anchors) is int
    assert "anchors=255" in repr(block)
    block(torch.randn(3, 4)).sum().backward()
    tensors = {name: tensor.requires_grad_() for name, tensor in arguments().items()}
    plain = functional.deep_residual(**tensors, backward="adjoint", anchors=255)
    short = functional.deep_residual(**tensors, backward="adjoint", anchors=np.uint8(255))
    expected, found = (torch.autograd.grad(y.sum(), tensors["h"])[0] for y in (plain, short))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["rows", "maps", "scan", "normalised"])
def test_a_budget_that_changes(kind: str) -> None:
    budget = torch.tensor(10**6)
    block = DeepResBlock(4, 6, memory_budget=budget)
    assert type(block.memory_budget) is int
    maps = DeepConvResBlock(4, 6, norm="batch" if kind == "normalised" else None)
    x = torch.randn(2, 4, 3, 3)

    def call() -> Tensor:
        if kind == "rows":
            return functional.deep_residual(torch.randn(3, 4), block.V, block.W, memory_budget=budget)
        if kind == "maps":
            return functional.deep_conv_residual(x, maps.V, maps.W, memory_budget=budget)
        if kind == "scan":
            return functional.residual_scan(
                lambda h, V: h @ V, torch.randn(3, 4), block.V, memory_budget=budget
            )
        maps.memory_budget = budget  # type: ignore[assignment]
        return maps(x)

    call().sum().backward()
    budget.fill_(10)
    with pytest.raises(ValueError, match=r"memory_budget: expected at least \d+ bytes.*got 10$"):
        call()


@pytest.mark.parametrize("function", ENTRY_POINTS, ids=["functional", "reference"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4)])
def test_an_empty_batch(function: Any, strategy: str, shape: tuple[int, ...]) -> None:
    tensors = arguments(h=torch.randn(shape))
    for tensor in tensors.values():
        tensor.requires_grad_()
    y = function(**tensors, backward=strategy)
    assert y.shape == shape
    y.sum().backward()
    for name, tensor in tensors.items():
        assert tensor.grad.shape == tensor.shape
        assert not tensor.grad.any(), name


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_leading_dimensions(strategy: str) -> None:
    tensors = arguments()
    h = torch.randn(2, 3, 5, 4)
    y = functional.deep_residual(**{**tensors, "h": h}, backward=strategy)
    rows = functional.deep_residual(**{**tensors, "h": h.reshape(-1, 4)}, backward=strategy)
    assert torch.equal(y, rows.view(2, 3, 5, 4))
    single = functional.deep_residual(**{**tensors, "h": h[0, 0, 0]}, backward=strategy)
    assert single.shape == (4,)
    torch.testing.assert_close(single, y[0, 0, 0])  # one row goes another way: csrc/cpu/few.h


def strided(tensor: Tensor, how: str) -> Tensor:
    """The same values in another memory layout."""
    if how == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "sliced":
        wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), float("nan"), dtype=tensor.dtype)
        wide[..., ::2] = tensor
        return wide[..., ::2]
    return tensor[:1].expand_as(tensor)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("how", ["transposed", "sliced", "expanded"])
def test_strides(how: str, strategy: str) -> None:
    layouts = {name: strided(tensor, how).requires_grad_() for name, tensor in arguments().items()}
    dense = {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in layouts.items()}
    assert not layouts["V"].is_contiguous()
    outputs = []
    for tensors in (layouts, {name: t.requires_grad_() for name, t in dense.items()}):
        y = functional.deep_residual(**tensors, backward=strategy)
        grad = strided(torch.linspace(-1, 1, y.numel()).view_as(y), how)
        outputs.append([y, *torch.autograd.grad(y, list(tensors.values()), grad)])
    for a, b in zip(*outputs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_reference_is_the_loop_of_modules_it_stands_for(name: str, bias: bool) -> None:
    """Written once more, with nn.Linear and PyTorch's activation modules."""
    modules = {
        "identity": nn.Identity(),
        "relu": nn.ReLU(),
        "leaky_relu": nn.LeakyReLU(),
        "tanh": nn.Tanh(),
        "sigmoid": nn.Sigmoid(),
        "softplus": nn.Softplus(),
        "silu": nn.SiLU(),
        "gelu": nn.GELU(),
        "gelu_tanh": nn.GELU(approximate="tanh"),
    }
    depth, dim, hidden, scale = 7, 4, 6, 0.3
    first = [nn.Linear(dim, hidden, bias=bias).double() for _ in range(depth)]
    second = [nn.Linear(hidden, dim, bias=bias).double() for _ in range(depth)]
    h = x = torch.randn(5, dim, dtype=torch.float64)
    for w, v in zip(first, second, strict=True):
        h = h + scale * v(modules[name](w(h)))
    stacked = {
        "V": torch.stack([v.weight for v in second]),
        "W": torch.stack([w.weight for w in first]),
        "hidden_bias": torch.stack([w.bias for w in first]) if bias else None,
        "output_bias": torch.stack([v.bias for v in second]) if bias else None,
    }
    for function in ENTRY_POINTS:
        y = function(x, **stacked, activation=name, scale=scale)
        torch.testing.assert_close(y, h, rtol=1e-14, atol=1e-14)


def test_the_scale_is_one_over_the_depth_by_default() -> None:
    tensors = arguments()
    assert torch.equal(functional.deep_residual(**tensors), functional.deep_residual(**tensors, scale=1 / 6))


def test_auto_keeps_at_most_the_square_root_of_the_depth() -> None:
    for depth in range(1, 3000):
        every, reconstruct, slots, _ = checkpointing.plan("auto", depth, 0, None, 1, 1)
        assert not reconstruct
        saved = reference.states_shape(1, 1, 1, depth, every, reconstruct, True)[0]
        assert saved + slots <= 2 * depth**0.5 + 2
