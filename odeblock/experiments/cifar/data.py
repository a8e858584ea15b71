"""The data set as training takes it: three splits, held in memory; or images made up, for a trial."""

from __future__ import annotations

import hashlib
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .files import CLASSES, SIZE, DataError, Files, Images, read

HELD_OUT = 10
"""One in so many of the training images, the last ones, is for validation: 5,000 of 50,000."""

MADE_UP, MADE_UP_TRAIN, MADE_UP_TEST = "generated", 480, 64
NOISE = 64  # of 255, standard deviation


@dataclass(frozen=True)
class Cifar10:
    """train and validation from the training set, ``test`` where there is one; what ``form`` they came in.

    fingerprint: SHA-256 of all training images and labels, so that a run goes on with the data it began with.
    """

    form: str
    train: Images
    validation: Images
    test: Images | None
    fingerprint: str

    def description(self) -> dict[str, Any]:
        """For a log."""
        sizes = {"train": len(self.train), "validation": len(self.validation)}
        return {"form": self.form, **sizes, "test": len(self.test or ()), "sha256": self.fingerprint}


def load(path: Path | None, images: int | None = None) -> Cifar10:
    """CIFAR-10 from ``path`` (``files.read``), or without one images that are made up.

    Arguments:
        path: a folder or a file. images: only the first so many of the training set, if given.

    Raises:
        DataError: there is none, or it is not what it should be; less than ``HELD_OUT`` images are left.
    """
    files = generate() if path is None else read(path)
    pixels, labels = files.train.pixels[:images], files.train.labels[:images]
    held_out = len(labels) // HELD_OUT
    if not held_out:
        raise DataError(f"{path}: expected {HELD_OUT} training images or more, got {len(labels)}")
    fingerprint = hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()
    return Cifar10(
        files.form,
        Images(pixels[:-held_out], labels[:-held_out]),
        Images(pixels[-held_out:], labels[-held_out:]),
        files.test,
        fingerprint,
    )


def generate(seed: int = 0) -> Files:
    """A few images that a network can learn to tell apart: one random picture a class, and noise."""
    generator = np.random.default_rng(seed)
    pictures = generator.integers(64, 192, (CLASSES, 3, SIZE // 8, SIZE // 8)).repeat(8, 2).repeat(8, 3)

    def draw(count: int) -> Images:
        labels = (np.arange(count) % CLASSES).astype(np.uint8)
        noisy = pictures[labels] + generator.normal(0.0, NOISE, (count, 3, SIZE, SIZE))
        return Images(noisy.clip(0, 255).astype(np.uint8), labels)

    return Files(MADE_UP, draw(MADE_UP_TRAIN), draw(MADE_UP_TEST))


def download(folder: Path) -> None:
    """Fetch the official archive into ``folder`` with torchvision, unless it is there already.

    Raises:
        DataError: torchvision is not installed, or what it fetches is not whole.
    """
    try:
        datasets = importlib.import_module("torchvision.datasets")
    except ImportError as error:
        raise DataError(
            f"torchvision downloads CIFAR-10, and cannot be imported ({error}); with the archive from "
            f"https://www.cs.toronto.edu/~kriz/cifar.html in {folder} nothing is downloaded"
        ) from None
    try:
        datasets.CIFAR10(str(folder), download=True)
    except Exception as error:  # of urllib, http, tarfile or torchvision
        text = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{folder}: the download failed: {text}") from None
