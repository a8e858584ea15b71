"""The examples with frameworks around PyTorch, where these are installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "examples"


def example(name: str, *packages: str) -> ModuleType:
    """A file of ``examples/`` as a module; skips without what it needs."""
    for package in packages:
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
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
