"""The scripts of examples/ at a small size: their claims hold, and their docstrings show what they print."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], threads: None) -> Any:
    """main(**settings) of an example, which prints what its docstring shows, with other numbers."""
    torch.set_num_threads(1)  # enough for these sizes
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def run(name: str, **settings: int) -> dict[str, float]:
        example = importlib.import_module(name)
        results: dict[str, float] = example.main(**settings)
        _, _, shown = example.__doc__.partition("It prints\n")
        assert without_numbers(capsys.readouterr().out) == without_numbers(shown)
        return results

    return run


def without_numbers(text: str) -> list[list[str]]:
    numbers = re.compile(r"\d[\d.]*(e[-+]\d+)?")
    return [numbers.sub("#", line).split() for line in text.strip().splitlines()]


def test_tabular(run: Any) -> None:
    right = run("tabular", depth=32, epochs=5)
    assert right["DeepResBlock"] > 0.85
    assert right["DeepResBlock"] > right["MLP of 3 layers"] - 0.05
    assert right["MLP as deep"] < 0.5


def test_ode_regression(run: Any) -> None:
    found = run("ode_regression", depth=64, iterations=120, rows=64)
    assert found["block, error"] < 1e-6  # it is the gradient of torchdiffeq's steps
    assert found["odeint_adjoint, error"] > 1e-3
    assert found["block, seconds"] < found["odeint_adjoint, seconds"]
    assert found["block, kept"] < found["odeint, kept"] / 20
    assert found["loss"] < 0.02
    assert found["gap"] < 0.03


def test_transformer(run: Any) -> None:
    nats = run("transformer", layers=1, depth=4, iterations=60)
    assert nats["transformer"] < nats["frequency"] - 0.2 < nats["uniform"]


def test_from_layers(run: Any) -> None:
    found = run("from_layers", depth=24, epochs=2)
    assert found["difference"] < 1e-5
    assert found["kept by block"] < found["kept by loop of modules"] / 4
    assert found["loss after"] < 0.7 * found["loss before"]
    assert found["loss of the old network"] == pytest.approx(found["loss after"], rel=1e-4)


def test_bf16(run: Any) -> None:
    found = run("bf16", depth=128, epochs=1)
    assert found["block"] < 0.01
    assert found["loop"] > 10 * found["block"]
    assert found["torch.bfloat16"] > 0.5
    assert abs(found["torch.bfloat16"] - found["torch.float32"]) < 0.02


# ---- with frameworks around PyTorch, where these are installed -------------------------------------------


def example(name: str, *packages: str) -> ModuleType:
    """A file of ``examples/`` as a module; skips without what it needs."""
    for package in packages:
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path: Path) -> None:
    digits = example("lightning_digits", "lightning")
    trainer = digits.main(
        str(tmp_path), epochs=2, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False
    )
    assert trainer.callback_metrics["accuracy"] > 0.6
    again = digits.Digits.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


@pytest.mark.filterwarnings("ignore")
def test_transformers(tmp_path: Path) -> None:
    digits = example("transformers_digits", "transformers", "accelerate")
    options = {"save_steps": 15, "use_cpu": True, "disable_tqdm": True}
    trainer = digits.main(str(tmp_path), steps=30, **options)
    assert trainer.evaluate()["eval_accuracy"] > 0.6
    state = trainer.model.state_dict()
    again = digits.Digits.from_pretrained(tmp_path / "checkpoint-30")
    for name, value in state.items():
        assert torch.equal(again.state_dict()[name], value)
    resumed = digits.main(str(tmp_path / "other"), steps=15, **options)
    resumed.args.max_steps = 30
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-15"))
    for name, value in resumed.model.state_dict().items():
        torch.testing.assert_close(value, state[name])
