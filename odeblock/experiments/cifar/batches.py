"""Batches of augmented images, made on the device a batch at a time: crops, mirror images, one scale.

Images stay bytes until a batch is made: all of CIFAR-10 are 150 MB on the device. Everything random about an
epoch is drawn at its start, so that a run can stop after any step and go on with the same batches.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .files import SIZE, DataError, Images

PADDING = 4
MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
"""Of red, green and blue over CIFAR-10's training images, from 0 to 1."""


def normalise(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bytes [B, 3, 32, 32] as numbers with mean 0 and variance 1, by channel, over CIFAR-10."""
    mean, deviation = _scale(dtype, pixels.device)
    return (pixels.to(dtype) / 255 - mean) / deviation


@functools.cache
def _scale(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Mean and deviation, [3, 1, 1] each. Made once: a copy to a GPU waits for all that it has to do."""
    return tuple(
        torch.tensor(values, dtype=dtype, device=device).view(3, 1, 1) for values in (MEAN, DEVIATION)
    )


def crop_and_flip(pixels: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
    """Of each image, with a black border of ``PADDING`` pixels, the 32x32 pixels from (top, left) on.

    One gather for the whole batch.

    Arguments:
        pixels: [B, 3, 32, 32], bytes. top, left: [B], from 0 to 2 · ``PADDING``, which is its number of
            positions less one. flip: [B], bool; whether to mirror it left to right.
    """
    padded = F.pad(pixels, (PADDING,) * 4)
    along = torch.arange(SIZE, device=pixels.device)
    rows = top[:, None] + along  # [B, 32]
    columns = left[:, None] + torch.where(flip[:, None], SIZE - 1 - along, along)
    image = torch.arange(len(pixels), device=pixels.device)[:, None, None, None]
    channel = torch.arange(3, device=pixels.device)[:, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


class Batches:
    """Endless batches of ``images``: epoch after epoch in a random order, each image augmented at random.

    What is left of an epoch's order at its end, less than a batch, is not used. Of several processes each
    draws the same, and takes its share of every batch.

    Arguments:
        images: the training set. size: images of a batch, of all processes together. seed: of order and
            augmentation. device: where batches are made. rank, processes: which share; ``size`` is a
            multiple of ``processes``. dtype: of x.

    Raises:
        DataError: there are less than ``size`` images.
    """

    def __init__(
        self,
        images: Images,
        size: int,
        seed: int,
        device: str = "cpu",
        rank: int = 0,
        processes: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if len(images) < size:
            raise DataError(f"training set: expected at least a batch, {size} images; got {len(images)}")
        self.size, self.rank, self.processes, self.dtype = size, rank, processes, dtype
        self.pixels, self.labels = on_device(images, device)
        self.steps = len(images) // size
        """Batches of an epoch."""
        self.generator = torch.Generator().manual_seed(seed)  # on the CPU: the same for every device
        self._draw()

    def _draw(self) -> None:
        """The next epoch's order and augmentation."""
        self._state, self.position = self.generator.get_state(), 0
        count, device = len(self.labels), self.labels.device
        self._order = torch.randperm(count, generator=self.generator).to(device)
        places = torch.randint(2 * PADDING + 1, (2, count), generator=self.generator).to(device)
        self._top, self._left = places
        self._flip = torch.randint(2, (count,), generator=self.generator).bool().to(device)

    def next(self) -> tuple[Tensor, Tensor]:
        """This process' share of the next batch: x [B, 3, 32, 32], normalised, and y [B]."""
        if self.position == self.steps:
            self._draw()
        share = self.size // self.processes
        start = self.position * self.size + self.rank * share
        chosen = slice(start, start + share)
        rows = self._order[chosen]
        pixels = crop_and_flip(self.pixels[rows], self._top[chosen], self._left[chosen], self._flip[chosen])
        self.position += 1
        return normalise(pixels, self.dtype), self.labels[rows]

    def state_dict(self) -> dict[str, Any]:
        """Where it is, for ``load_state_dict`` of one with the same arguments."""
        return {"generator": self._state, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        self._draw()
        self.position = state["position"]


def on_device(images: Images, device: str) -> tuple[Tensor, Tensor]:
    """pixels [n, 3, 32, 32], bytes, and labels [n], int64, as tensors on ``device``."""
    return torch.tensor(images.pixels, device=device), torch.tensor(images.labels, device=device).long()
