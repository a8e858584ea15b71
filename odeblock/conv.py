"""``DeepConvResBlock``: the parameters of a deep residual block of maps, stacked over depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .base import ResBlock
from .functional import conv_recorded
from .initializers import Initializer
from .layers import CONVOLUTION
from .validation import check_size

if TYPE_CHECKING:
    from typing_extensions import Self


class DeepConvResBlock(ResBlock):
    r"""L residual steps ``h ← h + scale · (V_k * σ(W_k * h + hidden_bias_k) + output_bias_k)`` of maps.

    ``DeepResBlock`` with convolutions ``*`` in the place of matrices, for maps [B, C, H, W] of any size H, W,
    which stays: a drop-in for the blocks of a stage of a residual network, hundreds or thousands of them.

    Arguments:
        channels: C, of a map.
        depth: L, number of residual steps.
        hidden_channels: M, between the two convolutions of a step; ``channels`` by default.
        kernel_size: k, of all kernels, odd; maps are continued by k//2 zeros on every side.
        activation: σ, see ``odeblock.functional.deep_residual``.
        bias: whether to learn ``hidden_bias`` and ``output_bias``; they start at zero.
        norm: None.
        init: as of ``DeepResBlock``; entries of W start with variance 1/(C k²), of V with 1/(M k²).
        scale: step size, 1/L by default.
        backward: ``"auto"``, ``"adjoint"``, ``"checkpoint"`` or ``"store"``, see
            ``odeblock.functional.deep_residual``.
        strict, anchors, memory_budget: options of the strategies, see there.
        device, dtype: of the parameters, as in ``nn.Conv2d``.

    Parameters:
        V [L, C, M, k, k], W [L, M, C, k, k], hidden_bias [L, M] and output_bias [L, C] (None without
        ``bias``).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> block = DeepConvResBlock(channels=16, depth=100)
        >>> block(torch.randn(8, 16, 32, 32)).shape
        torch.Size([8, 16, 32, 32])
    """

    branch = CONVOLUTION
    _recorded = staticmethod(conv_recorded)

    def __init__(
        self,
        channels: int,
        depth: int,
        hidden_channels: int | None = None,
        kernel_size: int = 3,
        *,
        activation: str = "gelu",
        bias: bool = False,
        norm: str | None = None,
        init: str | Initializer = "smooth",
        scale: float | None = None,
        backward: str = "auto",
        strict: bool = False,
        anchors: int = 0,
        memory_budget: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            depth,
            activation=activation,
            init=init,
            scale=scale,
            backward=backward,
            strict=strict,
            anchors=anchors,
            memory_budget=memory_budget,
        )
        self.channels = check_size("channels", channels)
        self.hidden_channels = (
            self.channels if hidden_channels is None else check_size("hidden_channels", hidden_channels)
        )
        self.kernel_size = check_size("kernel_size", kernel_size)
        if self.kernel_size % 2 == 0:
            raise ValueError(
                "kernel_size: expected an odd int, so that zeros around a map keep its size; got "
                f"{self.kernel_size}"
            )
        if norm is not None:
            raise ValueError(f"norm: expected None, got {norm!r}")
        self.norm = norm

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(self.depth, *shape, device=device, dtype=dtype))

        kernel = (self.kernel_size, self.kernel_size)
        self.V = empty(self.channels, self.hidden_channels, *kernel)
        self.W = empty(self.hidden_channels, self.channels, *kernel)
        self.hidden_bias = empty(self.hidden_channels) if bias else None
        self.output_bias = empty(self.channels) if bias else None
        self.reset_parameters()

    @classmethod
    def _sized_like(cls, V: Tensor, **options: Any) -> Self:
        return cls(V.shape[1], V.shape[0], V.shape[2], V.shape[3], **options)

    def _shown_sizes(self) -> list[tuple[str, Any]]:
        sizes = [("channels", self.channels), ("depth", self.depth)]
        sizes += [("hidden_channels", self.hidden_channels)] * (self.hidden_channels != self.channels)
        return [*sizes, ("kernel_size", self.kernel_size)]

    def _check_shape(self, h: Tensor) -> None:
        if h.dim() not in (3, 4) or h.shape[-3] != self.channels:
            expected = f"[B, {self.channels}, H, W] or [{self.channels}, H, W]"
            raise ValueError(f"h: expected shape {expected}, got {list(h.shape)}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As every module's. ``.to(memory_format=torch.channels_last)`` takes tensors of four or five
        dimensions for maps or volumes, and refuses the latter: it is shown stacks of kernels flattened."""

        def applied(tensor: Tensor) -> Tensor:
            if tensor.dim() != 5:
                return fn(tensor)
            flat: Tensor = fn(tensor.flatten(2))
            return flat.view(tensor.shape)

        super()._apply(applied, recurse)  # type: ignore[no-untyped-call]
        return self
