"""Blocks on PyTorch's own engine, in two processes: DDP, FSDP2, pipelines, checkpoints, docs/distributed.md.

What they do is in ``distributed_worker.py``. Both are started once, for all cases.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import distributed_worker
import pytest
import torch.distributed as dist

SECONDS = 240  # for all cases, on a machine that does other things


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    """What each of the processes found, by case."""
    folder = tmp_path_factory.mktemp("distributed")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun has one
    environment = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
    }
    processes = []
    for rank in "01":
        with open(folder / f"{rank}.log", "w") as log:
            process = subprocess.Popen(
                [sys.executable, distributed_worker.__file__, str(folder)],
                stdout=log,
                stderr=log,
                env={**environment, "RANK": rank, "LOCAL_RANK": rank},
            )
        processes.append(process)
    end = time.monotonic() + SECONDS
    try:
        while None in (codes := [process.poll() for process in processes]):
            if any(codes) or time.monotonic() > end:  # one would wait in every case for one that died
                break
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [_read(folder, rank) for rank in "01"]


def _read(folder: Path, rank: str) -> dict[str, str | None]:
    """A case that a process did not come to tells how it ended."""
    path = folder / f"{rank}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    end = f"process {rank} did not come to it:\n{(folder / f'{rank}.log').read_text()[-2000:]}"
    return {**dict.fromkeys(distributed_worker.CASES, end), **found}


@pytest.mark.parametrize("case", distributed_worker.CASES)
def test_two_processes(case: str, both: list[dict[str, str | None]]) -> None:
    for found in both:
        assert found[case] is None, found[case]
