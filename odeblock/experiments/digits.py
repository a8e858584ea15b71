"""The data: 1,797 real handwritten digits of 8x8 pixels, part of scikit-learn: nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits as load_bunch
from sklearn.model_selection import train_test_split
from torch import Tensor

SPLIT_SEED = 0
"""Seed of the stratified split into 80 % training and 20 % test digits; the same for every experiment."""


@dataclass(frozen=True)
class Digits:
    """Pixels x [n, 64] in float32 and labels y [n] in int64, 1,437 for training and 360 for testing."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load_digits(device: str = "cpu") -> Digits:
    """The digits on ``device``: pixels centred one by one and scaled by one number to variance 1 on average.

    Both come from the training set alone. One scale for all pixels, because those that hardly ever differ
    (the corners) would otherwise be blown up to noise.
    """
    pixels, labels = load_bunch(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        pixels, labels, test_size=0.2, stratify=labels, random_state=SPLIT_SEED
    )
    mean = train_x.mean(axis=0)
    deviation = (train_x - mean).std()

    def tensor(array: NDArray[np.float64], dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(array, dtype=dtype, device=device)

    return Digits(
        tensor((train_x - mean) / deviation, torch.float32),
        tensor(train_y, torch.int64),
        tensor((test_x - mean) / deviation, torch.float32),
        tensor(test_y, torch.int64),
    )
