"""The canonical dump: Parquet or JSONL with the columns of the table `rollouts`.

Required: group_id, sample_index, prompt_ids (or prompt), completion_ids, completion_entropies, reward.
`completion_entropies` may be null: such a rollout awaits the scorer. Defaults of the rest: origin policy,
policy_version 0, finish_reason stop, entropy_kind full_vocab, group_size the number of the group's rows
(experts not counted), night today, run_id the files' content.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import FormatError, nearest
from pipeline.formats.json_lines import first_object
from pipeline.formats.json_rows import json_lines
from pipeline.formats.parquet_rows import column_names, parquet_rows, parquet_tables
from pipeline.formats.source_rows import SourceRow, check_file

NAME = "canonical"
REQUIRED = ("group_id", "sample_index", "completion_ids", "completion_entropies", "reward")
SUFFIXES = (".parquet", ".jsonl", ".ndjson")
_NO_PLACE = "group_id must be text and sample_index a whole number from 0"


def recognizes(path: Path) -> bool:
    """Whether the file has groups, and their tokens or rewards, under our names."""
    names = column_names(path) if path.suffix == ".parquet" else first_object(path)
    return names is not None and "group_id" in names and bool({"completion_ids", "reward"} & set(names))


def read(path: Path) -> Iterator[SourceRow]:
    """The rows of a file; see `source_rows.Format`."""
    _check(path)
    rows = parquet_rows if path.suffix == ".parquet" else json_lines
    for row in rows(path):
        yield row if row.problem else replace(row, problem=_problem(row.values))


def tables(path: Path) -> Iterator[tuple[pa.Table, pa.Array]] | None:
    """The columns of a Parquet file; see `source_rows.ColumnarFormat`."""
    if path.suffix != ".parquet":
        return None
    _check(path)
    return ((table, _problems(table)) for table in parquet_tables(path))


def _check(path: Path) -> None:
    """Raises FormatError: the file is missing, of another kind, cut off, or lacks a required column."""
    check_file(path)
    if path.suffix not in SUFFIXES:
        raise FormatError(f"{path} is neither .parquet nor .jsonl. Convert it, or check the path.")
    if path.suffix != ".parquet":
        return
    names = column_names(path)
    if names is None:
        next(parquet_tables(path))  # says what is wrong with it
        return
    needed = [name for name in REQUIRED if name not in names]
    if "prompt_ids" not in names and "prompt" not in names:
        needed.append("prompt_ids")
    if needed:
        raise FormatError(f"{path} has no column `{needed[0]}`: {nearest(needed[0], names)}")


def _problem(row: Mapping[str, Any]) -> str | None:
    for name in REQUIRED:
        if name not in row:
            return f"column `{name}` is missing"
    return _NO_PLACE if row["sample_index"] is None else None


def _problems(table: pa.Table) -> pa.Array:
    placeless = table["sample_index"].combine_chunks().is_null()
    return pc.if_else(placeless, pa.scalar(_NO_PLACE), pa.scalar(None, pa.string()))
