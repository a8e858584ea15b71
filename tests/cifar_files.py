"""Writes small data sets in each form that CIFAR-10 comes in, as the official files are made."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from odeblock.experiments.cifar.files import Bytes, Files, Images

NAMES = tuple(f"data_batch_{i}" for i in range(1, 6))


def draw(train: int = 50, test: int = 10, seed: int = 0) -> Files:
    """Random images."""
    generator = np.random.default_rng(seed)

    def images(count: int) -> Images:
        pixels = generator.integers(0, 256, (count, 3, 32, 32), np.uint8)
        return Images(pixels, generator.integers(0, 10, count, np.uint8))

    return Files("", images(train), images(test))


def batches(files: Files) -> dict[str, tuple[Bytes, Bytes]]:
    """pixels [n, 3072] and labels [n] by the name of the file they go to."""
    assert files.test is not None
    train = zip(np.split(files.train.pixels, 5), np.split(files.train.labels, 5), strict=True)
    found = dict(zip(NAMES, train, strict=True))
    found["test_batch"] = (files.test.pixels, files.test.labels)
    return {name: (pixels.reshape(-1, 3072), labels) for name, (pixels, labels) in found.items()}


def write_binary(folder: Path, files: Files) -> Path:
    """``cifar-10-batches-bin`` in ``folder``."""
    target = folder / "cifar-10-batches-bin"
    target.mkdir(parents=True)
    for name, (pixels, labels) in batches(files).items():
        (target / f"{name}.bin").write_bytes(np.concatenate([labels[:, None], pixels], 1).tobytes())
    return target


def write_python(folder: Path, files: Files) -> Path:
    """``cifar-10-batches-py`` in ``folder``."""
    target = folder / "cifar-10-batches-py"
    target.mkdir(parents=True)
    for name, (pixels, labels) in batches(files).items():
        batch = {
            b"batch_label": name.encode(),
            b"labels": labels.tolist(),
            b"data": pixels,
            b"filenames": [f"{i}.png".encode() for i in range(len(labels))],
        }
        (target / name).write_bytes(pickle_of_2009(batch))
    return target


class _Pickler(pickle._Pickler):  # type: ignore[name-defined] # the one written in Python
    """Writes bytes as Python 2 wrote a str: the official files come from there."""

    def save_bytes(self, value: bytes) -> None:
        self.write(b"T" + struct.pack("<i", len(value)) + value)  # BINSTRING
        self.memoize(value)

    dispatch: ClassVar = {**pickle._Pickler.dispatch, bytes: save_bytes}  # type: ignore[attr-defined]


def pickle_of_2009(value: Any) -> bytes:
    """A pickle of protocol 2, with numpy where it was then."""
    file = io.BytesIO()
    _Pickler(file, 2).dump(value)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def pack(folder: Path, archive: Path) -> Path:
    """``folder`` as ``archive``, a .tar.gz."""
    with tarfile.open(archive, "w:gz") as file:
        file.add(folder, folder.name)
    return archive


def jpeg(pixels: Bytes, **options: Any) -> bytes:
    """One image [3, h, w] as a JPEG file."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(file, "JPEG", quality=95, **options)
    return file.getvalue()


def write_npz(path: Path, files: Files, **replaced: Any) -> Path:
    """The training images of ``files`` as JPEG; some of the arrays ``replaced``."""
    images = [jpeg(pixels) for pixels in files.train.pixels]
    arrays = {
        "jpeg": np.frombuffer(b"".join(images), np.uint8),
        "length": np.array([len(image) for image in images], np.uint16),
        "label": files.train.labels,
    }
    np.savez(path, **{**arrays, **replaced})
    return path
