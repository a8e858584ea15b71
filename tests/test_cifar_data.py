"""CIFAR-10: every form is read, nothing in a file is executed, damage is told; splits; augmentation."""

from __future__ import annotations

import io
import os
import pickle
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import cifar_files
import numpy as np
import pytest
import torch

from odeblock.experiments.cifar import data
from odeblock.experiments.cifar.batches import PADDING, Batches, crop_and_flip, normalise
from odeblock.experiments.cifar.files import DataError, Files, Images, read

# ---- every form is read ----------------------------------------------------------------------------------


def assert_same(found: Images | None, expected: Images | None) -> None:
    assert found is not None
    assert expected is not None
    np.testing.assert_array_equal(found.pixels, expected.pixels)
    np.testing.assert_array_equal(found.labels, expected.labels)


@pytest.mark.parametrize("write", [cifar_files.write_python, cifar_files.write_binary])
def test_official_forms(write: Callable[[Path, Files], Path], tmp_path: Path) -> None:
    files = cifar_files.draw()
    folder = write(tmp_path / "data", files)
    archives = tmp_path / "archives"
    archives.mkdir()
    kind = "python" if folder.name.endswith("py") else "binary"
    archive = cifar_files.pack(folder, archives / f"cifar-10-{kind}.tar.gz")
    for path in (folder, folder.parent, archive, archives):
        found = read(path)
        assert found.form == folder.name
        assert_same(found.train, files.train)
        assert_same(found.test, files.test)
    assert [path.name for path in archives.iterdir()] == [archive.name]  # nothing was unpacked


def test_newer_pickles(tmp_path: Path) -> None:
    files = cifar_files.draw()
    folder = cifar_files.write_python(tmp_path, files)
    for name, (pixels, labels) in cifar_files.batches(files).items():
        content = {b"data": np.asfortranarray(pixels), b"labels": labels.tolist()}
        (folder / name).write_bytes(pickle.dumps(content, protocol=4))
    assert_same(read(tmp_path).train, files.train)


def test_jpeg(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    smooth = np.linspace(0, 255, 32).astype(np.uint8)
    pixels = np.stack([np.broadcast_to(smooth, (3, 32, 32)), np.zeros((3, 32, 32), np.uint8)])
    files = Files("", Images(pixels, np.array([3, 7], np.uint8)), None)
    path = cifar_files.write_npz(tmp_path / "train.npz", files)
    for where in (path, tmp_path):
        found = read(where)
        assert found.test is None
        np.testing.assert_array_equal(found.train.labels, [3, 7])
        np.testing.assert_allclose(found.train.pixels.astype(int), pixels.astype(int), atol=6)


# ---- what is wrong is told -------------------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def hostile_pickles() -> dict[str, bytes]:
    array = np.zeros((2, 3072), np.uint8)
    good = {b"labels": [0, 1], b"data": array}
    return {
        "mkdir": pickle.dumps({**good, b"data": Evil()}, protocol=2),
        "builtins.eval": b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.",
        "getattr": b"\x80\x02cbuiltins\ngetattr\n.",
        "numpy.load": b"\x80\x02cnumpy\nload\n.",
        "numpy.core.multiarray.fromfile": b"\x80\x02cnumpy.core.multiarray\nfromfile\n.",
        "the instruction STRING": b"(S'true'\nios\nsystem\n.",
        "the instruction INST": b"(X\x04\x00\x00\x00trueios\nsystem\n.",
        "the instruction OBJ": b"\x80\x02(cnumpy\nndarray\no.",
        "the instruction EXT1": b"\x80\x02\x82\x01.",
        "a dict with": pickle.dumps([1, 2]),
        "found nothing": b"",
        "labels: expected a list": cifar_files.pickle_of_2009({**good, b"labels": "01"}),
        "expected numbers from 0 to 9, got 10": cifar_files.pickle_of_2009({**good, b"labels": [0, 10]}),
        "labels: expected 2": cifar_files.pickle_of_2009({**good, b"labels": [0]}),
        "expected shape [n, 3072]": cifar_files.pickle_of_2009({**good, b"data": array[:, 1:]}),
        "dtype uint8": cifar_files.pickle_of_2009({**good, b"data": array.astype(np.float32)}),
        "expected an array, got list": cifar_files.pickle_of_2009({**good, b"data": [0]}),
        "the instruction BINPERSID": b"\x80\x02X\x01\x00\x00\x000Q.",
        "but only 6143 remain": cifar_files.pickle_of_2009(good)[:-9],
    }


@pytest.mark.parametrize("expected", hostile_pickles())
def test_a_pickle_is_data(expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = cifar_files.write_python(tmp_path, cifar_files.draw())
    (folder / "data_batch_2").write_bytes(hostile_pickles()[expected])
    if expected == "found nothing":
        (folder / "data_batch_2").unlink()
    with pytest.raises(DataError, match="data_batch_2: ") as refused:
        read(tmp_path)
    assert expected in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not Path("executed").exists()


def test_what_a_plain_unpickler_would_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(hostile_pickles()["mkdir"])
    assert Path("executed").exists()


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda path: cut(path, 30729), "expected records of 3073 bytes, got 30729 bytes in all"),
        (lambda path: cut(path, 0), "got 0 bytes in all"),
        (lambda path: cut(path, 3073 * 7), "as many images as in data_batch_1.bin, 10; got 7"),
        (lambda path: path.write_bytes(b"\x0a" * 3073 * 10), "from 0 to 9, got 10"),
        (lambda path: path.unlink(), "beside the others, found nothing"),
    ],
)
def test_damaged_binary_files(damage: Callable[[Path], None], expected: str, tmp_path: Path) -> None:
    folder = cifar_files.write_binary(tmp_path, cifar_files.draw())
    damage(folder / "data_batch_3.bin")
    with pytest.raises(DataError, match=r"data_batch_3\.bin") as refused:
        read(tmp_path)
    assert expected in str(refused.value)


