"""Reads pickles as data: nothing that they name is looked up or called, nothing that they claim is believed.

A pickle is a program. Plain ``pickle.load`` calls whatever function it names, takes what memory it asks for,
and hashes what it builds, which may take for ever. Here a machine of our own follows the few instructions
that numbers, texts, lists, tuples, dicts and objects are made of, as pickletools reads them; a name stays a
``Name``, and an object is the ``Call`` that would make it.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_INSTRUCTIONS = 2**20
"""A batch of CIFAR-10 has 50,000. Each makes an object of some 64 bytes at most, beside what it holds."""

LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
LENGTHS = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
KEYS = (str, bytes, int, float, bool, type(None))
"""Of dicts. The hash of a tuple of two tuples of two tuples ... of few bytes takes for ever."""

ARRAY_NAMES = frozenset(
    (
        "numpy.ndarray",
        "numpy.dtype",
        "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray._reconstruct",
    )
)


@dataclass(eq=False)
class Name:
    """Of a class or function, with its module."""

    text: str


@dataclass(eq=False)
class Call:
    """An object: what would make it from which arguments, the state it would be given, and its items."""

    function: Name
    arguments: tuple[Any, ...]
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)


def unpickle(content: bytes, names: Container[str], stored: Callable[[Any], Any] | None = None) -> Any:
    """What a pickle holds; Python 2's strings as bytes.

    Arguments:
        names: those that may be in it. stored: called with what names an object that is stored outside of the
            pickle, whose place the result takes; without it there may be none.

    Raises:
        ValueError: it names anything else, or is more than data. A damaged one raises errors of other kinds.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def above(start: int) -> list[Any]:
        found = stack[start:]
        del stack[start:]
        return found

    instructions: Iterator[tuple[Any, Any, Any]] = pickletools.genops(content)
    for count, (instruction, argument, _) in enumerate(instructions):
        if count == MOST_INSTRUCTIONS:
            raise ValueError(f"expected a pickle of {MOST_INSTRUCTIONS} instructions at most, got more")
        kind = instruction.name
        if kind in LITERALS:
            stack.append(argument)
        elif kind in ("SHORT_BINSTRING", "BINSTRING"):
            stack.append(argument.encode("latin-1"))  # as pickletools decoded it
        elif kind in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif kind == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif kind in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif kind in CONSTANTS:
            stack.append(CONSTANTS[kind])
        elif kind == "EMPTY_LIST":
            stack.append([])
        elif kind == "EMPTY_DICT":
            stack.append({})
        elif kind == "MARK":
            marks.append(len(stack))
        elif kind == "TUPLE":
            stack.append(tuple(above(marks.pop())))
        elif kind in LENGTHS:
            stack.append(tuple(above(-LENGTHS[kind])))
        elif kind in ("APPEND", "APPENDS"):
            items = above(-1 if kind == "APPEND" else marks.pop())
            _expect(stack[-1], list).extend(items)
        elif kind in ("SETITEM", "SETITEMS"):
            items = above(-2 if kind == "SETITEM" else marks.pop())
            for key in items[::2]:
                _expect(key, *KEYS)
            target = _expect(stack[-1], dict, Call)
            (target if isinstance(target, dict) else target.items).update(
                zip(items[::2], items[1::2], strict=True)
            )
        elif kind in ("GLOBAL", "STACK_GLOBAL"):
            text = ".".join(argument.split(" ", 1) if kind == "GLOBAL" else above(-2))
            if text not in names:
                raise ValueError(f"expected arrays, numbers and texts alone, found the name {text}")
            stack.append(Name(text))
        elif kind == "REDUCE":
            function, arguments = above(-2)
            stack.append(Call(_expect(function, Name), _expect(arguments, tuple)))
        elif kind == "BUILD":
            (state,) = above(-1)
            _expect(stack[-1], Call).state = state
        elif kind == "BINPERSID" and stored is not None:
            stack.append(stored(stack.pop()))
        elif kind == "STOP":
            return stack.pop()
        elif kind not in ("PROTO", "FRAME"):
            raise ValueError(f"expected arrays, numbers and texts alone, found the instruction {kind}")
    raise ValueError("expected an end, found none")


def _expect(value: Any, *kinds: type) -> Any:
    if type(value) not in kinds:
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"expected {names} in a pickle, got {type(value).__name__}")
    return value


def array(record: Any) -> NDArray[np.uint8]:
    """The array of unsigned bytes that ``record``, found by ``unpickle`` with ``ARRAY_NAMES``, describes.

    Raises:
        ValueError: it describes none.
    """
    state = record.state if isinstance(record, Call) else None
    if not isinstance(state, tuple) or len(state) != 5:
        raise ValueError(f"expected an array, got {type(record).__name__}")
    _, shape, dtype, fortran, content = state  # as numpy.ndarray.__setstate__ takes it
    code = dtype.arguments[:1] if isinstance(dtype, Call) else ()
    if code not in (("u1",), (b"u1",)) or not isinstance(content, bytes):
        raise ValueError("expected an array of dtype uint8, got another")
    return np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran else "C")
