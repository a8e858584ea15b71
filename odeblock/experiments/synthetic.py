"""The problem of the paper's synthetic experiments, and gradient descent on it, ours and as a Python loop.

Regression of n standard normal y_i in R^d on standard normal x_i in R^d, with the mean square over all
entries for loss; no matrices A and B, GELU. At the start V = 0, and entries of W are standard normal: the
same W at every depth (smooth), or, for contrast, an independent one at each (i.i.d.).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..block import DeepResBlock
from ..flow import gradient_flow_groups
from .loop import finite

INITS = ("smooth", "iid")


def make_data(samples: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    """x and y, each [n, d]."""
    x, y = torch.randn(2, samples, dim, generator=torch.Generator().manual_seed(seed))
    return x, y


def initial_W(init: str, depth: int, hidden: int, dim: int, seed: int) -> Tensor:
    """W [L, m, d] with standard normal entries, tied in depth or independent."""
    layers = 1 if init == "smooth" else depth
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(layers, hidden, dim, generator=generator).expand(depth, -1, -1)


def make_block(W: Tensor) -> DeepResBlock:
    """A block with V = 0 and these W [L, m, d]."""
    depth, hidden, dim = W.shape
    block = DeepResBlock(dim, depth, hidden, init="zero_v", backward="store")
    with torch.no_grad():
        block.W.copy_(W)
    return block


class Descent:
    """Gradient descent on the whole data: Z_k ← Z_k - lr · L ∂R/∂Z_k."""

    def __init__(self, block: DeepResBlock, x: Tensor, y: Tensor, lr: float) -> None:
        self.block, self.x, self.y = block, x, y
        self.optimizer = torch.optim.SGD(gradient_flow_groups(block, lr))

    def gradient(self) -> float:
        """Leaves ∂R/∂Z in ``.grad``; returns R. FloatingPointError where R is not finite."""
        self.optimizer.zero_grad()
        loss = F.mse_loss(self.block(self.x), self.y)
        value = finite(loss)
        loss.backward()
        return value

    def step(self) -> float:
        """One step; returns R before it."""
        value = self.gradient()
        self.optimizer.step()
        return value


class LoopDescent(Descent):
    """The same with the network as a Python loop over layers, as the paper's experiments were run."""

    def gradient(self) -> float:
        self.optimizer.zero_grad()
        h, depth = self.x, self.block.depth
        for V_k, W_k in zip(self.block.V, self.block.W, strict=True):
            h = h + F.gelu(h.mm(W_k.t())).mm(V_k.t()) / depth
        loss = F.mse_loss(h, self.y)
        value = finite(loss)
        loss.backward()
        return value
