"""Tests of the command line and of the experiment ``train``: files, determinism, refusals, interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from odeblock import DeepResNet, build_info
from odeblock.__main__ import main

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

import matplotlib.image

from odeblock.experiments import loop, memory, speed
from odeblock.experiments.config import QUICK, TrainConfig
from odeblock.experiments.digits import load_digits
from odeblock.experiments.networks import build_network, eager_twin, network_arguments
from odeblock.experiments.outputs import atomic_file, remove_partial
from odeblock.experiments.train import CHECKPOINTS, FIGURE, RESULTS

SMALL = TrainConfig(**QUICK)


def start(*options: str, **extra: Any) -> subprocess.Popen[str]:
    """``python -m odeblock`` in a process of its own; one thread, as two would fight for a busy core."""
    return subprocess.Popen(
        [sys.executable, "-m", "odeblock", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **extra,
    )


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and standard output of one ``train --quick``."""
    folder = tmp_path_factory.mktemp("train") / "new" / "folder"
    process = start("train", "--quick", "--output", str(folder))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    return folder, out


@pytest.fixture
def no_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the measurements of time and memory."""
    monkeypatch.setattr("odeblock.experiments.train.step_seconds", lambda *_: (1.0, 2.0))
    monkeypatch.setattr("odeblock.experiments.train.step_memory", lambda *_, eager: 1000 + eager)


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RESULTS).read_text())


# ---- the whole experiment --------------------------------------------------------------------------------


def test_files(quick: tuple[Path, str]) -> None:
    folder, _ = quick
    assert {path.name for path in folder.iterdir()} == {RESULTS, FIGURE, *CHECKPOINTS.values()}


def test_results(quick: tuple[Path, str]) -> None:
    found = results(quick[0])
    assert found["experiment"] == "train"
    assert found["interrupted"] is False
    assert found["error"] is None
    assert found["config"] == vars(SMALL)
    assert found["versions"]["torch"] == torch.__version__
    assert found["build"]["native"] == build_info()["native"]
    for init in ("smooth", "iid"):
        network = found["networks"][init]
        assert [entry["epoch"] for entry in network["history"]] == [0, 1, 2]
        for entry in network["history"]:
            assert entry["train_loss"] > 0
            assert 0 <= entry["test_accuracy"] <= 1
            assert entry["V"]["total_variation"] > 0
        assert network["history"][-1]["train_loss"] < network["history"][0]["train_loss"]
        for name in ("V", "W"):
            assert len(network["coefficients"][name]["trained"]) == SMALL.depth
        for cost in ("epoch_seconds", "memory_bytes"):
            assert set(network["cost"][cost]) == {"odeblock", "eager"}
        assert network["cost"]["epoch_seconds"]["odeblock"] > 0


def test_start_differs_in_depth_only(quick: tuple[Path, str]) -> None:
    smooth, iid = (build_network(SMALL, init) for init in ("smooth", "iid"))
    torch.testing.assert_close(smooth.A.weight, iid.A.weight, rtol=0, atol=0)
    torch.testing.assert_close(smooth.B.weight, iid.B.weight, rtol=0, atol=0)
    curves = results(quick[0])["networks"]
    assert curves["smooth"]["coefficients"]["V"]["index"] == curves["iid"]["coefficients"]["V"]["index"]


def test_table(quick: tuple[Path, str]) -> None:
    folder, out = quick
    found = results(folder)
    rows = {(row["section"], row["label"]): row for row in found["table"]}
    row = rows["smoothness in depth", "total variation of W, trained"]
    for init in ("smooth", "iid"):
        assert row[init] == found["networks"][init]["history"][-1]["W"]["total_variation"]
        accuracy = found["networks"][init]["history"][-1]["test_accuracy"]
        assert rows["accuracy", "test"][init] == pytest.approx(100 * accuracy)
        times = found["networks"][init]["cost"]["epoch_seconds"]
        ratio = rows["time of an epoch", "eager loop / odeblock"][init]
        assert ratio == pytest.approx(times["eager"] / times["odeblock"])
    assert row["ratio"] == pytest.approx(row["iid"] / row["smooth"])
    assert row["ratio"] > 2  # at depth 16; about 0.35 L
    for section, label in rows:
        assert section in out
        assert label in out
    assert max(map(len, out.splitlines())) <= 80


def test_checkpoints_reproduce_the_accuracy(quick: tuple[Path, str]) -> None:
    data = load_digits()
    for init, name in CHECKPOINTS.items():
        checkpoint = torch.load(quick[0] / name, weights_only=True)
        network = DeepResNet(**checkpoint["network"])
        network.load_state_dict(checkpoint["state_dict"])
        with torch.no_grad():
            accuracy = loop.accuracy(network(data.test_x), data.test_y)
        assert accuracy == checkpoint["test_accuracy"]
        assert accuracy == results(quick[0])["networks"][init]["history"][-1]["test_accuracy"]


def test_figure_is_drawn(quick: tuple[Path, str]) -> None:
    image = matplotlib.image.imread(quick[0] / FIGURE)
    height, width, _ = image.shape
    assert width > height > 500
    for half in (image[:, : width // 2, :3], image[:, width // 2 :, :3]):
        red, blue = half[..., 0], half[..., 2]
        assert (blue - red > 0.3).sum() > 1000  # V
        assert (red - blue > 0.3).sum() > 1000  # W


@pytest.mark.parametrize("init", ["smooth", "iid"])
def test_same_seed_same_numbers(init: str) -> None:
    histories = []
    for seed in (3, 3, 4):
        config = replace(SMALL, seed=seed, epochs=1)
        training = loop.Training(build_network(config, init), load_digits(), config)
        losses: list[float] = []
        training.run(losses.append)
        assert len(losses) == training.total_steps
        histories.append((losses, training.history))
    assert histories[0] == histories[1]
    assert histories[0][0] != histories[2][0]


# ---- parts -----------------------------------------------------------------------------------------------


def test_digits_are_standardised_by_the_training_set() -> None:
    data = load_digits()
    assert data.train_x.shape == (1437, 64)
    assert data.test_x.shape == (360, 64)
    torch.testing.assert_close(data.train_x.mean(0), torch.zeros(64), atol=1e-5, rtol=0)
    assert data.train_x.square().mean().item() == pytest.approx(1, rel=1e-5)
    shares = torch.bincount(data.test_y) / 360 - torch.bincount(data.train_y) / 1437
    assert shares.abs().max() < 0.01
    torch.testing.assert_close(data.train_x, load_digits().train_x, rtol=0, atol=0)


def test_eager_twin_is_the_same_network() -> None:
    network = build_network(SMALL, "smooth").double()
    x = torch.randn(5, 64, dtype=torch.float64)
    twin = eager_twin(network)
    torch.testing.assert_close(twin(x), network(x))
    assert {id(p) for p in twin.parameters()} == {id(p) for p in network.parameters()}


def test_rates_of_the_gradient_flow() -> None:
    network = build_network(SMALL, "smooth")
    groups = loop.make_optimizer(network, 0.1).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rates[id(network.block.V)] == rates[id(network.block.W)] == 0.1 * SMALL.depth
    assert rates[id(network.A.weight)] == rates[id(network.B.weight)] == 0.1
    assert len(rates) == len(list(network.parameters()))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_of_a_step() -> None:
    config = TrainConfig(depth=32, dim=64, backward="store")
    batch = 512
    expected = config.depth * batch * config.dim * 4  # every state h_k in float32; and z_k, as many
    found = memory.step_memory(network_arguments(config, "smooth"), batch, "cpu", eager=False)
    assert found is not None
    assert 2 * expected < found < 2.6 * expected
    eager = memory.step_memory(network_arguments(config, "smooth"), batch, "cpu", eager=True)
    assert eager is not None
    assert eager > 2.5 * expected  # h_k, z_k and σ(z_k)


def test_timing_leaves_the_network_as_it_is() -> None:
    network = build_network(SMALL, "iid")
    before = [p.clone() for p in network.parameters()]
    ours, eager = speed.step_seconds(network, load_digits(), SMALL)
    assert ours > 0
    assert eager > 0
    for p, old in zip(network.parameters(), before, strict=True):
        torch.testing.assert_close(p, old, rtol=0, atol=0)


def test_atomic_file_keeps_the_old_content_on_errors(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def interrupted_write() -> None:
        with atomic_file(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_write()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_only_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = [
        tmp_path / f".results.json.{pid}.partial" for pid in (ended.pid, os.getpid(), 9999999)
    ]  # none has the last
    kept = [
        tmp_path / name
        for name in (
            ".movie.mkv.partial",
            ".7.partial",
            ".a.0.partial",
            ".a.20260102.partial",
            f"a.{ended.pid}.partial",
        )
    ]
    kept.append(tmp_path / f".results.json.{os.getppid()}.partial")  # it runs
    for path in (*left, *kept):
        path.write_bytes(b"half")
    for name in (".x.partial", f".x.{ended.pid}.partial"):
        kept.append(tmp_path / name)
        kept[-1].mkdir()
    kept.append(tmp_path / f".y.{ended.pid}.partial")
    kept[-1].symlink_to(kept[0])
    remove_partial(tmp_path)
    assert set(tmp_path.iterdir()) == set(kept)


def test_another_process_finishes_what_it_writes(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from odeblock.experiments.outputs import atomic_file\n"
        "with atomic_file(Path(sys.argv[1])) as file:\n"
        "    print(flush=True), sys.stdin.readline(), file.write(b'new')"
    )
    path = tmp_path / "file"
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        remove_partial(tmp_path)
        process.communicate("\n", timeout=60)
    assert process.returncode == 0
    assert path.read_bytes() == b"new"


# ---- interruption and divergence -------------------------------------------------------------------------


@pytest.mark.usefixtures("no_costs")
def test_interruption_leaves_what_was_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / CHECKPOINTS["iid"]).write_text("of an earlier experiment")
    steps, train_step = 0, loop.train_step

    def interrupted_step(*arguments: Any) -> float:
        nonlocal steps
        steps += 1
        if steps == 30:  # in the second epoch of the smooth network
            raise KeyboardInterrupt
        return train_step(*arguments)

    monkeypatch.setattr(loop, "train_step", interrupted_step)
    assert main(["train", "--quick", "--output", str(tmp_path)]) == 130
    assert {path.name for path in tmp_path.iterdir()} == {RESULTS, FIGURE, CHECKPOINTS["smooth"]}
    found = results(tmp_path)
    assert found["interrupted"] is True
    assert list(found["networks"]) == ["smooth"]
    assert [entry["step"] for entry in found["networks"]["smooth"]["history"]] == [0, 23, 29]
    checkpoint = torch.load(tmp_path / CHECKPOINTS["smooth"], weights_only=True)
    network = DeepResNet(**checkpoint["network"])
    network.load_state_dict(checkpoint["state_dict"])
    data = load_digits()
    assert loop.accuracy(network(data.test_x), data.test_y) == checkpoint["test_accuracy"]
    out = capsys.readouterr().out
    assert "interrupted" in out
    assert "total variation of V" in out


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Children take Ctrl-C, which a background job of a shell ignores, and whatever it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c(tmp_path: Path) -> None:
    process = start("train", "--quick", "--epochs", "10", "--output", str(tmp_path))
    while not (tmp_path / RESULTS).exists():  # the smooth network is trained, the other is not
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    found = results(tmp_path)
    assert found["interrupted"] is True
    assert found["networks"]["smooth"]["history"][-1]["epoch"] == 10
    names = {CHECKPOINTS[init] for init in found["networks"]}
    assert {path.name for path in tmp_path.iterdir()} == {RESULTS, FIGURE, *names}


@pytest.mark.usefixtures("no_costs")
def test_loss_that_is_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--quick", "--lr", "1e20", "--output", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "smooth network: the loss is" in out
    assert "after step" in out
    found = results(tmp_path)
    assert "after step" in found["error"]
    assert found["interrupted"] is False


# ---- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "expectation"),
    [
        ("--depth", "0", ">= 1"),
        ("--depth", "many", ">= 1"),
        ("--depth", "1" + "0" * 20, ">= 1 and <= 2147483647"),
        ("--depth", "1" + "0" * 5000, ">= 1 and <= 2147483647"),
        ("--dim", "2147483648", ">= 1 and <= 2147483647"),
        ("--batch-size", str(10**19), ">= 1 and <= 2147483647"),
        ("--dim", "-3", ">= 1"),
        ("--hidden-dim", "0", ">= 1"),
        ("--epochs", "-1", ">= 1"),
        ("--batch-size", "1.5", ">= 1"),
        ("--lr", "nan", "> 0"),
        ("--lr", "-0.1", "> 0"),
        ("--lr", "1e308", "> 0 and <= 1e+29"),
        ("--seed", "-1", ">= 0"),
        ("--seed", str(2**64), ">= 0"),
        ("--device", "toaster", "cpu, cuda or cuda:N"),
        ("--device", "cuda:99", "GPU"),
        ("--activation", "swish", "gelu"),
        ("--backward", "forward", "checkpoint"),
    ],
)
def test_bad_option(
    option: str, value: str, expectation: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "results"
    with pytest.raises(SystemExit) as stop:
        main(["train", "--output", str(folder), f"{option}={value}"])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    for part in (option, value, expectation):
        assert part in message
    assert not folder.exists()


def test_an_output_without_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["train", "--quick", "--output", ""])
    assert stop.value.code == 2
    assert "argument --output: expected a folder to write to, got ''" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_output_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    folder = tmp_path / "file" / "results"
    with pytest.raises(SystemExit) as stop:
        main(["train", "--quick", "--output", str(folder)])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "--output" in message
    assert str(folder) in message


@pytest.mark.parametrize("package", ["rich", "matplotlib", "sklearn"])
def test_missing_extra(package: str, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.modules[{package!r}] = None; from odeblock.__main__ import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "train", "--output", str(tmp_path / "new")]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1
    assert f"{package} is not installed" in process.stderr
    assert "pip install 'odeblock[experiments]'" in process.stderr
    assert not (tmp_path / "new").exists()


# ---- info ------------------------------------------------------------------------------------------------


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == build_info()
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for what in ("compiler", "torch", torch.__version__, *build_info()["paths"]):
        assert what in out


def test_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["train"], ["reproduce", "long-time"], ["bench"]])
def test_several_processes_are_refused(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They would do the same work, and write the same files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    folder = tmp_path / "results"
    with pytest.raises(SystemExit) as stop:
        main([*command, "--quick", "--output", str(folder)])
    assert stop.value.code == 2
    assert "expected one process, got 2 (WORLD_SIZE" in capsys.readouterr().err
    assert not folder.exists()
