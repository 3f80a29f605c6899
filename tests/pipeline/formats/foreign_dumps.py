"""The dumps beside this file, how to read them, and how to damage them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.formats import areal, echorl, luffy, nemo_rl, prime_rl, slime, trinity, uft, verifiers
from pipeline.formats.source_rows import SourceRow

DUMPS = Path(__file__).parent / "dumps"
FORMATS: dict[str, Any] = {
    module.NAME: module
    for module in (areal, echorl, luffy, nemo_rl, prime_rl, slime, trinity, uft, verifiers)
}
FILES = {
    "areal": ["areal/5/11.jsonl"],
    "echorl": ["echorl/step_6/samples.json"],
    "luffy": ["experts/luffy.parquet"],
    "nemo-rl": [
        f"nemo_rl/{name}.jsonl" for name in ("train_data_step12", "train_data_step13", "without_tokens")
    ],
    "prime-rl": [
        "prime_rl/rollouts/step_4/train/all/traces.jsonl",
        "prime_rl/monitors/file/traces/stream.jsonl",
    ],
    "slime": ["slime/rollout_5.pt"],
    "trinity": ["trinity/old.db", "trinity/new.db", "trinity/split.db"],
    "uft": ["experts/uft.parquet"],
    "verifiers": [
        "verifiers/traces.jsonl",
        "verifiers/bare.jsonl",
        "verifiers_old/results.jsonl",
        "verifiers_old/with_tokens/results.jsonl",
    ],
}
JSON_LINES = [(name, file) for name, files in FILES.items() for file in files if file.endswith(".jsonl")]
JUNK = [None, True, -1, 10**400, float("nan"), "x", "", [], {}, [None], [[1]], [{"a": 1}], {"a": {"b": 1}}]


def read(name: str, path: Path | str) -> list[SourceRow]:
    """Every row; a path that is text is one of the dumps."""
    return list(FORMATS[name].read(DUMPS / path))


def values(rows: Sequence[SourceRow]) -> list[dict[str, Any]]:
    """The values of rows that were read, none of which has a problem."""
    assert [row.problem for row in rows] == [None] * len(rows)
    return [dict(row.values) for row in rows]


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """The rows as a Parquet file."""
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def lines(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DUMPS / file).read_text().splitlines()]


def damaged(row: Any) -> Iterator[Any]:
    """The row with one member at a time, at any depth, replaced by each kind of junk."""
    for place in _places(row, ()):
        for junk in JUNK:
            broken = copy.deepcopy(row)
            holder = broken
            for key in place[:-1]:
                holder = holder[key]
            holder[place[-1]] = junk
            yield broken


def _places(value: Any, above: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Where members are; of lists the first item stands for all."""
    members = value.items() if isinstance(value, dict) else list(enumerate(value))[:1]
    for key, below in members:
        yield (*above, key)
        if isinstance(below, dict | list):
            yield from _places(below, (*above, key))
