"""odeblock: very deep residual networks in the neural-ODE regime, with fused native kernels."""

from importlib.metadata import version as _version

# torch comes first: its OpenMP runtime then serves the native core too, and there is one thread pool.
import torch as _torch  # noqa: F401

from . import diagnostics, flow, functional, initializers, limit, reference
from .block import DeepResBlock
from .build import build_info
from .conv import DeepConvResBlock
from .drift import DriftError, DriftWarning
from .native import release_memory
from .network import DeepResNet

__version__ = _version("odeblock")

__all__ = [
    "DeepConvResBlock",
    "DeepResBlock",
    "DeepResNet",
    "DriftError",
    "DriftWarning",
    "build_info",
    "diagnostics",
    "flow",
    "functional",
    "initializers",
    "limit",
    "reference",
    "release_memory",
]
