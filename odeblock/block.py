"""``DeepResBlock``: the parameters of a deep residual block of rows, stacked over depth."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import ResBlock
from .functional import recorded
from .initializers import Initializer
from .layers import LINEAR
from .validation import check_rows, check_size


class DeepResBlock(ResBlock):
    r"""L residual steps ``h ← h + scale · (V_k σ(W_k h + hidden_bias_k) + output_bias_k)``, fused.

    A drop-in layer [..., dim] -> [..., dim] for any model. With the default ``scale`` = 1/L and weights
    that start smooth in depth it discretises a neural ODE, and stays a discretisation during training
    (Marion, Wu, Sander & Biau, ICLR 2024).

    Arguments:
        dim: q, number of features.
        depth: L, number of residual steps.
        hidden_dim: m, number of hidden units of a step; ``dim`` by default.
        activation: σ, see ``odeblock.functional.deep_residual``.
        bias: whether to learn ``hidden_bias`` and ``output_bias``; they start at zero.
        init: ``"smooth"``, ``"tied"``, ``"iid"`` or ``"zero_v"``, or an initializer such as
            ``GaussianProcess("matern32")``, see ``odeblock.initializers``.
        scale: step size, 1/L by default.
        backward: ``"auto"``, ``"adjoint"``, ``"checkpoint"`` or ``"store"``, see
            ``odeblock.functional.deep_residual``.
        strict, anchors, memory_budget: options of the strategies, see there.
        device, dtype: of the parameters, as in ``nn.Linear``.

    Attributes:
        V: [L, q, m], a parameter, as all here.
        W: [L, m, q].
        hidden_bias: [L, m]; None without ``bias``.
        output_bias: [L, q]; None without ``bias``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Examples:
        >>> block = DeepResBlock(dim=64, depth=256)
        >>> block(torch.randn(32, 64)).shape
        torch.Size([32, 64])
    """

    branch = LINEAR
    _recorded = staticmethod(recorded)

    def __init__(
        self,
        dim: int,
        depth: int,
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
        super().__init__(depth, activation, init, scale, backward, strict, anchors, memory_budget)
        self.dim = check_size("dim", dim)
        self.hidden_dim = self.dim if hidden_dim is None else check_size("hidden_dim", hidden_dim)
        self._make_weights(self.dim, self.hidden_dim, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    def _shown_sizes(self) -> list[tuple[str, Any]]:
        sizes = [("dim", self.dim), ("depth", self.depth)]
        return sizes + [("hidden_dim", self.hidden_dim)] * (self.hidden_dim != self.dim)

    def _check_shape(self, h: Tensor) -> None:
        check_rows(h, self.dim)
