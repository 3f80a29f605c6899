"""The answers of `echomine sql` in four forms, and the table of `echomine audit`."""

from __future__ import annotations

import json
import sys
from io import BytesIO
from typing import Any

import click
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.commands.output import counted
from pipeline.audit import Audit
from pipeline.query import Selection

MAX_CELL = 80  # characters; long lists would fill the screen


def write_answer(answer: Selection, form: str) -> None:
    """Writes a query's answer to standard output as table, csv, json (one array) or parquet."""
    if form == "table":
        _print_table(answer)
    elif form == "json":
        rows = [dict(zip(answer.names, row, strict=True)) for row in _rows(answer.table)]
        click.echo(json.dumps(rows, default=str))
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


def print_audit(audit: Audit) -> None:
    """A table of the classes, and what their zero-advantage groups cost."""
    table = Table("class", title="Groups by class", title_justify="left")
    for name in ("groups", "rollouts", "completion tokens", "of all tokens"):
        table.add_column(name, justify="right")
    for name, figures in audit.classes.items():
        share = figures.tokens / audit.tokens if audit.tokens else 0.0
        table.add_row(
            name, f"{figures.groups:,}", f"{figures.rollouts:,}", f"{figures.tokens:,}", f"{share:.1%}"
        )
    Console(highlight=False, width=None if sys.stdout.isatty() else 100).print(table)
    click.echo(
        f"Zero-advantage groups: {audit.zero_advantage_tokens:,} of {audit.tokens:,} completion tokens "
        f"({audit.zero_advantage_share:.1%}) taught nothing."
    )
    click.echo(f"Mining them would yield {audit.clips:,} EchoClips; dropped: {counted(audit.dropped)}.")
    if audit.refused:
        click.echo(f"Rows left out: {counted(audit.refused)}.")


def _rows(table: pa.Table) -> list[tuple[Any, ...]]:
    columns: list[list[Any]] = [table.column(i).to_pylist() for i in range(table.num_columns)]
    return list(zip(*columns, strict=True))


def _flat(answer: Selection) -> pa.Table:
    """Lists and maps as JSON text: a CSV cell holds one value."""
    columns = [
        pa.array([None if v is None else json.dumps(v, default=str) for v in column.to_pylist()], pa.string())
        if pa.types.is_nested(column.type)
        else column
        for column in answer.table.columns
    ]
    return pa.table(columns, names=answer.names)


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
    return text if len(text) <= MAX_CELL else text[: MAX_CELL - 1] + "…"
