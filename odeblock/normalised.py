"""Batch normalisation after each convolution of a residual step, for every backward strategy.

    z = BN(W_k * h + b_k),   f_k(h) = BN(V_k * σ(z) + c_k),   BN(x) = γ (x - mean) / √(var + ε) + β

with mean and variance over samples and pixels, for each channel. The forward measures them and keeps them,
[L, M] and [L, C]. In the backward, where a state is run again or reconstructed, they are constants, so that a
sample depends on itself alone and comes out as it was; where a step is differentiated, its derivative is that
through the mean and the variance of the batch at that state (``Normalise``). The strategies are those of
``residual_scan`` (``scan.py``), of which a layer's statistics are parameters without a gradient. Where the
native core has the data, all steps are its own (``FusedSteps``), but for an adjoint and derivatives of
gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checkpointing, native, normalised_ops
from .activations import get_activation
from .autocast import autocasted
from .base import PARAMETERS
from .checkpointing import NOTHING
from .drift import DriftRecord
from .normalised_ops import EPS
from .products import CONVOLUTION, shaped
from .reference import state_dtype
from .scan import ResidualScan, Steps, plan_for
from .validation import check_affine, check_arguments, plain_sizes

MOMENTUM = 0.1
"""That of ``nn.BatchNorm2d``, as EPS is."""

AFFINE = ("hidden_norm_weight", "hidden_norm_bias", "output_norm_weight", "output_norm_bias")
"""γ and β after the first convolution of a step, [L, M], and after the second, [L, C]."""

STATISTICS = ("hidden_running_mean", "hidden_running_var", "output_running_mean", "output_running_var")
"""Running mean and variance, of the same shapes."""

CHANNELS_LAST = frozenset({"cuda"})
"""Devices on which maps have their channels last within the block: cuDNN's convolutions take them so, and
would turn input, weights and output round each time."""

_aten = torch.ops.aten


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of each channel, [B, C, H, W] -> [C], [C], in float32 at least.

    In two passes of sums: ``torch.var_mean`` takes many times as long on the CPU.
    """
    x = x.to(state_dtype(x.dtype))
    mean = x.mean((0, 2, 3))
    return mean, (x - mean[:, None, None]).square().mean((0, 2, 3))


