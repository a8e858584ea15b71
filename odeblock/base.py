"""``ResBlock``: what blocks of every kind share, their settings and what one does with their depth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .activations import get_activation
from .autocast import autocasted, without
from .drift import Drift, DriftRecord
from .initializers import Initializer, get_initializer
from .layers import Branch, make_layer, stack_layers
from .limit import VectorField, interpolate
from .sharded import draw, is_sharded
from .validation import (
    NO_TORCHSCRIPT,
    check_flag,
    check_options,
    check_scale,
    check_size,
    check_tensor,
    in_digits,
)

if TYPE_CHECKING:
    from typing_extensions import Self

PARAMETERS = ("V", "W", "hidden_bias", "output_bias")

REPARAMETRISING = (BasePruningMethod, WeightNorm, SpectralNorm)
"""Hooks before ``forward`` that compute a weight from parameters, as a plain attribute of the module."""


class ResBlock(nn.Module):
    """L residual steps, with tensors stacked over depth.

    A kind of block has sizes, parameters of these sizes, and a function that they go to: ``DeepResBlock``
    (``block.py``) for rows, ``DeepConvResBlock`` (``conv.py``) for maps.
    """

    stacks: ClassVar[tuple[str, ...]] = PARAMETERS
    """Names of all that is stacked over depth; a block may have None under any but V and W."""

    branch: ClassVar[Branch]
    """The modules that a step is made of."""

    _recorded: ClassVar[Callable[..., Tensor]]
    """The function of ``functional.py`` that runs the steps, with a record of its adjoint's drift."""

    norm: str | None = None
    """What normalises within a step."""

    V: nn.Parameter
    W: nn.Parameter
    hidden_bias: nn.Parameter | None
    output_bias: nn.Parameter | None

    def __init__(
        self,
        depth: int,
        activation: str,
        init: str | Initializer,
        scale: float | None,
        backward: str,
        strict: bool,
        anchors: int,
        memory_budget: int | None,
    ) -> None:
        super().__init__()
        self.depth = check_size("depth", depth)
        self.activation = get_activation(activation).name
        get_initializer(init)
        self.init = init
        self.scale = 1.0 / self.depth if scale is None else check_scale(scale)
        self.anchors, self.memory_budget = check_options(backward, strict, anchors, memory_budget)
        self.backward, self.strict = backward, strict
        self._drift = DriftRecord()

    def _make_weights(
        self,
        dim: int,
        hidden: int,
        *kernel: int,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Empty V [L, dim, hidden, *kernel], W [L, hidden, dim, *kernel] and biases."""

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(self.depth, *shape, device=device, dtype=dtype))

        check_flag("bias", bias)
        self.V, self.W = empty(dim, hidden, *kernel), empty(hidden, dim, *kernel)
        self.hidden_bias, self.output_bias = (empty(n) if bias else None for n in (hidden, dim))

    # ---- what a kind of block adds -----------------------------------------------------------------------

    def _shown_sizes(self) -> list[tuple[str, Any]]:
        """Name and value of the arguments before the settings, for ``repr``."""
        raise NotImplementedError

    def _check_shape(self, h: Tensor) -> None:
        """Refuse what is no state of the block."""
        raise NotImplementedError

    # ---- what all have -----------------------------------------------------------------------------------

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw V and W anew from the initializer ``init``; biases become zero. Nothing is drawn on
        "meta" and of fake tensors.

        What is under a parametrization (``torch.nn.utils.parametrize``) gets what was drawn through its
        ``right_inverse``. Where ``fully_shard`` has sharded the parameters, every process draws the whole,
        and has its share of what the first one drew.

        Raises:
            RuntimeError: a parametrization without ``right_inverse``; weights that hooks compute, as pruning.
        """
        everything = attrgetter(*self.stacks)(self)
        stacks = {name: p for name, p in zip(self.stacks, everything, strict=True) if p is not None}
        if stacks["V"].is_meta or isinstance(stacks["V"], FakeTensor):
            return
        under = [name for name in stacks if parametrize.is_parametrized(self, name)]
        hooked = [name for name in stacks if name not in {*self._parameters, *self._buffers, *under}]
        if hooked:
            raise RuntimeError(
                f"{', '.join(hooked)}: expected parameters to draw anew, got weights that hooks compute, as "
                "those of torch.nn.utils.prune; remove these hooks first"
            )
        stacks.update((name, torch.empty_like(stacks[name])) for name in under)
        self._draw(stacks)
        for name in under:
            setattr(self, name, stacks[name])

    def _draw(self, stacks: dict[str, Tensor]) -> None:
        """Initial values into these tensors."""
        draw(get_initializer(self.init), stacks["V"], stacks["W"])
        for name in PARAMETERS[2:]:
            if name in stacks:
                nn.init.zeros_(stacks[name])

    def forward(self, h: Tensor) -> Tensor:
        """h -> h_L, of the same shape, dtype and device."""
        return self._run(h, *self._stacks())

    @property
    def last_drift(self) -> Drift | None:
        """What the last adjoint backward of this block found; None before there was one.

        Relative errors of the worst row: ``estimate``, of the states that activations were differentiated at;
        ``drift``, of reconstructed states that the forward knew. Means: ``evaluations`` of a step's f,
        ``order`` of the prediction that the reconstruction starts from. See docs/adjoint.md. Waits for a GPU,
        and takes what CUDA graphs have written since the last look for the last.
        """
        return self._drift.read()

    def trajectory(self, h: Tensor, every: int = 1) -> Tensor:
        """States along depth: h_0, h_every, h_2every, ... and, always last, h_L.

        Differentiable. Runs the block in pieces of ``every`` steps; the last entry is ``self(h)`` bit for bit
        (in half precision on the CPU's native core, and without normalisation, which is folded into weights
        of half precision otherwise).

        Arguments:
            h: input, as of ``forward``.
            every: steps between two states, from 1 to L.

        Returns:
            shape [⌈L / every⌉ + 1, *h.shape], of the dtype of ``self(h)``.

        Raises:
            TypeError, ValueError: ``every`` is not a whole number from 1 to L, or as ``forward``.
        """
        every = check_size("every", every, most=None)
        if every > self.depth:
            got = in_digits(every)
            raise ValueError(f"every: expected an int from 1 to the depth {self.depth}, got {got}")
        check_tensor("h", h)
        stacks = self._current_stacks()
        h, *weights = autocasted(h, *stacks[: len(PARAMETERS)])
        if h.dtype != weights[0].dtype:
            raise TypeError(f"h: expected the dtype of the block, {weights[0].dtype}; got {h.dtype}")
        # Between pieces the state keeps the precision that it has inside one: half-precision weights are
        # widened, which is exact, and what the kernels do themselves.
        state = h.to(torch.promote_types(h.dtype, torch.float32))
        states = [state]
        stacks = (*weights, *stacks[len(PARAMETERS) :])
        with without(h.device.type):
            for piece in cut_stacks(stacks, lambda p: p.to(state.dtype).split(every)):
                states.append(self._run(states[-1], *piece))
        return torch.stack(states).to(h.dtype)

    @torch.enable_grad()  # computed weights then tell whether they are trained
    def resample(self, depth: int) -> Self:
        """A new block: the same neural ODE at another depth.

        Layer j of the new block has the weights 𝒵(j / depth), where 𝒵 passes through this block's Z_k at
        s = k/L, is linear between and constant below 1/L (``odeblock.limit``); the scale is such that
        scale · depth, the ODE's horizon, stays. For weights that are smooth in depth both blocks are within
        O(1/L) of the ODE; tied weights are copied exactly; independent layers have no ODE, and what comes out
        is another network. Of parametrizations and pruning the new block has the outcome, in plain
        parameters.

        Arguments:
            depth: of the new block, >= 1.

        Raises:
            TypeError, ValueError: ``depth`` is not a whole number >= 1.
        """
        depth = check_size("depth", depth)
        old = self._current_stacks()
        layers = torch.arange(1, depth + 1, dtype=torch.float64, device=old[0].device)
        position = layers * self.depth / depth  # exact wherever an old layer lies
        scale = None if self.scale == 1.0 / self.depth else self.scale * self.depth / depth
        with torch.no_grad():
            stacks = [None if p is None else interpolate(p, position) for p in old]
        return self._like(stacks, scale, old)

    @torch.enable_grad()
    def split(self, parts: int) -> nn.Sequential:
        """The block cut along depth into ``parts`` blocks, applied one after another.

        For pipelines, sharding (docs/distributed.md) and layer-wise optimisers. The parts have copies of the
        parameters (plain ones, as after ``resample``), the ``scale`` of the whole, and depths that differ by
        at most one, the larger ones first. In float32 and float64 they give the whole's bits; in half
        precision the state is rounded between two parts.

        Arguments:
            parts: from 1 to L.

        Raises:
            TypeError, ValueError: ``parts`` is not a whole number from 1 to L.
        """
        parts = check_size("parts", parts, most=None)
        if parts > self.depth:
            raise ValueError(
                f"parts: expected an int from 1 to the depth {self.depth}, got {in_digits(parts)}; a part "
                "holds at least one step"
            )
        stacks = self._current_stacks()
        pieces = cut_stacks(stacks, lambda p: p.detach().tensor_split(parts))
        return nn.Sequential(*(self._like(piece, self.scale, stacks) for piece in pieces))

    def vector_field(self, interpolation: str = "linear") -> VectorField:
        """f(s, h), the right-hand side of the block's limiting ODE, for any ODE solver on 0 <= s <= 1.

        It shares the block's parameters, and interpolates them in depth (``"linear"`` or ``"cubic"``): see
        ``odeblock.limit.VectorField``.
        """
        return VectorField(self, interpolation)

    @classmethod
    def from_layers(
        cls,
        layers: Iterable[Sequence[nn.Module] | nn.Sequential],
        *,
        scale: float | None = None,
        backward: str = "auto",
    ) -> Self:
        """A block with the weights of a list of residual branches ``V_k σ(W_k h + b_k) + c_k``.

        Arguments:
            layers: one ``nn.Sequential``, tuple or list of three modules for each step, all alike:
                (nn.Linear(q, m), activation module, nn.Linear(m, q)), or for maps (nn.Conv2d(C, M, k,
                padding=k//2), activation module, nn.Conv2d(M, C, k, padding=k//2)) with k odd, perhaps with
                an nn.BatchNorm2d after each nn.Conv2d. Parameters and running statistics are copied, and
                the number of batches that the first nn.BatchNorm2d has seen.
            scale: step size of ``h + scale · branch(h)``; 1/L by default. A plain residual network has 1.
            backward: see ``odeblock.functional.deep_residual``.

        Raises:
            TypeError, ValueError: no layers; a layer that is not modules of these kinds; an activation that
                the block does not have; sizes, activations, dtypes or devices that differ between layers; a
                bias or a normalisation on some layers only; a convolution with a stride, dilation, groups, or
                another padding; a normalisation with settings other than the default ones.
        """
        activation, stacks, tracked = stack_layers(cls.branch, layers)
        options: dict[str, Any] = {"activation": activation, "scale": scale, "backward": backward}
        if tracked is not None:
            options["norm"] = "batch"
        block = cls._sized_like(stacks[0], **options, device="meta")
        block._set_stacks([*stacks, *[None] * (len(cls.stacks) - len(stacks))])
        if tracked is not None:
            block.num_batches_tracked = tracked
        return block

    def to_layers(self) -> list[nn.Sequential]:
        """The block's steps as the modules that ``from_layers`` takes, with copied parameters.

        A ``scale`` other than 1/L has to be given to ``from_layers`` again.
        """
        start = (self.branch, self.activation, getattr(self, "num_batches_tracked", None))
        return [
            make_layer(*start, *piece).train(self.training)
            for piece in cut_stacks(self._current_stacks(), lambda p: p.unbind())
        ]

    def extra_repr(self) -> str:
        parts = [*self._shown_sizes(), ("activation", self.activation)]
        biases = [name for name in PARAMETERS[2:] if getattr(self, name) is not None]
        parts.extend((name, True) for name in (biases if len(biases) == 1 else ["bias"] * bool(biases)))
        parts.append(("init", self.init))
        if self.scale != 1.0 / self.depth:
            parts.append(("scale", self.scale))
        parts.append(("backward", self.backward))
        for name, default in (("strict", False), ("anchors", 0), ("memory_budget", None)):
            if getattr(self, name) != default:
                parts.append((name, getattr(self, name)))
        return ", ".join(f"{name}={value!r}" for name, value in parts)

    # ---- inside ------------------------------------------------------------------------------------------

    @classmethod
    def _sized_like(cls, V: Tensor, **options: Any) -> Self:
        """A block of the depth and the sizes of V [L, q, m] or [L, C, M, k, k]."""
        make: Callable[..., Self] = cls
        return make(V.shape[1], V.shape[0], *V.shape[2:4], **options)

    def _stacks(self) -> tuple[Any, ...]:
        """All stacks, V first; each a tensor, or None. RuntimeError where this process has a share only."""
        stacks: tuple[Any, ...] = attrgetter(*self.stacks)(self)
        if is_sharded(stacks[0]):
            raise RuntimeError(
                "V: expected a whole tensor, got a shard of one, as FSDP keeps it outside of forward; call "
                ".unshard() of the module that was given to fully_shard before, and .reshard() after"
            )
        return stacks

    def _current_stacks(self) -> tuple[Any, ...]:
        """The same where ``forward`` was not called, with what is computed before it."""
        for hook in self._forward_pre_hooks.values():
            if isinstance(hook, REPARAMETRISING):
                hook(self, ())
        return self._stacks()

    def _run(self, h: Tensor, *stacks: Tensor | None) -> Tensor:
        """h through the layers that ``stacks`` hold."""
        if not torch.compiler.is_compiling():
            self._drift.settle()
        options = (self.backward, self.strict, self.anchors, self.memory_budget)
        return self._recorded(self._drift, h, *self._weights(*stacks), self.activation, self.scale, *options)

    def _weights(self, *stacks: Tensor | None) -> tuple[Tensor | None, ...]:
        """V, W and biases of layers without normalisation that do what those do that ``stacks`` hold."""
        return stacks

    def _set_stacks(self, stacks: Sequence[Tensor | None]) -> None:
        """Replace all stacks by copies of those given, of the same depth."""
        for name, value in zip(self.stacks, stacks, strict=True):
            if value is not None:
                value = value.detach().clone(memory_format=torch.contiguous_format)
                value = value if name in self._buffers else nn.Parameter(value)
            setattr(self, name, value)

    def _options(self) -> dict[str, Any]:
        """The settings, beside the scale, of a block like this one."""
        names = ("activation", "init", "backward", "strict", "anchors", "memory_budget")
        return {name: getattr(self, name) for name in names}

    def _like(self, stacks: Sequence[Any], scale: float | None, old: Sequence[Any]) -> Self:
        """A new block with this one's settings, copies of ``stacks``, and ``scale``; trained is what is in
        ``old``, the stacks of this one."""
        kind: Any = parametrize.type_before_parametrizations(self)
        block: Self = kind._sized_like(stacks[0], scale=scale, **self._options(), device="meta")
        block._set_stacks(stacks)
        for new, was in zip(block._stacks(), old, strict=True):
            if new is not None:
                new.requires_grad_(was.requires_grad)
        return block.train(self.training)

    def __prepare_scriptable__(self) -> Self:
        """What ``torch.jit.script`` asks every module for first."""
        raise RuntimeError(f"torch.jit.script {NO_TORCHSCRIPT}")

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """As every module's, with advice where the state dict comes from a block of another depth."""
        depths = {
            name: state_dict[prefix + name].shape[0]
            for name in self.stacks
            if isinstance(state_dict.get(prefix + name), Tensor) and state_dict[prefix + name].dim() > 1
        }
        other = {name: depth for name, depth in depths.items() if depth != self.depth}
        if other:
            depth = next(iter(other.values()))
            error_msgs: list[str] = args[-1]
            error_msgs.append(
                f"{prefix}{', '.join(other)}: this block has depth {self.depth}, the state dict holds one of "
                f"depth {depth}. Load it into a block of depth {depth}, and call .resample({self.depth}) on "
                "that."
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *args)


def cut_stacks(
    stacks: Sequence[Tensor | None], cut: Callable[[Tensor], Sequence[Tensor]]
) -> list[tuple[Any, ...]]:
    """All stacks of each piece into which ``cut`` divides a stack along depth."""
    pieces = [None if p is None else cut(p) for p in stacks]
    count = len(pieces[0] or ())
    return list(zip(*([None] * count if piece is None else piece for piece in pieces), strict=True))
