"""Calls between the tests and the program under test, in two processes, with data only.

Numbers, texts, bytes, None and the containers and number types of `_TYPES` are copied. Of anything else that the
program has (functions, classes, their objects, iterators) the tests get a `Remote`, which forwards what is done with
it. The program gets copies too, and of a test's functions a `Remote` that it can call and nothing else. After a call,
lists and other mutable arguments are made equal to what the program made of them.

Whatever arrives is checked: nothing that the other side sends can be more than data.
"""

import builtins
import collections
import datetime
import decimal
import fractions
import importlib
import operator
import types
from collections.abc import Callable, Mapping

from tracerl_jax.rewards.sandbox.inside.frames import Wait, read_frame, write_frame


class ProgramEnded(BaseException):
    """The program has gone away, or sends what is no message. Tests that catch everything do not get past it."""


# ---- data ----

_DATES = (datetime.datetime, datetime.date, datetime.time)
# name: (type, to JSON with `encode` for items, from JSON with `decode` for items); subclasses before their bases
_TYPES: dict[str, tuple[type, Callable, Callable]] = {
    "int": (int, lambda v, encode: hex(v), lambda d, decode: int(d, 16)),
    "complex": (complex, lambda v, encode: [v.real, v.imag], lambda d, decode: complex(*d)),
    "bytes": (bytes, lambda v, encode: v.decode("latin-1"), lambda d, decode: d.encode("latin-1")),
    "bytearray": (bytearray, lambda v, encode: v.decode("latin-1"), lambda d, decode: bytearray(d, "latin-1")),
    "decimal": (decimal.Decimal, lambda v, encode: str(v), lambda d, decode: decimal.Decimal(d)),
    "fraction": (
        fractions.Fraction,
        lambda v, encode: [hex(v.numerator), hex(v.denominator)],
        lambda d, decode: fractions.Fraction(int(d[0], 16), int(d[1], 16)),
    ),
    "range": (range, lambda v, encode: [v.start, v.stop, v.step], lambda d, decode: range(*d)),
    **{
        kind.__name__: (kind, lambda v, encode: v.isoformat(), lambda d, decode, kind=kind: kind.fromisoformat(d))
        for kind in _DATES
    },
    "timedelta": (
        datetime.timedelta,
        lambda v, encode: [v.days, v.seconds, v.microseconds],
        lambda d, decode: datetime.timedelta(*d),
    ),
    **{
        name: (
            kind,
            lambda v, encode: [[encode(key), encode(value)] for key, value in v.items()],
            lambda d, decode, kind=kind: kind({decode(key): decode(value) for key, value in d}),
        )
        for name, kind in (("counter", collections.Counter), ("ordered", collections.OrderedDict), ("dict", dict))
    },
    **{
        kind.__name__: (
            kind,
            lambda v, encode: [encode(item) for item in v],
            lambda d, decode, kind=kind: kind(decode(item) for item in d),
        )
        for kind in (tuple, set, frozenset, collections.deque)
    },
}
_MUTABLE = (list, dict, set, bytearray, collections.deque)
_JSON_INT = 1 << 63


# ---- operations on an object of the other side ----

