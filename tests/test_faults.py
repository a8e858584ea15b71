"""What becomes of the commands' files: kill -9 at any moment, full disks, removed folders, NaN losses.

A run is a process forked from a server that has imported everything, and can so be killed many times.
"""

from __future__ import annotations

import http.client
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import cifar_files
import pytest
import torch

from odeblock import DeepResNet
from odeblock.__main__ import main

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from cifar_runs import assert_same_run

from odeblock.experiments import loop, train
from odeblock.experiments.cifar import data
from odeblock.experiments.cifar.run import CHECKPOINT, LOG, Run, read_checkpoint
from odeblock.experiments.config import CIFAR_QUICK, QUICK, CifarConfig, TrainConfig
from odeblock.experiments.digits import load_digits
from odeblock.experiments.networks import build_network

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and limits the size of files")

processes = multiprocessing.get_context("forkserver")
# What takes long to import, of PyTorch for its optimisers. Not this file, which the server does not find.
processes.set_forkserver_preload(
    [
        "pytest",
        "torch._dynamo",
        "matplotlib.backends.backend_agg",
        "odeblock.__main__",
        "odeblock.experiments.train",
        "odeblock.experiments.cifar.command",
    ]
)

CIFAR = ["train", "cifar10", "--quick", "--norm", "none", "--epochs", "2", "--resume", "--output"]
DIGITS = ["train", "--quick", "--epochs", "1", "--output"]

# ---- a command in a process of its own -------------------------------------------------------------------


def at(moment: int, action: Callable[[], None]) -> None:
    """Before its ``moment``-th operation on the content or the name of a file this process does that, too."""
    count = 0

    def counted(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal count
            if count == moment:
                action()
            count += 1
            return operation(*arguments)

        return call

    os.fsync, os.replace = counted(os.fsync), counted(os.replace)  # of outputs.atomic_file, two a file


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def command(arguments: list[str], errors: Path, prepare: tuple[Callable[..., None], Any] | None) -> None:
    """The target of a process: ``main``, standard error to a file, standard output to none."""
    torch.set_num_threads(1)
    train.step_seconds = lambda *_: (1.0, 2.0)  # type: ignore[assignment] # what takes most of the time
    train.step_memory = lambda *_, eager: 1000 + eager  # type: ignore[assignment]
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    if prepare is not None:
        prepare[0](prepare[1])
    sys.exit(main(arguments))


def begin(arguments: list[str], folder: Path, prepare: tuple[Callable[..., None], Any] | None = None) -> Any:
    process = processes.Process(
        target=command, args=([*arguments, str(folder)], folder.with_suffix(".errors"), prepare)
    )
    process.start()
    return process


def run(
    arguments: list[str], folder: Path, prepare: tuple[Callable[..., None], Any] | None = None
) -> tuple[int | None, str]:
    """Exit code, and standard error."""
    process = begin(arguments, folder, prepare)
    process.join(300)
    return process.exitcode, folder.with_suffix(".errors").read_text()


def kill_at(moment: int) -> None:
    at(moment, kill)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---- kill -9 ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of ``CIFAR`` that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(CIFAR, folder) == (0, "")
    return folder


def test_a_run_killed_at_each_operation_goes_on_to_the_bit(tmp_path: Path, whole: Path) -> None:
    """Of the log, then of the checkpoint, that are written after an epoch, and with the result."""
    folder, steps = tmp_path / "run", []
    for moment in (0, 1, 2, 3, 4, 6):
        assert run(CIFAR, folder, (kill_at, moment)) == (-signal.SIGKILL, "")
        state = read_checkpoint(folder)
        steps.append(state and state["step"])
    assert steps == [None, None, None, None, 6, 12]
    assert "result" in (folder / LOG).read_text()  # which the checkpoint does not know of
    assert run(CIFAR, folder) == (0, "")
    assert names(folder) == {CHECKPOINT, LOG}
    assert_same_run(folder, whole)


@pytest.mark.parametrize("kills", [4, pytest.param(300, marks=pytest.mark.long)])
def test_a_run_killed_at_any_moment_goes_on_to_the_bit(kills: int, tmp_path: Path, whole: Path) -> None:
    """With a checkpoint after every step."""
    options = [*CIFAR[:-1], "--checkpoint-every", "1e-9", CIFAR[-1]]
    begun = time.monotonic()
    assert run(options, tmp_path / "unhurt") == (0, "")
    longest = time.monotonic() - begun
    dice, finished, killed = random.Random(0), 0, 0
    while killed < kills:
        folder = tmp_path / f"run{finished}"
        process = begin(options, folder)
        process.join(dice.uniform(0, longest))
        if process.exitcode is None:
            process.kill()
            killed += 1
        process.join()
        if folder.exists():
            read_checkpoint(folder)  # raises if it is not whole
        if process.exitcode == 0:
            finished += 1
            assert_same_run(folder, whole)
    assert run(options, folder) == (0, "")
    assert_same_run(folder, whole)
    assert names(folder) == {CHECKPOINT, LOG}


def test_a_run_of_an_experiment_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    """In the folders that ``reproduce`` makes for trainings of its own."""
    (tmp_path / f".{CHECKPOINT}.9999999.partial").write_bytes(b"half")
    config = CifarConfig(**{**CIFAR_QUICK, "norm": "none", "images": 160, "batch_size": 24})
    Run(tmp_path, config, data.load(None, 160))
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    "moments", [(1, 3, 9), pytest.param(tuple(range(22)), marks=pytest.mark.long)], ids=["some", "all"]
)
def test_digits_killed_leave_whole_files(moments: tuple[int, ...], tmp_path: Path) -> None:
    """22 operations: smooth weights, figure and results; both weights, figure, results, twice."""
    folder = tmp_path / "run"
    for moment in moments:
        assert run(DIGITS, folder, (kill_at, moment)) == (-signal.SIGKILL, "")
        for path in folder.glob("*.pt"):
            checkpoint = torch.load(path, weights_only=True)
            DeepResNet(**checkpoint["network"]).load_state_dict(checkpoint["state_dict"])
        if (folder / train.RESULTS).exists():
            assert json.loads((folder / train.RESULTS).read_text())["interrupted"]
    assert run(DIGITS, folder) == (0, "")
    assert names(folder) == {train.RESULTS, train.FIGURE, *train.CHECKPOINTS.values()}


