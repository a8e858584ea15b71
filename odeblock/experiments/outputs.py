"""The files of an experiment, each written whole or not at all: JSON, CSV, checkpoints, figures."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from ..build import build_info

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURE_DPI = 200
PACKAGES = ("odeblock", "torch", "numpy", "scikit-learn", "matplotlib", "pillow", "rich")


def provenance() -> dict[str, Any]:
    """What made the numbers: "versions" of Python and packages, and the "build" of the native core.

    The version of a package that is not installed, as some experiments do not need it, is None.
    """
    versions = {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}
    return {"versions": versions, "build": build_info()}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file, open for writing, that takes the place of ``path`` once it is complete.

    Until then it lies beside it under another name: a reader sees the old content or the new, never a part.
    An error or an interruption removes it and leaves ``path`` as it was.

    Raises:
        OSError: it cannot be written, the disk is full; ``filename`` is ``path``.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # on the disk before the name: also where the machine stops
        os.replace(partial, path)
    except OSError as error:  # a write does not know of which file it was
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def remove_partial(folder: Path) -> None:
    """Remove what processes that were killed while they wrote left in ``folder``.

    Nothing but regular files with names of ``atomic_file``, the number of a process of 7 digits at most, and
    none of another process that still runs.
    """
    for partial in folder.glob(".*.partial"):
        found = re.fullmatch(r"\..+\.([1-9][0-9]{0,6})\.partial", partial.name, re.DOTALL)
        if found and partial.is_file() and not partial.is_symlink() and not _runs_elsewhere(int(found[1])):
            partial.unlink(missing_ok=True)


def _runs_elsewhere(pid: int) -> bool:
    """Whether another process has this number. (What has ours is of an earlier one: we write nothing yet.)"""
    if pid == os.getpid():
        return False
    if os.name == "nt":  # where this signal ends a process; nobody is asked
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        pass
    return True


def save_json(path: Path, value: dict[str, Any]) -> None:
    """Strict JSON (no NaN), indented."""
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def save_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """A table with a header; the keys of the first row are its columns, and those of all rows."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_file(path) as file:
        file.write(text.getvalue().encode())


def save_checkpoint(path: Path, value: dict[str, Any]) -> None:
    """A dict of tensors and plain values, for ``torch.load(path, weights_only=True)``."""
    whole = io.BytesIO()  # to a full disk torch.save raises a RuntimeError that does not say so
    torch.save(value, whole)
    with atomic_file(path) as file:
        file.write(whole.getbuffer())


def save_figure(path: Path, figure: Figure) -> None:
    """A PNG or a PDF, by the ending of ``path``, whatever backend the user has; the same bytes each time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # training alone draws nothing
    from matplotlib.backends.backend_pdf import FigureCanvasPdf

    pdf = path.suffix == ".pdf"
    canvas = FigureCanvasPdf(figure) if pdf else FigureCanvasAgg(figure)
    metadata = {"CreationDate": None} if pdf else {}
    with atomic_file(path) as file:
        canvas.print_figure(file, dpi=FIGURE_DPI, format=path.suffix[1:], metadata=metadata)
