"""CIFAR-10 as it lies on disk: the two official downloads, packed or unpacked, and JPEG files in an .npz.

Nothing in a file is executed, no path in an archive is followed, and sizes are looked at before anything is
read. Whatever is wrong raises one ``DataError``, which names the file, what was expected and what came
(``saved.py`` says what may be). A link is followed where the user made it, never in an archive.
"""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import Refusal
from ..saved import check_size, explained, is_file
from ..unpickle import ARRAY_NAMES, array, unpickle

Bytes = NDArray[np.uint8]

SIZE, PIXELS, CLASSES = 32, 3 * 32 * 32, 10
LARGEST_BATCH = 2**26  # bytes; the official files have 2**25 at most
LARGEST_ARCHIVE = LARGEST_NPZ = 2**28  # bytes when unpacked; the official archives have 1.9e8
MOST_IMAGES = 2**17  # of an .npz
BLOCK = 512  # bytes; what a tar archive is made of


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
    with _explained(path):
        if path.is_dir():
            return _read_folder(path)
        if not is_file(path):
            raise ValueError("expected a folder with CIFAR-10 or a file of it, found nothing")
        if path.name.endswith((".tar.gz", ".tgz")):
            return _read_archive(path)
        if path.suffix == ".npz":
            return _read_npz(path)
        raise ValueError("expected a folder, an archive (.tar.gz) or an .npz, got a file of another kind")


_explained = partial(explained, kind=DataError)


def _read_folder(path: Path) -> Files:
    for form in FORMS:
        for folder in (path / form.folder, path):
            if (folder / form.names[0]).exists():
                return form.assemble(partial(_read_file, folder), str(folder))
    for form in FORMS:
        if (path / form.archive).is_file():
            return _read_archive(path / form.archive)
    packed = sorted(file for file in path.glob("*.npz") if file.is_file())
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
    batch = unpickle(content, ARRAY_NAMES)
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
    if not is_file(path):
        raise ValueError("expected this file beside the others, found nothing")
    check_size(path.stat().st_size, LARGEST_BATCH)
    return path.read_bytes()


def _read_archive(path: Path) -> Files:
    """The files of an official archive, read from it one by one; nothing is unpacked to the disk.

    Headers are read one by one as well: tarfile reads those that extend others (pax) before one sees how
    large they are, and some versions of it take for ever over one.
    """
    wanted = {f"{form.folder}/{name}" for form in FORMS for name in form.names}
    contents: dict[str, bytes] = {}
    with _explained(path), gzip.open(path) as file:
        while any(header := file.read(BLOCK)):  # the end is a block of zeros
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            rest = LARGEST_ARCHIVE - file.tell()
            if not 0 <= member.size <= rest:
                raise ValueError(
                    f"expected {LARGEST_ARCHIVE} bytes at most, unpacked; got a member of {member.size}"
                )
            end = file.tell() + member.size + -member.size % BLOCK
            if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and member.name in wanted:
                check_size(member.size, LARGEST_BATCH)
                contents[member.name] = file.read(member.size)
            file.seek(end)
        if len(header) < BLOCK:
            raise ValueError("expected a whole file, got the first part of one")
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
    with _explained(path):
        check_size(path.stat().st_size, LARGEST_NPZ)
        with zipfile.ZipFile(path) as archive:
            members = {entry.filename: entry.file_size for entry in archive.infolist()}
            if sum(members.values()) > LARGEST_NPZ:
                raise ValueError(
                    f"expected {LARGEST_NPZ} bytes at most, unpacked; got {sum(members.values())}"
                )
            missing = [name for name in ("jpeg", "length", "label") if f"{name}.npy" not in members]
            if missing:
                raise ValueError(
                    f"expected arrays jpeg, length and label, found no {' and no '.join(missing)}"
                )
            jpeg, length, label = (_read_array(archive, name) for name in ("jpeg", "length", "label"))
        if len(length) > MOST_IMAGES:
            raise ValueError(f"length: expected {MOST_IMAGES} images at most, got {len(length)}")
        ends = np.cumsum(length, dtype=np.uint64)
        if not len(ends) or length.max() > len(jpeg) or ends[-1] != len(jpeg):
            total = int(ends[-1]) if len(ends) else 0
            raise ValueError(f"jpeg: expected {total} bytes, the sum of length; got {len(jpeg)}")
        pixels = np.empty((len(ends), 3, SIZE, SIZE), np.uint8)
        for i, (start, end) in enumerate(zip((0, *ends[:-1]), ends, strict=True)):
            with _explained(f"{path}: image {i}"):
                pixels[i] = _decode_jpeg(jpeg[start:end].tobytes())
        return Files("JPEG", _images(pixels.reshape(-1, PIXELS), label), None)


def _read_array(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    """An array [n] of unsigned integers, bytes except for length, whose size is the one that it claims."""
    with archive.open(f"{name}.npy") as file:
        npy: Any = np.lib.format  # which has no types
        if (version := npy.read_magic(file)) != (1, 0):
            raise ValueError(f"{name}: expected an .npy of version 1.0, got {version[0]}.{version[1]}")
        shape, _, dtype = npy.read_array_header_1_0(file)
        if len(shape) != 1 or dtype.kind != "u" or (name != "length" and dtype.itemsize > 1):
            raise ValueError(f"{name}: expected unsigned bytes [n], got {dtype} {list(shape)}")
        values = np.frombuffer(file.read(), dtype)
    if len(values) != shape[0]:
        raise ValueError(f"{name}: expected the {shape[0]} numbers that it claims, got {len(values)}")
    return values


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
