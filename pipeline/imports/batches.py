"""A dump's rows as batches of bounded size, each ready to be staged: what may enter, and what is refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import schema
from pipeline.errors import EchoMineError
from pipeline.formats.fields import is_count
from pipeline.formats.source_rows import ColumnarFormat, Format, SourceRow
from pipeline.imports.columns import completed_columns
from pipeline.imports.context import ImportContext, is_unicode
from pipeline.imports.rows import completed_row, prompt_columns
from pipeline.imports.types import Columns, columns_of_rows, columns_of_table
from pipeline.quarantine import Refused
from pipeline.rollouts import unnamed_table

BATCH_ITEMS = 1 << 20  # tokens, numbers and characters of a batch of rows; as Python objects some 30 MB

# Rows on their way: columns of `rollouts`, the prompt's words, and where they come from. A refused row leaves
# its place here, since its group lost a rollout.
STAGED = pa.schema(
    [
        *schema.ROLLOUTS,
        *((name, pa.string()) for name in prompt_columns(None)),
        ("file", pa.int32()),
        ("nth", pa.int64()),  # over all files, from 0
        ("sample_id", pa.string()),  # the dump's, where it has one
        ("source", pa.string()),
        ("is_refused", pa.bool_()),
    ]
)


@dataclass(frozen=True)
class Batch:
    """Some neighbouring rows of one file.

    Attributes:
        num_rows: how many.
        staged: a row each, of the schema STAGED; those that were refused only if their group is known.
        refused: why those that are refused are.
        assumed: what the reader had to assume.
    """

    num_rows: int
    staged: pa.Table
    refused: list[Refused] = field(default_factory=list)
    assumed: set[str] = field(default_factory=set)


def batches(kind: Format, path: Path, file: int, first: int, context: ImportContext) -> Iterator[Batch]:
    """Every row of a file, in batches of bounded size.

    Args:
        file: the file's number in this import.
        first: the number of its first row in this import.

    Raises:
        FormatError: the file is cut off, or of another kind.
    """
    # dumps of several steps or trainings are often of one name
    whole = str(path.absolute())
    tables = kind.tables(path) if isinstance(kind, ColumnarFormat) else None
    if tables is None:
        named = (replace(row, source=whole + row.source.removeprefix(path.name)) for row in kind.read(path))
        for rows in _bounded(named):
            yield _batch_of_rows(rows, context, file, first)
            first += len(rows)
        return
    start = first
    for table, problems in tables:
        sources = [f"{whole}:{first - start + row + 1}" for row in range(table.num_rows)]
        yield _batch_of_table(table, problems, sources, context, file, first)
        first += table.num_rows


def _bounded(rows: Iterable[SourceRow]) -> Iterator[list[SourceRow]]:
    batch: list[SourceRow] = []
    items = 0
    for row in rows:
        batch.append(row)
        items += 16 + sum(map(_num_items, row.values.values()))
        if items >= BATCH_ITEMS:
            yield batch
            batch, items = [], 0
    if batch:
        yield batch


def _num_items(value: Any) -> int:
    """How much a value weighs in a batch; the messages of a prompt by their texts."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return sum(_num_items(part) for message in value for part in message.values())
    return len(value) if isinstance(value, list | str) else 1


def _batch_of_rows(rows: Sequence[SourceRow], context: ImportContext, file: int, first: int) -> Batch:
    sound = [row for row in rows if row.problem is None]
    numbers = np.array([i for i, row in enumerate(rows) if row.problem is None], dtype=np.int64) + first
    values = _with_ids([row.values for row in sound], context)
    rest = _Rest(context)
    for number, row in enumerate(rows, start=first):
        if row.problem is not None:
            rest.refuse(number, row.source, row.problem, row.values)
    staged = _staged(columns_of_rows(values), values, [row.source for row in sound], numbers, rest)
    assumed = {row.assumed for row in sound if row.assumed is not None}
    batch = _finished(len(rows), staged, rest, file, assumed)
    ids = pa.array([row.sample_id for row in rows], pa.string())
    named = ids.take(pa.array(batch.staged["nth"].to_numpy() - first))
    at = STAGED.get_field_index("sample_id")
    return replace(batch, staged=batch.staged.set_column(at, STAGED.field(at), named))


