from __future__ import annotations

import os
import pickle
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from valr_ops.data.sources.plain_pickle import BrokenPickleError, UnsafePickleError, loads

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
PLAIN: list[Any] = [
    None,
    True,
    -1,
    2**63,
    1.5,
    float("inf"),
    "",
    "text with é, 漢 and 'quotes'\n",
    [],
    (),
    {},
    [1, [2, [3]]],
    ((1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
    {"a": {"b": (None, False)}, 1: "one", 2.5: [], None: 0},
    list(range(3000)),
    {str(number): number for number in range(3000)},
]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_values_come_back_as_the_pickler_wrote_them(protocol: int) -> None:
    for value in PLAIN:
        # The pickler in Python takes other opcodes than the one in C.
        for data in (pickle.dumps(value, protocol), pickle._dumps(value, protocol)):  # type: ignore[attr-defined]
            read = loads(data)
            assert read == value and type(read) is type(value)


def test_text_of_python_2_is_read_as_utf8() -> None:
    assert loads(b"S'plain \\x41'\np0\n.") == "plain A"
    assert loads(b"U\x02\xc3\xa9.") == "é"
    assert loads(b"T\x02\x00\x00\x00\xc3\xa9q\x00.") == "é"
    with pytest.raises(BrokenPickleError, match="utf-8"):
        loads(b"U\x01\xe9.")


class Runs:
    """Calls something as soon as it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.called = (function, arguments)

    def __reduce__(self) -> Any:
        return self.called


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_pickle_that_would_run_code_does_not_run_it(tmp_path: Path, protocol: int) -> None:
    made = tmp_path / "made"
    for one in (Runs(os.mkdir, str(made)), Runs(eval, f"__import__('os').mkdir({str(made)!r})")):
        for value in (one, {"question": "?", "final_com": [one]}):
            with pytest.raises(UnsafePickleError, match=r"opcode (STACK_)?GLOBAL at byte"):
                loads(pickle.dumps(value, protocol))
    assert not made.exists()
    # It would have run: the stock loader does make the folder.
    pickle.loads(pickle.dumps(Runs(os.mkdir, str(made)), protocol))
    assert made.exists()


def test_the_bytes_of_a_call_written_by_hand_do_not_run(tmp_path: Path) -> None:
    made = tmp_path / "made"
    command = f"touch {made}".encode()
    for data in (
        b"cos\nsystem\n(S'" + command + b"'\ntR.",
        b"(S'" + command + b"'\nios\nsystem\n.",
        b"(cos\nsystem\nS'" + command + b"'\no.",
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c" + bytes([len(command)]) + command + b"\x85R.",
    ):
        with pytest.raises(UnsafePickleError, match=r"opcode (GLOBAL|INST|STACK_GLOBAL) "):
            loads(data)
        assert not made.exists()
        pickle.loads(data)
        assert made.exists()
        made.unlink()


@pytest.mark.parametrize(
    ("opcode", "data"),
    [
        ("REDUCE", b")R."),
        ("BUILD", b"}}b."),
        ("OBJ", b"(o."),
        ("NEWOBJ", b"))\x81."),
        ("NEWOBJ_EX", b"))}\x92."),
        ("EXT1", b"\x82\x01."),
        ("EXT2", b"\x83\x01\x00."),
        ("EXT4", b"\x84\x01\x00\x00\x00."),
        ("PERSID", b"P1\n."),
        ("BINPERSID", b"K\x01Q."),
        ("NEXT_BUFFER", b"\x97."),
        ("READONLY_BUFFER", b"N\x98."),
        ("BINBYTES", b"B\x01\x00\x00\x00x."),
        ("SHORT_BINBYTES", b"C\x01x."),
        ("BYTEARRAY8", b"\x96\x01\x00\x00\x00\x00\x00\x00\x00x."),
        ("EMPTY_SET", b"\x8f."),
        ("FROZENSET", b"(\x91."),
        ("POP", b"NN0."),
        ("DUP", b"N2."),
    ],
)
def test_every_opcode_beyond_plain_values_is_refused_by_name(opcode: str, data: bytes) -> None:
    with pytest.raises(UnsafePickleError, match=f"opcode {opcode} at byte"):
        loads(data)


@pytest.mark.parametrize("value", [np.float32(1.5), np.int64(3), np.zeros(4), {"bbx_1": np.array([1, 2, 3, 4])}])
def test_numpy_objects_are_refused(value: Any) -> None:
    for protocol in PROTOCOLS:
        with pytest.raises(UnsafePickleError, match="GLOBAL"):
            loads(pickle.dumps(value, protocol))


def test_a_container_may_stand_in_two_places() -> None:
    box = [1, 2, 3, 4]
    for protocol in PROTOCOLS:
        assert loads(pickle.dumps({"a": box, "b": box}, protocol)) == {"a": box, "b": box}


def test_few_bytes_that_stand_for_billions_of_values_are_refused() -> None:
    laughs: list[Any] = ["ha"]
    for _ in range(30):
        laughs = [laughs] * 10
    with pytest.raises(UnsafePickleError, match="more than 100000 values"):
        loads(pickle.dumps(laughs))
    tuples: tuple[Any, ...] = ("ha",)
    for _ in range(30):
        tuples = (tuples,) * 10
    with pytest.raises(UnsafePickleError, match="more than 100000 values"):
        loads(pickle.dumps({"a": tuples}))


def test_one_long_text_in_many_places_is_refused() -> None:
    with pytest.raises(UnsafePickleError, match="characters"):
        loads(pickle.dumps(["x" * 10_000] * 1000))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_container_in_itself_is_refused(protocol: int) -> None:
    inside: list[Any] = []
    inside.append(inside)
    table: dict[str, Any] = {}
    table["a"] = [{"b": table}]
    for value in (inside, table):
        with pytest.raises(UnsafePickleError, match="in themselves"):
            loads(pickle.dumps(value, protocol))


def test_depth_and_length_are_bounded() -> None:
    nested: Any = 0
    for _ in range(64):
        nested = [nested]
    assert loads(pickle.dumps(nested)) == nested
    with pytest.raises(UnsafePickleError, match="deeper than 64"):
        loads(pickle.dumps([nested]))
    with pytest.raises(UnsafePickleError, match="deeper than 64"):
        loads(b"]" * 20_000 + b"a" * 19_999 + b".")
    with pytest.raises(UnsafePickleError, match="20 bytes, at most 10"):
        loads(bytes(20), max_bytes=10)
    with pytest.raises(UnsafePickleError, match="more than 5 values"):
        loads(pickle.dumps([0] * 10), max_values=5)


@pytest.mark.parametrize(
    ("what", "data"),
    [
        ("exhausted", b""),
        ("exhausted", b"N"),
        ("exhausted", pickle.dumps({"a": [1, 2, 3]})[:-1]),
        ("unknown", b"\xff."),
        ("unknown", bytes(10)),
        ("expected 100 bytes", b"\x8c\x64abc"),
        ("0 values are left", b"."),
        ("2 values are left", b"NN."),
        ("2 values are left", b"N(N."),
        ("3 bytes follow its end", b"N.abc"),
        ("takes what is not there", b"a."),
        ("takes what is not there", b"t."),
        ("takes what is not there", b"h\x07."),
        ("takes what is not there", b"q\x00."),
        ("takes what is not there", b"](N\x85\x87."),
        ("into a NoneType", b"NNa."),
        ("into a list", b"](NNu."),
        ("into a tuple", b")Na."),
        ("without a value", b"}(Nu."),
        ("a list as a key", b"}]Ns."),
        ("a tuple as a key", b"}(K\x01tNs."),
        ("an integer of 65 bits", pickle.dumps(2**64)),
        ("an integer of 40000 bits", pickle.dumps(2**39999)),
        ("protocol 9", b"\x80\x09N."),
    ],
)
def test_what_is_no_whole_pickle_is_named(what: str, data: bytes) -> None:
    with pytest.raises(BrokenPickleError, match=what):
        loads(data)


@pytest.mark.timeout(60)
def test_mutated_and_truncated_pickles_end_in_a_value_or_one_of_two_errors() -> None:
    chance = random.Random(7)
    step = {"func": "GROUNDING", "param": ["bbx_1", 2], "variables": {"bbx_1": [1, 2, 3.5, 4]}, "found": True}
    sample = {"question": "What?", "answer": "é", "final_com": {"0,0--1,0": step, "1,0--2,0": (step, None, -1, 2**40)}}
    seeds = [pickle.dumps(sample, protocol) for protocol in PROTOCOLS]
    seeds += [pickle.dumps([Runs(os.getcwd), sample], protocol) for protocol in PROTOCOLS]
    outcomes = {"value": 0, "unsafe": 0, "broken": 0}
    for turn in range(6000):
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.randrange(1, 6)):
            at = chance.randrange(len(data)) if data else 0
            match chance.randrange(4):
                case 0 if data:
                    data[at] = chance.randrange(256)
                case 1:
                    data[at:at] = bytes(chance.randrange(256) for _ in range(chance.randrange(1, 9)))
                case 2:
                    del data[at : at + chance.randrange(1, 9)]
                case 3:
                    data[at:at] = struct.pack("<q", chance.choice((-1, 2**31 - 1, 2**62, 0)))
        if turn % 3 == 0:
            del data[chance.randrange(len(data) + 1) :]
        try:
            loads(bytes(data))
            outcomes["value"] += 1
        except UnsafePickleError:
            outcomes["unsafe"] += 1
        except BrokenPickleError:
            outcomes["broken"] += 1
    assert all(outcomes.values()), outcomes