def test_files_too_large_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cifar_files.write_binary(tmp_path, cifar_files.draw())
    archive = cifar_files.pack(folder, tmp_path / "archive.tar.gz")
    with monkeypatch.context() as patched:
        patched.setattr("odeblock.experiments.cifar.files.LARGEST_BATCH", 30000)
        for path in (folder, archive):
            with pytest.raises(DataError, match=r"expected 30000 bytes at most, got 30730"):
                read(path)
    monkeypatch.setattr("odeblock.experiments.cifar.files.LARGEST_ARCHIVE", 100_000)
    with pytest.raises(DataError, match=r"expected 100000 bytes at most, unpacked; got a member of \d+"):
        read(archive)


def test_a_pickle_has_so_many_instructions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cifar_files.write_python(tmp_path, cifar_files.draw())
    monkeypatch.setattr("odeblock.experiments.unpickle.MOST_INSTRUCTIONS", 20)
    with pytest.raises(DataError, match="expected a pickle of 20 instructions at most, got more"):
        read(tmp_path)


def test_damaged_archives(tmp_path: Path) -> None:
    folder = cifar_files.write_binary(tmp_path, cifar_files.draw())
    archive = cifar_files.pack(folder, tmp_path / "cifar.tar.gz")
    whole = archive.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no archive"):
        archive.write_bytes(content)
        with pytest.raises(DataError, match=r"cifar\.tar\.gz: expected a whole file"):
            read(archive)
    (folder / "test_batch.bin").unlink()
    cifar_files.pack(folder, archive)
    with pytest.raises(DataError, match=r"test_batch\.bin: expected .* in the archive, found nothing"):
        read(archive)
    with tarfile.open(archive, "w:gz") as file:  # a way out of the folder, and a link
        entry = tarfile.TarInfo("../cifar-10-batches-bin/data_batch_1.bin")
        entry.size = 3073
        file.addfile(entry, io.BytesIO(bytes(3073)))
        link = tarfile.TarInfo("cifar-10-batches-bin/data_batch_1.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
    with pytest.raises(DataError, match="found neither"):
        read(archive)


def test_damaged_npz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("PIL")
    files = cifar_files.draw(5, 0)
    path = tmp_path / "train.npz"
    small, cut_jpeg = cifar_files.jpeg(files.train.pixels[0, :, :16]), cifar_files.jpeg(files.train.pixels[0])

    def one(content: bytes) -> dict[str, Any]:
        length = np.array([len(content)], np.uint16)
        return {"jpeg": np.frombuffer(content, np.uint8), "length": length, "label": files.train.labels[:1]}

    for replaced, expected in (
        ({"length": np.full(5, 7, np.uint16)}, "jpeg: expected 35 bytes, the sum of length; got"),
        ({"length": np.full(5, 7, np.int64)}, "length: expected unsigned bytes [n], got int64 [5]"),
        ({"label": files.train.labels[:4]}, "labels: expected 5, one for each image; got 4"),
        ({"label": files.train.labels[None]}, "label: expected unsigned bytes [n], got uint8 [1, 5]"),
        ({"label": np.array([Evil()] * 5)}, "label: expected unsigned bytes [n], got object [5]"),
        (one(small), "image 0: expected 32x32 pixels, got 32x16"),
        (one(cut_jpeg[:-200]), "image 0: expected a whole file, got OSError"),
        (one(b"GIF89a"), "image 0: expected a whole file, got UnidentifiedImageError"),
    ):
        cifar_files.write_npz(path, files, **replaced)
        with pytest.raises(DataError, match=r"train\.npz") as refused:
            read(tmp_path)
        assert expected in str(refused.value)
    np.savez(path, jpeg=np.zeros(1, np.uint8))
    with pytest.raises(DataError, match="found no length and no label"):
        read(path)
    cifar_files.write_npz(path, files)
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "PIL", None)
        with pytest.raises(DataError, match=r"pip install 'odeblock\[experiments\]'"):
            read(path)
    with monkeypatch.context() as patched:
        patched.setattr("odeblock.experiments.cifar.files.LARGEST_NPZ", 100)
        with pytest.raises(DataError, match="expected 100 bytes at most"):
            read(path)
    cut(path, 1000)
    with pytest.raises(DataError, match=r"train\.npz: expected a whole file"):
        read(path)


