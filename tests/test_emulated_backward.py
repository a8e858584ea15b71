"""The backward on a GPU, whole: ``odeblock.gpu`` on the emulated kernels, against the oracle."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import NAMES, Case, check_results, make_case, rounded
from test_emulated_kernels import PRODUCTS, SHAPES, shapes_of
from test_emulation import TESTS, compile_emulated, link_emulated
from torch import Tensor

from odeblock import checkpointing, gpu, gpu_adjoint, gpu_layers, native, reference
from odeblock.activations import ACTIVATIONS
from odeblock.drift import drift_tolerance

SIZES = 9
"""Of a problem: what the core's functions begin with."""
KINDS = {name: dtype for name, (_, dtype) in PRODUCTS.items()}


STORE = checkpointing.Plan(1, False, 0)
CHECKED = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""How far projections of states may be off, of the largest."""


class Core:
    """The part of ``odeblock._core`` that ``gpu`` calls."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        for name in ("forward", "sweep", "reconstruct"):
            getattr(self.library, name).restype = ctypes.c_char_p
        self.library.fuses.restype = ctypes.c_bool
        self.calls: list[tuple[str, int, int]] = []  # kernel, layers, hidden values asked for

    def emulate(
        self, products: str = "", multiprocessors: int = 1, seed: int = 0, capability: int = 0
    ) -> None:
        """The GPU that such products are chosen for, or one of a capability."""
        capability = capability or (90 if products.endswith("warpgroup") else 80)
        self.library.emulate(capability, multiprocessors, ctypes.c_int64(seed))

    def cuda_fuses(self, *arguments: Any) -> bool:
        *sizes, backward, reconstruct, tf32, _ = arguments
        flags = ctypes.c_bool(backward), ctypes.c_bool(reconstruct), ctypes.c_bool(tf32)
        return bool(self.library.fuses((ctypes.c_int64 * SIZES)(*sizes), *flags))

    def cuda_forward(self, *arguments: Any) -> None:
        *arrays, save_every, reconstruct, tf32, _, _ = arguments[SIZES + 5 :]
        flags = ctypes.c_bool(reconstruct), ctypes.c_bool(tf32)
        self._call("forward", arguments, arrays, ctypes.c_int64(save_every), *flags)

    def cuda_sweep(self, *arguments: Any) -> None:
        *arrays, tf32, _, _ = arguments[SIZES + 5 :]
        self._call("sweep", arguments, arrays, ctypes.c_bool(tf32))

    def cuda_map_blocks(self, *arguments: Any) -> int:
        *sizes, tf32, _ = arguments
        return int(self.library.map_blocks((ctypes.c_int64 * SIZES)(*sizes), ctypes.c_bool(tf32)))

    def cuda_reconstruct(self, *arguments: Any) -> None:
        *arrays, ring, first, depth, limit, tf32, _, _ = arguments[SIZES + 5 :]
        place = map(ctypes.c_int64, (ring, first, depth))
        self._call("reconstruct", arguments, arrays, *place, ctypes.c_double(limit), ctypes.c_bool(tf32))

    def _call(self, name: str, arguments: tuple[Any, ...], arrays: list[int], *rest: Any) -> None:
        sizes, scale, weights = arguments[:SIZES], arguments[SIZES], arguments[SIZES + 1 : SIZES + 5]
        self.calls.append((name, sizes[5], arrays[-1]))
        pointers = (ctypes.c_void_p * 4)(*weights), (ctypes.c_void_p * len(arrays))(*arrays)
        error = getattr(self.library, name)(
            (ctypes.c_int64 * SIZES)(*sizes), ctypes.c_double(scale), *pointers, *rest
        )
        if error is not None:
            raise RuntimeError(error.decode())


