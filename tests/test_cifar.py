"""The network for CIFAR-10 and its training: it learns, stops, and goes on to the bit; what is not finite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from odeblock.arguments import positive_number
from odeblock.experiments.config import CIFAR_QUICK, CifarConfig, Refusal

pytest.importorskip("rich")

from cifar_runs import assert_same_run, lines

from odeblock.experiments.cifar import data, training
from odeblock.experiments.cifar.batches import normalise
from odeblock.experiments.cifar.network import ConvNet, build_network, parameter_counts
from odeblock.experiments.cifar.processes import Processes
from odeblock.experiments.cifar.run import CHECKPOINT, Run, initial, read_checkpoint
from odeblock.experiments.cifar.training import Training, rate
from odeblock.experiments.outputs import save_checkpoint

SMALL = CifarConfig(**{**CIFAR_QUICK, "epochs": 2, "images": 160, "norm": "none", "batch_size": 24})
IMAGES = data.load(None, 160)  # 144 for training: 6 batches

# ---- network and rates -----------------------------------------------------------------------------------


def test_the_network() -> None:
    network = ConvNet(16, 3, norm=None)
    x = torch.randn(2, 3, 32, 32)
    h = network.stem(x)
    assert h.shape == (2, 16, 10, 10)
    expected = torch.nn.functional.avg_pool2d(network.block(h), 4).reshape(2, 64)
    torch.testing.assert_close(network(x), network.head(expected))
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
    counts = {"stem": 16 * 76, "block": 3 * 2 * 16 * 16 * 9, "head": 650}
    assert parameter_counts(network) == {**counts, "all": sum(counts.values())}


def test_the_normalised_network() -> None:
    """The stem and every step are normalised; the block starts as the identity, and does not stay it."""
    network = ConvNet(16, 3)
    assert network.stem[0].bias is None
    x = torch.randn(8, 3, 32, 32)
    h = network.stem(x)
    assert torch.equal(network.block(h), h)
    torch.testing.assert_close(network.stem[:2](x).mean((0, 2, 3)), torch.zeros(16), atol=1e-5, rtol=0)
    network(x).square().sum().backward()
    assert network.block.output_norm_weight.grad.abs().min() > 0
    counts = {"stem": 16 * 75 + 32, "block": 3 * (2 * 16 * 16 * 9 + 4 * 16), "head": 650}
    assert parameter_counts(network) == {**counts, "all": sum(counts.values())}


def test_a_seed_draws_the_same_but_for_the_block() -> None:
    tied, iid, other = (
        build_network(replace(SMALL, init=init, seed=seed))
        for init, seed in (("tied", 1), ("iid", 1), ("tied", 2))
    )
    for name in ("stem", "head"):
        for a, b, c in zip(*(getattr(n, name).parameters() for n in (tied, iid, other)), strict=True):
            assert torch.equal(a, b)
            assert not torch.equal(a, c)
    assert torch.equal(tied.block.W[0], tied.block.W[1])
    assert not torch.equal(iid.block.W[0], iid.block.W[1])


def test_defaults_go_with_the_normalisation() -> None:
    paper, plain = CifarConfig().resolved(), CifarConfig(norm="none").resolved()
    assert (paper.init, paper.schedule, paper.rates) == ("tied", "cosine", "equal")
    assert (plain.init, plain.schedule, plain.rates) == ("zero_v", "onecycle", "flow")
    assert CifarConfig(norm="none", init="iid").resolved() == replace(plain, init="iid")
    assert plain.resolved() == plain


def test_schedules() -> None:
    assert [rate("cosine", t) for t in (0.0, 0.5, 1.0)] == pytest.approx([1, 0.5, 0])
    assert [rate("onecycle", t) for t in (0.0, 0.15, 0.3, 0.65, 1.0)] == pytest.approx(
        [0.04, 0.52, 1, 0.5, 0]
    )


@pytest.mark.parametrize(("rates", "factor"), [("equal", 1), ("flow", 4)])
def test_rates(rates: str, factor: int) -> None:
    run = Training(replace(SMALL, rates=rates, lr=0.1, schedule="cosine"), IMAGES)
    run._train_step()
    groups = {id(p): (g["lr"], g["weight_decay"]) for g in run.optimizer.param_groups for p in g["params"]}
    assert len(groups) == len(list(run.network.parameters()))
    for name, parameter in run.network.named_parameters():
        inside = factor if name.startswith("block") else 1
        assert groups[id(parameter)] == pytest.approx((0.1 * inside, 5e-4 / inside))
    run._train_step()
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * rate("cosine", 1 / run.total_steps))


# ---- training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_training_learns(norm: str, tmp_path: Path) -> None:
    config = replace(SMALL, norm=norm, epochs=6, lr=0.1)
    run = Run(tmp_path, config, IMAGES)
    assert run.go()
    epochs = run.training.epochs
    assert [line["epoch"] for line in epochs] == [1, 2, 3, 4, 5, 6]
    assert epochs[-1]["train_loss"] < epochs[0]["train_loss"] - 0.3
    assert epochs[-1]["validation_accuracy"] > 0.2
    assert epochs[0]["V"]["max"] < epochs[-1]["V"]["max"]  # from 0 on


def test_evaluation() -> None:
    run = Training(SMALL, IMAGES)
    before = [p.clone() for p in run.network.state_dict().values()]
    loss, right = run.evaluate(IMAGES.validation)
    logits = run.network(normalise(torch.tensor(IMAGES.validation.pixels)))
    labels = torch.tensor(IMAGES.validation.labels).long()
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert right == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    for a, b in zip(before, run.network.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_half_precision_is_near(tmp_path: Path) -> None:
    losses = {}
    for precision in ("float32", "bfloat16", "float64"):
        run = Training(replace(SMALL, precision=precision), IMAGES)
        losses[precision] = run._train_step()[0].item()
        assert all(p.dtype == run.dtype for p in run.network.parameters())
    assert losses["float32"] == pytest.approx(losses["float64"], rel=1e-6)
    assert losses["bfloat16"] == pytest.approx(losses["float64"], rel=0.02)
    assert losses["bfloat16"] != losses["float32"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 12 steps that was never stopped."""
    folder = tmp_path_factory.mktemp("run")
    assert Run(folder, SMALL, IMAGES).go()
    return folder