# ---- files that cannot be written ------------------------------------------------------------------------


def limit_size(size: int) -> None:
    """Of files, what is printed among them."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def remove(folder: Path) -> None:
    at(0, lambda: shutil.rmtree(folder))


def check_line(found: tuple[int | None, str], file: Path | str, reason: str) -> None:
    assert found == (1, f"python -m odeblock: error: {file}: {reason}\n")


@pytest.mark.parametrize(("size", "name"), [(500, LOG), (20_000, CHECKPOINT)])
def test_no_room_for_the_next_checkpoint(size: int, name: str, tmp_path: Path, whole: Path) -> None:
    """The last one stays, and the run goes on from there once there is room."""
    folder = tmp_path / "run"
    assert run(CIFAR, folder, (kill_at, 4))[0] == -signal.SIGKILL  # after an epoch
    before = (folder / CHECKPOINT).read_bytes()
    check_line(run(CIFAR, folder, (limit_size, size)), folder / name, "File too large")
    assert (folder / CHECKPOINT).read_bytes() == before
    assert names(folder) == {CHECKPOINT, LOG}
    assert run(CIFAR, folder) == (0, "")
    assert_same_run(folder, whole)


def test_no_room_for_a_figure(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    check_line(run(DIGITS, folder, (limit_size, 100_000)), folder / train.FIGURE, "File too large")
    assert names(folder) == {train.CHECKPOINTS["smooth"]}


def test_no_room_for_a_part(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code, errors = run(
        ["reproduce", "large-depth-convergence", "--quick", "--output"], folder, (limit_size, 500)
    )
    assert code == 1
    assert errors.count("\n") == 1
    assert errors.startswith(f"python -m odeblock: error: {folder / 'parts'}")
    assert names(folder / "parts") == set()


def test_a_folder_that_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    check_line(run(CIFAR, folder, (remove, folder)), folder / LOG, "No such file or directory")


def test_standard_output_that_is_full(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with suppress(OSError), open("/dev/full", "w") as full:  # closing it fails, too
        monkeypatch.setattr(sys, "stdout", full)
        code = main(["info"])
    check_line((code, capsys.readouterr().err), "standard output", "No space left on device")


def test_a_reader_that_has_seen_enough(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read, write = os.pipe()
    os.close(read)
    with suppress(OSError), open(write, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        code = main(["info"])
    assert code == 1
    assert capsys.readouterr().err == ""


# ---- data that do not come -------------------------------------------------------------------------------


def test_a_download_that_breaks_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it leaves is refused, and fetched again."""
    folder, output = tmp_path / "data", tmp_path / "run"
    files = cifar_files.write_binary(tmp_path, cifar_files.draw(100, 10))
    archive = cifar_files.pack(files, tmp_path / "cifar-10-binary.tar.gz").read_bytes()
    size, error = len(archive) // 2, http.client.IncompleteRead(b"", 1000)

    def fetch(root: str, download: bool) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "cifar-10-binary.tar.gz").write_bytes(archive[:size])
        if size < len(archive):
            raise error

    module = ModuleType("torchvision.datasets")
    module.CIFAR10 = fetch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module)
    arguments = ["train", "cifar10", "--quick", "--norm", "none", "--epochs", "1", "--batch", "16"]
    arguments += ["--data", str(folder), "--output", str(output)]
    for options, expected in (
        (["--download"], f"{folder}: the download failed: IncompleteRead(0 bytes read, 1000 more expected)"),
        ([], f"{folder / 'cifar-10-binary.tar.gz'}: expected a whole file"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, *options])
        assert stop.value.code == 2
        message = capsys.readouterr().err
        assert expected in message
        assert message.count("\n") == 1
        assert names(output) == set()
    size = len(archive)
    assert main([*arguments, "--download"]) == 0


# ---- losses that are not finite --------------------------------------------------------------------------


def test_digits_keep_the_last_epoch_that_was_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps, finite = 0, loop.finite

    def diverging(loss: torch.Tensor) -> float:
        nonlocal steps
        steps += torch.is_grad_enabled()  # not where it is measured
        return finite(loss if steps < 30 else loss * math.nan)

    monkeypatch.setattr(loop, "finite", diverging)
    assert main(["train", "--quick", "--output", str(tmp_path)]) == 1
    assert "stopped: smooth network: the loss is nan after step 29 of 46" in capsys.readouterr().out
    assert names(tmp_path) == {train.RESULTS, train.FIGURE, train.CHECKPOINTS["smooth"]}
    checkpoint = torch.load(tmp_path / train.CHECKPOINTS["smooth"], weights_only=True)
    assert checkpoint["step"] == 23
    network, digits = DeepResNet(**checkpoint["network"]), load_digits()
    network.load_state_dict(checkpoint["state_dict"])
    assert loop.accuracy(network(digits.test_x), digits.test_y) == checkpoint["test_accuracy"]
    begun = build_network(TrainConfig(**QUICK), "smooth")
    assert not torch.equal(network.block.V, begun.block.V)
