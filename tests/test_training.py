"""A block in PyTorch's training tools, beside the list of layers that it stands for."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from odeblock import DeepConvResBlock, DeepResBlock, DeepResNet

DEPTH = 12
kinds = pytest.mark.parametrize("maps", [False, True], ids=["rows", "maps"])
STRATEGIES = ("store", "checkpoint", "adjoint")


class Layers(nn.Module):
    """The loop over a block's layers as modules."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.layers, self.scale = nn.ModuleList(block.to_layers()), block.scale

    def forward(self, h: Tensor) -> Tensor:
        for layer in self.layers:
            h = h + self.scale * layer(h)
        return h


def make_block(maps: bool = False, depth: int = DEPTH, **options: Any) -> tuple[Any, Tensor]:
    """A block in float64, and a batch for it."""
    options = {"activation": "tanh", "bias": True, "dtype": torch.float64, **options}
    if maps:
        return DeepConvResBlock(3, depth, 4, **options), torch.randn(4, 3, 3, 4, dtype=torch.float64)
    return DeepResBlock(4, depth, 5, **options), torch.randn(8, 4, dtype=torch.float64)


def agree(block: Any, layers: Layers) -> None:
    stacks, expected = block.state_dict(), type(block).from_layers(layers.layers).state_dict()
    for name in stacks:
        torch.testing.assert_close(
            stacks[name], expected[name], msg=lambda text, name=name: f"{name}: {text}"
        )


# ---- optimisers ------------------------------------------------------------------------------------------


