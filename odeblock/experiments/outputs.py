"""The files of an experiment, each written whole or not at all: JSON, checkpoints, figures."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

FIGURE_DPI = 200


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file, open for writing, that takes the place of ``path`` once it is complete.

    Until then it lies beside it under another name: a reader sees the old content or the new, never a part.
    An error or an interruption removes it and leaves ``path`` as it was.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save_json(path: Path, value: dict[str, Any]) -> None:
    """Strict JSON (no NaN), indented."""
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def save_checkpoint(path: Path, value: dict[str, Any]) -> None:
    """A dict of tensors and plain values, for ``torch.load(path, weights_only=True)``."""
    with atomic_file(path) as file:
        torch.save(value, file)


def save_figure(path: Path, figure: Figure) -> None:
    """A PNG drawn by Agg, whatever backend the user has."""
    with atomic_file(path) as file:
        FigureCanvasAgg(figure).print_figure(file, dpi=FIGURE_DPI, format="png")