def test_no_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found nothing"):
        read(tmp_path / "missing")
    with pytest.raises(DataError, match=r"expected one of cifar-10-batches-py, .*; found none of them"):
        read(tmp_path)
    for name in ("a.npz", "b.npz", "c.zip"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match="found 2 of the last"):
        read(tmp_path)
    with pytest.raises(DataError, match="another kind"):
        read(tmp_path / "c.zip")


# ---- splits, downloads, images made up -------------------------------------------------------------------


def test_the_last_tenth_is_held_out(tmp_path: Path) -> None:
    files = cifar_files.draw(200, 10)
    cifar_files.write_binary(tmp_path, files)
    found = data.load(tmp_path)
    assert_same(found.train, Images(files.train.pixels[:180], files.train.labels[:180]))
    assert_same(found.validation, Images(files.train.pixels[180:], files.train.labels[180:]))
    assert_same(found.test, files.test)
    few = data.load(tmp_path, images=60)
    assert (len(few.train), len(few.validation)) == (54, 6)
    assert few.fingerprint != found.fingerprint == data.load(tmp_path).fingerprint
    description = {"form": "cifar-10-batches-bin", "train": 180, "validation": 20, "test": 10}
    assert found.description() == {**description, "sha256": found.fingerprint}
    with pytest.raises(DataError, match="10 training images or more, got 9"):
        data.load(tmp_path, images=9)


def test_images_that_are_made_up() -> None:
    found, again = data.load(None), data.load(None)
    assert found.fingerprint == again.fingerprint
    assert (len(found.train), len(found.validation)) == (432, 48)
    assert set(found.train.labels.tolist()) == set(found.validation.labels.tolist()) == set(range(10))


def test_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = cifar_files.draw()

    def fetch(root: str, download: bool) -> None:
        assert download
        cifar_files.write_python(Path(root), files)

    module = ModuleType("torchvision.datasets")
    module.CIFAR10 = fetch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module)
    data.download(tmp_path)
    assert_same(read(tmp_path).test, files.test)

    def broken(root: str, download: bool) -> None:
        raise RuntimeError("Dataset not found or corrupted.")

    module.CIFAR10 = broken  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="the download failed: Dataset not found"):
        data.download(tmp_path)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(DataError, match="torchvision downloads CIFAR-10"):
        data.download(tmp_path)


# ---- augmentation ----------------------------------------------------------------------------------------


