"""Pickles that try to run code, to fill the memory, or to take for ever."""

import pickle
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest

from megamoe.convert.pickles import LARGEST_PICKLE, Name, Record, Vocabulary, unpickle
from megamoe.errors import CheckpointError
from tests.checkpoint.hostile import Bomb

PLAIN = Vocabulary(
    lambda name: name.module in ("harmless", __name__),
    {"collections.OrderedDict": dict},
    lambda identity: identity,
)


def load(data: bytes) -> Any:
    return unpickle(data, PLAIN)


class Harmless:
    def __init__(self, value: Any) -> None:
        self.value = value


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "value",
    [
        None, True, -1, 300, 1 << 40, 1.5, "text", "x" * 300, [], [1], [1, [2]], {},
        {"a": {2: (1, 2)}}, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), OrderedDict(a=1),
    ],
    ids=repr,
)  # fmt: skip
def test_data_is_what_pickle_gives(value: Any, protocol: int) -> None:
    assert load(pickle.dumps(value, protocol)) == value


def test_bytes() -> None:
    assert load(pickle.dumps(b"bytes", 3)) == b"bytes"


def test_shared_objects_stay_shared() -> None:
    inner = [1]
    a, b = load(pickle.dumps([inner, inner], 2))
    assert a is b


def test_instances_are_inert_records() -> None:
    found = load(pickle.dumps(Harmless([1, 2]), 2))
    assert found == Record(Name(__name__, "Harmless"), (), {"value": [1, 2]})


@pytest.mark.parametrize("protocol", range(6))
def test_never_runs_code(tmp_path: Path, protocol: int) -> None:
    data = pickle.dumps(Bomb(tmp_path / "trace"), protocol)
    with pytest.raises(CheckpointError):
        load(data)
    assert not list(tmp_path.iterdir())
    pickle.loads(data)
    assert list(tmp_path.iterdir()), "the bomb must be live"


ATTACKS = {
    "eval": b"c__builtin__\neval\n(X\x01\x00\x00\x001tR.",
    "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02ls\x85R.",
    "dotted name": b"\x80\x04\x8c\x05torch\x8c\x0ahub.system\x93.",
    "inst": b"(S'ls'\nios\nsystem\n.",
    "obj": b"(cos\nsystem\nS'ls'\no.",
    "extension registry": b"\x80\x02\x82\x01.",
    "build on a function": b"charmless\nf\n}b.",
    "call of a record": b"charmless\nf\n)\x81)R.",
    "call of text": b"X\x01\x00\x00\x00a)R.",
    "persistent text": b"Pname\n.",
    "memo that was not set": b"h\x05.",
    "empty stack": b"0.",
    "no stop": b"N",
    "nothing": b"",
    "mark as a value": b"(.",
    "items without a mark": b"]e.",
    "append to a number": b"K\x01K\x01a.",
    "items of a tuple": b")(K\x01e.",
    "odd entries": b"}(K\x01u.",
    "list as a key": b"}(]K\x01u.",
    "tuple as a key": b"}()K\x01u.",
    "long text that is not there": b"X\xff\xff\xff\x7fa.",
    "8 byte length": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fa.",
    "bytearray of a terabyte": b"\x80\x05\x96\x00\x00\x00\x00\x00\x01\x00\x00.",
    "number of many digits": b"I" + b"9" * 5000 + b"\n.",
    "not utf-8": b"X\x01\x00\x00\x00\xff.",
    "too large": b"N0" * (LARGEST_PICKLE // 2 + 1),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_refuses(attack: str) -> None:
    with pytest.raises(CheckpointError):
        load(ATTACKS[attack])


def test_a_large_memo_number_takes_no_memory() -> None:
    assert load(b"\x80\x02Nr\xff\xff\xff\x7f.") is None


def test_hash_bombs_are_refused_at_once() -> None:
    doubled = b"".join(b"q\x00h\x00\x86" for _ in range(80))  # t -> (t, t), eighty times
    data = b"\x80\x02})" + doubled + b"K\x01s."
    started = time.monotonic()
    with pytest.raises(CheckpointError, match="key"):
        load(data)
    assert time.monotonic() - started < 30


def test_repeating_a_large_state_takes_no_memory() -> None:
    state = pickle.dumps({str(i): i for i in range(20_000)}, 2)[2:-1] + b"r\x00\x01\x00\x00"
    data = b"\x80\x02" + state + b"0" + b"(" + b"charmless\nf\n)\x81j\x00\x01\x00\x00b" * 20_000 + b"t."
    started = time.monotonic()
    with pytest.raises(CheckpointError):
        load(data)  # pop, the instruction "0", is none that torch writes
    records = load(data.replace(state + b"0(", b"(" + state, 1))
    assert len({id(record.state) for record in records[1:]}) == 1
    assert time.monotonic() - started < 30


def nested(depth: int, kind: Any) -> Any:
    value = kind((1,))
    for _ in range(depth):
        value = kind((value, value))
    return value


@pytest.mark.parametrize("kind", [list, tuple])
def test_data_that_expands_without_end_is_refused_at_once(kind: Any) -> None:
    """Forty levels take 300 bytes, and years to print or to hash."""
    begin = time.perf_counter()
    with pytest.raises(CheckpointError, match="expands to more values"):
        load(pickle.dumps({"a": nested(40, kind)}, 2))
    with pytest.raises(CheckpointError, match="expands to more values"):
        load(pickle.dumps(Harmless(nested(40, kind)), 2))
    assert time.perf_counter() - begin < 5
    assert load(pickle.dumps(nested(5, kind), 2)) == nested(5, kind)


def test_data_that_holds_itself_is_refused_unless_a_record_does() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(CheckpointError, match="expands to more values"):
        load(pickle.dumps(loop, 2))
    child = Harmless(None)
    child.value = [child]
    assert load(pickle.dumps(child, 2)).state["value"]
