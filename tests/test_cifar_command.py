"""``train cifar10`` from the command line: several processes, interruption, settings, refusals."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import cifar_files
import pytest
import torch

from odeblock.__main__ import main
from odeblock.experiments.config import CIFAR_QUICK, CifarConfig

pytest.importorskip("rich")

from cifar_runs import comparable

from odeblock.experiments.cifar.network import network_arguments
from odeblock.experiments.cifar.run import CHECKPOINT, LOG, read_checkpoint
from odeblock.experiments.outputs import save_checkpoint

# ---- processes -------------------------------------------------------------------------------------------


def start(*options: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "odeblock", "train", "cifar10", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def start_two(*options: str) -> list[subprocess.Popen[str]]:
    """Two processes, as ``torchrun --nproc-per-node 2`` starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [
        start(
            *options,
            WORLD_SIZE="2",
            RANK=str(i),
            LOCAL_RANK=str(i),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        for i in range(2)
    ]


def wait(*started: subprocess.Popen[str]) -> list[tuple[int, str, str]]:
    found = []
    for process in started:
        out, err = process.communicate(timeout=300)
        assert "Traceback" not in err, err
        found.append((process.returncode, out, err))
    return found


def test_two_processes_are_one(tmp_path: Path) -> None:
    """With one batch for both, stopped and going on: the same network up to rounding."""
    options = ["--quick", "--norm", "none", "--precision", "float64", "--epochs", "2", "--output"]
    alone, both = tmp_path / "alone", tmp_path / "both"
    assert main(["train", "cifar10", *options, str(alone)]) == 0
    (first, out, _), second = wait(*start_two(*options, str(both), "--minutes", "1e-6"))
    assert (first, second[0]) == (0, 0)
    assert "stopped after 1e-06 minutes at step 1 of 12" in out
    assert second[1] == ""
    assert [code for code, *_ in wait(*start_two(*options, str(both), "--resume"))] == [0, 0]
    a, b = read_checkpoint(alone), read_checkpoint(both)
    assert a is not None
    assert b is not None
    assert a["step"] == b["step"] == 12
    torch.testing.assert_close(a["state_dict"], b["state_dict"], rtol=1e-9, atol=1e-12)
    for x, y in zip(comparable(a["log"]), comparable(b["log"]), strict=True):
        for key in ("train_loss", "validation_loss", "validation_accuracy", "test_loss", "test_accuracy"):
            assert x.get(key) == pytest.approx(y.get(key), rel=1e-9), key
    starts = [line for line in b["log"] if line["kind"] == "start"]
    assert [line["processes"] for line in starts] == [2, 2]


# ---- command line ----------------------------------------------------------------------------------------


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Children take Ctrl-C, which a background job of a shell ignores, and whatever it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption(number: signal.Signals, tmp_path: Path) -> None:
    cifar_files.write_binary(tmp_path, cifar_files.draw(400, 40))
    options = ["--quick", "--norm", "none", "--data", str(tmp_path), "--batch", "8", "--epochs"]
    folder = tmp_path / "run"
    process = start(*options, "1000", "--output", str(folder))
    while not (folder / CHECKPOINT).exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    ((code, out, _),) = wait(process)
    assert code == 130
    assert "interrupted at step" in " ".join(out.split())
    state = read_checkpoint(folder)
    assert state is not None
    assert state["step"] >= 45
    assert sorted(path.name for path in folder.iterdir()) == [CHECKPOINT, LOG]


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], threads: None) -> None:
    cifar_files.write_python(tmp_path, cifar_files.draw(200, 20))
    folder = tmp_path / "run"
    options = ["train", "cifar10", "--quick", "--norm", "none", "--output", str(folder)]
    settings = ["--data", str(tmp_path), "--epochs", "2", "--batch", "16", "--images", "170", "--init", "iid"]
    assert main([*options, *settings]) == 0
    out = capsys.readouterr().out
    for part in (
        "cifar-10-batches-py, 153 images",
        "L = 4",
        "epoch   2",
        "validation accuracy",
        "test accuracy",
    ):
        assert part in out
    state = read_checkpoint(folder)
    assert state is not None
    expected = CifarConfig(**{**CIFAR_QUICK, "epochs": 2, "batch_size": 16, "images": 170, "norm": "none"})
    assert state["config"] == asdict(replace(expected, init="iid").resolved())
    assert state["network"] == network_arguments(replace(expected, init="iid"))
    before = (folder / CHECKPOINT).read_bytes()
    assert main([*options, "--data", str(tmp_path), "--resume"]) == 0  # is at its end, and has its settings
    assert (folder / CHECKPOINT).read_bytes() == before
    assert main([*options[:-1], str(tmp_path / "new"), *settings, "--lr", "1e29", "--resume"]) == 1
    assert "stopped: the loss is" in capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["train", "cifar10", *options])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that is at its end."""
    folder = tmp_path_factory.mktemp("run")
    options = ["--quick", "--norm", "none", "--epochs", "1", "--output", str(folder)]
    assert main(["train", "cifar10", *options]) == 0
    return folder


def test_refusals(tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = ("--output", str(finished), "--quick")
    folder = tmp_path / "new"
    for options, expected in (
        (["--output", str(folder)], "argument --data: expected a folder for CIFAR-10, got none"),
        (["--output", str(folder), "--quick", "--download"], "argument --data: expected a folder"),
        (["--output", str(folder), "--data", str(tmp_path / "x")], "found nothing"),
        (here, "argument --output: expected a folder without a run"),
        ([*here, "--resume", "--depth", "5"], "argument --depth: the run that goes on has 4, got 5"),
        (
            [*here, "--resume", "--schedule", "cosine"],
            "argument --schedule: the run that goes on has onecycle",
        ),
        (["--output", str(folder), "--quick", "--batch", "1000"], "at least a batch, 1000 images; got 432"),
        (["--output", str(folder), "--quick", "--images", "5"], "10 training images or more, got 5"),
        (["--output", str(folder), "--norm", "layer"], "--norm"),
        (["--output", str(folder), "--minutes", "0"], "--minutes: expected a finite number > 0"),
        (["--output", str(folder), "--images", "9" * 20], "--images: expected a whole number >= 1 and <= "),
        (["--output", str(folder), "--channels", "9" * 20], "--channels: expected a whole number >= 1 and "),
        (["--output", str(folder), "--lr", "1e308"], "--lr: expected a finite number > 0 and <= 1e+29, got"),
        (["--output", str(folder), "--precision", "float8"], "--precision"),
    ):
        assert expected in refused(capsys, *options)


@pytest.mark.parametrize("damage", [lambda b: b[:-100], lambda b: b"", lambda b: b"no checkpoint"])
def test_a_damaged_checkpoint(
    damage: Callable[[bytes], bytes], tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / CHECKPOINT
    path.write_bytes(damage((finished / CHECKPOINT).read_bytes()))
    message = refused(capsys, "--quick", "--resume", "--output", str(tmp_path))
    assert f"{path}: expected a checkpoint of train cifar10" in message


def test_a_run_from_a_gpu_that_is_not_here(
    tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = read_checkpoint(finished)
    assert state is not None
    state["config"]["device"] = "cuda:99"
    save_checkpoint(tmp_path / CHECKPOINT, state)
    here = ("--quick", "--resume", "--output", str(tmp_path))
    assert "argument --device: expected cpu or one of the" in refused(capsys, *here)
    assert main(["train", "cifar10", *here, "--device", "cpu"]) == 0


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "cifar10", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "torchrun",
        "cifar-10-batches-bin",
        "default: 256; quick: 4",
        "zero_v with norm none",
        "--minutes",
    ):
        assert part in text
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "cifar10" in capsys.readouterr().out
