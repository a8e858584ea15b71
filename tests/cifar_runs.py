"""Reads runs of ``train cifar10``, and tells whether two are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from odeblock.experiments.cifar.run import LOG, read_checkpoint


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


def comparable(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what differs between two runs that are the same: clocks, and how often they stopped."""
    return [{**line, "seconds": 0} for line in log if line["kind"] != "start"]


def assert_same_run(a: Path, b: Path) -> None:
    """The same bits: weights, momentum, position, log."""
    first, second = read_checkpoint(a), read_checkpoint(b)
    assert first is not None
    assert second is not None

    def same(x: Any, y: Any, where: str) -> None:
        if isinstance(x, torch.Tensor):
            assert torch.equal(x, y), where
        elif isinstance(x, dict):
            assert x.keys() == y.keys(), where
            for key in x:
                same(x[key], y[key], f"{where}.{key}")
        elif isinstance(x, list):
            assert len(x) == len(y), where
            for i, (u, v) in enumerate(zip(x, y, strict=True)):
                same(u, v, f"{where}[{i}]")
        else:
            assert x == y, where

    for state in (first, second):
        state["log"] = comparable(state["log"])
        del state["epoch_seconds"]
    same(first, second, "state")
    assert comparable(lines(a)) == comparable(lines(b))
