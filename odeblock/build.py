"""``odeblock.build_info()``: what was built and what runs here, printed by ``python -m odeblock info``."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch

from . import native

_NO_CORE: dict[str, Any] = {
    "compiler": None,
    "openmp": False,
    "cuda_version": None,
    "cuda_architectures": [],
    "cpu_builds": [],
    "cpu_features": None,
    "cuda_devices": 0,
    "cuda_error": None,
}


def build_info() -> dict[str, Any]:
    """The build of the native core, and what this machine makes of it.

    Returns a dict with the keys
        version: of odeblock.
        native: whether the native core is present.
        compiler, cuda_version, cuda_architectures: how it was built; ``cuda_version`` is None and
            ``cuda_architectures`` empty for a build without CUDA.
        openmp: whether its threads are those of PyTorch's OpenMP runtime, else its own.
        cpu_builds: the instruction sets that are in the binary and that this processor runs.
        cpu_features: the one of them that is used: the last, or what ``ODEBLOCK_CPU`` (environment) names.
        cuda_devices: number of GPUs that the core's CUDA runtime sees; ``cuda_error``: its message, if any.
        torch, threads: PyTorch's version, and the number of threads a call uses now.
        paths: which code serves a block, by device and dtype.
    """
    core = native.build_info()
    cpu = "native core" if core else "PyTorch reference (no native core in this build)"
    return {
        "version": version("odeblock"),
        "native": core is not None,
        **(core or _NO_CORE),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "paths": {
            "cpu": cpu,
            "cuda": "native core up to 256 features, and for maps that fit on chip"
            if core and core["cuda_architectures"]
            else "PyTorch reference",
            "other devices": "PyTorch reference",
        },
    }
