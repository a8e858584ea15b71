"""CIFAR-10 as it lies on disk: the two official downloads, packed or unpacked, and JPEG files in an .npz.

Nothing in a file is executed, no path in an archive is followed, and sizes are looked at before anything is
read. Whatever is wrong raises one ``DataError``, which names the file, what was expected and what came.
"""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..config import Refusal
from .unpickle import array, unpickle

Bytes = NDArray[np.uint8]

SIZE, PIXELS, CLASSES = 32, 3 * 32 * 32, 10
LARGEST_BATCH = 2**26  # bytes; the official files have 2**25 at most
LARGEST_NPZ = 2**30


class DataError(Refusal):
    """A file of the data is missing, or is not what it should be."""


@dataclass(frozen=True)
class Images:
    """pixels [n, 3, 32, 32] and labels [n], from 0 to 9; both uint8."""

    pixels: Bytes
    labels: Bytes

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Files:
    """What was read: its ``form``, and the two splits; ``test`` is None where there is none."""

    form: str
    train: Images
    test: Images | None


def read(path: Path) -> Files:
    """CIFAR-10 in the folder ``path``, or in the file ``path``.

    A folder is, or holds, ``cifar-10-batches-py`` or ``cifar-10-batches-bin``; or holds an archive of one,
    as it is downloaded, or one .npz. The first of these is read.

    The .npz has ``jpeg``, uint8 [bytes], JPEG files one after another; ``length``, unsigned [n], the bytes of
    each; ``label``, uint8 [n]. They are training images; decoding them needs Pillow.

    Raises:
        DataError: nothing like that is there, or something in it is wrong.
    """
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise DataError(f"{path}: expected a folder with CIFAR-10 or a file of it, found nothing")
    if path.name.endswith((".tar.gz", ".tgz")):
        return _read_archive(path)
    if path.suffix == ".npz":
        return _read_npz(path)
    raise DataError(f"{path}: expected a folder, an archive (.tar.gz) or an .npz, got a file of another kind")


def _read_folder(path: Path) -> Files:
    for form in FORMS:
        for folder in (path / form.folder, path):
            if (folder / form.names[0]).exists():
                return form.assemble(partial(_read_file, folder), str(folder))
    for form in FORMS:
        if (path / form.archive).exists():
            return _read_archive(path / form.archive)
    packed = sorted(path.glob("*.npz"))
    if len(packed) == 1:
        return _read_npz(packed[0])
    found = f"{len(packed)} of the last" if packed else "none of them"
    expected = ", ".join([form.folder for form in FORMS] + [form.archive for form in FORMS])
    raise DataError(f"{path}: expected one of {expected}, or one .npz; found {found}")


# ---- the official batches --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """An official form: its folder, its archive, the names of its six files, and how to decode one."""

    folder: str
    archive: str
    names: tuple[str, ...]
    decode: Callable[[bytes], Images]

    def assemble(self, content: Callable[[str], bytes], where: str) -> Files:
        """Both splits, from the ``content`` of the files by name: five for training, one for testing."""
        batches = []
        for name in self.names:
            with _explained(f"{where}/{name}"):
                batches.append(self.decode(content(name)))
        sizes = [len(batch) for batch in batches[:-1]]
        for name, size in zip(self.names, sizes, strict=False):
            if size != sizes[0]:
                raise DataError(
                    f"{where}/{name}: expected as many images as in {self.names[0]}, {sizes[0]}; got {size}"
                )
        train = Images(
            np.concatenate([batch.pixels for batch in batches[:-1]]),
            np.concatenate([batch.labels for batch in batches[:-1]]),
        )
        return Files(self.folder, train, batches[-1])


def decode_binary(content: bytes) -> Images:
    """Records of a label and 3072 pixels: 1024 red ones, row by row, then green, then blue."""
    record = 1 + PIXELS
    if not content or len(content) % record:
        raise ValueError(f"expected records of {record} bytes, got {len(content)} bytes in all")
    records = np.frombuffer(content, np.uint8).reshape(-1, record)
    return _images(records[:, 1:], records[:, 0])


def decode_python(content: bytes) -> Images:
    """A pickled dict with b"data", uint8 [n, 3072] in the order of the binary form, and b"labels", n ints."""
    batch = unpickle(content)
    if not isinstance(batch, dict) or not {b"data", b"labels"} <= batch.keys():
        raise ValueError(f'expected a dict with b"data" and b"labels", got {_shown(batch)}')
    pixels, labels = array(batch[b"data"]), batch[b"labels"]
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < 256 for label in labels):
        raise ValueError(f"labels: expected a list of numbers from 0 to 9, got {_shown(labels)}")
    return _images(pixels, np.array(labels, np.uint8))


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return f"one with {', '.join(map(repr, list(value)[:4])) or 'nothing'}"
    return type(value).__name__


