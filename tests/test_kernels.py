"""The native kernels against the float64 oracle, forward and backward, by the rule of oracle.py."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import NAMES, check_rule, make_case, rounded, run
from torch import Tensor

from odeblock import DeepResBlock, DriftWarning, build_info, native, normalised_ops, ops, reference
from odeblock.activations import ACTIVATIONS
from odeblock.checkpointing import Plan
from odeblock.functional import deep_conv_residual, deep_residual

STRATEGIES = ("auto", "store", "checkpoint", "adjoint")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# (B, q, m): nothing is a multiple of anything.
SHAPES = [
    (1, 1, 1),
    (3, 1, 5),
    (1, 17, 3),
    (3, 17, 23),
    (129, 17, 64),
    (3, 64, 17),
    (129, 64, 100),
    (3, 100, 64),
    (129, 100, 1),
    (1, 257, 130),
    (129, 257, 33),
]


def test_the_native_core_is_what_is_tested() -> None:
    assert build_info()["native"]
    assert build_info()["paths"]["cpu"] == "native core"


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, dtype: torch.dtype, strategy: str) -> None:
    case = make_case(7, 17, 23, 12, activation=activation)
    check_rule(deep_residual, case, dtype, rebuilt=strategy == "adjoint", backward=strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, int, int], dtype: torch.dtype, strategy: str) -> None:
    case = make_case(*shape, 11, activation="tanh")
    check_rule(deep_residual, case, dtype, rebuilt=strategy == "adjoint", backward=strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("hidden_bias", "output_bias"), [(False, False), (True, False), (False, True)])
def test_biases(hidden_bias: bool, output_bias: bool, dtype: torch.dtype, strategy: str) -> None:
    case = make_case(5, 9, 13, 10, hidden_bias=hidden_bias, output_bias=output_bias, scale=0.07)
    check_rule(deep_residual, case, dtype, rebuilt=strategy == "adjoint", backward=strategy)


@pytest.mark.parametrize("strategy", ["auto", "store", "checkpoint"])
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5, 16, 17, 99])
def test_depths(depth: int, strategy: str) -> None:
    check_rule(deep_residual, make_case(10, 6, 7, depth), torch.float32, backward=strategy)


@pytest.mark.parametrize("smooth", [True, False], ids=["smooth", "iid"])
@pytest.mark.parametrize("depth", [64, 256, 1024])
@pytest.mark.parametrize("strategy", ["checkpoint", "adjoint"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_deep(dtype: torch.dtype, strategy: str, depth: int, smooth: bool) -> None:
    case = make_case(16, 48, 40, depth, activation="tanh", smooth=smooth)
    check_rule(deep_residual, case, dtype, rebuilt=strategy == "adjoint", backward=strategy)


@pytest.mark.parametrize("strategy", ["store", "checkpoint", "adjoint"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_row_tiles(dtype: torch.dtype, strategy: str) -> None:
    # Wide enough that a batch of this size is swept tile after tile, weight gradients added up.
    check_rule(deep_residual, make_case(700, 300, 20, 8), dtype, backward=strategy)


@pytest.mark.parametrize("strategy", ["store", "adjoint"])
def test_tiles_of_many_rows(strategy: str) -> None:
    # So narrow that a tile has more rows than are summed at once.
    check_rule(deep_residual, make_case(1400, 9, 7, 6), torch.float32, backward=strategy)


@pytest.mark.parametrize("batch", [2, 9])
def test_rounding_does_not_grow_with_the_features(batch: int) -> None:
    check_rule(deep_residual, make_case(batch, 5000, 3, 2), torch.float32, backward="store")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 17, 40), (37, 17, 23), (5, 9, 8, (5, 6))], ids=str)
def test_half_precision_is_float32_rounded_once(shape: Any, dtype: torch.dtype) -> None:
    """To the bit: y and gradients are what float32 gives for the same numbers, rounded to nearest."""
    *sizes, maps = shape if len(shape) == 4 else (*shape, None)
    case = rounded(make_case(*sizes, 6, maps=maps), dtype)
    function = deep_conv_residual if maps else deep_residual
    for strategy in ("store", "checkpoint"):
        half, single = (run(function, case, t, backward=strategy) for t in (dtype, torch.float32))
        for name in ("y", *NAMES):
            assert torch.equal(half[name], single[name].to(dtype).double()), name


@pytest.mark.parametrize("shape", [(3, 17, 40), (37, 17, 23), (5, 9, 8, (5, 6)), (40, 9, 8, (7, 5))], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_may_hold_anything(dtype: torch.dtype, shape: Any) -> None:
    """PyTorch fills new tensors with NaN where it is to be deterministic: none is read, none stays in what is
    saved, beyond the rows of the batch either."""
    *sizes, maps = shape if len(shape) == 4 else (*shape, None)
    case = rounded(make_case(*sizes, 6, maps=maps), dtype)
    inputs = [t.to(dtype) for t in case.tensors.values()]
    h, V, W, hidden_bias, output_bias = inputs
    for plan in (Plan(1, False, 0, True), Plan(2, False, 1, True), Plan(0, True, 0), Plan(2, True, 0)):
        every, reconstruct, slots, keep_hidden = plan
        options = ("gelu", 0.1, every, reconstruct)
        found = []
        for deterministic in (False, True):
            torch.use_deterministic_algorithms(deterministic)
            try:
                y, states, checks = torch.ops.odeblock.deep_residual(*inputs, *options, keep_hidden)
                gradients = torch.ops.odeblock.deep_residual_backward(
                    *(case.grad.to(dtype), h, V, W, hidden_bias, output_bias, states, checks, *options),
                    *(slots, keep_hidden, True, False, 0),
                )
            finally:
                torch.use_deterministic_algorithms(False)
            found.append((y, states, checks, *gradients))
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"W": torch.ones(1, 1, 1)}, r"W: expected shape \[L, m, q\] = \[4, 6, 5\]"),
        ({"W": torch.ones(4, 6, 5).double()}, "W: expected the dtype of h"),
        ({"hidden_bias": torch.ones(4, 6).to_sparse()}, "hidden_bias: expected a dense"),
        ({"V": None}, "V: expected a torch.Tensor"),
        ({"h": torch.ones(2, 7, 5)}, r"h: expected shape \[B, q\]"),
        ({"activation": "sine"}, "activation: expected one of"),
        ({"save_every": -1}, "save_every: expected from 0 to L = 4"),
        ({"save_every": 5}, "save_every: expected from 0 to L = 4"),
        ({"grad": torch.ones(7, 4)}, "grad: expected shape"),
        ({"states": None}, "states: expected a torch.Tensor"),
        ({"states": torch.ones(2, 16, 4)}, "states: expected a tensor"),
        ({"slots": 0}, "slots: expected from 1 to L = 4"),
        ({"slots": 5}, "slots: expected from 1 to L = 4"),
        ({"save_every": 0}, "save_every: expected from 1 to L = 4"),
        ({"reconstruct": True}, "h: expected a torch.Tensor"),
    ],
)
def test_ops_by_themselves_check_what_goes_to_the_core(changed: dict[str, Any], message: str) -> None:
    """Those of a program that was saved, too: with such arguments the core would read what is not theirs."""
    tensors = {"h": torch.ones(7, 5), "V": torch.ones(4, 5, 6), "W": torch.ones(4, 6, 5)}
    options = {"activation": "relu", "scale": 0.1, "save_every": 2, "reconstruct": False}
    biases = {"hidden_bias": None, "output_bias": None}
    given: dict[str, Any] = tensors | biases | options | {"keep_hidden": False}
    y, states, checks = torch.ops.odeblock.deep_residual(**given)
    more = {"h": None, "grad": y, "states": states, "checks": checks}
    more |= {"slots": 1, "weight_gradients": True, "strict": False, "record": 0}

    def both(changed: dict[str, Any]) -> None:
        torch.ops.odeblock.deep_residual(**given | {k: v for k, v in changed.items() if k in given})
        torch.ops.odeblock.deep_residual_backward(**given | more | changed)

    both({})
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        both(changed)


@pytest.mark.parametrize("normalised", [False, True])
def test_no_op_takes_a_meta_tensor_among_others(normalised: bool) -> None:
    """PyTorch would ask the fake version, whose results nothing has computed."""
    options: dict[str, Any] = {"activation": "relu", "scale": 1e-3, "save_every": 1, "reconstruct": True}
    options |= {"keep_hidden": False, "slots": 1, "weight_gradients": True, "strict": False, "record": 0}
    kind: Any = normalised_ops if normalised else ops
    kernel = (3, 3) if normalised else ()
    given = {"h": torch.randn(3, 5, 4, 4) if normalised else torch.randn(3, 5)} | options
    given |= {"V": torch.randn(4, 5, 6, *kernel), "W": torch.randn(4, 6, 5, *kernel)}
    given |= {"hidden_bias": torch.randn(4, 6), "output_bias": torch.randn(4, 5)}
    given |= {name: torch.randn(4, 6) for name in ("hidden_weight", "hidden_shift")}
    given |= {name: torch.randn(4, 5) for name in ("output_weight", "output_shift")}
    on_meta = given["hidden_bias"].to("meta")
    for op in (kind.forward, kind.backward):
        schema = op._schema
        names = [argument.name for argument in schema.arguments]
        tensors = [name for name in names if isinstance(given[name], torch.Tensor)]
        first, *_ = tensors
        for name in tensors:
            changed = {key: given[key] for key in names} | {name: given[name].to("meta")}
            named, got = ("(h|V)", "meta; got cpu") if name == first else (name, "cpu; got meta")
            expected = f"^{named}: expected the device of {first}, {got}"
            with pytest.raises(ValueError, match=expected):
                op(**changed)
            if name not in ("hidden_bias", "output_bias") and (name, op) != ("h", kind.backward):
                lacking = {key: given[key] for key in names} | {name: None, "hidden_bias": on_meta}
                with pytest.raises(TypeError, match=f"^{name}: expected a torch.Tensor, got NoneType"):
                    op(**lacking)
        saved = op(**{name: given[name] for name in names})
        given |= dict(zip([result.name for result in schema.returns], saved, strict=True))
        given["grad"] = saved[0]


def test_the_direction_lives_as_long_as_the_core_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is kept for no other call, as under a dispatch mode."""
    block, x = DeepResBlock(5, 4, backward="adjoint"), torch.randn(3, 5)
    made: list[Any] = []
    alive: list[bool] = []

    def probe(dim: int, dtype: torch.dtype) -> torch.Tensor:
        direction = torch.randn(dim, dtype=dtype)
        made.append(weakref.ref(direction))
        return direction

    class Core:
        def __getattr__(self, name: str) -> Any:
            function = getattr(core, name)
            if name not in ("forward", "backward"):
                return function

            def watched(*arguments: Any) -> Any:
                alive.append(made[-1]() is not None)
                return function(*arguments)

            return watched

    core = native.core
    monkeypatch.setattr(native, "core", Core())
    monkeypatch.setattr(ops, "probe", probe)
    with pytest.warns(DriftWarning):  # as two directions are compared
        block(x).sum().backward()
    assert alive == [True, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_precision_number_passes_through(dtype: torch.dtype) -> None:
    """All 65536 patterns: widened exactly, and rounded as PyTorch rounds, in whole vectors and in tails."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    dim = 31
    for order in (torch.arange(2**16), torch.randperm(2**16)):
        h = torch.cat([patterns, patterns[: -(2**16) % dim]]).view(-1, dim)
        c = torch.cat([patterns[order], patterns[: -(2**16) % dim]]).view(-1, dim)
        for rows, bias in zip(h.split(128), c, strict=False):
            zero = rows.new_zeros(1, dim, 1)
            y = deep_residual(
                rows, zero, zero.transpose(1, 2), None, bias[None], activation="sigmoid", scale=1.0
            )
            expected = (rows.float() + bias.float()).to(dtype)
            # An infinite or NaN feature reaches all others through W.
            finite = rows.isfinite().all(dim=1)
            torch.testing.assert_close(y[finite], expected[finite], rtol=0, atol=0, equal_nan=True)
            assert y[rows.isnan()].isnan().all()


@torch.no_grad()
def test_depth_does_not_stagnate_in_bfloat16() -> None:
    """Increments of size 1/L fall under half an ulp of a bfloat16 state; here the state is float32."""
    torch.manual_seed(0)
    block = DeepResBlock(48, 1024, dtype=torch.bfloat16)
    x = torch.randn(64, 48, dtype=torch.bfloat16)
    V, W = block.V.detach(), block.W.detach()
    moved = reference.deep_residual(x.double(), V.double(), W.double()) - x.double()

    eager = x
    for V_k, W_k in zip(V, W, strict=True):
        eager = eager + F.linear(F.gelu(F.linear(eager, W_k)), V_k) / 1024

    def error(y: Tensor) -> float:
        return float((y.double() - x.double() - moved).norm() / moved.norm())

    assert moved.norm() > 0.2 * x.double().norm()
    assert error(block(x)) < 0.01
    assert error(eager) > 0.1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_scale_may_be_negative_or_zero(dtype: torch.dtype) -> None:
    for scale in (-0.1, 0.0):
        check_rule(deep_residual, make_case(4, 5, 6, 7, scale=scale), dtype)


# Rows and increments are subnormal, or nearly: with some threads that flush them to zero and some that do
# not, rows have other bits, and the threads of a batch of few rows other opinions of how often to evaluate f.
# Afterwards they are as they were: PyTorch's operators use them too.
FLUSHING = """
import torch
from odeblock.functional import deep_residual

def inputs(batch, size):
    torch.manual_seed(0)
    h, V, W = torch.randn(batch, 128), torch.randn(12, 128, 128) * size, torch.randn(12, 128, 128) / 12
    return h * 1e-39 if batch > 1 else h, V, W

def gradients(tensors, threads):
    torch.set_num_threads(threads)
    tensors = [x.clone().requires_grad_() for x in tensors]
    y = deep_residual(*tensors, activation="tanh", backward="adjoint")
    return [y, *torch.autograd.grad(y.sum(), tensors)]

subnormal = torch.full((1 << 20,), 1e-39)
for batch, size in ((1, 1e-39), (200, 0.1)):
    tensors = inputs(batch, size)  # while subnormals are made
    gradients(tensors, 2)  # starts the threads
    torch.set_flush_denormal(True)
    found = [gradients(tensors, threads) for threads in (1, 2)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), batch
    torch.set_flush_denormal(False)
    assert torch.equal((subnormal * 1).view(torch.int32), subnormal.view(torch.int32)), batch
"""


def test_all_threads_flush_subnormals_like_the_caller() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", FLUSHING], check=True, timeout=100)


def other_builds() -> list[str]:
    info = build_info()
    return [name for name in info["cpu_builds"] if name != info["cpu_features"]]


@pytest.mark.parametrize("build", other_builds())
def test_every_instruction_set(build: str, request: pytest.FixtureRequest) -> None:
    """These tests and those of the gradients with the other builds of the kernels that run here."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        __file__,
        str(Path(__file__).parent / "test_gradients.py"),
    ]
    result = subprocess.run(
        [*command, "-k", "not every_instruction_set and not deep"],
        env={**os.environ, "ODEBLOCK_CPU": build},
        cwd=Path(request.config.rootpath),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:]


def test_an_instruction_set_that_is_not_there_is_refused() -> None:
    result = subprocess.run(
        [sys.executable, "-c", "import odeblock"],
        env={**os.environ, "ODEBLOCK_CPU": "avx1024"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert "ODEBLOCK_CPU: expected one of baseline" in result.stderr
    assert "got 'avx1024'" in result.stderr
