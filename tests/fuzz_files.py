"""Files that were meddled with, for every reader: read as they were, or one error that names the file.

``python tests/fuzz_files.py --calls 100000 --seed 0`` says how many of each there were. Any other error is a
defect, and so are a reader that takes a gigabyte, one that takes longer than ``PATIENCE``, and the end of the
process; a file that brought one about goes to ``tests/corpus``.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import faulthandler
import functools
import gzip
import io
import json
import pickle
import random
import resource
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cifar_files
import torch

from odeblock.experiments import reproduce
from odeblock.experiments.cifar import command, data, run
from odeblock.experiments.cifar.files import read
from odeblock.experiments.config import CifarConfig, Refusal
from odeblock.experiments.outputs import save_json

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import gpu_report
import report

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
PATIENCE, ROOM = 120, 2**30
"""Seconds, and bytes beside what the process has, that a reader may take."""
CHECKED = ("checkpoint", "state", "part")
"""Readers of files with sums, which see every changed bit."""
LONGEST = 600  # characters of an error, without the path
SMALL = CifarConfig(depth=2, channels=2, norm="none", epochs=2, batch_size=9, images=20)
STRANGE: list[Any] = [
    *(None, True, 0, 1, -1, 2**31, 2**63, 10**30, -(2**40), 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "x" * 1000, "cuda", "batch", "none", b"bytes", [], {}, (), [1], {"kind": "epoch"}, [[[]]]),
    *(torch.tensor(2), torch.ones(3), torch.empty(0), torch.ones(1).expand(2, 3), torch.ones(2).char()),
]
TOKENS = [
    *(b"r\xff\xff\xff\x7f", b"\x8d\xff\xff\xff\xff\xff\x00\x00\x00", b"B\xff\xff\xff\x7f", b"cos\nsystem\n"),
    *(b"]" * 500, b"(" * 500, b"2" * 50, b"\x86q\x010h\x01h\x01", b"R", b"b", b"u", b"Q", b"e", b".", b"N"),
    *(b"\x00" * 8, b"\xff" * 8, b"PK\x03\x04", b"PK\x05\x06", b"[" * 3000, b"1e999", b"NaN", b"\x1f\x8b\x08"),
    *(b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R", b"-1", b"9" * 5000, b"\\ud800", b"99999999999"),
]


# ---- readers ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """path: of its file. whole: the content that it should have. read: returns what is in it, if anything."""

    path: Path
    whole: bytes
    read: Callable[[], bytes]


def readers(folder: Path) -> dict[str, Reader]:
    """One of each kind, with small files, in folders under ``folder``."""
    found: dict[str, Reader] = {}

    def add(name: str, path: Path, read: Callable[..., bytes], *arguments: Any) -> None:
        found[name] = Reader(path, path.read_bytes(), functools.partial(read, *arguments))

    made = cifar_files.draw(5, 1)
    official = {"python": cifar_files.write_python, "binary": cifar_files.write_binary}
    for name, write in official.items():
        batches = write(folder / name, made)
        add(name, next(batches.glob("data_batch_2*")), images_of, folder / name)
    archive = cifar_files.pack(folder / "binary" / "cifar-10-batches-bin", folder / "archive.tar.gz")
    add("archive", archive, images_of, archive)
    packed = cifar_files.write_npz(folder / "packed.npz", made)
    add("npz", packed, images_of, packed)

    images = data.load(None, SMALL.images)
    (folder / "run").mkdir()
    run.Run(folder / "run", SMALL, images).go(minutes=1e-9)
    add("checkpoint", folder / "run" / run.CHECKPOINT, going_on, folder / "run", images)

    settings = {"config": {"seed": 0}, "torch": "2", "code": "0" * 64}
    results = {"loss": [1.0, 0.5], "step": 3, "name": "smooth"}
    save_json(folder / "part.json", {**settings, "results": results, "sha256": reproduce._sum(results)})
    add("part", folder / "part.json", lambda: plain(reproduce._read(folder / "part.json", settings)))
    underway = reproduce.Run(lambda steps: None, folder / "state.pt", settings, folder)
    underway.save({"start": 20, "weights": [{"V": torch.randn(2, 3)}]})
    add("state", folder / "state.pt", lambda: plain(underway.load()))

    for name, module, kept in (
        ("bench", report, "cpu.json"),
        ("gpu", gpu_report, "NVIDIA_H100_80GB_HBM3-step.json"),
    ):
        path = folder / f"{name}.json"
        path.write_bytes((RESULTS / kept).read_bytes())
        add(name, path, lambda module, path: plain(module.write(path, folder)), module, path)
    return found


def images_of(path: Path) -> bytes:
    found = read(path)
    return found.train.pixels.tobytes() + found.train.labels.tobytes()


def going_on(folder: Path, images: data.Cifar10) -> bytes:
    """The weights of a run that is resumed, after one step more."""
    state = run.read_checkpoint(folder)
    if state is None:
        return b""
    config = CifarConfig(**state["config"])
    if config.images != SMALL.images or config.epochs > SMALL.epochs:
        raise Refusal(f"{folder}: nothing that is wrong, but other images, or more steps")
    command.check_device(config)
    training = run.Run(folder, config, images, state).training
    with contextlib.suppress(FloatingPointError):
        training.run(
            on_look=lambda loss: None, on_epoch=lambda line: None, save=lambda due: None, stop=lambda: True
        )
    return b"".join(x.numpy().tobytes() for x in training.network.state_dict().values())


def plain(found: Any) -> bytes:
    """Of what JSON and checkpoints hold; nothing for None."""
    try:
        return b"" if found is None else json.dumps(found, default=lambda x: x.tolist()).encode()
    except (TypeError, ValueError, AttributeError):  # something else, as a list that is in itself
        return repr(found).encode()


# ---- what is done to files -------------------------------------------------------------------------------


def edited(draw: random.Random, content: bytes) -> bytes:
    """Some bytes changed, lost, twice or too many."""
    found = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        start = draw.randrange(len(found) + 1)
        end = min(len(found), start + draw.choice((1, 1, 2, 4, 30, 1000)))
        kind = draw.randrange(7)
        if kind == 0:
            del found[start:]
        elif kind == 1:
            del found[start:end]
        elif kind == 2:
            found[start:start] = draw.choice(TOKENS)
        elif kind == 3:
            token = draw.choice(TOKENS)
            found[start : start + len(token)] = token
        elif kind == 4:
            found[start:start] = found[start:end]
        else:
            found[start:end] = bytes(byte ^ 1 << draw.randrange(8) for byte in found[start:end])
    return bytes(found)


def sealed(draw: random.Random, name: str, content: bytes) -> bytes:
    """Something changed within, and sums and sizes made to fit, as by someone who means it."""
    if name == "archive":
        return gzip.compress(edited(draw, gzip.decompress(content)), 1)
    if name in ("checkpoint", "state") and draw.random() < 0.7:
        file = io.BytesIO()
        value = torch.load(io.BytesIO(content), weights_only=True)
        torch.save(replaced(draw, value), file)
        return file.getvalue()
    if name in ("npz", "checkpoint", "state"):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {member: archive.read(member) for member in archive.namelist()}
        chosen = draw.choice([member for member in members if member.endswith((".npy", ".pkl"))])
        members[chosen] = edited(draw, members[chosen])
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
            for member, inside in members.items():
                archive.writestr(member, inside)
        return file.getvalue()
    if name in ("part", "bench", "gpu"):
        found = replaced(draw, json.loads(content))
        if name == "part" and isinstance(found, dict):
            with contextlib.suppress(TypeError):
                found["sha256"] = reproduce._sum(found.get("results"))
        return json.dumps(found, default=str).encode()
    if name == "python":
        batch = {b"labels": [0], b"data": torch.zeros(1, 3072, dtype=torch.uint8).numpy()}
        return pickle.dumps(replaced(draw, batch), protocol=draw.choice((2, 3, 4, 5)))
    return edited(draw, content)


def replaced(draw: random.Random, value: Any) -> Any:
    """A value in it, or it, is another or missing."""
    places: list[tuple[Any, Any]] = [({None: value}, None)]

    def walk(x: Any) -> None:
        for key in x if isinstance(x, dict) else range(len(x)) if isinstance(x, list) else ():
            places.append((x, key))
            walk(x[key])

    walk(value)
    where, key = draw.choice(places)
    if key is None:
        return draw.choice(STRANGE)
    if draw.random() < 0.2:
        del where[key]
    else:
        where[key] = draw.choice((*STRANGE, copy.deepcopy(draw.choice(places)[0])))
    return value


# ---- calls -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Ends the process after ``PATIENCE``, with a traceback; memory beyond ``ROOM`` is a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, limits[1]))
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        resource.setrlimit(resource.RLIMIT_AS, limits)


def outcome(reader: Reader) -> tuple[str, bytes]:
    """What became of reading, and what was read."""
    try:
        with watched():
            found = reader.read()
    except Refusal as refused:
        text = str(refused)
        where = str(reader.path.parent)
        assert text.startswith((where, "argument --", "training set:")), text
        assert len(text.replace(where, "")) < LONGEST, text
        assert "\n" not in text, text
        assert "MemoryError" not in text, text
        return "refused", b""
    return ("read" if found else "nothing"), found


def fuzz(calls: int, seed: int, folder: Path, found: Path) -> collections.Counter[str]:
    """How many calls ended in which way. A file that defeats a reader is left in ``found``."""
    warnings.simplefilter("ignore")  # of numpy, Pillow and matplotlib about what they see
    outcomes: collections.Counter[str] = collections.Counter()
    everyone = readers(folder)
    whole = {name: reader.read() for name, reader in everyone.items()}
    # Those that draw figures take longest.
    names = [name for name in everyone for _ in range(1 if name in ("bench", "gpu") else 20)]
    for i in range(calls):
        draw = random.Random(f"{seed} {i}")
        name = draw.choice(names)
        reader = everyone[name]
        seal = draw.random() < 0.5
        content = sealed(draw, name, reader.whole) if seal else edited(draw, reader.whole)
        found.write_bytes(content)  # before it is read: the process may end
        reader.path.write_bytes(content)
        try:
            kind, content = outcome(reader)
            if kind == "read" and not seal and name in CHECKED:
                assert content == whole[name], "changed bits were read"
        except Exception as error:
            raise AssertionError(f"call {i} of seed {seed}: {name}") from error
        outcomes[f"{name} {kind}"] += 1
        reader.path.write_bytes(reader.whole)
    found.unlink(missing_ok=True)
    return outcomes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--found", type=Path, default="found", help="where a file goes that is not refused")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        counts = fuzz(options.calls, options.seed, Path(temporary), options.found)
    for what, count in sorted(counts.items()):
        print(f"{count:9,} {what}")
