"""Rows for the scorer's tests, and what a lake holds of them."""

from __future__ import annotations

from typing import Any

from pipeline.lake import Lake
from pipeline.scoring import Selection

ALL = Selection(rescore=True)


def without(rows: list[dict[str, Any]], *columns: str) -> list[dict[str, Any]]:
    return [row | dict.fromkeys(columns) for row in rows]


def unscored(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return without(rows, "completion_entropies", "completion_logprobs")


def select(lake: Lake, query: str, snapshot: int | None = None) -> list[dict[str, Any]]:
    with lake.reader(snapshot) as reader:
        return reader.rows(query)


def by_place(lake: Lake, snapshot: int | None = None) -> dict[tuple[str, int], dict[str, Any]]:
    rows = select(lake, "select * from rollouts", snapshot)
    return {(row["group_id"], row["sample_index"]): row for row in rows}