_UNARY = {
    f"__{name}__": function
    for name, function in {
        "len": len, "iter": iter, "next": next, "reversed": reversed, "bool": bool, "str": str, "repr": repr,
        "int": int, "float": float, "index": operator.index, "abs": abs, "neg": operator.neg, "pos": operator.pos,
        "invert": operator.invert, "round": round,
    }.items()
}  # fmt: skip
_ITEM = {"__getitem__": operator.getitem, "__setitem__": operator.setitem, "__delitem__": operator.delitem}
_BINARY = {f"__{name}__": getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
for _name in "add sub mul truediv floordiv mod pow matmul and_ or_ xor lshift rshift".split():
    _function = getattr(operator, _name)
    _BINARY[f"__{_name.rstrip('_')}__"] = _function
    _BINARY[f"__r{_name.rstrip('_')}__"] = lambda value, other, function=_function: function(other, value)
_ATTRIBUTE = {"getattr": getattr, "setattr": setattr, "delattr": delattr}
_OPERATIONS = {**_UNARY, **_ITEM, **_BINARY, **_ATTRIBUTE}


class Remote:
    """An object of the other process."""

    __slots__ = ("_remote_id", "_remote_peer", "_remote_type")

    def __init__(self, peer: "Peer", number: int, type_name: str):
        for name, value in (("_remote_peer", peer), ("_remote_id", number), ("_remote_type", type_name)):
            object.__setattr__(self, name, value)

    def __call__(self, *args, **kwargs):
        return self._remote_peer.call(self, args, kwargs)

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(f"{self._remote_type} object of the program has no {name} here")
        return self._remote_peer.operate("getattr", self, name)

    def __setattr__(self, name: str, value: object) -> None:
        self._remote_peer.operate("setattr", self, name, value)

    def __delattr__(self, name: str) -> None:
        self._remote_peer.operate("delattr", self, name)

    def __hash__(self) -> int:
        return self._remote_id


def _forward(name: str) -> Callable:
    def method(self, *args):
        return self._remote_peer.operate(name, self, *args)

    return method


def _forward_between_remotes(name: str) -> Callable:
    """An object of the program is not asked whether it equals a test's value, nor how the two add up: it would decide
    about its own reward. Between its own objects it has the say, and everywhere if the peer `believes`."""

    def method(self, other):
        if isinstance(other, Remote) or self._remote_peer.believes:
            return self._remote_peer.operate(name, self, other)
        return NotImplemented

    return method


for _name in (*_UNARY, *_ITEM):
    setattr(Remote, _name, _forward(_name))
for _name in _BINARY:
    setattr(Remote, _name, _forward_between_remotes(_name))


# ---- the conversation ----


class Peer:
    """One end. `wait(fd)` is called before each message that is read, and where a descriptor that does not block would
    have; it may raise `EOFError`.

    `believes`: whether objects of the other side are asked for comparisons and sums with values of this side.
    """

    def __init__(self, read_fd: int, write_fd: int, *, wait: Wait = lambda fd: None, believes: bool = False):
        self._read_fd, self._write_fd, self._wait = read_fd, write_fd, wait
        self.believes = believes
        self.broken = ""  # why the other side cannot be asked any more
        self._exported: list[object] = []
        self._is_program = False

    # what this side asks for

    def ask(self, what: str, **fields) -> dict:
        """Sends a request, serves requests that come before its reply, and returns this. Raises what the other side
        raised, and `ProgramEnded`."""
        try:
            write_frame(self._write_fd, {"do": what, **fields}, self._wait)
            while "do" in (message := self._read()):
                self._answer(message)
        except (OSError, EOFError, ValueError, TypeError, KeyError, RecursionError, MemoryError) as error:
            raise self._broken_off(f"the program broke off: {error}") from None
        if "raised" in message:
            raise _exception(*message["raised"])
        return message

    def call(self, function: Remote, args: tuple, kwargs: dict) -> object:
        reply = self.ask(
            "call", object=function._remote_id, args=[self.encode(arg) for arg in args],
            kwargs=[[name, self.encode(value)] for name, value in kwargs.items()],
        )  # fmt: skip
        value = self._received(reply["value"])
        for position, changed in reply["changed"]:
            _make_equal(args[position], self._received(changed))
        return value

    def operate(self, name: str, value: Remote, *args) -> object:
        reply = self.ask("operate", name=name, object=value._remote_id, args=[self.encode(arg) for arg in args])
        return self._received(reply["value"])

    def load(self) -> None:
        self.ask("load")

    def name(self, name: str) -> object:
        """What the program calls `name`; of a module, this process's own. Raises `NameError`."""
        reply = self.ask("name", name=name)
        if "module" not in reply:
            return self._received(reply["value"])
        try:
            return importlib.import_module(reply["module"])
        except Exception as error:  # of whatever the program named
            raise NameError(f"{name} is no module here") from error

    # what the other side asks for

    def serve(self, load: Callable[[], None], names: Mapping[str, object]) -> None:
        """Does what is asked, in the program's process, until the other side is gone."""
        self._is_program, self._load, self._names = True, load, names
        while True:
            try:
                message = self._read()
            except EOFError:
                return
            self._answer(message)

    def _answer(self, message: dict) -> None:
        try:
            reply = self._do(message)
        except BaseException as error:  # SystemExit too: it is for the tests to see
            builtin = next(kind for kind in type(error).__mro__ if kind.__module__ == "builtins")
            reply = {"raised": [builtin.__name__, type(error).__name__, str(error)[:1000]]}
        write_frame(self._write_fd, reply, self._wait)

    def _do(self, message: dict) -> dict:
        what = message["do"]
        if what == "call":
            return self._do_call(message)
        if not self._is_program:
            raise TypeError("a test's functions can be called, and nothing else")
        if what == "load":
            self._load()
            return {}
        if what == "name":
            if message["name"] not in self._names:
                raise NameError(f"name {message['name']!r} is not defined")
            value = self._names[message["name"]]
            return {"module": value.__name__} if isinstance(value, types.ModuleType) else {"value": self.encode(value)}
        target, args = self._exported[message["object"]], [self.decode(arg) for arg in message["args"]]
        return {"value": self.encode(_OPERATIONS[message["name"]](target, *args))}

    def _do_call(self, message: dict) -> dict:
        function = self._exported[message["object"]]
        args = [self.decode(arg) for arg in message["args"]]
        value = function(*args, **{name: self.decode(arg) for name, arg in message["kwargs"]})
        changed = []
        for position, (arg, sent) in enumerate(zip(args, message["args"], strict=True)):
            if isinstance(arg, _MUTABLE) and (now := self.encode(arg)) != sent:
                changed.append([position, now])
        return {"value": self.encode(value), "changed": changed}

    # values

    def encode(self, value: object) -> object:
        """JSON of a value. Raises `TypeError` in the tests for what cannot be given to the program."""
        if value is None or isinstance(value, bool | str | float):
            return value
        if isinstance(value, int):
            return int(value) if -_JSON_INT < value < _JSON_INT else {"int": hex(value)}
        if isinstance(value, list):
            return [self.encode(item) for item in value]
        for name, (kind, to_json, _) in _TYPES.items():
            if isinstance(value, kind):
                return {name: to_json(value, self.encode)}
        if isinstance(value, Remote):
            return {"yours": value._remote_id}
        if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
            return self.encode(value.item())
        if not self._is_program and not callable(value):
            raise TypeError(f"a test cannot give the program a {type(value).__name__}: only data and functions")
        self._exported.append(value)
        return {"mine": [len(self._exported) - 1, type(value).__name__]}

    def decode(self, data: object) -> object:
        """Raises `ValueError` and the like for what `encode` does not write."""
        if isinstance(data, list):
            return [self.decode(item) for item in data]
        if not isinstance(data, dict):
            return data
        ((name, content),) = data.items()
        if name == "yours":
            return self._exported[content]
        if name == "mine":
            number, type_name = content
            return Remote(self, int(number), str(type_name))
        return _TYPES[name][2](content, self.decode)

    def _received(self, data: object) -> object:
        try:
            return self.decode(data)
        except Exception as error:
            raise self._broken_off(f"the program sent what is no data ({type(error).__name__})") from None

    def _broken_off(self, reason: str) -> ProgramEnded:
        self.broken = self.broken or reason
        return ProgramEnded(reason)

    def _read(self) -> dict:
        self._wait(self._read_fd)
        message = read_frame(self._read_fd, self._wait)
        if not isinstance(message, dict):
            raise ValueError("it sent what is no message")
        return message


def _exception(builtin: str, name: str, text: str) -> BaseException:
    kind = getattr(builtins, str(builtin), None)
    if not (isinstance(kind, type) and issubclass(kind, BaseException)):
        kind = RuntimeError
    text = str(text) if name == builtin else f"{name}: {text}"
    try:
        return kind(text)
    except TypeError:  # one that wants more than a text
        return RuntimeError(f"{name}: {text}")


def _make_equal(mine: object, changed: object) -> None:
    """Gives a mutable argument the content that the program's copy has now."""
    if type(changed) is not type(mine):
        raise ProgramEnded("the program sent another type of argument back")
    if isinstance(mine, list | bytearray):
        mine[:] = changed
    else:
        mine.clear()
        (mine.extend if isinstance(mine, collections.deque) else mine.update)(changed)
