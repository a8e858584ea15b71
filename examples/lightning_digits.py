"""A deep residual network on handwritten digits with Lightning: pip install lightning scikit-learn

python examples/lightning_digits.py
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset, TensorDataset

from odeblock import DeepResNet


class Digits(lightning.LightningModule):
    """64 pixels -> 10 classes, through a block of ``depth`` steps."""

    def __init__(self, dim: int = 32, depth: int = 256, lr: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = DeepResNet(64, dim, depth, 10, bias=True, backward="checkpoint")

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        x, labels = batch
        loss = cross_entropy(self.network(x), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        x, labels = batch
        self.log("accuracy", (self.network(x).argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])


def main(folder: str = "outputs/lightning", epochs: int = 5, **options: Any) -> lightning.Trainer:
    """Trains, and returns the trainer with the model, its metrics and its last checkpoint."""
    lightning.seed_everything(0)
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data / 16).float(), torch.tensor(digits.target))
    train, test = Subset(data, range(1400)), Subset(data, range(1400, len(data)))
    trainer = lightning.Trainer(
        max_epochs=epochs,
        gradient_clip_val=1.0,
        default_root_dir=folder,
        log_every_n_steps=10,
        **options,
    )
    trainer.fit(Digits(), DataLoader(train, batch_size=64, shuffle=True), DataLoader(test, batch_size=397))
    return trainer


if __name__ == "__main__":
    print(main().callback_metrics)
