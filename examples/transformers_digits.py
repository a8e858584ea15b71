"""A deep residual network as a model of Hugging Face's transformers, trained by their Trainer on digits.

pip install 'transformers[torch]' scikit-learn
python examples/transformers_digits.py
"""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments

from odeblock import DeepResBlock, DeepResNet


class DigitsConfig(PretrainedConfig):
    """Sizes of the network."""

    model_type = "odeblock-digits"

    def __init__(self, dim: int = 32, depth: int = 256, **others: Any) -> None:
        self.dim, self.depth = dim, depth
        super().__init__(**others)


class Digits(PreTrainedModel):
    """64 pixels -> 10 classes: what ``save_pretrained`` writes, ``from_pretrained`` reads."""

    config_class = DigitsConfig

    def __init__(self, config: DigitsConfig) -> None:
        super().__init__(config)
        self.network = DeepResNet(64, config.dim, config.depth, 10, bias=True)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Blocks start smooth in depth, linear maps as PyTorch has them."""
        if isinstance(module, (DeepResBlock, torch.nn.Linear)):
            module.reset_parameters()

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.network(pixels)
        loss = {} if labels is None else {"loss": cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


def examples() -> list[dict[str, Tensor]]:
    digits = load_digits()
    pixels, labels = torch.tensor(digits.data / 16).float(), torch.tensor(digits.target)
    return [{"pixels": x, "labels": label} for x, label in zip(pixels, labels, strict=True)]


def main(folder: str = "outputs/transformers", steps: int = 110, **options: Any) -> Trainer:
    """Trains, and returns the trainer with the model and its history."""
    data = examples()
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=64,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        logging_steps=10,
        report_to="none",
        **options,
    )
    trainer = Trainer(
        model=Digits(DigitsConfig()),
        args=arguments,
        train_dataset=data[:1400],
        eval_dataset=data[1400:],
        compute_metrics=lambda found: {"accuracy": (found[0].argmax(1) == found[1]).mean()},
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    print(main().evaluate())
