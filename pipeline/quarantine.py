"""Rows that do not enter the lake: why, and what is kept of them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import schema


@dataclass(frozen=True)
class Refused:
    """A row that does not enter the lake, and why."""

    reason: str
    source: str
    row: dict[str, Any]


def quarantine_table(refused: Sequence[Refused]) -> pa.Table:
    """Refused rows as the table `quarantine`; the row itself is kept as JSON."""
    now = datetime.now(UTC)
    return pa.Table.from_pylist(
        [
            {
                "reason": item.reason,
                "source": item.source,
                "run_id": _text(item.row.get("run_id")),
                "group_id": _text(item.row.get("group_id")),
                "sample_index": _small_integer(item.row.get("sample_index")),
                "row": json.dumps(_jsonable({k: v for k, v in item.row.items() if k != "created_at"})),
                "created_at": now,
            }
            for item in refused
        ],
        schema.QUARANTINE,
    )


def first_refusal(quarantine: pa.Table) -> str:
    """Where the first row of the table `quarantine` stood, and why it was refused."""
    return f"{quarantine['source'][0]}: {quarantine['reason'][0]}"


def _text(value: Any) -> str | None:
    # Half a surrogate pair, which JSON can spell and UTF-8 cannot, is kept as its escape.
    return None if value is None else str(value).encode("utf-8", "backslashreplace").decode()


def _small_integer(value: Any) -> int | None:
    return int(value) if isinstance(value, int | np.integer) and abs(int(value)) < 2**31 else None


def _jsonable(value: Any) -> Any:
    """What JSON can hold; NaN and infinities, which it cannot, become text."""
    if isinstance(value, np.ndarray | np.generic):
        return _jsonable(value.tolist())
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
