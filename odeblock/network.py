"""``DeepResNet``: the paper's network F(x) = B h_L, with h_0 = A x and a deep residual block between."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .block import DeepResBlock
from .initializers import Initializer
from .validation import check_size


class DeepResNet(nn.Module):
    """F(x) = B h_L with h_0 = A x: a linear map in, a ``DeepResBlock``, a linear map out.

    The network of Marion, Wu, Sander & Biau, ICLR 2024 (arXiv 2309.01213).

    Arguments:
        in_features: size of x.
        dim: q, features of the block.
        depth: L, residual steps.
        out_features: size of F(x).
        hidden_dim, activation, bias, init, scale, backward, strict, anchors, memory_budget, device, dtype: of
            the block, see ``DeepResBlock``; ``bias`` holds for A and B as well.

    Attributes:
        A: nn.Linear(in_features, dim).
        block: DeepResBlock(dim, depth, ...).
        B: nn.Linear(dim, out_features).
    """

    def __init__(
        self,
        in_features: int,
        dim: int,
        depth: int,
        out_features: int,
        hidden_dim: int | None = None,
        *,
        activation: str = "gelu",
        bias: bool = False,
        init: str | Initializer = "smooth",
        scale: float | None = None,
        backward: str = "auto",
        strict: bool = False,
        anchors: int = 0,
        memory_budget: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_features, dim = check_size("in_features", in_features), check_size("dim", dim)
        out_features = check_size("out_features", out_features)
        self.A = nn.Linear(in_features, dim, bias=bias, device=device, dtype=dtype)
        self.block = DeepResBlock(
            dim,
            depth,
            hidden_dim,
            activation=activation,
            bias=bias,
            init=init,
            scale=scale,
            backward=backward,
            strict=strict,
            anchors=anchors,
            memory_budget=memory_budget,
            device=device,
            dtype=dtype,
        )
        self.B = nn.Linear(dim, out_features, bias=bias, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        self.A.reset_parameters()
        self.block.reset_parameters()
        self.B.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> F(x) [..., out_features]."""
        y: Tensor = self.B(self.block(self.A(x)))
        return y
