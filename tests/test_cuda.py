"""Blocks on a GPU; skipped where there is none."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from oracle import (
    FLOOR_ULP,
    NAMES,
    Case,
    baseline,
    check_rule,
    check_strategies,
    errors,
    make_case,
    rounded,
    run,
)
from test_emulated_kernels import SHAPES
from test_emulated_maps import SHAPES as SHAPES_OF_MAPS
from test_emulated_maps import make_map_case

from odeblock import DeepConvResBlock, DeepResBlock, DriftError, DriftWarning, gpu, reference
from odeblock.functional import deep_conv_residual, deep_residual, residual_scan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("strategy", ["auto", "store", "checkpoint", "adjoint"])
def test_a_cuda_block_agrees_with_the_cpu(strategy: str) -> None:
    case = make_case(9, 12, 10, 40)
    found = []
    for device in ("cpu", "cuda"):
        inputs = [case.tensors[name].to(device).requires_grad_() for name in NAMES]
        y = deep_residual(*inputs, backward=strategy)
        assert y.device.type == device
        found.append([y, *torch.autograd.grad(y, inputs, case.grad.to(device))])
    for cpu, cuda in zip(*found, strict=True):
        torch.testing.assert_close(cpu, cuda.cpu(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("strategy", ["auto", "adjoint"])
def test_the_rule_on_a_gpu(strategy: str, dtype: torch.dtype) -> None:
    def on_the_gpu(*tensors: torch.Tensor | None, **options: object) -> torch.Tensor:
        return deep_residual(*(None if t is None else t.cuda() for t in tensors), **options).cpu()

    case = make_case(16, 48, 40, 256, activation="tanh", smooth=True)
    check_rule(on_the_gpu, case, dtype, backward=strategy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("strategy", "maps"), [("auto", False), ("adjoint", False), ("auto", True)])
def test_autocast_on_a_gpu(strategy: str, maps: bool, dtype: torch.dtype) -> None:
    """The block in autocast's dtype bit for bit, and so of its kernels; gradients are float32."""
    options = {"bias": True, "backward": strategy, "device": "cuda"}
    block = DeepConvResBlock(16, 40, **options) if maps else DeepResBlock(48, 40, **options)
    low = copy.deepcopy(block).to(dtype)
    x = torch.randn(70, *((16, 10, 10) if maps else (48,)), device="cuda")
    with torch.autocast("cuda", dtype):
        y = block(x)
    expected = low(x.to(dtype))
    for result in (y, expected):
        result.float().square().sum().backward()
    assert y.dtype == dtype
    assert torch.equal(y, expected)
    for a, b in zip(block.parameters(), low.parameters(), strict=True):
        assert a.grad.dtype == torch.float32
        assert torch.equal(a.grad, b.grad.float())


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("strategy", ["auto", "adjoint"])
def test_a_compiled_block_on_a_gpu(strategy: str, mode: str) -> None:
    """Its gradients in training, and the adjoint's report, which comes with later steps."""
    torch._dynamo.reset()
    block = DeepResBlock(48, 300, activation="tanh", backward=strategy, device="cuda")
    compiled = torch.compile(block, fullgraph=True, mode=mode)
    x = torch.randn(70, 48, device="cuda")
    parameters = list(block.parameters())
    for _ in range(4):  # what becomes a CUDA graph runs as it is, is captured, then replayed
        found = []
        for model in (block, compiled):
            gradients = torch.autograd.grad(model(x).square().sum(), parameters)
            found.append([gradient.clone() for gradient in gradients])
        for p, a, b in zip(parameters, *found, strict=True):
            assert torch.equal(a, b)
            with torch.no_grad():
                p.sub_(a, alpha=1e-3)
    assert (block.last_drift is None) == (strategy == "auto")
    if strategy == "adjoint":
        steep = DeepResBlock(48, 3, activation="tanh", scale=30.0, backward="adjoint", device="cuda")
        run = torch.compile(steep, fullgraph=True, mode=mode)
        run(x).sum().backward()
        torch.cuda.synchronize()
        steep.zero_grad()
        with pytest.warns(DriftWarning):
            run(x).sum().backward()
        assert steep.V.grad.isnan().all()


def inference(case: Case, dtype: torch.dtype, **options: str) -> torch.Tensor:
    """y of a case on the GPU, in float64 on the CPU."""
    tensors = (case.tensors[name] for name in NAMES)
    given = [None if t is None else t.to("cuda", dtype) for t in tensors]
    with torch.inference_mode():
        return deep_residual(*given, activation=case.activation, scale=case.scale).cpu().double()