def test_the_log(uninterrupted: Path) -> None:
    start, first, second, result = lines(uninterrupted)
    assert start["config"] == asdict(SMALL.resolved())
    assert start["data"]["train"] == 144
    assert start["parameters"]["all"] == sum(p.numel() for p in build_network(SMALL).parameters())
    assert start["versions"]["torch"] == torch.__version__
    assert (first["step"], second["step"]) == (6, 12)
    assert second["lr"] == pytest.approx(SMALL.lr * rate("onecycle", 11 / 12))
    for key in ("train_loss", "validation_loss", "validation_accuracy", "seconds", "V", "W"):
        assert key in first
    assert result["validation_accuracy"] == second["validation_accuracy"]
    assert 0 <= result["test_accuracy"] <= 1


def test_a_checkpoint_is_the_network(uninterrupted: Path) -> None:
    state = torch.load(uninterrupted / CHECKPOINT, weights_only=True)
    network = ConvNet(**state["network"])
    network.load_state_dict(state["state_dict"])
    logits = network(normalise(torch.tensor(IMAGES.validation.pixels)))
    right = (logits.argmax(1) == torch.tensor(IMAGES.validation.labels)).float().mean().item()
    assert right == pytest.approx(lines(uninterrupted)[-1]["validation_accuracy"])
    begun = build_network(initial(state))
    assert torch.equal(begun.block.W[0], begun.block.W[1])
    assert not torch.equal(network.block.W[0], network.block.W[1])


def test_a_normalised_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    """Running statistics too."""
    config = replace(SMALL, norm="batch", precision="bfloat16")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    assert Run(whole, config, IMAGES).go()
    run = Run(parts, config, IMAGES)
    assert not run.go(stop=lambda: run.training.step >= 8)
    assert Run(parts, config, IMAGES, read_checkpoint(parts)).go()
    assert_same_run(whole, parts)
    state = read_checkpoint(whole)
    assert state is not None
    assert state["state_dict"]["block.num_batches_tracked"] == 12