def split_by_decay(model: nn.Module) -> list[dict[str, Any]]:
    """Weights decay, biases do not, and have a rate of their own."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, p in model.named_parameters():
        groups["bias" in name].append(p)
    return [{"params": groups[False], "weight_decay": 0.1}, {"params": groups[True], "lr": 0.02}]


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda groups, **how: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, **how),
    "adam": lambda groups, **how: torch.optim.Adam(groups, lr=0.01, **how),
    "adamw": lambda groups, **how: torch.optim.AdamW(groups, lr=0.01, amsgrad=True, **how),
}


@kinds
@pytest.mark.parametrize("how", [{}, {"foreach": True}, {"fused": True}], ids=["loop", "foreach", "fused"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_block_is_trained_as_its_layers_are(name: str, how: dict[str, bool], maps: bool) -> None:
    """With groups, decay, a clipped norm, gradients of two batches; and zero_grad in both ways."""
    block, x = make_block(maps)
    layers = Layers(block)
    for model, set_to_none in ((block, True), (layers, False)):
        optimizer = OPTIMIZERS[name](split_by_decay(model), **how)
        for _ in range(4):
            for part in x.chunk(2):
                (model(part).square().sum() / 2).backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            assert norm > 0.5
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
            assert all(p.grad is None if set_to_none else not p.grad.any() for p in model.parameters())
    agree(block, layers)


def test_a_closure_is_called_as_often_as_wanted() -> None:
    """L-BFGS runs the block again within a step."""
    block, x = make_block()
    layers = Layers(block)
    for model in (block, layers):
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=5)

        def closure(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = (model(x) - 1).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
    agree(block, layers)


# ---- hooks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_hooks_of_modules_and_tensors(strategy: str) -> None:
    block, x = make_block(backward=strategy, depth=60)
    seen: list[str] = []
    block.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    block.register_forward_hook(lambda module, inputs, y: y * 3)
    block.register_full_backward_pre_hook(lambda module, grads: (grads[0] * 5,))
    block.register_full_backward_hook(lambda module, grads, _: (grads[0] * 7,))
    block.V.register_hook(lambda grad: grad * 11)
    block.W.register_post_accumulate_grad_hook(lambda p: seen.append(f"W {bool(p.grad.any())}"))
    h = x.clone().requires_grad_()
    y = block(h)
    plain, _ = make_block(depth=60)
    plain.load_state_dict(block.state_dict())
    point = (2 * x).requires_grad_()
    expected = 3 * plain(point)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(h.grad, 5 * 7 * 2 * point.grad)
    torch.testing.assert_close(block.V.grad, 5 * 11 * plain.V.grad)
    torch.testing.assert_close(block.W.grad, 5 * plain.W.grad)
    assert seen == ["W True"]


def test_an_optimizer_in_the_backward() -> None:
    """A step of each parameter as soon as its gradient is there, which then goes."""
    block, x = make_block()
    twin, _ = make_block()
    twin.load_state_dict(block.state_dict())
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in block.parameters()}

    def step(p: Tensor) -> None:
        optimizers[p].step()
        p.grad = None

    for p in block.parameters():
        p.register_post_accumulate_grad_hook(step)
    whole = torch.optim.SGD(twin.parameters(), lr=0.1)
    for _ in range(2):
        block(x).square().sum().backward()
        whole.zero_grad()
        twin(x).square().sum().backward()
        whole.step()
    assert all(p.grad is None for p in block.parameters())
    for name, p in twin.named_parameters():
        assert torch.equal(p, block.get_parameter(name))


@kinds
def test_inner_states_are_seen_by_parts_and_in_the_trajectory(maps: bool) -> None:
    """A fused block has no modules within, whose hooks could look at activations: its parts have."""
    block, x = make_block(maps)
    states: list[Tensor] = []
    parts = block.split(4)
    for part in parts:
        part.register_forward_hook(lambda module, inputs, y: states.append(y))
    parts(x)
    path = block.trajectory(x, every=DEPTH // 4)
    assert torch.equal(torch.stack([x, *states]), path)
    gradients: list[Tensor] = []
    path.register_hook(gradients.append)
    path[2].sum().backward()
    assert [bool(g.any()) for g in gradients[0]] == [False, False, True, False, False]


def packings() -> dict[str, Callable[[], Any]]:
    def to_disk(tensor: Tensor) -> bytes:
        torch.save(tensor, buffer := io.BytesIO())
        return buffer.getvalue()

    def from_disk(packed: bytes) -> Tensor:
        return torch.load(io.BytesIO(packed))

    hooks = torch.autograd.graph.saved_tensors_hooks
    return {
        "on the cpu": torch.autograd.graph.save_on_cpu,
        "to disk": lambda: hooks(to_disk, from_disk),
        "transposed": lambda: hooks(lambda t: t.detach().mT.contiguous() if t.dim() > 2 else t, untransposed),
    }


def untransposed(tensor: Tensor) -> Tensor:
    return tensor.mT if tensor.dim() > 2 else tensor


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("packing", packings())
@pytest.mark.parametrize("norm", [None, "batch"])
def test_saved_tensors_may_be_kept_elsewhere(packing: str, strategy: str, norm: str | None) -> None:
    block, x = make_block(maps=True, depth=40, backward=strategy, norm=norm)
    inputs = [x.requires_grad_(), *block.parameters()]
    expected = torch.autograd.grad(block(x).square().sum(), inputs)
    with packings()[packing]():
        y = block(x)
    for a, b in zip(expected, torch.autograd.grad(y.square().sum(), inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_checkpoint_around_a_block(strategy: str, norm: str | None, use_reentrant: bool) -> None:
    block, x = make_block(maps=True, depth=40, backward=strategy, norm=norm)
    inputs = [x.requires_grad_(), *block.parameters()]

    def gradients(y: Tensor) -> list[Tensor]:
        for leaf in inputs:
            leaf.grad = None
        y.square().sum().backward()
        return [leaf.grad for leaf in inputs]

    expected = gradients(block(x))
    found = gradients(checkpoint(block, x, use_reentrant=use_reentrant))
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)


# ---- copies, checkpoints and devices ---------------------------------------------------------------------


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averages_of_a_model(use_buffers: bool) -> None:
    """An exponential average; with ``use_buffers`` also of running statistics, which ``update_bn`` of PyTorch
    finds in its own modules only."""
    block, x = make_block(maps=True, norm="batch")
    model = nn.Sequential(block)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
    names = list(block.state_dict()) if use_buffers else [name for name, _ in block.named_parameters()]
    expected: dict[str, Tensor] = {}
    for _ in range(3):
        with torch.no_grad():
            for p in block.parameters():
                p.add_(torch.randn_like(p))
        block(x)
        average.update_parameters(model)
        now = {name: block.state_dict()[name].clone() for name in names}
        expected = {name: (expected[name] + value) / 2 if expected else value for name, value in now.items()}
    found = average.module[0].state_dict()
    for name in set(names) - {"num_batches_tracked"}:
        torch.testing.assert_close(found[name], expected[name])


@kinds
def test_parameters_given_at_a_call(maps: bool) -> None:
    """``functional_call``, of all and of some; running statistics that are given are the ones that move."""
    block, x = make_block(maps, **({"norm": "batch"} if maps else {}))
    other, _ = make_block(maps, **({"norm": "batch"} if maps else {}))
    before = {name: value.clone() for name, value in block.state_dict().items()}
    given = {name: value.clone() for name, value in other.state_dict().items()}
    assert torch.equal(torch.func.functional_call(block, given, (x,)), other(x))
    for name, value in other.state_dict().items():
        assert torch.equal(given[name], value)
    for name, value in block.state_dict().items():
        assert torch.equal(value, before[name])
    zero = {"V": torch.zeros_like(block.V), "output_bias": torch.zeros_like(block.output_bias)}
    assert torch.equal(torch.func.functional_call(block.eval(), zero, (x,)), x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DeepResBlock(4, 9, 5, bias=True),
        lambda: DeepResNet(3, 4, 9, 2, bias=True),
        lambda: DeepConvResBlock(3, 5, norm="batch", bias=True),
    ],
    ids=["rows", "network", "maps"],
)
def test_from_the_meta_device(make: Callable[[], Any]) -> None:
    """Memory first and values after, drawn or loaded."""
    torch.manual_seed(1)
    real = make()
    with torch.device("meta"):
        drawn, assigned = make(), make()
    drawn.to_empty(device="cpu")
    for tensor in drawn.state_dict().values():
        tensor.fill_(9)
    torch.manual_seed(1)
    drawn.reset_parameters()
    state = real.state_dict()
    assigned.load_state_dict(state, assign=True)
    for name, value in state.items():
        assert torch.equal(drawn.state_dict()[name], value)
        assert assigned.state_dict()[name].data_ptr() == value.data_ptr()
    assert all(p.requires_grad and isinstance(p, nn.Parameter) for p in assigned.parameters())


@kinds
def test_a_step_of_fake_tensors(maps: bool) -> None:
    """For estimates of memory and time: shapes without values."""
    with FakeTensorMode():
        block, x = make_block(maps)
        block(x).sum().backward()
    assert all(p.grad.shape == p.shape for p in block.parameters())


def test_a_state_dict_in_another_dtype() -> None:
    """Is cast on loading; assigned, it brings its dtype."""
    block, x = make_block()
    single, _ = make_block(dtype=torch.float32)
    single.load_state_dict(block.state_dict())
    assert single.V.dtype == torch.float32
    torch.testing.assert_close(single(x.float()), block(x).float())
    single.load_state_dict(block.state_dict(), assign=True)
    assert torch.equal(single(x), block(x))


def test_a_block_in_shared_memory() -> None:
    block, x = make_block(maps=True, norm="batch")
    y = block.eval()(x)
    block.share_memory()
    assert all(tensor.is_shared() for tensor in block.state_dict().values())
    assert torch.equal(block(x), y)
