"""Prompt files of verl's kind, in Parquet, whose rows carry an expert's solution."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import FormatError
from pipeline.formats.fields import (
    member,
    messages,
    said,
    truth,
)
from pipeline.formats.json_rows import rollouts
from pipeline.formats.parquet_rows import column_names, parquet_tables
from pipeline.formats.source_rows import SourceRow
from pipeline.hashing import content_id, file_sha256

_ASSUMED = "Experts' solutions carry no reward: each was held to be right, with the reward 1."


def columns(path: Path) -> list[str]:
    """The file's column names; none if it is missing or no Parquet file."""
    return (column_names(path) or []) if path.suffix == ".parquet" else []


def expert_rows(
    name: str, path: Path, values: Callable[[Mapping[str, Any]], dict[str, Any]]
) -> Iterator[SourceRow]:
    """Each row as an expert's rollout; `values` gives prompt and completion, `name` is the format's.

    Rows of a file with the same prompt and ground truth are a group.

    Raises:
        FormatError: the file is missing, or no whole Parquet file.
    """
    if not path.is_file():
        raise FormatError(f"There is no file {path}. Check the path.")
    file = file_sha256(path)[:16]

    def group(row: Mapping[str, Any]) -> str:
        asked = messages(row.get("prompt"), "prompt")
        return f"{name}/{file}/{content_id(asked, _ground_truth(row))[:16]}"

    def with_source(row: Mapping[str, Any]) -> dict[str, Any]:
        source = row.get("data_source")
        return said(
            values(row)
            | {
                "origin": "expert",
                "reward": 1.0,  # nothing is said, and what is given to be learned is held to be right
                "ground_truth": _ground_truth(row),
                "data_source": source if isinstance(source, str) else None,
            }
        )

    yield from rollouts(_rows(path), group, with_source, _ASSUMED)


def _ground_truth(row: Mapping[str, Any]) -> str | None:
    return truth(member(row, "reward_model").get("ground_truth"))


def _rows(path: Path) -> Iterator[SourceRow]:
    rows = (row for table in parquet_tables(path) for row in table.to_pylist())
    for number, row in enumerate(rows, start=1):
        yield SourceRow(f"{path.name}:{number}", row)