@pytest.mark.parametrize("stops", [(1,), (5, 6, 7), (11,), (12,)])
def test_a_run_goes_on_to_the_bit(stops: tuple[int, ...], tmp_path: Path, uninterrupted: Path) -> None:
    for at in stops:
        run = Run(tmp_path, SMALL, IMAGES, read_checkpoint(tmp_path))
        finished = run.go(stop=lambda run=run, at=at: run.training.step >= at)
        assert finished == (at == 12)
        assert run.training.step == at
    last = Run(tmp_path, SMALL, IMAGES, read_checkpoint(tmp_path))
    assert last.go()
    assert_same_run(tmp_path, uninterrupted)
    starts = [line["step"] for line in lines(tmp_path) if line["kind"] == "start"]
    assert starts == [0, *(at for at in stops if at < 12)]


def test_a_run_that_is_killed_loses_what_is_not_saved(tmp_path: Path, uninterrupted: Path) -> None:
    def killed(loss: float) -> None:
        if run.training.step == 9:
            raise KeyboardInterrupt

    run = Run(tmp_path, SMALL, IMAGES)
    with pytest.raises(KeyboardInterrupt):
        run.go(on_look=killed)
    state = read_checkpoint(tmp_path)
    assert state is not None
    assert state["step"] == 6  # the end of the epoch
    assert Run(tmp_path, SMALL, IMAGES, state).go()
    assert_same_run(tmp_path, uninterrupted)
    run = Run(tmp_path, SMALL, IMAGES)
    with pytest.raises(KeyboardInterrupt):
        run.go(on_look=killed, checkpoint_every=0)
    state = read_checkpoint(tmp_path)
    assert state is not None
    assert state["step"] == 8  # every step
    assert Run(tmp_path, SMALL, IMAGES, state).go()
    assert_same_run(tmp_path, uninterrupted)


def test_minutes(tmp_path: Path, uninterrupted: Path) -> None:
    assert not Run(tmp_path, SMALL, IMAGES).go(minutes=1e-9)
    state = read_checkpoint(tmp_path)
    assert state is not None
    assert state["step"] == 1
    assert Run(tmp_path, SMALL, IMAGES, state).go(minutes=10)
    assert_same_run(tmp_path, uninterrupted)


