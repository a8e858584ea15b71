"""A step's kernels as one CUDA graph: hundreds of small ones a layer, which a CPU would launch one by one."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor, nn

Step = Callable[[Tensor, Tensor], Tensor]
"""Of a batch x, y: leaves gradients in the parameters, and returns what is to be known of it."""

REHEARSALS = 3
"""Calls before the one that is captured, as many as PyTorch's notes on CUDA graphs make."""


def rehearse(step: Step, network: nn.Module, x: Tensor, y: Tensor) -> None:
    """Call a step for what only a first call does, and leave the network as it was: running statistics in
    their place, no gradients."""
    buffers = list(network.buffers())
    before = [buffer.clone() for buffer in buffers]
    step(x, y)
    with torch.no_grad():
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
    network.zero_grad(set_to_none=True)


class GraphedStep:
    """``step`` on a GPU, captured at its first call and replayed from then on; a ``Step`` as well.

    All batches have the shapes of the first. The network keeps its parameters and buffers, which may change
    in place; its gradients are the same tensors after every call. A step that waits for the GPU cannot be
    captured, and raises RuntimeError.
    """

    def __init__(self, step: Step, network: nn.Module) -> None:
        self.step, self.network = step, network
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        if self._graph is None:
            with torch.cuda.device(x.device):
                self._graph = self._capture(x, y)
        self._x.copy_(x)
        self._y.copy_(y)
        self._graph.replay()
        for parameter, gradient in zip(self.network.parameters(), self._gradients, strict=True):
            parameter.grad = gradient  # whatever became of it, for that is what is written
        return self._found.clone()  # the next replay writes it again

    def _capture(self, x: Tensor, y: Tensor) -> torch.cuda.CUDAGraph:
        self._x, self._y = x.clone(), y.clone()
        # Where a parameter's gradient is added up is bound to the stream on which a graph of autograd's first
        # needs it: both on one stream, and no such graph left when the capture begins.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(REHEARSALS):
                rehearse(self.step, self.network, self._x, self._y)
        torch.cuda.current_stream().wait_stream(stream)
        gc.collect()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self._found = self.step(self._x, self._y)
        self._gradients = [parameter.grad for parameter in self.network.parameters()]
        return graph
