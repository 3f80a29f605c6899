"""Reads a pickle of tensors and plain values without running anything that it asks for.

pickletools splits the bytes into operations; the few that build plain values are carried out here, on a
stack of our own. A class becomes a dict of its attributes. The functions a pickle may name are those in
`_FUNCTIONS`, each with a stand-in of ours; any other name, and any other operation, ends the reading.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.errors import FormatError, said
from pipeline.formats.fields import is_count

_NUMPY_KINDS = "fiub"  # floats, whole numbers, flags
_VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True)
class _Name:
    """A class or function that the pickle names. It is never looked up."""

    name: str


@dataclass
class _NumpyType:
    """A dtype of plain numbers, its byte order told later."""

    dtype: np.dtype[Any]


_MARK = _Name("mark")


def read_pickle(data: bytes, classes: frozenset[str]) -> Any:
    """The value that a pickle describes: tensors as lists, objects of `classes` as dicts.

    Args:
        classes: full names of the classes whose attributes may be read.

    Raises:
        FormatError: it is cut off, or names or does anything else.
    """
    reader = _Reader(classes)
    try:
        for operation, argument, _ in pickletools.genops(data):
            if operation.name == "STOP":
                return reader.stack.pop()
            reader.run(operation.name, argument)
    except FormatError:
        raise
    except Exception as error:  # hostile bytes can fail anywhere in here, and all of it means the same
        raise FormatError(f"its pickle is damaged: {type(error).__name__}: {said(error)[:100]}") from None
    raise FormatError("its pickle is cut off")


class _Reader:
    def __init__(self, classes: frozenset[str]) -> None:
        self.stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._classes = classes

    def run(self, name: str, argument: Any) -> None:
        """Carries out one operation."""
        stack = self.stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in ("PROTO", "FRAME"):
            return
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name == "TUPLE":
            stack.append(tuple(self._marked()))
        elif name in _TUPLES:
            stack.append(tuple(self._top(_TUPLES[name])))
        elif name in ("APPEND", "APPENDS"):
            values = self._marked() if name == "APPENDS" else self._top(1)
            _plain(stack[-1], list).extend(values)
        elif name in ("SETITEM", "SETITEMS"):
            pairs = self._marked() if name == "SETITEMS" else self._top(2)
            _plain(stack[-1], dict).update(zip(pairs[::2], pairs[1::2], strict=True))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            parts = argument.split(" ") if name == "GLOBAL" else self._top(2)
            stack.append(self._named(".".join(_plain(part, str) for part in parts)))
        elif name in ("REDUCE", "NEWOBJ"):
            called, arguments = self._top(2)
            stack.append(self._made(called, _plain(arguments, tuple)))
        elif name == "BUILD":
            (state,) = self._top(1)
            _build(stack[-1], state)
        else:
            raise FormatError(f"its pickle does {name}, which is not carried out")

    def _top(self, count: int) -> list[Any]:
        values = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        if len(values) != count or any(value is _MARK for value in values):
            raise FormatError("its pickle is damaged: the stack is empty")
        return values

    def _marked(self) -> list[Any]:
        values = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def _named(self, name: str) -> _Name:
        if name not in self._classes and name not in _FUNCTIONS:
            raise FormatError(f"its pickle names {name:.80}, which is not run")
        return _Name(name)

    def _made(self, called: Any, arguments: tuple[Any, ...]) -> Any:
        name = _plain(called, _Name).name
        return {} if name in self._classes else _FUNCTIONS[name](*arguments)


def _plain(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise FormatError(f"its pickle is damaged: a {type(value).__name__} in place of a {kind.__name__}")
    return value


def _build(made: Any, state: Any) -> None:
    if isinstance(made, _NumpyType):
        order = _plain(state, tuple)[1]
        made.dtype = made.dtype.newbyteorder(_plain(order, str))
    else:
        _plain(made, dict).update(_plain(state, dict))


def _storage(data: Any) -> Any:
    import torch

    if zipfile.is_zipfile(io.BytesIO(_plain(data, bytes))):
        raise FormatError("its pickle holds an archive, whose content could fill the memory")
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, _requires_grad: Any = None, *_more: Any
) -> list[Any]:
    """A tensor of one dimension, as a list. torch itself would let the storage grow to any length."""
    import torch

    if not isinstance(storage, torch.storage.TypedStorage) or len(size) != 1 or stride != (1,):
        raise FormatError("its pickle holds a tensor that is no list of numbers")
    if not is_count(offset) or not is_count(size[0]):
        raise FormatError("its pickle holds a tensor without a length")
    values = torch.empty(0, dtype=storage.dtype).set_(storage)[offset : offset + size[0]]
    if len(values) != size[0]:
        raise FormatError("its pickle holds a tensor that is longer than its storage")
    return list(values.tolist())


def _numpy_type(code: Any, *_flags: Any) -> _NumpyType:
    dtype = np.dtype(_plain(code, str))
    if dtype.kind not in _NUMPY_KINDS:
        raise FormatError(f"its pickle holds a numpy {dtype}, no number")
    return _NumpyType(dtype)


def _numpy_number(kind: Any, data: Any) -> Any:
    return np.frombuffer(_plain(data, bytes), dtype=_plain(kind, _NumpyType).dtype, count=1)[0].item()


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch.storage._load_from_bytes": _storage,
    "collections.OrderedDict": dict,
    "numpy.dtype": _numpy_type,
    "numpy.core.multiarray.scalar": _numpy_number,
    "numpy._core.multiarray.scalar": _numpy_number,
}