WIDE = [(1000, 128, 128, 20), (300, 256, 300, 10), (5000, 64, 64, 50), (129, 257, 65, 3)]


@pytest.mark.parametrize("shape", SHAPES + WIDE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_forward_kernels(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    assert gpu.has_kernels(torch.cuda.current_device())
    for activation in ("gelu_tanh", "tanh"):
        case = rounded(make_case(*shape, activation=activation), dtype)
        truth = run(reference.deep_residual, case, torch.float64)
        allowed = baseline(case, dtype, truth)
        y = inference(case, dtype)
        found = errors({**truth, "y": y, "increment": y - case.tensors["h"]}, truth)
        floor = FLOOR_ULP[dtype] * torch.finfo(dtype).eps
        assert found["y"] <= max(2 * allowed["y"], floor), (found["y"], allowed["y"])
        assert found["increment"] <= max(2 * allowed["increment"], 4 * floor), (found, allowed)


@pytest.mark.parametrize("shape", SHAPES + WIDE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_backward_kernels(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    def on_the_gpu(*tensors: torch.Tensor | None, **options: object) -> torch.Tensor:
        return deep_residual(*(None if t is None else t.cuda() for t in tensors), **options).cpu()

    check_strategies(on_the_gpu, make_case(*shape, activation="tanh"), dtype, ("store", "checkpoint"))


# And the paper's; blocks of several samples; maps that fill a block, and that a sweep has no room for.
MAPS = [
    *SHAPES_OF_MAPS,
    (64, 16, 16, 20, 10, 10, 3),
    (600, 8, 20, 3, 10, 10, 3),
    (2, 16, 16, 3, 27, 27, 3),
    (2, 16, 16, 3, 32, 32, 3),
]


@pytest.mark.parametrize("shape", MAPS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_kernels_of_maps(
    dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward; float32 to its own rounding, as PyTorch's setting for convolutions says."""
    cudnn = torch.backends.cudnn
    if hasattr(cudnn, "conv"):
        monkeypatch.setattr(cudnn.conv, "fp32_precision", "ieee")
    else:
        monkeypatch.setattr(cudnn, "allow_tf32", False)

    def on_the_gpu(*tensors: torch.Tensor | None, **options: object) -> torch.Tensor:
        return deep_conv_residual(*(None if t is None else t.cuda() for t in tensors), **options).cpu()

    assert gpu.has_kernels_for(torch.empty(1, 1, 1, 1, dtype=dtype, device="cuda"))
    case = make_map_case(*shape, activation="tanh")
    if dtype.itemsize == 2:
        h, *parameters = (case.tensors[name].to("cuda", dtype) for name in NAMES)
        assert gpu.layers_of(h, *parameters, "tanh", 1).fuse(len(h), True) == (h.shape[2] < 28)
    check_strategies(on_the_gpu, case, dtype, ("store", "checkpoint", "auto"))


@pytest.mark.parametrize("maps", [False, True])
def test_a_step_in_a_cuda_graph(maps: bool) -> None:
    options = {"bias": True, "device": "cuda", "dtype": torch.bfloat16}
    block = DeepConvResBlock(16, 30, **options) if maps else DeepResBlock(64, 30, 72, **options)
    x = torch.randn(200, *((16, 10, 10) if maps else (64,)), device="cuda", dtype=torch.bfloat16)
    held = torch.zeros_like(x, requires_grad=True)
    inputs = [held, *block.parameters()]

    def step() -> tuple[torch.Tensor, ...]:
        y = block(held)
        return y, *torch.autograd.grad(y.square().sum(), inputs)

    with torch.no_grad():
        held.copy_(x)
    # y's graph, kept, would keep the nodes of held and of the parameters, bound to the stream that made
    # them: the capture below would have to wait for it.
    expected = [t.detach().clone() for t in step()]
    with torch.no_grad():
        held.zero_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    with torch.no_grad():
        held.copy_(x)
    graph.replay()
    for right, replayed in zip(expected, found, strict=True):
        assert torch.equal(right, replayed)


def test_a_step_on_a_thread_that_has_not_used_the_gpu() -> None:
    block = DeepResBlock(64, 5, 64, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(100, 64, device="cuda", dtype=torch.bfloat16)

    def step() -> torch.Tensor:
        return torch.autograd.grad(block(x).sum(), block.W)[0]

    expected = step()
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(step).result(), expected)


def test_memory_of_a_step_does_not_grow_with_unused_layers() -> None:
    def peak(depth: int) -> int:
        block = DeepResBlock(32, depth, 32, device="cuda", backward="store")
        x = torch.randn(4096, 32, device="cuda")
        block(x).sum().backward()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        block(x).sum().backward()
        states = depth * 4096 * 32 * 4
        parameters = sum(p.numel() * 4 for p in block.parameters())
        return torch.cuda.max_memory_allocated() - before - states - parameters

    assert peak(1024) < peak(256) + (8 << 20)


def test_tf32_is_pytorchs_to_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    case = rounded(make_case(200, 64, 64, 20), torch.float32)
    truth = run(reference.deep_residual, case, torch.float64)["y"]
    found = []
    for allowed in (False, True):
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", allowed)
        found.append(float((inference(case, torch.float32) - truth).abs().max()))
    assert found[0] < 1e-5
    assert 10 * found[0] < found[1] < 1e-2


def test_a_forward_in_a_cuda_graph_and_on_another_stream() -> None:
    block = DeepResBlock(48, 30, 40, bias=True, device="cuda")
    x = torch.randn(70, 48, device="cuda")
    with torch.inference_mode():
        expected = block(x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            other = block(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        held = torch.zeros_like(x)
        with torch.cuda.graph(graph):
            y = block(held)
        held.copy_(x)
        graph.replay()
    assert torch.equal(other, expected)
    assert torch.equal(y, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_block_on_a_gpu_that_is_not_the_current_one() -> None:
    block = DeepResBlock(8, 5, device="cuda:1")
    x = torch.randn(3, 8, device="cuda:1")
    with torch.inference_mode():
        torch.testing.assert_close(block(x).cpu(), block.cpu()(x.cpu()))
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("strategy", ["auto", "store", "adjoint"])
def test_a_normalised_block_on_a_gpu(strategy: str) -> None:
    """In training: its statistics, which GPUs keep in another form, as well."""
    block = DeepConvResBlock(
        16, 20, 8, norm="batch", activation="tanh", backward=strategy, dtype=torch.float64
    )
    x = torch.randn(5, 16, 10, 9, dtype=torch.float64) + 1
    found = []
    for device in ("cpu", "cuda"):
        copied = copy.deepcopy(block).to(device)
        h = x.to(device, copy=True).requires_grad_()
        y = copied(h)
        (y * y).sum().backward()
        found.append([y, h.grad, *(p.grad for p in copied.parameters()), *copied.buffers()])
    for cpu, cuda in zip(*found, strict=True):
        assert cuda.is_cuda
        torch.testing.assert_close(cpu, cuda.cpu(), rtol=1e-9, atol=1e-9)


def test_what_one_does_with_depth_on_a_gpu() -> None:
    block = DeepResBlock(6, 20, 9, bias=True, dtype=torch.float64)
    x = torch.randn(4, 6, dtype=torch.float64)

    def results(block: DeepResBlock, x: torch.Tensor) -> list[torch.Tensor]:
        again = DeepResBlock.from_layers(block.to_layers())
        modules = (block.resample(33), block.split(3), again)
        return [block.trajectory(x, 6), block.vector_field()(0.3, x), *(module(x) for module in modules)]

    expected = results(block, x)
    for cpu, cuda in zip(expected, results(block.cuda(), x.cuda()), strict=True):
        assert cuda.is_cuda
        torch.testing.assert_close(cpu, cuda.cpu(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("strategy", ["auto", "store", "checkpoint", "adjoint"])
def test_any_residual_on_a_gpu(strategy: str) -> None:
    params = torch.linspace(-1, 1, 60 * 7 * 7, dtype=torch.float64).view(60, 7, 7)
    x = torch.randn(5, 7, dtype=torch.float64)
    found = []
    for device in ("cpu", "cuda"):
        h, Z = (tensor.to(device).requires_grad_() for tensor in (x, params))
        y = residual_scan(lambda h, Z_k: torch.tanh(h @ Z_k), h, Z, backward=strategy)
        assert y.device.type == device
        found.append([y, *torch.autograd.grad(y.square().sum(), (h, Z))])
    for cpu, cuda in zip(*found, strict=True):
        torch.testing.assert_close(cpu, cuda.cpu(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("normalised", [False, True])
def test_an_adjoint_in_pytorch_where_tensors_start_on_the_gpu(normalised: bool) -> None:
    """Nothing that it makes for itself follows ``torch.set_default_device``. No other test has as many
    features: what is drawn for them is kept."""
    options = {"activation": "tanh", "backward": "adjoint", "device": "cuda", "dtype": torch.float64}
    if normalised:
        block = DeepConvResBlock(16, 20, 8, norm="batch", **options)
        leaves = [torch.randn(5, 16, 11, 13, dtype=torch.float64).cuda(), *block.parameters()]
    else:
        params = torch.linspace(-1, 1, 60 * 19 * 19, dtype=torch.float64).view(60, 19, 19)
        leaves = [torch.randn(5, 19, dtype=torch.float64).cuda(), params.cuda()]
    for leaf in leaves:
        leaf.requires_grad_()

    def step() -> tuple[torch.Tensor, ...]:
        h, *others = leaves
        if normalised:
            y = block(h)
        else:
            y = residual_scan(lambda h, Z_k: torch.tanh(h @ Z_k), h, *others, backward="adjoint")
        return y, *torch.autograd.grad(y.square().sum(), leaves)

    torch.set_default_device("cuda")
    try:
        found = step()
    finally:
        torch.set_default_device(None)
    expected = step()
    for a, b in zip(found, expected, strict=True):
        assert a.is_cuda
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape", [(9, 17, 5, 70), (150, 32, 48, 100), (300, 128, 136, 70), (70, 200, 24, 40)]
)
def test_the_adjoint_kernels(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    def on_the_gpu(*tensors: torch.Tensor | None, **options: object) -> torch.Tensor:
        return deep_residual(*(None if t is None else t.cuda() for t in tensors), **options).cpu()

    case = make_case(*shape, activation="tanh", smooth=True, scale=0.01)
    for anchors in (0, 2):
        check_rule(on_the_gpu, case, dtype, rebuilt=True, backward="adjoint", anchors=anchors)


def adjoint_block(weights: float = 1) -> DeepResBlock:
    torch.manual_seed(0)
    block = DeepResBlock(64, 70, activation="tanh", backward="adjoint", device="cuda")
    with torch.no_grad():
        block.V.mul_(weights)
        block.W.mul_(weights)
    return block


def test_an_adjoint_step_on_a_gpu_waits_for_nothing() -> None:
    block = adjoint_block()
    x = torch.randn(200, 64, device="cuda")
    block(x).sum().backward()  # once before, for what is asked only then
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        block(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    drift = block.last_drift
    assert drift is not None
    assert drift["estimate"] < 1e-6
    assert drift["evaluations"] < 3


def test_an_adjoint_on_a_gpu_is_never_silently_wrong() -> None:
    block = adjoint_block(30)
    x = torch.randn(200, 64, device="cuda", requires_grad=True)
    block(x).sum().backward()
    assert all(tensor.grad.isnan().all() for tensor in (x, block.V, block.W))
    torch.cuda.synchronize()
    with pytest.warns(DriftWarning, match='use backward="auto"'):
        block(x)
    block.strict = True
    with pytest.raises(DriftError):
        block(x).sum().backward()


def test_an_adjoint_step_in_a_cuda_graph() -> None:
    block = adjoint_block()
    x = torch.randn(200, 64, device="cuda")
    held = torch.zeros_like(x, requires_grad=True)
    inputs = [held, block.V, block.W]

    def step() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(block(held).square().sum(), inputs)

    with torch.no_grad():
        held.copy_(x)
    expected = [t.clone() for t in step()]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    for right, replayed in zip(expected, found, strict=True):
        assert torch.equal(right, replayed)
    drift = block.last_drift
    with torch.no_grad():
        held.fill_(float("nan"))
    graph.replay()
    assert drift is not None
    assert drift["estimate"] < 1e-6
    assert found[0].isnan().all()
    with pytest.warns(DriftWarning):
        assert block.last_drift != drift


def test_memory_of_an_adjoint_step_does_not_grow_with_depth() -> None:
    def peak(depth: int) -> int:
        block = DeepResBlock(32, depth, 32, device="cuda", backward="adjoint")
        x = torch.randn(4096, 32, device="cuda")
        block(x).sum().backward()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        block(x).sum().backward()
        parameters = sum(p.numel() * 4 for p in block.parameters())
        return torch.cuda.max_memory_allocated() - before - parameters

    assert peak(4096) < peak(128) + (2 << 20)
