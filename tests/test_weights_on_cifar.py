"""``reproduce weights-on-cifar``: trains what is missing, reads what is trained, refuses what is another."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cifar_files
import pytest
import torch

from odeblock.__main__ import main
from odeblock.experiments.config import EXPERIMENTS, CifarWeightsConfig, Refusal

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from odeblock.experiments import reproduce
from odeblock.experiments.cifar.run import Run, read_checkpoint

NAME = "weights-on-cifar"
SMALL = CifarWeightsConfig(depth=4, channels=4, norm="none", epochs=2, images=160, data="generated")


def run(folder: Path, config: CifarWeightsConfig = SMALL) -> dict[str, Any]:
    assert reproduce.reproduce(NAME, config, folder) == 0
    found: dict[str, Any] = json.loads((folder / f"{NAME}.json").read_text())
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a whole experiment."""
    folder = tmp_path_factory.mktemp(NAME)
    run(folder)
    return folder


def test_what_is_told(folder: Path) -> None:
    found = json.loads((folder / f"{NAME}.json").read_text())
    for name, part in found["parts"].items():
        state = read_checkpoint(folder / "runs" / f"{name}-0")
        assert state is not None
        assert state["log"][-1] == part["result"]
        for stack, curve in part["coefficients"].items():
            assert len(curve["index"]) == 4
            entries = state["state_dict"][f"block.{stack}"][(slice(None), *curve["index"])]
            assert curve["trained"] == pytest.approx(entries.tolist())
            assert curve["trained"] != curve["initial"]
            flat = len(set(curve["initial"])) == 1
            assert flat == (name != "gelu-iid")
        assert (part["smoothness"]["W"]["total_variation"] == 0) == (name != "gelu-iid")
        assert part["result"]["test_accuracy"] >= 0
    with (folder / f"{NAME}.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1", "2"] * 3
    assert float(rows[2]["W_max"]) < float(rows[5]["W_max"])
    for text in ("GELU, smooth", "GELU, i.i.d.", "ReLU, smooth"):
        assert sum(text in label for label in found["findings"]) == 3


def test_what_is_trained_is_read(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without data, by other code, and where ``train cifar10`` has trained it."""
    before = json.loads((folder / f"{NAME}.json").read_text())
    monkeypatch.setattr(torch, "__version__", "0.1")
    assert run(folder, replace(SMALL, data=None))["parts"] == before["parts"]
    options = ["--quick", "--norm", "none", "--depth", "4", "--channels", "4", "--epochs", "2"]
    for name, activation, init in (
        ("gelu-smooth", "gelu", "tied"),
        ("gelu-iid", "gelu", "iid"),
        ("relu-smooth", "relu", "tied"),
    ):
        runs = ["--activation", activation, "--init", init, "--output", str(tmp_path / "runs" / f"{name}-0")]
        assert main(["train", "cifar10", *options, "--images", "160", "--backward", "store", *runs]) == 0
    found = run(tmp_path, replace(SMALL, data=None))
    for name, part in found["parts"].items():
        assert part["result"].keys() == before["parts"][name]["result"].keys()


def test_an_interrupted_training_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, saved = Run.save, 0

    def interrupted(run: Run) -> None:
        nonlocal saved
        save(run)
        saved += 1
        if saved == 4:  # the first network's two epochs and result, the second one's first
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "save", interrupted)
    assert reproduce.reproduce(NAME, SMALL, tmp_path) == 130
    found = run(tmp_path)
    assert saved == 9
    before = json.loads((folder / f"{NAME}.json").read_text())
    for name, part in found["parts"].items():
        assert part["coefficients"] == before["parts"][name]["coefficients"]


def test_refusals(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Refusal, match="--data: expected a folder with CIFAR-10 to train with, got none"):
        reproduce.reproduce(NAME, replace(SMALL, data=None), tmp_path)
    with pytest.raises(Refusal, match=r"--output: .*gelu-smooth-0 has another run: argument --epochs"):
        reproduce.reproduce(NAME, replace(SMALL, epochs=3), folder)
    capsys.readouterr()
    for options, expected in (
        ([NAME], "argument --data: expected a folder with CIFAR-10 to train with, got none"),
        ([NAME, "--data", str(tmp_path / "missing")], "missing: expected a folder with CIFAR-10"),
        (["long-time", "--data", str(tmp_path)], "argument --data: long-time takes none"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["reproduce", *options, "--output", str(tmp_path / "new")])
        assert stop.value.code == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        assert expected in message


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cifar_files.write_binary(tmp_path, cifar_files.draw(160, 16))
    monkeypatch.setitem(EXPERIMENTS, NAME, replace(EXPERIMENTS[NAME], quick=replace(SMALL, epochs=1)))
    folder = tmp_path / "out"
    assert main(["reproduce", NAME, "--quick", "--data", str(tmp_path), "--output", str(folder)]) == 0
    state = read_checkpoint(folder / "runs" / "gelu-iid-0")
    assert state is not None
    assert state["log"][0]["data"]["form"] == "cifar-10-batches-bin"