def _batch_of_table(
    table: pa.Table,
    problems: pa.Array,
    sources: Sequence[str],
    context: ImportContext,
    file: int,
    first: int,
) -> Batch:
    num_rows = table.num_rows
    numbers = np.arange(num_rows, dtype=np.int64) + first
    rest = _Rest(context)
    if problems.null_count < num_rows:
        sound = problems.is_null().to_numpy(zero_copy_only=False)
        for row in np.flatnonzero(~sound).tolist():
            rest.refuse(first + row, sources[row], problems[row].as_py(), table.slice(row, 1).to_pylist()[0])
        table, numbers = table.filter(pa.array(sound)), numbers[sound]
        sources = [sources[row] for row in np.flatnonzero(sound)]
    staged = _staged(columns_of_table(table), table, sources, numbers, rest)
    return _finished(num_rows, staged, rest, file, set())


def _with_ids(rows: Sequence[Mapping[str, Any]], context: ImportContext) -> list[Mapping[str, Any]]:
    """The rows; those whose completion is known by its text only with its tokens."""
    texts = [
        i
        for i, row in enumerate(rows)
        if row.get("completion_ids") is None
        and isinstance(row.get("completion"), str)
        and is_unicode(row["completion"])
    ]
    made = list(rows)
    ids = context.tokenized([rows[i]["completion"] for i in texts])
    for i, tokens in zip(texts, ids, strict=True):
        made[i] = {**rows[i], "completion_ids": tokens}
    return made


class _Rest:
    """The rows of a batch that are not beyond doubt: judged one by one."""

    def __init__(self, context: ImportContext) -> None:
        self.context = context
        self.accepted: list[dict[str, Any]] = []
        self.places: list[dict[str, Any]] = []  # what refused rows leave behind
        self.refused: list[Refused] = []

    def judge(self, number: int, source: str, values: Mapping[str, Any]) -> None:
        try:
            row = completed_row(values, self.context)
        except EchoMineError as error:
            self.refuse(number, source, str(error), values)
        else:
            self.accepted.append(row | {"nth": number, "source": source})

    def refuse(self, number: int, source: str, reason: str, values: Mapping[str, Any]) -> None:
        self.refused.append(Refused(reason, source, dict(values)))
        group, index = values.get("group_id"), values.get("sample_index")
        if isinstance(group, str) and is_unicode(group):
            expert = values.get("origin") == "expert"
            self.places.append(
                {
                    "group_id": group,
                    "sample_index": index if is_count(index) else None,
                    "origin": "expert" if expert else "policy",
                    "nth": number,
                    "source": source,
                }
            )


def _staged(
    columns: Columns, rows: Any, sources: Sequence[str], numbers: np.ndarray, rest: _Rest
) -> pa.Table:
    """The rows beyond doubt, staged; the others go to `rest`."""
    table, sure = completed_columns(columns, rest.context)
    doubtful = np.flatnonzero(~sure)
    if isinstance(rows, pa.Table):
        values = rows.take(pa.array(doubtful)).to_pylist() if len(doubtful) else []
    else:
        values = [rows[row] for row in doubtful]
    for row, given in zip(doubtful.tolist(), values, strict=True):
        rest.judge(int(numbers[row]), sources[row], given)
    table = table.append_column("nth", pa.array(numbers[sure]))
    kept = [sources[row] for row in np.flatnonzero(sure)]
    return table.append_column("source", pa.array(kept, pa.string()))


def _finished(num_rows: int, staged: pa.Table, rest: _Rest, file: int, assumed: set[str]) -> Batch:
    parts = [(staged, False)]
    if rest.accepted:
        accepted = unnamed_table(rest.accepted)
        for name in (*prompt_columns(None), "nth", "source"):
            values = pa.array([row[name] for row in rest.accepted], STAGED.field(name).type)
            accepted = accepted.append_column(name, values)
        parts.append((accepted, False))
    if rest.places:
        parts.append((pa.Table.from_pylist(rest.places), True))
    tables = []
    for table, is_refused in parts:
        length = table.num_rows
        facts = {"file": pa.array([file] * length, pa.int32()), "is_refused": pa.array([is_refused] * length)}
        columns = {name: table[name] for name in table.column_names} | facts
        tables.append(
            pa.table(
                [
                    columns[f.name].cast(f.type) if f.name in columns else pa.nulls(length, f.type)
                    for f in STAGED
                ],
                schema=STAGED,
            )
        )
    return Batch(num_rows, pa.concat_tables(tables), rest.refused, assumed)
