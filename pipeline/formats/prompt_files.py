"""Prompt files of verl's kind, in Parquet, whose rows carry an expert's solution."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import FormatError
from pipeline.formats.fields import member, messages, said, truth
from pipeline.formats.json_rows import rollouts
from pipeline.formats.parquet_rows import column_names, parquet_rows
from pipeline.formats.source_rows import SourceRow, check_file
from pipeline.hashing import content_id, file_sha256

_ASSUMED = "Experts' solutions carry no reward: each was held to be right, with the reward 1."


def columns(path: Path) -> list[str]:
    """The file's column names; none if it is missing or no Parquet file."""
    return (column_names(path) or []) if path.suffix == ".parquet" else []


def expert_rows(
    name: str,
    path: Path,
    column: str,
    values: Callable[[list[dict[str, str]], Any], dict[str, Any]],
) -> Iterator[SourceRow]:
    """Each row as an expert's rollout. Rows of a file with the same prompt and ground truth are a group.

    A row without a solution is refused, since it is a prompt and no rollout.

    Args:
        name: the format's.
        column: where the solution stands.
        values: makes the prompt and the completion of the prompt's messages and the solution.

    Raises:
        FormatError: the file is missing, or no whole Parquet file.
    """
    check_file(path)
    file = file_sha256(path)[:16]

    def group(row: Mapping[str, Any]) -> str:
        return f"{name}/{file}/{content_id(_asked(row), _ground_truth(row))[:16]}"

    def with_source(row: Mapping[str, Any]) -> dict[str, Any]:
        solution, source = row.get(column), row.get("data_source")
        if not solution:
            raise FormatError(f"the prompt has no {column}")
        return said(
            values(_asked(row), solution)
            | {
                "origin": "expert",
                "reward": 1.0,  # nothing is said, and what is given to be learned is held to be right
                "ground_truth": _ground_truth(row),
                "data_source": source if isinstance(source, str) else None,
            }
        )

    yield from rollouts(parquet_rows(path), group, with_source, _ASSUMED)


def _asked(row: Mapping[str, Any]) -> list[dict[str, str]]:
    return messages(row.get("prompt"), "prompt")


def _ground_truth(row: Mapping[str, Any]) -> str | None:
    return truth(member(row, "reward_model").get("ground_truth"))
