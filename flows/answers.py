"""The answers of `echomine sql` in four forms."""

from __future__ import annotations

import json
import math
import sys
from decimal import Decimal
from io import BytesIO
from typing import Any

import click
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.query import Selection

MAX_CELL = 80  # characters; long lists would fill the screen


def write_answer(answer: Selection, form: str) -> None:
    """Writes a query's answer to standard output as table, csv, json (one array) or parquet."""
    if form == "table":
        _print_table(answer)
    elif form == "json":
        names = _distinct(answer.names)
        rows = [dict(zip(names, row, strict=True)) for row in _plain_rows(answer.table)]
        click.echo(json.dumps(rows, default=str, allow_nan=False))
    elif form == "csv":
        frame = pl.from_arrow(_flat(answer))
        assert isinstance(frame, pl.DataFrame)
        click.echo(frame.write_csv(), nl=False)
    else:
        if sys.stdout.isatty():
            raise click.UsageError(
                "Parquet is no text: redirect it, as in `echomine sql … --format parquet > out.parquet`"
            )
        buffer = BytesIO()
        pq.write_table(answer.table.rename_columns(answer.names), buffer, compression="zstd")
        sys.stdout.buffer.write(buffer.getvalue())


def _rows(table: pa.Table) -> list[tuple[Any, ...]]:
    columns: list[list[Any]] = [table.column(i).to_pylist() for i in range(table.num_columns)]
    return list(zip(*columns, strict=True))


def _plain_rows(table: pa.Table) -> list[tuple[Any, ...]]:
    """Rows as JSON has them: maps are objects; NaN and infinity, which JSON cannot say, are null."""
    columns = [
        [_plain(value, table.schema.field(i).type) for value in table.column(i).to_pylist()]
        for i in range(table.num_columns)
    ]
    return list(zip(*columns, strict=True))


def _plain(value: Any, kind: pa.DataType) -> Any:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if isinstance(value, Decimal):
        return float(value)
    if pa.types.is_map(kind):
        return {str(key): _plain(item, kind.item_type) for key, item in value}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return [_plain(item, kind.value_type) for item in value]
    if pa.types.is_struct(kind):
        return {field.name: _plain(value[field.name], field.type) for field in kind}
    return value


def _distinct(names: list[str]) -> list[str]:
    """Column names with a number behind those that came before: an object holds a name once."""
    seen: dict[str, int] = {}
    distinct = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        distinct.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return distinct


def _flat(answer: Selection) -> pa.Table:
    """Lists and maps as JSON text: a CSV cell holds one value."""
    columns = [
        pa.array(
            [
                None if v is None else json.dumps(_plain(v, column.type), default=str)
                for v in column.to_pylist()
            ],
            pa.string(),
        )
        if pa.types.is_nested(column.type)
        else column
        for column in answer.table.columns
    ]
    return pa.table(columns, names=_distinct(answer.names))


def _print_table(answer: Selection) -> None:
    table = Table()
    for name in answer.names:
        table.add_column(Text(name))
    for row in _rows(answer.table):
        # Text, not str: what a model wrote must not be read as markup
        table.add_row(*(Text(_cell(value)) for value in row))
    Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(table)


def _cell(value: object) -> str:
    text = "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    # a model's text must not move the cursor or recolour the terminal
    text = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    return text if len(text) <= MAX_CELL else text[: MAX_CELL - 1] + "…"