FORMS = tuple(
    Form(
        f"cifar-10-batches-{short}",
        f"cifar-10-{long}.tar.gz",
        tuple(f"{name}{ending}" for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")),
        decode,
    )
    for short, long, ending, decode in (
        ("py", "python", "", decode_python),
        ("bin", "binary", ".bin", decode_binary),
    )
)


def _read_file(folder: Path, name: str) -> bytes:
    path = folder / name
    if not path.is_file():
        raise ValueError("expected this file beside the others, found nothing")
    _check_size(path.stat().st_size)
    return path.read_bytes()


def _check_size(size: int) -> None:
    if size > LARGEST_BATCH:
        raise ValueError(f"expected {LARGEST_BATCH} bytes at most, got {size}")


def _read_archive(path: Path) -> Files:
    """The files of an official archive, read from it one by one; nothing is unpacked to the disk."""
    wanted = {f"{form.folder}/{name}" for form in FORMS for name in form.names}
    contents: dict[str, bytes] = {}
    with _explained(str(path)), tarfile.open(path, "r:gz") as archive:
        for member in archive:
            if member.isfile() and member.name in wanted:
                _check_size(member.size)
                file = archive.extractfile(member)
                assert file is not None  # a regular file
                contents[member.name] = file.read()
    for form in FORMS:
        if f"{form.folder}/{form.names[0]}" in contents:
            return form.assemble(partial(_member, contents, form.folder), str(path))
    expected = " or ".join(f"{form.folder}/{form.names[0]}" for form in FORMS)
    raise DataError(f"{path}: expected {expected} in it, found neither")


def _member(contents: dict[str, bytes], folder: str, name: str) -> bytes:
    if f"{folder}/{name}" not in contents:
        raise ValueError(f"expected {folder}/{name} in the archive, found nothing")
    return contents[f"{folder}/{name}"]


# ---- JPEG ------------------------------------------------------------------------------------------------


def _read_npz(path: Path) -> Files:
    with _explained(str(path)):
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > LARGEST_NPZ:
            raise ValueError(f"expected {LARGEST_NPZ} bytes at most, unpacked; got {size}")
        with np.load(path, allow_pickle=False) as arrays:
            missing = [name for name in ("jpeg", "length", "label") if name not in arrays]
            if missing:
                raise ValueError(
                    f"expected arrays jpeg, length and label, found no {' and no '.join(missing)}"
                )
            jpeg, length, label = arrays["jpeg"], arrays["length"], arrays["label"]
        for name, values in (("jpeg", jpeg), ("length", length), ("label", label)):
            if (
                values.ndim != 1
                or values.dtype.kind != "u"
                or (name != "length" and values.dtype.itemsize > 1)
            ):
                raise ValueError(
                    f"{name}: expected unsigned bytes [n], got {values.dtype} {list(values.shape)}"
                )
        ends = length.astype(np.int64).cumsum()
        if not len(ends) or ends[-1] != len(jpeg):
            total = int(ends[-1]) if len(ends) else 0
            raise ValueError(f"jpeg: expected {total} bytes, the sum of length; got {len(jpeg)}")
        content = jpeg.tobytes()
        pixels = np.empty((len(ends), 3, SIZE, SIZE), np.uint8)
        for i, (start, end) in enumerate(zip((0, *ends[:-1]), ends, strict=True)):
            with _explained(f"{path}: image {i}"):
                pixels[i] = _decode_jpeg(content[start:end])
        return Files("JPEG", _images(pixels.reshape(-1, PIXELS), label), None)


def _decode_jpeg(content: bytes) -> Bytes:
    """One JPEG file of 32x32 pixels as [3, 32, 32]. Its size is looked at before it is decoded."""
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise ValueError("Pillow decodes it: pip install 'odeblock[experiments]'") from None
    with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
        if image.size != (SIZE, SIZE):
            raise ValueError(f"expected {SIZE}x{SIZE} pixels, got {image.size[0]}x{image.size[1]}")
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


# ---- all forms -------------------------------------------------------------------------------------------


def _images(pixels: Bytes, labels: Bytes) -> Images:
    """pixels [n, 3072] and labels [n] as ``Images``, if that is what they are."""
    if pixels.ndim != 2 or pixels.shape[1] != PIXELS or len(pixels) == 0:
        raise ValueError(f"pixels: expected shape [n, {PIXELS}] with n >= 1, got {list(pixels.shape)}")
    if labels.shape != (len(pixels),):
        raise ValueError(f"labels: expected {len(pixels)}, one for each image; got {labels.size}")
    if labels.max() >= CLASSES:
        raise ValueError(f"labels: expected numbers from 0 to {CLASSES - 1}, got {labels.max()}")
    return Images(pixels.reshape(-1, 3, SIZE, SIZE), labels)


@contextmanager
def _explained(where: str) -> Iterator[None]:
    """Errors in reading ``where`` as one ``DataError``: a damaged file makes readers raise any of a dozen."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        if not isinstance(error, ValueError):  # whose text is most often our own
            text = f"expected a whole file, got {type(error).__name__}: {text}"
        raise DataError(f"{where}: {text}") from None
