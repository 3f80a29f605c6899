"""TRL's completions: `{output_dir}/completions/completions_{step}.parquet`, with `log_completions=True`.

Texts, a column of numbers for each reward function (NaN where it gave None), and the advantage. Which rows
are a group is not said: they stand one after the other, so neighbours with the same prompt and step are one
(the same prompt drawn twice in a row makes one group of two). Nor are the weights of the reward functions:
the reward is their plain sum, as with TRL's default weights. Columns that a reward function logged beside its
reward (`log_extra`) look the same if they hold fractions, and count too. `policy_version` is the logged step:
one more than the optimizer steps behind the sampling weights, for every row alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.errors import FormatError, nearest
from pipeline.formats.parquet_rows import column_names, parquet_tables
from pipeline.formats.source_rows import SourceRow, check_file
from pipeline.hashing import content_id, file_sha256

NAME = "trl"
REQUIRED = ("step", "prompt", "completion", "advantage")
_NEIGHBOURS = "TRL's dump names no groups: neighbouring rows with the same prompt and step were taken as one."


def recognizes(path: Path) -> bool:
    """Whether it is Parquet with TRL's columns."""
    names = column_names(path)
    return names is not None and set(names) >= set(REQUIRED)


def read(path: Path) -> Iterator[SourceRow]:
    """The rows of a file; see `source_rows.Format`."""
    check_file(path)
    names = column_names(path)
    if names is None:
        next(parquet_tables(path))  # says what is wrong with it
    needed = [name for name in REQUIRED if name not in (names or [])]
    if needed:
        raise FormatError(f"{path} has no column `{needed[0]}`: {nearest(needed[0], names or [])}")
    return _rows(path)


def _rows(path: Path) -> Iterator[SourceRow]:
    # The same prompt and step occur in every training, so the file itself tells groups apart.
    file, number, group, first, last = file_sha256(path), 0, -1, 0, None
    for table in parquet_tables(path):
        parts = [field.name for field in table.schema if _is_reward(field)]
        assumed = f"{_NEIGHBOURS} The reward is the sum of {', '.join(parts)}."
        for row in table.to_pylist():
            number += 1
            if (row["step"], row["prompt"]) != last:
                group, first, last = group + 1, number, (row["step"], row["prompt"])
            place = {"group_id": content_id(NAME, file, group), "sample_index": number - first}
            yield SourceRow(f"{path.name}:{number}", place | _values(row, parts), _problem(row), assumed)


def _is_reward(field: pa.Field) -> bool:
    return field.name not in REQUIRED and bool(pa.types.is_floating(field.type))


def _values(row: Mapping[str, Any], parts: list[str]) -> dict[str, Any]:
    scored = {name: row[name] for name in parts if row[name] is not None and not math.isnan(row[name])}
    values: dict[str, Any] = {
        "policy_version": row["step"],
        "completion": _spoken(row["completion"]),
        "reward": sum(scored.values()) if scored else None,
        "reward_parts": scored or None,
    }
    kind = "messages" if isinstance(row["prompt"], list) else "prompt_text"
    return values | {kind: row["prompt"]}


def _problem(row: Mapping[str, Any]) -> str | None:
    if not isinstance(_spoken(row["completion"]), str):
        return "its completion is more than one message of text, which cannot be one sequence of tokens"
    return None


def _spoken(completion: Any) -> Any:
    """The completion's text; a conversational one is a list of one message."""
    if isinstance(completion, list) and len(completion) == 1 and isinstance(completion[0], dict):
        return completion[0].get("content")
    return completion
