"""Files that commands are given, or find where an earlier call left them: looked at before they are believed.

Whatever is wrong with one raises one ``Refusal``, which names it: a file cut short, changed bits, a pipe or a
folder in its place, sizes that it claims and does not have, names of code. No reader takes much more memory
than its largest file, and none waits.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .config import Refusal
from .unpickle import Name, unpickle

LARGEST_JSON = 2**25  # bytes; in memory it may be 30 times as large
LONGEST = 300  # characters of an error's text
STORAGES = {
    f"torch.{dtype}Storage": size
    for dtype, size in {
        "Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Byte": 1, "Bool": 1
    }.items()
}  # fmt: skip
"""Bytes of an element."""
NAMES = frozenset((*STORAGES, "torch._utils._rebuild_tensor_v2", "collections.OrderedDict"))


@contextmanager
def explained(where: object, what: str | None = None, kind: type[Refusal] = Refusal) -> Iterator[None]:
    """Errors in reading ``where`` as one ``kind``: a damaged file makes readers raise any of a dozen.

    Arguments:
        what: it should be; without it the text of a ValueError says so.
    """
    try:
        yield
    except Refusal:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        text = text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
        if what or not isinstance(error, ValueError):
            text = f"expected {what or 'a whole file'}, got {type(error).__name__}: {text}"
        raise kind(f"{where}: {text}") from None


def is_file(path: Path) -> bool:
    """Whether there is a file.

    Raises:
        ValueError: there is something else, as a folder, or a pipe, for which a reader would wait.
    """
    found = path.is_file()
    if not found and path.exists():
        raise ValueError("expected a file, found a folder, a pipe or a device")
    return found


def check_size(size: int, largest: int) -> None:
    if size > largest:
        raise ValueError(f"expected {largest} bytes at most, got {size}")


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in ``path``, which is ``what``.

    Raises:
        Refusal: there is none, or it is not whole.
    """
    with explained(path, what):
        if not is_file(path):
            raise FileNotFoundError("nothing is there")
        check_size(path.stat().st_size, LARGEST_JSON)
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError(f"it holds {type(found).__name__}")
        return found


def load_checkpoint(path: Path, what: str) -> dict[str, Any]:
    """What ``outputs.save_checkpoint`` wrote to ``path``, which is ``what``; tensors on the CPU.

    ``torch.load(weights_only=True)`` executes nothing, but believes sizes, and does not see changed bits.

    Raises:
        Refusal: there is none, or it is not whole.
    """
    with explained(path, what):
        if not is_file(path):
            raise FileNotFoundError("nothing is there")
        with zipfile.ZipFile(path) as archive:
            checked = _checked(archive, path.stat().st_size)
        found = torch.load(checked, map_location="cpu", weights_only=True)
        if not isinstance(found, dict):
            raise ValueError(f"it holds {type(found).__name__}")
        return found


def _checked(archive: zipfile.ZipFile, size: int) -> io.BytesIO:
    """The archive anew, once its members' sizes and sums are what it says: PyTorch believes other headers.

    Members lie there as they are, so no larger than the file.
    """
    members = {entry.filename: entry.file_size for entry in archive.infolist()}
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
    if packed or len(members) < len(archive.infolist()) or sum(members.values()) > size:
        raise ValueError("members are packed, or overlap")
    contents = {name: archive.read(name) for name in members}
    (pickled,) = (name for name in members if name.endswith("/data.pkl"))
    folder = pickled.removesuffix(".pkl")

    def stored(key: Any) -> None:
        """Told what would be read as a tensor's memory: ("storage", type, member, device, elements)."""
        _, kind, number, _, count = key
        if not isinstance(kind, Name) or count * STORAGES[kind.text] != members[f"{folder}/{number}"]:
            raise ValueError(f"tensor {number} is not as large as it says")

    unpickle(contents[pickled], NAMES, stored)
    copy = io.BytesIO()
    with zipfile.ZipFile(copy, "w") as written:
        for name, content in contents.items():
            written.writestr(name, content)
    copy.seek(0)
    return copy