@pytest.fixture(scope="session")
def library(emulated_parts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    own = compile_emulated(TESTS / "emulation" / "library.cpp", folder / "library.o", "-fPIC")
    return link_emulated([own, *emulated_parts], folder / "library.so", "-shared")


@pytest.fixture
def core(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Core]:
    core = Core(library)
    core.emulate()
    monkeypatch.setattr(native, "core", core)
    return core


def run(
    case: Case,
    products: str,
    monkeypatch: pytest.MonkeyPatch,
    plan: checkpointing.Plan = STORE,
    weight_gradients: bool = True,
    report: dict[str, float] | None = None,
) -> dict[str, Tensor]:
    """y, y - h and the gradients, in float64; the adjoint's report."""
    dtype = PRODUCTS[products][1]
    monkeypatch.setattr(gpu_layers, "tf32", lambda *_: products == "tf32")
    h, *parameters = (None if t is None else t.to(dtype) for t in (case.tensors[name] for name in NAMES))
    assert h is not None
    scale = 1 / len(parameters[0]) if case.scale is None else case.scale
    found = gpu.forward(h, *parameters, case.activation, scale, plan.save_every, plan.reconstruct)
    assert found is not None
    y, states, checks = found
    states[:, len(h) :] = checks[:, len(h) :] = float("nan")  # what nothing may read
    options = (case.activation, scale, plan.save_every, plan.reconstruct, plan.slots, weight_gradients)
    grad = case.grad.to(dtype)
    gradients = gpu.backward(grad, h, *parameters, states, checks, *options)
    assert gradients is not None
    *gradients, figures = gradients
    if report is not None:
        report.update(zip(("estimate", "drift", "evaluations", "order"), figures.tolist(), strict=True))
    results = {"y": y, **dict(zip(NAMES, gradients, strict=True))}
    results = {name: t.double() for name, t in results.items() if t.numel() or name in ("y", "h")}
    return {**results, "increment": results["y"] - case.tensors["h"]}


@pytest.mark.parametrize(
    ("products", "shape"), [(p, shape) for p in KINDS for shape in shapes_of(p)], ids=str
)
def test_emulated_backward(
    products: str, shape: tuple[int, ...], core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(2):
        core.emulate(products, multiprocessors=1 + seed, seed=seed)
        biases = (shape[0] + seed) % 2 == 1
        case = make_case(*shape, activation="gelu_tanh", hidden_bias=biases, output_bias=biases)
        case = rounded(case, KINDS[products])
        results = run(case, products, monkeypatch)
        # tf32 has the 11 bits of float16.
        check_results(results, case, torch.float16 if products == "tf32" else KINDS[products])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("capability", [80, 90])
def test_emulated_backward_of_float32_as_each_gpu_rounds(
    capability: int, shape: tuple[int, ...], core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other bits of what tensor cores sum are cut off; the case of test_cuda.py."""
    core.emulate(capability=capability)
    case = rounded(make_case(*shape, activation="tanh"), torch.float32)
    check_results(run(case, "float32", monkeypatch), case, torch.float32)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_emulated_backward_of_every_activation(
    activation: str, core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    for products in ("float32", "float64", "bfloat16"):
        case = rounded(make_case(40, 12, 10, 3, activation=activation), KINDS[products])
        check_results(run(case, products, monkeypatch), case, KINDS[products])


@pytest.mark.parametrize("products", ["float32", "bfloat16", "bfloat16_warpgroup"])
@pytest.mark.parametrize("most_layers", [1, 3, 64])
def test_no_plan_changes_a_bit_of_the_emulated_gradients(
    products: str, most_layers: int, core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever states are stored and however many layers a sweep takes; a call a part, not a layer."""
    core.emulate(products)
    batch, dim = (70, 40) if products.endswith("warpgroup") else (35, 20)
    case = rounded(make_case(batch, dim, 24, 11, activation="tanh"), KINDS[products])
    expected = run(case, products, monkeypatch)
    check_results(expected, case, KINDS[products])
    monkeypatch.setattr(gpu, "MOST_LAYERS", most_layers)
    for save_every, slots in ((1, 0), (4, 3), (4, 1), (11, 10), (11, 2), (11, 1)):
        core.calls.clear()
        found = run(case, products, monkeypatch, checkpointing.Plan(save_every, False, slots))
        for name, value in expected.items():
            assert torch.equal(found[name], value), (name, save_every, slots)
        if most_layers == 64 and slots >= save_every - 1:
            parts = -(-11 // save_every) if save_every > 1 else 1
            assert [name for name, *_ in core.calls].count("sweep") == parts
            assert len(core.calls) == 1 + (2 * parts if save_every > 1 else 1)


@pytest.mark.parametrize("products", KINDS)
def test_emulated_backward_of_the_input_alone(
    products: str, core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    core.emulate(products)
    case = rounded(make_case(70, 48, 24, 3), KINDS[products])
    whole = run(case, products, monkeypatch)
    core.calls.clear()
    alone = run(case, products, monkeypatch, weight_gradients=False)
    assert alone.keys() == {"y", "h", "increment"}
    assert torch.equal(alone["h"], whole["h"])
    assert all(not factor for name, _, factor in core.calls if name == "sweep")


@pytest.mark.parametrize("products", ["float32", "float64", "bfloat16"])
def test_emulated_kernels_of_weights_that_begin_anywhere(products: str, core: Core) -> None:
    """Kernels copy pieces of 16 bytes; weights may be a part of another array."""
    case = make_case(20, 16, 8, 2)
    h, *weights = (case.tensors[name].to(KINDS[products]) for name in NAMES)
    parts = [torch.cat((t.new_zeros(1), t.flatten()))[1:].view_as(t) for t in weights]
    results = [gpu.forward(h, *given, "tanh", 0.5, 1, False) for given in (weights, parts)]
    (y, states, checks), (right, right_states, _) = results
    assert torch.equal(y, right)
    assert torch.equal(states[:, :20], right_states[:, :20])
    options = (states, checks, "tanh", 0.5, 1, False, 1, True)
    gradients = [gpu.backward(y, h, *given, *options) for given in (weights, parts)]
    assert all(torch.equal(ours, right) for ours, right in zip(*gradients, strict=True))


def test_emulated_kernels_with_little_shared_memory(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    """99 KiB, as the smaller GPUs of a generation have: fewer warps a block, or the forward alone."""
    core.emulate(capability=86, multiprocessors=1)
    for products, dim in (("bfloat16", 128), ("float32", 64), ("float64", 128)):
        case = rounded(make_case(150, dim, 24, 2), KINDS[products])
        check_results(run(case, products, monkeypatch), case, KINDS[products])
    weights = [make_case(150, 128, 24, 2).tensors[name].float() for name in NAMES[1:]]
    layers = gpu.Layers(*weights, "tanh", 0.5)
    assert layers.fuse(150)
    assert not layers.fuse(150, backward=True)


@pytest.mark.parametrize("products", KINDS)
def test_an_emulated_backward_of_no_rows(products: str, core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    results = run(make_case(0, 17, 4, 3), products, monkeypatch)
    assert results["h"].shape == (0, 17)
    assert all(not results[name].any() for name in NAMES[1:])


def test_emulated_gradients_of_a_row_do_not_depend_on_others(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = rounded(make_case(150, 24, 40, 3), torch.bfloat16)
    expected = run(case, "bfloat16", monkeypatch)
    h = case.tensors["h"].clone()
    h[7] = float("inf")
    core.emulate(multiprocessors=3, seed=1)
    found = run(replace(case, tensors={**case.tensors, "h": h}), "bfloat16", monkeypatch)
    kept = torch.arange(150) != 7
    assert torch.equal(found["h"][kept], expected["h"][kept])
    assert not found["h"][7].isfinite().all()


@pytest.mark.parametrize("dtype", native.NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 40, 1000, 1021, 5000, 2048])
def test_products_over_rows_are_those_of_parts(batch: int, dtype: torch.dtype) -> None:
    """Any number of rows: one part, equal parts, parts and a rest; of strided layers, as states are."""
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(3, batch, 5, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randn(3, batch + 7, 4, generator=generator, dtype=torch.float64).to(dtype)
    for rows in (y[:, :batch], y[:, :batch].contiguous()):
        expected = x.double().transpose(1, 2) @ rows.double()
        found = gpu_layers.product(x, rows)
        assert found.dtype == torch.promote_types(dtype, torch.float32)
        tolerance = 1e-13 if dtype == torch.float64 else 1e-6
        size = float(expected.abs().max())
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance * size)


def smooth_case(products: str, *shape: int, **options: Any) -> Case:
    options = {"hidden_bias": False, "output_bias": False, **options}
    return rounded(make_case(*shape, smooth=True, **options), KINDS[products])


def adjoint(save_every: int = 0) -> checkpointing.Plan:
    return checkpointing.Plan(save_every, True, 0)


def precision(products: str) -> torch.dtype:
    """tf32 has the 11 bits of float16."""
    return torch.float16 if products == "tf32" else KINDS[products]


@pytest.mark.parametrize("products", KINDS)
def test_emulated_adjoint(products: str, core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    """Smooth weights: by the rule, in a few evaluations; with anchors and without."""
    core.emulate(products)
    shape = (70, 48, 24, 40) if products.endswith("warpgroup") else (21, 17, 9, 70)
    case = smooth_case(products, *shape, activation="tanh", scale=1 / 70)
    for save_every in (0, 25):
        report: dict[str, float] = {}
        results = run(case, products, monkeypatch, adjoint(save_every), report=report)
        check_results(results, case, precision(products), rebuilt=True)
        assert max(report["estimate"], report["drift"]) <= drift_tolerance(precision(products), True)
        assert report["evaluations"] < (6 if products == "float64" else 2)
        assert report["order"] > 1.5


@pytest.mark.parametrize(
    ("products", "shape"),
    [(p, shape) for p in KINDS for shape in shapes_of(p) if shape[0] < 300],
    ids=str,
)
def test_emulated_adjoint_of_rough_weights(
    products: str, shape: tuple[int, ...], core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that take several evaluations of the same layer, on every odd shape."""
    core.emulate(products, multiprocessors=2, seed=shape[0])
    biases = shape[0] % 2 == 1
    options: dict[str, Any] = {"hidden_bias": biases, "output_bias": biases, "scale": 0.1}
    case = rounded(make_case(*shape, activation="gelu_tanh", **options), KINDS[products])
    report: dict[str, float] = {}
    results = run(case, products, monkeypatch, adjoint(), report=report)
    check_results(results, case, precision(products), rebuilt=True)
    assert max(report["estimate"], report["drift"]) <= drift_tolerance(precision(products), True)
    assert report["evaluations"] >= 2


@pytest.mark.parametrize("products", KINDS)
def test_emulated_forward_of_the_adjoint(products: str, core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anchors, h_L and the projections that the reconstructed states are compared with."""
    monkeypatch.setattr(gpu_layers, "tf32", lambda *_: products == "tf32")
    core.emulate(products)
    shape = (70, 40, 24, 40) if products.endswith("warpgroup") else (21, 17, 9, 40)
    case = smooth_case(products, *shape, activation="tanh")
    h, *weights = case.tensors.values()
    exact = reference.forward(h, *weights, "tanh", 1 / 40, 15, True, False)
    given = (None if t is None else t.to(KINDS[products]) for t in (h, *weights))
    found = gpu.forward(*given, "tanh", 1 / 40, 15, True)
    assert found is not None
    for ours, right in zip(found[1:], exact[1:], strict=True):
        assert ours.shape == right.shape
        error = CHECKED[precision(products)] * float(right.abs().max())
        torch.testing.assert_close(ours[:, : shape[0]].double(), right[:, : shape[0]], rtol=0, atol=error)
    assert len(found[2]) == 13


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_emulated_adjoint_of_every_activation(
    activation: str, core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    for products in ("float32", "float64", "bfloat16"):
        case = rounded(make_case(40, 12, 10, 6, activation=activation, scale=0.05), KINDS[products])
        check_results(run(case, products, monkeypatch, adjoint()), case, KINDS[products], rebuilt=True)


@pytest.mark.parametrize("products", ["float32", "bfloat16", "bfloat16_warpgroup"])
def test_no_part_of_depth_changes_a_bit_of_the_emulated_adjoint(
    products: str, core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many layers a launch takes; nor do other rows, also those that need more evaluations."""
    core.emulate(products)
    batch, dim = (70, 40) if products.endswith("warpgroup") else (35, 20)
    case = smooth_case(products, batch, dim, 8, 23, activation="tanh")
    expected = run(case, products, monkeypatch, adjoint(10))
    for most in (1, 3, 7):
        monkeypatch.setattr(gpu, "MOST_LAYERS", most)
        core.calls.clear()
        found = run(case, products, monkeypatch, adjoint(10))
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        launches = {1: 23, 3: 9, 7: 5}[most]  # none goes beyond an anchor
        assert [name for name, *_ in core.calls].count("reconstruct") >= launches
    h = case.tensors["h"].clone()
    h[::3] *= 100
    h[1] = float("inf")
    core.emulate(products, multiprocessors=3, seed=1)
    found = run(replace(case, tensors={**case.tensors, "h": h}), products, monkeypatch, adjoint(10))
    kept = torch.arange(batch) % 3 == 2
    assert torch.equal(found["h"][kept], expected["h"][kept])
    assert not found["h"][1].isfinite().all()


@pytest.mark.parametrize("products", KINDS)
def test_an_emulated_adjoint_of_no_rows(products: str, core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    report: dict[str, float] = {}
    results = run(make_case(0, 17, 4, 3), products, monkeypatch, adjoint(), report=report)
    assert results["h"].shape == (0, 17)
    assert not any(report.values())


@pytest.mark.parametrize("products", KINDS)
def test_the_emulated_adjoint_is_never_silently_wrong(
    products: str, core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that cannot be inverted, a number that is not finite, states that are not the forward's."""
    core.emulate(products)
    tolerance = drift_tolerance(precision(products), True)
    shape = (64, 40, 8, 18) if products.endswith("warpgroup") else (9, 6, 4, 18)
    good = smooth_case(products, *shape, activation="tanh", scale=1 / 40)

    def figures(case: Case, save_every: int = 0) -> dict[str, float]:
        report: dict[str, float] = {}
        run(case, products, monkeypatch, adjoint(save_every), report=report)
        return report

    found = figures(good)
    assert max(found["estimate"], found["drift"]) <= tolerance
    steep = {name: None if t is None else 30 * t for name, t in good.tensors.items()}
    found = figures(replace(good, tensors={**steep, "h": good.tensors["h"]}))
    assert not (found["estimate"] <= tolerance and found["drift"] <= tolerance)
    h = good.tensors["h"].clone()
    h[5, 3] = float("nan")
    found = figures(replace(good, tensors={**good.tensors, "h": h}))
    assert not (found["estimate"] <= tolerance and found["drift"] <= tolerance)

    def spoil(which: int, save_every: int = 0) -> float:
        """The drift where something that the forward left is a little off."""
        real = gpu.forward

        def forward(*arguments: Any) -> Any:
            kept = real(*arguments)
            assert kept is not None
            kept[which][0, 7] += 0.1
            return kept

        with monkeypatch.context() as patch:
            patch.setattr(gpu, "forward", forward)
            return figures(good, save_every)["drift"]

    assert spoil(2) > tolerance  # a projection
    assert spoil(1, 10) > tolerance  # an anchor
    assert spoil(1) > tolerance  # h_L, so that h_0 is another


@pytest.mark.parametrize("products", ["bfloat16", "float16", "tf32"])
def test_rounded_products_give_the_emulated_adjoint_no_false_alarm(
    products: str, core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Increments smaller than what rounding a state moves f by: changes that do not shrink are noise."""
    case = smooth_case(products, 128, 40, 32, 16, activation="tanh")
    h, W = case.tensors["h"], case.tensors["W"]
    assert h is not None
    assert W is not None
    tensors = {**case.tensors, "h": h + 3, "W": W - W.mean(2, keepdim=True)}
    case = rounded(replace(case, tensors=tensors), KINDS[products])
    report: dict[str, float] = {}
    check_results(
        run(case, products, monkeypatch, adjoint(), report=report), case, precision(products), rebuilt=True
    )
    assert max(report["estimate"], report["drift"]) < drift_tolerance(precision(products), True) / 4
    assert report["evaluations"] < 4


def test_the_emulated_adjoint_sees_a_wrong_input(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    case = smooth_case("float32", 20, 8, 8, 5, activation="tanh")
    tensors = [case.tensors[name] for name in NAMES]
    h, V, W = (t.float() for t in tensors[:3] if t is not None)
    found = gpu.forward(h, V, W, None, None, "tanh", 0.02, 0, True)
    assert found is not None
    gradients = gpu.backward(h, h + 1e-4, V, W, None, None, *found[1:], "tanh", 0.02, 0, True, 0, True)
    assert gradients is not None
    assert 3e-5 < float(gradients[-1][1]) < 3e-4


def test_the_emulated_adjoint_holds_the_same_at_any_depth() -> None:
    """What a backward holds besides gradients: the ring, the rows' memory and the factors of its layers."""
    sizes = []
    for depth in (200, 5000):
        V, W = torch.empty(depth, 8, 4, device="meta"), torch.empty(depth, 4, 8, device="meta")
        layers = gpu.Layers(V, W, None, None, "tanh", 1 / depth)
        most = gpu._layers_at_once(layers, 1000, True)
        states = torch.empty(1, 1008, 8)
        descent = gpu_adjoint.Descent(layers, 1000, states, states, 0, most)
        sizes.append((most, descent.ring.shape, descent.rows.shape))
    assert sizes[0] == sizes[1]
    assert sizes[0][0] == gpu.MOST_LAYERS
    large = gpu._layers_at_once(layers, 1 << 20, True)
    assert large < gpu.MOST_LAYERS
    assert gpu_adjoint.ring_length(large, torch.float32) * (1 << 20) * 32 <= gpu.WORKSPACE
