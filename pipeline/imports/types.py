"""What a dump says in the lake's types: rows or columns of any kind become columns of `rollouts`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import schema
from pipeline.errors import FormatError
from pipeline.flat_lists import Mask
from pipeline.imports.rows import date_of, time_of

_IDS, _NATS = pa.list_(pa.int32()), pa.list_(pa.float32())
_WORDS = ("prompt", "prompt_text", "messages", "ground_truth", "data_source")
_PLAIN: dict[pa.DataType, set[type]] = {
    pa.string(): {str},
    pa.int32(): {int},
    pa.int64(): {int},
    pa.float64(): {int, float},
}
# What JSON says in another way: the Python type, and how it is read.
_READ: dict[pa.DataType, tuple[type, Callable[[Any], Any]]] = {
    pa.date32(): (str, date_of),
    pa.timestamp("us", tz="UTC"): (str, time_of),
    pa.map_(pa.string(), pa.float64()): (dict, lambda parts: list(parts.items())),
}
_ITEMS: dict[pa.DataType, set[type]] = {_IDS: {int}, _NATS: {int, float}}


@dataclass(frozen=True)
class Columns:
    """Rows of a dump in the lake's types. R = rows.

    Attributes:
        table: [R] the columns of `rollouts` that were given, null where a value is none of its type.
        sure: [R] whether every value of the row is of its column's type.
        words: what the prompt is made of, by name: [R] Python values.
    """

    table: pa.Table
    sure: Mask
    words: Mapping[str, list[Any]]


def columns_of_rows(rows: Sequence[Mapping[str, Any]]) -> Columns:
    """Rows, as Python values, in columns."""
    sure = np.ones(len(rows), dtype=bool)
    names = {name for row in rows for name in row}
    columns = {}
    for field in schema.ROLLOUTS:
        if field.name in names:
            columns[field.name] = _array([row.get(field.name) for row in rows], field.type, sure)
    words = {name: [row.get(name) for row in rows] for name in _WORDS if name in names}
    return Columns(pa.table(columns), sure, words)


def columns_of_table(table: pa.Table) -> Columns:
    """A dump's own columns, without making Python values of them where their types allow it."""
    sure = np.ones(table.num_rows, dtype=bool)
    columns = {}
    for field in schema.ROLLOUTS:
        if field.name not in table.column_names:
            continue
        given = table[field.name].combine_chunks()
        try:
            if not _alike(given.type, field.type):
                raise pa.ArrowTypeError(str(given.type))
            columns[field.name] = given.cast(field.type)
        except pa.ArrowException:
            columns[field.name] = _array(given.to_pylist(), field.type, sure)
    words = {name: table[name].to_pylist() for name in _WORDS if name in table.column_names}
    return Columns(pa.table(columns), sure, words)


def _alike(given: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether a cast says the same; whether a value fits, the cast itself finds out."""
    if given == wanted or pa.types.is_null(given):
        return True
    if wanted in (_IDS, _NATS):
        nested = pa.types.is_list(given) or pa.types.is_large_list(given)
        return nested and _alike(given.value_type, wanted.value_type)
    if pa.types.is_integer(wanted):
        return bool(pa.types.is_integer(given))
    if pa.types.is_floating(wanted):
        return bool(pa.types.is_integer(given) or pa.types.is_floating(given))
    if pa.types.is_string(wanted):
        return bool(pa.types.is_large_string(given) or pa.types.is_dictionary(given))
    return bool(pa.types.is_timestamp(wanted) and pa.types.is_timestamp(given))


def _array(values: list[Any], wanted: pa.DataType, sure: Mask) -> pa.Array:
    """The values as an array; of those that do not fit, `sure` is made false."""
    if wanted in _READ:
        values = [_read(value, *_READ[wanted]) for value in values]
    try:
        if _plain(values, wanted):
            return pa.array(values, wanted)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        pass
    for row, value in enumerate(values):
        try:
            if not _plain([value], wanted):
                raise TypeError
            pa.array([value], wanted)
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            values[row] = None
            sure[row] = False
    return pa.array(values, wanted)


def _read(value: Any, kind: type, read: Callable[[Any], Any]) -> Any:
    """The value as Arrow takes it; one that cannot be read as it is, which Arrow then refuses."""
    try:
        return read(value) if isinstance(value, kind) else value
    except FormatError:
        return value


def _plain(values: list[Any], wanted: pa.DataType) -> bool:
    """Whether the values are of the Python types that Arrow takes without changing what they say."""
    present = [value for value in values if value is not None]
    if wanted in _ITEMS:
        if not set(map(type, present)) <= {list}:
            return False
        return set(map(type, chain.from_iterable(present))) <= _ITEMS[wanted]
    return wanted not in _PLAIN or set(map(type, present)) <= _PLAIN[wanted]
