"""``benchmarks/accuracy.py``: a short run writes what it should, and the documentation shows its numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from oracle import FLOOR_ULP, run

from odeblock import reference

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
GRADIENTS = ("h", "V", "W")
FLOORS = {str(dtype).removeprefix("torch."): ulp * torch.finfo(dtype).eps for dtype, ulp in FLOOR_ULP.items()}
PEERS = {"adjoint_2022", "torchdiffeq", "torchdiffeq_default"}


def script(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, BENCHMARKS / "accuracy.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("accuracy") / "new"
    done = script("--quick", "--output", found)
    assert done.returncode == 0, done.stderr
    return found


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "gradient_error.json").read_text())
    return found


@pytest.fixture
def accuracy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import accuracy

    return accuracy


def gradient(entry: dict[str, Any]) -> float:
    return max(entry["errors"][name] for name in GRADIENTS)


def cases(results: dict[str, Any]) -> dict[tuple[str, str, int], dict[str, dict[str, Any]]]:
    """(weights, dtype, depth) -> method -> entry."""
    found: dict[tuple[str, str, int], dict[str, dict[str, Any]]] = {}
    for entry in results["entries"]:
        found.setdefault((entry["weights"], entry["dtype"], entry["depth"]), {})[entry["method"]] = entry
    return found


def test_files(folder: Path, results: dict[str, Any]) -> None:
    names = {path.name for path in folder.iterdir()}
    assert names == {"gradient_error.json", "gradient_error.md", "gradient_error.png"}
    assert imread(folder / "gradient_error.png").std() > 0.05
    for name in ("odeblock", "torch", "torchdiffeq", "numpy"):
        assert results["versions"][name]
    assert results["machine"]["cpu"]


def test_every_method_on_every_case(folder: Path, results: dict[str, Any]) -> None:
    text = (folder / "gradient_error.md").read_text()
    found = cases(results)
    assert len(found) == 3 * 2 * 2
    for (_, dtype, _), methods in found.items():
        expected = {"eager", "store", "checkpoint", "auto", "adjoint", *PEERS}
        assert methods.keys() == expected | ({"eager_low_state"} if dtype == "bfloat16" else set())
        for name, entry in methods.items():
            assert entry["errors"].keys() >= {"y", *GRADIENTS}, entry.get("reason")
            assert ("states" in entry["errors"]) == (name == "adjoint" or name in PEERS)
    assert text.count("| `adjoint` |") == 6 * 4  # errors, states, evaluations, and the three gradients apart


def test_ours_keep_the_rule(results: dict[str, Any]) -> None:
    for (weights, dtype, depth), methods in cases(results).items():
        for name in ("store", "checkpoint", "auto", "adjoint"):
            for result in GRADIENTS:
                error, eager = (methods[m]["errors"][result] for m in (name, "eager"))
                assert error <= max(2 * eager, FLOORS[dtype]), (weights, dtype, depth, name, result)


def test_peers_are_as_far_off_as_they_should_be(results: dict[str, Any]) -> None:
    found = cases(results)
    methods = found["smooth", "float32", 64]
    assert gradient(methods["adjoint_2022"]) > 500 * gradient(methods["adjoint"])
    assert methods["adjoint_2022"]["errors"]["states"] > 500 * methods["adjoint"]["errors"]["states"]
    assert methods["adjoint_2022"]["evaluations"] == 2
    assert 1 <= methods["adjoint"]["evaluations"] < 2
    assert methods["torchdiffeq"]["evaluations"] == 1
    # Both step down with f at h_{k+1}, so have the same states.
    theirs = methods["torchdiffeq"]["errors"]["states"]
    assert theirs == pytest.approx(methods["adjoint_2022"]["errors"]["states"], rel=0.01)
    for name in ("adjoint_2022", "torchdiffeq"):  # O(1/L)
        shallow, deep = (gradient(found["smooth", "float32", depth][name]) for depth in (16, 64))
        assert 2 < shallow / deep < 8
    assert 0.5 < gradient(methods["torchdiffeq_default"]) < 2  # a layer off
    for depth in (16, 64):
        low = found["smooth", "bfloat16", depth]["eager_low_state"]
        assert gradient(low) > gradient(found["smooth", "bfloat16", depth]["eager"])


def test_another_network_is_refused(accuracy: ModuleType) -> None:
    case = accuracy.make_case("smooth", 16, seed=0, epochs=0)
    truth = run(reference.deep_residual, case, torch.float64)
    wrong = partial(accuracy.peers.adjoint_2022, {})

    def shifted(*tensors: Any, **options: Any) -> torch.Tensor:
        return wrong(*tensors, **{**options, "scale": 1.001 / 16})

    accuracy.check_network("right", wrong, case, truth)
    with pytest.raises(AssertionError, match="shifted: another network"):
        accuracy.check_network("shifted", shifted, case, truth)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--depths", "48"), "powers of 2"), (("--quick", "--docs"), "whole run")],
)
def test_arguments_that_do_not_fit(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    done = script("--output", tmp_path / "new", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "new").exists()


def test_documentation_shows_the_numbers_that_are_kept(accuracy: ModuleType) -> None:
    report = accuracy.accuracy_report
    results = json.loads(report.DOCS_JSON.read_text())
    assert not results["quick"]
    assert report.BEGIN + report.render(results) + report.END in report.DOCS_PAGE.read_text()
    assert imread(report.DOCS_FIGURE).std() > 0.05
