"""Hostile and damaged files: the corpus, files that ``fuzz_files.py`` makes, and things that are no files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("PIL")

from fuzz_files import Reader, fuzz, outcome, readers

from odeblock.experiments.saved import load_checkpoint

CORPUS = sorted((Path(__file__).resolve().parent / "corpus").glob("*/*"))


@pytest.fixture(scope="module")
def everyone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reader]:
    return readers(tmp_path_factory.mktemp("readers"))


@pytest.fixture
def restored(
    everyone: dict[str, Reader], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> dict[str, Reader]:
    """All files whole; the working directory is empty."""
    monkeypatch.chdir(tmp_path)
    for reader in everyone.values():
        reader.path.write_bytes(reader.whole)
    return everyone


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", CORPUS, ids=[f"{path.parent.name}-{path.name}" for path in CORPUS])
def test_the_corpus_is_refused(path: Path, restored: dict[str, Reader]) -> None:
    reader = restored[path.parent.name]
    reader.path.write_bytes(path.read_bytes())
    assert outcome(reader)[0] in ("refused", "nothing")
    assert not list(Path().iterdir())  # nothing was executed


def test_every_reader_reads_what_is_whole(restored: dict[str, Reader]) -> None:
    for name, reader in restored.items():
        assert outcome(reader)[0] == ("nothing" if name in ("bench", "gpu") else "read"), name


def folder(path: Path) -> None:
    path.mkdir()


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def missing(path: Path) -> None:
    pass


@pytest.mark.parametrize("make", [folder, os.mkfifo, device, loop, missing])
def test_what_is_no_file(make: Callable[[Path], None], restored: dict[str, Reader]) -> None:
    begun_anew = ("part", "state", "checkpoint") if make in (missing, loop) else ()
    for name, reader in restored.items():
        reader.path.unlink()
        make(reader.path)
        kind, _ = outcome(reader)
        reader.path.rmdir() if make is folder else reader.path.unlink(missing_ok=True)
        assert kind == ("nothing" if name in begun_anew else "refused"), name


@pytest.mark.parametrize("calls", [200, pytest.param(100_000, marks=pytest.mark.long)])
@pytest.mark.filterwarnings("ignore")
def test_files_are_read_or_refused(calls: int, tmp_path: Path) -> None:
    outcomes = fuzz(calls, seed=1, folder=tmp_path, found=tmp_path / "found")
    assert sum(outcomes.values()) == calls
    refused = {what.split()[0] for what in outcomes if what.endswith(("refused", "nothing"))}
    assert refused >= {"python", "binary", "archive", "npz", "checkpoint", "state", "part"}


def test_headers_that_pytorch_alone_believes() -> None:
    """The fuzzer found this: by a changed header, of which no sum is kept, PyTorch reads other memory."""
    found = load_checkpoint(CORPUS[0].parents[1] / "other-headers.pt", "a state")["state"]
    assert found["weights"][0]["V"][0, 0].item() == pytest.approx(-0.30679408)
