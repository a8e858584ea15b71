"""``DeepConvResBlock``: the parameters of a deep residual block of maps, stacked over depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import normalised
from .base import PARAMETERS, ResBlock
from .functional import conv_recorded
from .initializers import Initializer
from .layers import CONVOLUTION
from .validation import check_maps, check_size

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
        norm: None, or ``"batch"``: batch normalisation after each convolution, z = BN(W_k * h + b_k) and
            h ← h + scale · BN'(V_k * σ(z) + c_k), as by ``nn.BatchNorm2d`` with ε = 1e-5 and momentum 0.1.
            In training mode by mean and variance of the batch (float32 at least), in evaluation by running
            ones, which are then folded into weights and biases.
        init: as of ``DeepResBlock``; entries of W start with variance 1/(C k²), of V with 1/(M k²).
        activation, bias, scale, backward, strict, anchors, memory_budget, device, dtype: as of
            ``DeepResBlock``.

    Attributes:
        V: [L, C, M, k, k], a parameter, as the next three.
        W: [L, M, C, k, k].
        hidden_bias: [L, M]; None without ``bias``.
        output_bias: [L, C]; None without ``bias``.
        hidden_norm_weight, hidden_norm_bias: [L, M], parameters, which start at one and zero; None without
            ``norm``, as all below.
        output_norm_weight, output_norm_bias: [L, C], likewise.
        hidden_running_mean, hidden_running_var: [L, M], buffers.
        output_running_mean, output_running_var: [L, C], buffers.
        num_batches_tracked: a buffer.

    A training step with ``norm`` keeps the batch's statistics from the forward for where states are run again
    or reconstructed; the derivative goes through them, and running statistics change once a call of the block
    (not in ``trajectory``). On the CPU it is native, but for ``adjoint``; all threads take a layer together,
    so the backward holds a segment of states of the whole batch. Elsewhere it runs on PyTorch operators.
    Derivatives of gradients are those of the plain loop. ``torch.compile`` leaves it to run eagerly. Under
    ``DistributedDataParallel`` each process has the statistics of its own part of the batch, and takes over
    the buffers of the first one, as with ``nn.BatchNorm2d``. ``nn.SyncBatchNorm.convert_sync_batchnorm``
    leaves a block as it is, and so does ``torch.optim.swa_utils.update_bn``: give ``AveragedModel``
    ``use_buffers=True``, which averages running statistics, too.

    Under ``torch.autocast`` convolutions have its dtype; states, normalisation and its statistics float32.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. In training with
            ``norm``: a batch of a single pixel, which has no variance.

    Examples:
        >>> block = DeepConvResBlock(channels=16, depth=100)
        >>> block(torch.randn(8, 16, 32, 32)).shape
        torch.Size([8, 16, 32, 32])
    """

    stacks = (*PARAMETERS, *normalised.AFFINE, *normalised.STATISTICS)
    branch = CONVOLUTION
    num_batches_tracked: Tensor | None
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
        super().__init__(depth, activation, init, scale, backward, strict, anchors, memory_budget)
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
        if norm is not None and not (isinstance(norm, str) and norm == "batch"):
            raise ValueError(f'norm: expected None or "batch", got {norm!r}')
        self.norm = norm

        C, M, k = self.channels, self.hidden_channels, self.kernel_size
        self._make_weights(C, M, k, k, bias=bias, device=device, dtype=dtype)
        for i, n in enumerate((M, M, C, C)):
            affine, statistic = (torch.empty(self.depth, n, device=device, dtype=dtype) for _ in range(2))
            self.register_parameter(normalised.AFFINE[i], nn.Parameter(affine) if norm else None)
            self.register_buffer(normalised.STATISTICS[i], statistic if norm else None)
        tracked = torch.zeros((), dtype=torch.long, device=device) if norm else None
        self.register_buffer("num_batches_tracked", tracked)
        self.reset_parameters()

    def _draw(self, stacks: dict[str, Tensor]) -> None:
        """And a normalisation that of mean 0 and variance 1."""
        super()._draw(stacks)
        if self.num_batches_tracked is None:
            return
        for i, (affine, statistic) in enumerate(zip(normalised.AFFINE, normalised.STATISTICS, strict=True)):
            stacks[affine].fill_(1 - i % 2)  # weight, bias
            stacks[statistic].fill_(i % 2)  # mean, variance
        self.num_batches_tracked.zero_()

    def forward(self, h: Tensor) -> Tensor:
        """h [B, C, H, W] or [C, H, W] -> h_L, of the same shape, dtype and device."""
        if not self._measures(h):
            return super().forward(h)
        y, statistics = self._measured(h, *self._stacks())
        self._remember(statistics, h.numel() // self.channels)
        return y

    def _shown_sizes(self) -> list[tuple[str, Any]]:
        sizes = [("channels", self.channels), ("depth", self.depth)]
        sizes += [("hidden_channels", self.hidden_channels)] * (self.hidden_channels != self.channels)
        return [*sizes, ("kernel_size", self.kernel_size), *[("norm", self.norm)] * bool(self.norm)]

    def _run(self, h: Tensor, *stacks: Tensor | None) -> Tensor:
        return self._measured(h, *stacks)[0] if self._measures(h) else super()._run(h, *stacks)

    def _weights(self, *stacks: Tensor | None) -> tuple[Tensor | None, ...]:
        return stacks[:4] if self.norm is None else normalised.folded(*stacks)

    def _measures(self, h: Any) -> bool:
        """Whether a batch is normalised by its own statistics; an empty one has none."""
        return self.norm is not None and self.training and isinstance(h, Tensor) and h.numel() > 0

    def _measured(self, h: Tensor, *stacks: Tensor | None) -> tuple[Tensor, Sequence[Tensor]]:
        """h through layers by the batch's statistics, and these."""
        run = normalised.normalised_residual
        if torch.compiler.is_compiling():  # it would unroll the loops
            run = torch.compiler.disable(run)
        weights, norm = stacks[:4], stacks[4:8]
        options = (self.activation, self.scale, self.backward, self.strict, self.anchors, self.memory_budget)
        return run(self._drift, h, weights, norm, *options)

    @torch.no_grad()
    def _remember(self, statistics: Sequence[Tensor], count: int) -> None:
        """Running statistics, after a batch with ``count`` values of each channel."""
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        for name, found in zip(normalised.STATISTICS, statistics, strict=True):
            running = getattr(self, name)
            found = found * (count / (count - 1)) if name.endswith("var") else found
            running.lerp_(found.to(running.dtype), normalised.MOMENTUM)

    def _like(self, stacks: Sequence[Any], scale: float | None, old: Sequence[Any]) -> Self:
        block = super()._like(stacks, scale, old)
        if self.num_batches_tracked is not None:
            block.num_batches_tracked = self.num_batches_tracked.clone()
        return block

    def _options(self) -> dict[str, Any]:
        return {**super()._options(), "norm": self.norm}

    def _check_shape(self, h: Tensor) -> None:
        check_maps(h, self.channels)

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