def measured(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and spread of each channel: the variance, or 1/√(var + ε) on a GPU, where one kernel finds it and
    others take it."""
    found: tuple[Tensor, Tensor] = _aten.batch_norm_stats(x, EPS) if x.is_cuda else batch_statistics(x)
    return found


class Normalise(torch.autograd.Function):
    """BN(x) by mean and spread that are given, in x's dtype, with the derivative that it has where they are
    those of x: equation (17) of docs/adjoint.md."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
        if not x.is_cuda:
            return F.batch_norm(x, mean, spread, weight, bias, training=False, eps=EPS)
        y: Tensor = _aten.batch_norm_elemt(x, weight, bias, mean, spread, EPS)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x, weight, _, mean, spread = inputs
        ctx.save_for_backward(x, weight, mean, spread)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, spread = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        invstd = spread if x.is_cuda else (spread + EPS).rsqrt()
        like_x = torch.channels_last if channels_last(x) else torch.contiguous_format
        gradients = _aten.native_batch_norm_backward(
            grad.contiguous(memory_format=like_x),
            *(x, weight, None, None, mean, invstd, True, EPS, wanted),
        )
        return *(g if want else None for g, want in zip(gradients, wanted, strict=True)), None, None


def channels_last(x: Tensor) -> bool:
    """Whether the channels of a pixel lie side by side, and not the pixels of a channel."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _by_given(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    y: Tensor = Normalise.apply(x, weight, bias, mean, spread)  # type: ignore[no-untyped-call]
    return y


def _by_its_own(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """BN(x) by the batch's own statistics, with derivatives of every order and mode."""
    mean, var = (statistic[:, None, None] for statistic in batch_statistics(x))
    normal = (x.to(mean.dtype) - mean) * (var + EPS).rsqrt()
    return (normal * weight[:, None, None] + bias[:, None, None]).to(x.dtype)


@dataclass(frozen=True)
class NormalisedSteps(Steps):
    """Those of a normalised branch. names: of the tensors of a layer, V, W, biases where there are, and
    ``AFFINE``; mean and spread after each convolution may follow them. last: whether kernels come with their
    channels last, [M, k, k, C]."""

    activation: str
    names: tuple[str, ...]
    last: bool

    roundings: ClassVar[int] = 4  # of the state, two products and σ, magnified where a variance is small
    measures: ClassVar[int] = len(STATISTICS)

    def residual(self, state: Tensor, layer: Sequence[Tensor]) -> Tensor:
        """By given statistics; without, by the batch's, with derivatives of every order."""
        given = iter(layer[len(self.names) :])

        def by_given(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return _by_given(x, weight, bias, next(given), next(given))

        return self._branch(state, layer, by_given if len(layer) > len(self.names) else _by_its_own)

    def measure(self, state: Tensor, layer: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        found: list[Tensor] = []

        def by_found(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            found.extend(measured(x))
            return _by_given(x, weight, bias, *found[-2:])

        return self.add(state, self._branch(state, layer, by_found)), found

    def _branch(
        self, state: Tensor, layer: Sequence[Tensor], normalise: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        Z = dict(zip(self.names, layer, strict=False))
        hidden, hidden_shift, output, output_shift = (Z[name].to(state_dtype(self.dtype)) for name in AFFINE)
        W, V = (Z[name].permute(0, 3, 1, 2) if self.last else Z[name] for name in "WV")
        with self.in_autocast():
            z = CONVOLUTION.apply(state.to(self.dtype), W, Z.get("hidden_bias"))
            s = get_activation(self.activation).function(normalise(z, hidden, hidden_shift))
            return normalise(CONVOLUTION.apply(s, V, Z.get("output_bias")), output, output_shift)


class FusedSteps(NormalisedSteps):
    """The same on the native core, whose one saved tensor holds all states that the plan asks for."""

    def forward(self, plan: checkpointing.Plan, h: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        y, states, *statistics = normalised_ops.forward(
            h, *self._all(leaves), self.activation, self.scale, plan.save_every
        )
        return y, *statistics, states

    def backward(
        self,
        plan: checkpointing.Plan,
        strict: bool,
        record: DriftRecord,
        grad: Tensor,
        tensors: Sequence[Tensor],
        needed: Sequence[bool],
        kept: Sequence[Tensor],
    ) -> Sequence[Tensor | None]:
        _, *leaves = tensors
        options = (self.activation, self.scale, plan.save_every, plan.slots, any(needed[1:]))
        dh, *found = normalised_ops.backward(grad, *self._all(leaves), *kept, *options)
        gradients = dict(zip((*PARAMETERS, *AFFINE), found, strict=True))
        wanted = zip(self.names, leaves, needed[1:], strict=True)
        return [
            dh if needed[0] else None,
            *(gradients[name].to(leaf.dtype) if need else None for name, leaf, need in wanted),
        ]

    def _all(self, leaves: Sequence[Tensor]) -> list[Tensor | None]:
        given = dict(zip(self.names, leaves, strict=True))
        return [given.get(name) for name in (*PARAMETERS, *AFFINE)]


def normalised_residual(
    record: DriftRecord,
    h: Tensor,
    weights: Sequence[Tensor | None],
    norm: Sequence[Tensor | None],
    activation: str,
    scale: float | None,
    backward: str,
    strict: bool,
    anchors: int,
    memory_budget: int | None,
) -> tuple[Tensor, list[Tensor]]:
    """h_L of maps by the batch's statistics, and these: ``STATISTICS`` of this batch, stacked.

    weights: V, W, hidden_bias, output_bias of ``deep_conv_residual``, with whose arguments the others go;
    norm: ``AFFINE``. An adjoint backward leaves its report in ``record``.
    """
    h, V, W, hidden_bias, output_bias = autocasted(h, *weights)
    options = (backward, strict, anchors, memory_budget)
    scale = check_arguments(h, V, W, hidden_bias, output_bias, activation, scale, *options, maps=True)
    anchors, memory_budget = plain_sizes(anchors, memory_budget)
    for i, (name, tensor) in enumerate(zip(AFFINE, norm, strict=True)):
        check_affine(name, tensor, V, hidden=i < 2)
    if h.numel() == h.shape[-3]:
        raise ValueError(
            "h: expected more than one value of each channel, as batch normalisation in training takes their "
            f"variance; got {list(h.shape)}. In evaluation, after .eval(), one is enough"
        )
    depth, last = len(V), h.device.type in CHANNELS_LAST
    layout = torch.channels_last if last else torch.contiguous_format
    maps = (h if h.dim() == 4 else h[None]).contiguous(memory_format=layout)
    if last:
        V, W = (kernel.movedim(2, -1).contiguous() for kernel in (V, W))
    tensors = zip((*PARAMETERS, *AFFINE), (V, W, hidden_bias, output_bias, *norm), strict=True)
    layer = {name: tensor for name, tensor in tensors if tensor is not None}
    leaves = tuple(layer.values())
    fused = native.runs_natively(h) and not last and backward != "adjoint"
    kind = FusedSteps if fused else NormalisedSteps
    steps = kind(depth, scale, h.dtype, h.device.type, None, activation, tuple(layer), last)
    plan = NOTHING
    if torch.is_grad_enabled() and any(t.requires_grad for t in (h, *leaves)):
        if fused:
            plan = normalised_ops.plan(maps, V, backward, anchors, memory_budget)
        else:
            plan = plan_for(maps, depth, backward, anchors, memory_budget)
    y, *rest = ResidualScan.apply(steps, plan, strict, record, maps, *leaves)  # type: ignore[no-untyped-call]
    found = rest[: steps.measures]
    if h.is_cuda:
        found[1::2] = [(invstd.pow(-2) - EPS).clamp_min(0) for invstd in found[1::2]]
    return shaped(y.contiguous(), h), found


def folded(
    V: Any, W: Any, hidden_bias: Any, output_bias: Any, *norm: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """V, W and biases [L, ...] of the block without normalisation that is this one in evaluation.

    norm: ``AFFINE``, then ``STATISTICS``. Differentiable: γ (W h + b - mean) / √(var + ε) + β is a
    convolution with other weights.
    """
    weights, statistics = norm[: len(AFFINE)], norm[len(AFFINE) :]
    (W, hidden_bias), (V, output_bias) = (
        _fold(kernel, bias, *weights[i : i + 2], *statistics[i : i + 2])
        for i, kernel, bias in ((0, W, hidden_bias), (2, V, output_bias))
    )
    return V, W, hidden_bias, output_bias


def _fold(
    kernel: Tensor, bias: Tensor | None, weight: Tensor, shift: Tensor, mean: Tensor, var: Tensor
) -> tuple[Tensor, Tensor]:
    computed = state_dtype(kernel.dtype)
    factor = weight.to(computed) * (var.to(computed) + EPS).rsqrt()
    start = -mean.to(computed) if bias is None else bias.to(computed) - mean.to(computed)
    folded_kernel = kernel.to(computed) * factor.view(*factor.shape, 1, 1, 1)
    return folded_kernel.to(kernel.dtype), (shift.to(computed) + factor * start).to(kernel.dtype)
