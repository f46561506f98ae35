"""Pickles as data: dict, list, tuple, text, numbers and None, and nothing that could run code.

In: the bytes of a pickle of protocol 0 to 5. Out: the value, or one of two errors.
Always: `pickletools` only cuts the bytes into opcodes; the few that build plain values are carried out here, and every
other one (a global, a call, a persistent id, an extension code, a set, a buffer ...) is refused by its name. Time and
memory are linear in the length of the bytes, which is bounded. A container may stand in several places, as the pickler
writes it, but the value written out in full is bounded too, so that ten lists of ten references each can't grow into
billions; a container in itself is refused.
"""

from __future__ import annotations

import pickletools
import warnings
from typing import Any

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_INTEGERS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"}
_FLOATS = {"FLOAT", "BINFLOAT"}
_TEXTS = {"STRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_OLD_TEXTS = {"BINSTRING", "SHORT_BINSTRING"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}
_LATEST_PROTOCOL = 5
_INTEGER_BITS = 64
# Scalars only: to hash a nested tuple costs as much as it holds.
_KEYS = (str, int, float, type(None))


class UnsafePickleError(ValueError):
    """A pickle that asks for more than a bounded plain value: the opcode and its place, or the bound."""


class BrokenPickleError(ValueError):
    """No pickle, or one that ends early or contradicts itself: what, and at which byte."""


def loads(data: bytes, *, max_bytes: int = 2**20, max_values: int = 100_000, max_depth: int = 64) -> Any:
    """The plain value that a pickle holds.

    Args:
        data: the whole pickle. Text of Python 2 is read as UTF-8.
        max_bytes: its length; also bounds the characters of the value written out in full.
        max_values: values and keys of all containers, each counted as often as it stands there.
        max_depth: containers inside each other.

    Raises:
        UnsafePickleError: an opcode beyond plain values, a container in itself, or a value beyond a bound.
        BrokenPickleError: anything else that does not end in one value; an integer of more than 64 bits.
    """
    if len(data) > max_bytes:
        raise UnsafePickleError(f"{len(data)} bytes, at most {max_bytes} allowed")
    value = _built(data)
    _measure(value, max_bytes, max_values, max_depth)
    return value


def _built(data: bytes) -> Any:
    """Carry out the opcodes. No step costs more than the bytes that it reads or the values that it takes away."""
    stack: list[Any] = []
    below: list[list[Any]] = []  # The stacks under each mark.
    memo: dict[int, Any] = {}
    at = 0
    try:
        # Old pickles may hold escapes that a newer Python warns of.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            argument: Any
            for opcode, argument, place in pickletools.genops(data):
                name, at = opcode.name, place or 0
                if name in _CONSTANTS:
                    stack.append(_CONSTANTS[name])
                elif name in _INTEGERS:
                    if argument.bit_length() > _INTEGER_BITS:
                        raise BrokenPickleError(f"an integer of {argument.bit_length()} bits at byte {at}")
                    stack.append(argument)
                elif name in _FLOATS or name in _TEXTS:
                    stack.append(argument)
                elif name in _OLD_TEXTS:
                    stack.append(argument.encode("latin-1").decode("utf-8"))
                elif name == "EMPTY_LIST":
                    stack.append([])
                elif name == "EMPTY_DICT":
                    stack.append({})
                elif name == "EMPTY_TUPLE":
                    stack.append(())
                elif name == "MARK":
                    below.append(stack)
                    stack = []
                elif name in _TUPLES:
                    taken = [stack.pop() for _ in range(_TUPLES[name])]
                    stack.append(tuple(reversed(taken)))
                elif name in ("LIST", "TUPLE", "DICT"):
                    taken, stack = stack, below.pop()
                    stack.append(
                        taken if name == "LIST" else tuple(taken) if name == "TUPLE" else _filled({}, taken, at, dict)
                    )
                elif name in ("APPEND", "SETITEM"):
                    taken = [stack.pop() for _ in range(1 if name == "APPEND" else 2)]
                    _filled(stack[-1], taken[::-1], at, list if name == "APPEND" else dict)
                elif name in ("APPENDS", "SETITEMS"):
                    taken, stack = stack, below.pop()
                    _filled(stack[-1], taken, at, list if name == "APPENDS" else dict)
                elif name in _PUTS:
                    memo[len(memo) if argument is None else argument] = stack[-1]
                elif name in _GETS:
                    stack.append(memo[argument])
                elif name == "PROTO":
                    if argument > _LATEST_PROTOCOL:
                        raise BrokenPickleError(
                            f"protocol {argument} at byte {at}, at most {_LATEST_PROTOCOL} is known"
                        )
                elif name not in ("FRAME", "STOP"):
                    raise UnsafePickleError(f"opcode {name} at byte {at} builds more than plain values")
    except (UnsafePickleError, BrokenPickleError):
        raise
    except (IndexError, KeyError):
        raise BrokenPickleError(f"an opcode at byte {at} takes what is not there") from None
    except ValueError as error:
        # Also UnicodeDecodeError. `pickletools` says what it misses, but not always where.
        raise BrokenPickleError(f"after byte {at}: {error}") from None
    if len(stack) != 1 or below:
        raise BrokenPickleError(f"{len(stack) + sum(map(len, below))} values are left at byte {at} instead of one")
    if at + 1 != len(data):
        raise BrokenPickleError(f"{len(data) - at - 1} bytes follow its end at byte {at}")
    return stack[0]


def _filled(container: Any, values: list[Any], at: int, kind: type[list] | type[dict]) -> Any:
    """The container, with `values` put into it: into a list, or as key, value, key, value into a dict."""
    if not isinstance(container, kind):
        raise BrokenPickleError(f"an opcode at byte {at} puts something into a {type(container).__name__}")
    if isinstance(container, list):
        container.extend(values)
        return container
    if len(values) % 2:
        raise BrokenPickleError(f"a key without a value at byte {at}")
    for key in values[::2]:
        if not isinstance(key, _KEYS):
            raise BrokenPickleError(f"a {type(key).__name__} as a key at byte {at}")
    container.update(zip(values[::2], values[1::2]))
    return container


def _measure(value: Any, max_characters: int, max_values: int, max_depth: int) -> None:
    """Walk through the value as its reader will, every reference followed. Raises `UnsafePickleError`."""
    values = characters = 0
    waiting = [iter((value,))]
    while waiting:
        for one in waiting[-1]:
            values += 1
            if isinstance(one, str):
                characters += len(one)
            if values > max_values or characters > max_characters:
                raise UnsafePickleError(
                    f"written out it has more than {max_values} values or {max_characters} characters"
                )
            if isinstance(one, dict | list | tuple):
                if len(waiting) > max_depth:
                    raise UnsafePickleError(f"containers in each other, or in themselves, deeper than {max_depth}")
                # Keys are short of containers, so they can be counted with the values.
                waiting.append(iter([*one, *one.values()] if isinstance(one, dict) else one))
                break
        else:
            waiting.pop()