def test_looks_are_rare_on_a_gpu(
    tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several steps between two looks change nothing."""
    monkeypatch.setattr(training, "LOOK_EVERY", {"cpu": 4})
    seen: list[int] = []
    run = Run(tmp_path, SMALL, IMAGES)
    assert run.go(on_look=lambda loss: seen.append(run.training.step))
    assert seen == [4, 6, 8, 12]
    assert_same_run(tmp_path, uninterrupted)


# ---- what is not finite ----------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    run = Run(tmp_path, replace(SMALL, lr=1e30), IMAGES)
    with pytest.raises(
        FloatingPointError, match=r"at step \d+ of 12 \(epoch 1, rate .*smaller --lr"
    ) as stopped:
        run.go()
    assert "the loss is" in str(stopped.value)
    assert read_checkpoint(tmp_path) is None


@pytest.mark.filterwarnings("ignore::odeblock.DriftWarning")
def test_a_gradient_that_is_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "LOOK_EVERY", {"cpu": 5})
    run = Run(tmp_path, replace(SMALL, backward="adjoint"), IMAGES)
    calls = 0

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return gradient * float("nan") if calls == 8 else gradient

    run.training.network.block.V.register_hook(hook)
    with pytest.raises(FloatingPointError, match=r"the gradient is nan at step 8 of 12 .*another --backward"):
        run.go()
    state = read_checkpoint(tmp_path)
    assert state is not None
    assert state["step"] == 6
    assert all(bool(value.isfinite().all()) for value in state["state_dict"].values())


# ---- refusals --------------------------------------------------------------------------------------------


def test_other_images(tmp_path: Path, uninterrupted: Path) -> None:
    state = read_checkpoint(uninterrupted)
    with pytest.raises(Refusal, match="--data: expected the images that this run began with"):
        Run(tmp_path, SMALL, data.load(None, 170), state)


def claim(state: dict[str, Any], depth: int) -> None:
    """A network of that depth, whose weights are all one number in memory."""
    state["config"]["depth"] = state["network"]["depth"] = depth
    for name in ("block.V", "block.W", "block.hidden_bias", "block.output_bias"):
        if name in state["state_dict"]:
            shape = state["state_dict"][name].shape[1:]
            state["state_dict"][name] = torch.zeros(1).expand(depth, *shape)


MADE_UP: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "nothing": (lambda s: s.clear(), "KeyError: 'config'"),
    "no step": (lambda s: s.pop("step"), "KeyError: 'step'"),
    "setting": (lambda s: s["config"].pop("seed"), "KeyError: 'seed'"),
    "other setting": (lambda s: s["config"].update(exec="true"), "unexpected keyword argument"),
    "type": (lambda s: s["config"].update(lr="0.1"), "config: lr is str"),
    "size": (lambda s: s["config"].update(batch_size=0), "config: batch_size cannot be 0"),
    "choice": (lambda s: s["config"].update(schedule="x" * 9), "config: schedule cannot be 'xxxxxxxxx'"),
    "rate": (lambda s: s["config"].update(lr=float("nan")), "config: lr cannot be nan"),
    "large rate": (lambda s: s["config"].update(lr=1e30), "config: lr cannot be 1e+30"),
    "no rate": (lambda s: s["config"].update(lr=-0.0), "config: lr cannot be -0.0"),
    "arguments": (lambda s: s["network"].update(depth=10**9), "arguments are not those of the settings"),
    "depth": (lambda s: [s[key].update(depth=10**9) for key in ("config", "network")], "not those of the n"),
    "large": (lambda s: claim(s, 10**9), "a tensor is larger than its memory"),
    "weights": (lambda s: s["state_dict"].popitem(), "tensors are not those of the network"),
    "no log": (lambda s: s["log"].clear(), "log: it is empty"),
    "line": (lambda s: s["log"][1].pop("train_loss"), "KeyError: 'train_loss'"),
    "number": (lambda s: s["log"][1].update(lr=float("nan")), "log: a number is not finite"),
    "text": (lambda s: s["log"][1]["V"].update(max="1"), "TypeError"),
    "tensor": (lambda s: s["log"][0].update(threads=torch.ones(2)), "got"),
    "far": (lambda s: s.update(step=10**9), "expected one of the 12"),
    "position": (lambda s: s["batches"].update(position=3), "expected one of the 12"),
    "epoch": (lambda s: s["log"].pop(1), "expected one of the 12"),
    "momentum": (lambda s: s["optimizer"]["state"][0].update(momentum_buffer=torch.ones(1)), "momentum"),
    "generator": (lambda s: s["batches"].update(generator=torch.ones(2).byte()), "got"),
}


@pytest.mark.parametrize("what", MADE_UP)
def test_a_checkpoint_that_is_made_up(what: str, tmp_path: Path, uninterrupted: Path) -> None:
    state = read_checkpoint(uninterrupted)
    assert state is not None
    change, expected = MADE_UP[what]
    change(state)
    save_checkpoint(tmp_path / CHECKPOINT, state)
    with pytest.raises(Refusal, match=r"checkpoint\.pt: expected a checkpoint of train") as refused:
        Run(tmp_path, SMALL, IMAGES, read_checkpoint(tmp_path))
    assert expected in str(refused.value)


def test_the_largest_rate_that_is_taken_is_read_again(tmp_path: Path, uninterrupted: Path) -> None:
    state = read_checkpoint(uninterrupted)
    assert state is not None
    state["config"]["lr"] = positive_number("1e29")
    save_checkpoint(tmp_path / CHECKPOINT, state)
    found = read_checkpoint(tmp_path)
    assert found is not None
    assert found["config"]["lr"] == 1e29


def test_a_batch_that_cannot_be_shared() -> None:
    with pytest.raises(Refusal, match="--batch-size: expected a multiple of the 5 processes, got 24"):
        Training(SMALL, IMAGES, Processes(5))
