"""Members: what ``torch.vmap`` maps over, as a dimension that tensors of a block have in front.

A call takes h [B, q] and V, W, hidden_bias, output_bias, or those of maps. Each tensor may have E members, an
ensemble: one dimension more, in front. One that has not is shared by all. Where h alone is mapped over there
are no members, but more rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

WEIGHTS = 4
"""The last tensors of every list; those before, h or grad and h, are alike."""


class Mapped(NamedTuple):
    """Tensors as a call takes them, without the dimension that a ``vmap`` maps over; ``restore`` gives a
    result this dimension again, and says where."""

    tensors: list[Tensor | None]
    restore: Callable[[Tensor], tuple[Tensor, int]]


def of(tensors: Sequence[Tensor | None], dims: Sequence[int | None] | None = None) -> list[bool]:
    """Which tensors have members; ``dims``: where dimensions are that do not count."""
    V = tensors[-WEIGHTS]
    assert V is not None
    dims = [None] * len(tensors) if dims is None else dims
    weight = 3 if V.dim() - (dims[-WEIGHTS] is not None) <= 4 else 5
    own = [weight - 1] * (len(tensors) - WEIGHTS) + [weight, weight, 2, 2]
    return [
        x is not None and x.dim() - (dim is not None) > least
        for x, dim, least in zip(tensors, dims, own, strict=True)
    ]


def count(tensors: Sequence[Tensor | None]) -> int | None:
    """E; None where no tensor has members."""
    return next(
        (x.shape[0] for x, has in zip(tensors, of(tensors), strict=True) if has and x is not None), None
    )


def split(tensors: Sequence[Tensor | None]) -> list[list[Tensor | None]]:
    """The tensors of each member; without members, of the one there is."""
    size, have = count(tensors), of(tensors)
    if size is None:
        return [list(tensors)]
    return [
        [x[e] if x is not None and has else x for x, has in zip(tensors, have, strict=True)]
        for e in range(size)
    ]


def join(tensors: Sequence[Tensor | None], results: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The results of ``split``'s parts, each with members in front if there were."""
    if count(tensors) is None:
        return list(results[0])
    return [torch.stack(parts) for parts in zip(*results, strict=True)]


def first(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The tensors of the first member, or of the one there is."""
    return [x[0] if x is not None and has else x for x, has in zip(tensors, of(tensors), strict=True)]


def mapped(function: Callable[..., Any], tensors: Sequence[Tensor | None]) -> Callable[..., Any]:
    """A function of one member's tensors (or of several such lists), made of PyTorch operators, as one of all
    members of tensors such as these."""
    if count(tensors) is None:
        return function
    have = of(tensors)

    def of_all(*arguments: Tensor | None) -> Any:
        given = zip(arguments, itertools.cycle(have), strict=False)
        return torch.vmap(function, tuple(0 if has and x is not None else None for x, has in given))(
            *arguments
        )

    return of_all


def into_rows(size: int, dims: Sequence[int | None], tensors: Sequence[Tensor | None]) -> Mapped:
    """Of a ``vmap`` over ``size`` states and not over weights: more rows of one call."""
    have = of(tensors, dims)
    rows = next(  # of each of the `size`
        x.shape[int(has) + (dim is not None and dim <= int(has))]
        for x, dim, has in zip(tensors, dims, have, strict=True)
        if x is not None
    )

    def flat(x: Tensor, dim: int | None, has: bool) -> Tensor:
        at = int(has)  # behind the members
        x = x.expand(size, *x.shape).movedim(0, at) if dim is None else x.movedim(dim, at)
        return x.flatten(at, at + 1)

    states = zip(tensors[:-WEIGHTS], dims, have, strict=False)
    found = [None if x is None else flat(x, dim, has) for x, dim, has in states]
    at = int(any(have))
    return Mapped([*found, *tensors[-WEIGHTS:]], lambda y: (y.unflatten(at, (size, rows)), at))


def into_members(size: int, dims: Sequence[int | None], tensors: Sequence[Tensor | None]) -> Mapped:
    """Of a ``vmap`` over weights: members. Where there are E already, they become ``size`` · E."""
    have = of(tensors, dims)
    within = next(
        (
            (x if dim is None else x.select(dim, 0)).shape[0]
            for x, dim, has in zip(tensors, dims, have, strict=True)
            if has and x is not None
        ),
        None,
    )

    def in_front(x: Tensor | None, dim: int | None, has: bool) -> Tensor | None:
        if x is None or (dim is None and not has):
            return x
        x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        if within is None:
            return x
        return (x if has else x.unsqueeze(1).expand(size, within, *x.shape[1:])).flatten(0, 1)

    found = [in_front(*each) for each in zip(tensors, dims, have, strict=True)]
    return Mapped(found, lambda y: (y if within is None else y.unflatten(0, (size, within)), 0))