def test_every_crop_is_one_of_its_image() -> None:
    places = torch.cartesian_prod(
        torch.arange(2 * PADDING + 1), torch.arange(2 * PADDING + 1), torch.arange(2)
    )
    image = torch.randint(1, 256, (3, 32, 32), dtype=torch.uint8)
    images = image.expand(len(places), -1, -1, -1)
    top, left, flip = places.unbind(1)
    crops = crop_and_flip(images, top, left, flip.bool())
    assert crops.dtype is torch.uint8
    for crop, (y, x, mirrored) in zip(crops, places.tolist(), strict=True):
        padded = torch.zeros(3, 40, 40, dtype=torch.uint8)
        padded[:, 4:36, 4:36] = image
        expected = padded[:, y : y + 32, x : x + 32]
        assert torch.equal(crop, expected.flip(2) if mirrored else expected)
    middle = crop_and_flip(image[None], torch.tensor([4]), torch.tensor([4]), torch.tensor([False]))
    assert torch.equal(middle[0], image)


def test_normalised_pixels() -> None:
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    for c, (mean, deviation) in enumerate(((0.4914, 0.2470), (0.4822, 0.2435), (0.4465, 0.2616))):
        expected = (pixels[:, c].double() / 255 - mean) / deviation
        torch.testing.assert_close(normalise(pixels)[:, c].double(), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(normalise(pixels, torch.float64)[:, c], expected)


def numbered(count: int) -> Images:
    """Images whose first pixel inside any crop tells which one it is."""
    pixels = np.broadcast_to(np.arange(1, count + 1, dtype=np.uint8)[:, None, None, None], (count, 3, 32, 32))
    return Images(np.ascontiguousarray(pixels), (np.arange(count) % 10).astype(np.uint8))


def which(x: torch.Tensor) -> list[int]:
    """The number of each image, from its middle, which no crop leaves out."""
    return (
        (normalise(torch.arange(256).view(-1, 1, 1, 1))[:, 0, 0, 0] - x[:, :1, 16, 16])
        .abs()
        .argmin(1)
        .tolist()
    )


def test_an_epoch_has_each_image_once_at_most() -> None:
    batches = Batches(numbered(45), 8, seed=0)
    assert batches.steps == 5
    epochs = []
    for _ in range(2):
        seen: list[int] = []
        for _ in range(batches.steps):
            x, y = batches.next()
            assert x.shape == (8, 3, 32, 32)
            numbers = which(x)
            assert y.tolist() == [(number - 1) % 10 for number in numbers]
            seen += numbers
        assert len(set(seen)) == 40
        epochs.append(seen)
    assert epochs[0] != epochs[1]
    with pytest.raises(DataError, match="at least a batch, 46 images; got 45"):
        Batches(numbered(45), 46, seed=0)


def test_augmentation_is_uniform() -> None:
    """Frequencies of all 81 crops, and of mirror images, by the borders of all-white images."""
    count, epochs = 200, 20
    batches = Batches(numbered(count), count, seed=1)
    crops, mirrored = torch.zeros(9, 9), 0
    for _ in range(epochs):
        batches.next()
        crops += torch.bincount(9 * batches._top + batches._left, minlength=81).view(9, 9)
        mirrored += int(batches._flip.sum())
    total = count * epochs
    chi_square = float(((crops - total / 81) ** 2 / (total / 81)).sum())
    assert chi_square < 125  # 80 degrees of freedom: exceeded with probability 0.001
    assert abs(mirrored / total - 0.5) < 0.03  # four standard deviations


def test_batches_are_those_of_the_seed_and_can_go_on() -> None:
    images = cifar_files.draw(50).train

    def take(batches: Batches, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [batches.next() for _ in range(count)]

    def same(a: Any, b: Any) -> bool:
        return all(torch.equal(x, v) and torch.equal(y, w) for (x, y), (v, w) in zip(a, b, strict=True))

    whole = take(Batches(images, 16, seed=3), 12)
    assert same(whole, take(Batches(images, 16, seed=3), 12))
    assert not same(whole, take(Batches(images, 16, seed=4), 12))
    for done in (0, 2, 3, 4, 7):
        first, second = Batches(images, 16, seed=3), Batches(images, 16, seed=5)
        take(first, done)
        second.load_state_dict(first.state_dict())
        assert same(whole[done:], take(second, 12 - done))


def test_processes_share_a_batch() -> None:
    images = cifar_files.draw(50).train
    whole = Batches(images, 16, seed=3)
    parts = [Batches(images, 16, seed=3, rank=rank, processes=2) for rank in range(2)]
    for _ in range(7):
        x, y = whole.next()
        shares = [part.next() for part in parts]
        assert torch.equal(x, torch.cat([share[0] for share in shares]))
        assert torch.equal(y, torch.cat([share[1] for share in shares]))
