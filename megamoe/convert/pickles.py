"""Read the pickles that torch.save writes without running anything that is in them.

A pickle is a program. This interpreter knows the instructions that data is made of; a class becomes an
inert `Record`, and the few functions that rebuild tensors are known by name. Everything else is refused.
"""

import pickletools
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from megamoe.errors import CheckpointError

MOST_VALUES = 10_000_000
LARGEST_PICKLE = 1 << 23
"""Bytes; that of a model of a thousand layers is smaller. It bounds time and memory."""


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle speaks of."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass
class Record:
    """What would be an instance of a class: its class's name and its attributes, as data."""

    type: Name
    arguments: tuple[Any, ...]
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Vocabulary:
    """What a pickle may mention.

    Attributes:
        is_known: whether a class, or another global name that is not a function here, may occur.
        functions: by name, what is called instead of the pickled function.
        persistent: makes an object of the persistent id of a storage.
    """

    is_known: Callable[[Name], bool]
    functions: dict[str, Callable[..., Any]]
    persistent: Callable[[Any], Any]


def unpickle(data: bytes, vocabulary: Vocabulary) -> Any:
    """The data in a pickle. Dicts of any class are dicts, sets are lists, other instances `Record`.

    Raises:
        CheckpointError: it is damaged, too large, or mentions what is not in `vocabulary`.
    """
    if len(data) > LARGEST_PICKLE:
        raise CheckpointError(f"pickle of {len(data):,} bytes: larger than any model's description")
    machine = _Machine(vocabulary)
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                result = machine.pop()
                _bound_size(result)
                return result
            machine.execute(opcode.name, argument)
    except CheckpointError:
        raise
    except (ArithmeticError, LookupError, TypeError, UnicodeError, ValueError) as error:
        raise CheckpointError(f"pickle is damaged ({type(error).__name__}: {str(error)[:80]})") from None
    raise CheckpointError("pickle is damaged (it has no end)")


def _bound_size(root: Any) -> None:
    """Refuse data that is small only because parts are shared: who walks, prints or hashes it would not end.

    Counts the values in every list, tuple and dict, shared ones as often as they come.
    """
    sizes: dict[int, int] = {}
    waiting = [(root, False)]
    while waiting:
        value, counted = waiting.pop()
        if counted:
            sizes[id(value)] = 1 + sum(_size_in(item, sizes) for item in _items(value))
            if sizes[id(value)] > MOST_VALUES:
                raise CheckpointError("pickle expands to more values than any model's description has")
        elif id(value) not in sizes:
            sizes[id(value)] = MOST_VALUES + 1  # until it is counted: nothing may contain itself
            waiting.append((value, True))
            waiting += [(item, False) for item in _items(value) if _items(item)]


def _size_in(item: Any, sizes: dict[int, int]) -> int:
    """What an item adds to the size of what holds it; a record counts by itself."""
    return 1 if isinstance(item, Record) else sizes.get(id(item), 1)


def _items(value: Any) -> Collection[Any]:
    if isinstance(value, Record):
        return (value.arguments, value.state)
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


class _Mark:
    """Where a list of items begins on the stack."""


class _Machine:
    """Stack and memo of a pickle that is being read."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def execute(self, opcode: str, argument: Any) -> None:
        if opcode in _PUSH_ARGUMENT:
            self.stack.append(argument)
        elif opcode in _PUSH_NEW:
            self.stack.append(_PUSH_NEW[opcode]())
        elif opcode in _TUPLES:
            size = _TUPLES[opcode]
            self.stack.append(tuple([self.pop() for _ in range(size)][::-1]))
        elif opcode in _MEMO_GET:
            self.stack.append(self.memo[argument])
        elif opcode in _MEMO_PUT:
            self.memo[argument] = self.stack[-1]
        elif opcode in _STEPS:
            _STEPS[opcode](self)
        elif opcode == "GLOBAL":
            self.push_name(*argument.split(" ", 1))
        elif opcode not in _IGNORED:
            raise CheckpointError(f"pickle holds the instruction {opcode}, which no model needs")

    def pop(self) -> Any:
        value = self.stack.pop()
        if isinstance(value, _Mark):
            raise ValueError("unexpected mark")
        return value

    def pop_items(self) -> list[Any]:
        """What lies above the last mark."""
        items: list[Any] = []
        while not isinstance(value := self.stack.pop(), _Mark):
            items.append(value)
        return items[::-1]

    def push_name(self, module: str, name: str) -> None:
        found = Name(module, name)
        if str(found) not in self.vocabulary.functions and not self.vocabulary.is_known(found):
            raise CheckpointError(f"pickle mentions {str(found)[:80]!r}, which no model needs; refused")
        self.stack.append(found)

    def step_stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("global name is not text")
        self.push_name(module, name)

    def step_memoize(self) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def step_tuple(self) -> None:
        self.stack.append(tuple(self.pop_items()))

    def step_reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise ValueError("call of what is not a function")
        known = self.vocabulary.functions.get(str(function))
        self.stack.append(known(*arguments) if known else Record(function, arguments))

    def step_new(self) -> None:
        arguments, cls = self.pop(), self.pop()
        if not isinstance(cls, Name) or not isinstance(arguments, tuple):
            raise ValueError("instance of what is not a class")
        self.stack.append(Record(cls, arguments))

    def step_build(self) -> None:
        state, target = self.pop(), self.stack[-1]
        if isinstance(target, Record) and isinstance(state, dict):
            target.state = state  # not a copy: a pickle may say this of one large dict many times
        elif not isinstance(target, dict):  # attributes of a dict, such as a state dict's, are left out
            raise ValueError("attributes of what has none")

    def step_append(self) -> None:
        self.append([self.pop()])

    def step_appends(self) -> None:
        self.append(self.pop_items())

    def append(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError("items of what is not a list")
        self.stack[-1].extend(items)

    def step_set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.update([key, value])

    def step_set_items(self) -> None:
        self.update(self.pop_items())

    def update(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict):
            raise ValueError("entries of what is not a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # The hash of nested tuples can take for ever.
            if key is not None and not isinstance(key, str | int | float | bytes | Name):
                raise ValueError("key that is no plain value")
            self.stack[-1][key] = value

    def step_persistent(self) -> None:
        self.stack.append(self.vocabulary.persistent(self.pop()))


_PUSH_ARGUMENT = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINBYTES",
    "SHORT_BINBYTES", "BINSTRING", "SHORT_BINSTRING",
}  # fmt: skip
_PUSH_NEW: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": list,
    "MARK": _Mark,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MEMO_GET = {"BINGET", "LONG_BINGET"}
_MEMO_PUT = {"BINPUT", "LONG_BINPUT"}
_STEPS: dict[str, Callable[[_Machine], None]] = {
    "STACK_GLOBAL": _Machine.step_stack_global,
    "MEMOIZE": _Machine.step_memoize,
    "TUPLE": _Machine.step_tuple,
    "REDUCE": _Machine.step_reduce,
    "NEWOBJ": _Machine.step_new,
    "BUILD": _Machine.step_build,
    "APPEND": _Machine.step_append,
    "APPENDS": _Machine.step_appends,
    "ADDITEMS": _Machine.step_appends,
    "SETITEM": _Machine.step_set_item,
    "SETITEMS": _Machine.step_set_items,
    "BINPERSID": _Machine.step_persistent,
}
_IGNORED = {"PROTO", "FRAME"}
