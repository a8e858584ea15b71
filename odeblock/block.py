"""``DeepResBlock``: the parameters of a deep residual block, stacked over depth."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .activations import get_activation
from .functional import deep_residual
from .initializers import get_initializer
from .validation import check_scale, check_size, check_strategy


class DeepResBlock(nn.Module):
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
        init: ``"smooth"``, ``"tied"``, ``"iid"`` or ``"zero_v"``, see ``odeblock.initializers``.
        scale: step size, 1/L by default.
        backward: ``"auto"``, ``"adjoint"``, ``"checkpoint"`` or ``"store"``, see
            ``odeblock.functional.deep_residual``.
        device, dtype: of the parameters, as in ``nn.Linear``.

    Parameters:
        V [L, q, m], W [L, m, q], hidden_bias [L, m] and output_bias [L, q] (None without ``bias``).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> block = DeepResBlock(dim=64, depth=256)
        >>> block(torch.randn(32, 64)).shape
        torch.Size([32, 64])
    """

    hidden_bias: nn.Parameter | None
    output_bias: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        depth: int,
        hidden_dim: int | None = None,
        *,
        activation: str = "gelu",
        bias: bool = False,
        init: str = "smooth",
        scale: float | None = None,
        backward: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim = check_size("dim", dim)
        self.depth = check_size("depth", depth)
        self.hidden_dim = self.dim if hidden_dim is None else check_size("hidden_dim", hidden_dim)
        self.activation = get_activation(activation).name
        get_initializer(init)
        self.init = init
        self.scale = 1.0 / self.depth if scale is None else check_scale(scale)
        self.backward = check_strategy(backward)

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(self.depth, *shape, device=device, dtype=dtype))

        self.V = empty(self.dim, self.hidden_dim)
        self.W = empty(self.hidden_dim, self.dim)
        self.hidden_bias = empty(self.hidden_dim) if bias else None
        self.output_bias = empty(self.dim) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw V and W anew from the initializer ``init``; biases become zero."""
        get_initializer(self.init)(self.V, self.W)
        for bias in (self.hidden_bias, self.output_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, h: Tensor) -> Tensor:
        """h [..., dim] -> h_L [..., dim], of the same dtype and device."""
        return deep_residual(
            h,
            self.V,
            self.W,
            self.hidden_bias,
            self.output_bias,
            activation=self.activation,
            scale=self.scale,
            backward=self.backward,
        )

    def extra_repr(self) -> str:
        parts: list[tuple[str, Any]] = [("dim", self.dim), ("depth", self.depth)]
        if self.hidden_dim != self.dim:
            parts.append(("hidden_dim", self.hidden_dim))
        parts.append(("activation", self.activation))
        if self.hidden_bias is not None:
            parts.append(("bias", True))
        parts.append(("init", self.init))
        if self.scale != 1.0 / self.depth:
            parts.append(("scale", self.scale))
        parts.append(("backward", self.backward))
        return ", ".join(f"{name}={value!r}" for name, value in parts)
