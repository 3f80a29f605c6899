"""What the reward part of an audit reads from dumps: a group, a reward, and a length if there is one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline import schema
from pipeline.errors import FormatError
from pipeline.formats.fields import is_count
from pipeline.formats.parquet_rows import parquet_rows
from pipeline.formats.source_rows import Format, SourceRow

_AS_IN_ROLLOUTS = ("group_id", "sample_index", "reward", "group_size", "origin")
DUMP_ROWS = pa.schema(
    [
        pa.field("nth_row", pa.int64()),
        pa.field("num_tokens", pa.int64()),
        pa.field("sample_id", pa.string()),
        *(schema.ROLLOUTS.field(name) for name in _AS_IN_ROLLOUTS),
    ]
)
LENGTHS = ("completion_ids", "completion_entropies", "completion_logprobs")
_READ = {*_AS_IN_ROLLOUTS, "completion", *LENGTHS}
_BATCH_ROWS = 65_536


def source_rows(dumps: Sequence[tuple[Path, Format]]) -> Iterator[SourceRow]:
    """Every row of the dumps in the words of the table `rollouts`.

    Raises:
        FormatError: a file is cut off, or of another kind.
    """
    for path, kind in dumps:
        # Of canonical Parquet a few columns are enough, and none is required but a group and a reward.
        columnar = kind.NAME == "canonical" and path.suffix == ".parquet"
        yield from parquet_rows(path, _READ) if columnar else kind.read(path)


def dump_rows(
    rows: Iterator[SourceRow],
    tokenizer: Any | None,
    refused: Counter[str],
    progress: Callable[[int], None] | None = None,
) -> pa.Table:
    """The rows that have a group and a reward, as `DUMP_ROWS`; the others are counted in `refused`.

    Args:
        tokenizer: counts the tokens of completions that a dump holds as text only.
        progress: called with the number of rows read so far.
    """
    good = _reward_rows(rows, tokenizer, refused)
    batches = []
    while chunk := list(islice(good, _BATCH_ROWS)):
        batches.append(pa.RecordBatch.from_pylist(chunk, DUMP_ROWS))
        if progress is not None:
            progress(chunk[-1]["nth_row"] + 1)
    return pa.Table.from_batches(batches, DUMP_ROWS)


def _reward_rows(
    rows: Iterator[SourceRow], tokenizer: Any | None, refused: Counter[str]
) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(rows):
        try:
            yield _reward_row(number, row, tokenizer)
        except FormatError as error:
            known = row.values.keys() & {"group_id", "reward"}
            refused[str(error) if known else row.problem or str(error)] += 1


def _reward_row(number: int, row: SourceRow, tokenizer: Any | None) -> dict[str, Any]:
    values = row.values  # of a row that cannot be imported, too, if its group and its reward can be read
    group, reward = values.get("group_id"), values.get("reward")
    index, size = values.get("sample_index"), values.get("group_size")
    if not isinstance(group, str):
        raise FormatError("column `group_id` is missing or no text")
    if isinstance(reward, bool) or not isinstance(reward, int | float):
        raise FormatError("the reward is missing" if reward is None else "the reward is no number")
    if not math.isfinite(reward):
        raise FormatError(f"the reward is {reward}")
    return {
        "nth_row": number,
        "group_id": group,
        "sample_index": index if is_count(index) else None,
        "reward": float(reward),
        "sample_id": row.sample_id,
        "num_tokens": _num_tokens(values, tokenizer),
        "group_size": size if is_count(size) else None,
        "origin": values["origin"] if values.get("origin") == "expert" else "policy",
    }


def _num_tokens(values: Mapping[str, Any], tokenizer: Any | None) -> int | None:
    for name in LENGTHS:
        if isinstance(values.get(name), list):
            return len(values[name])
    text = values.get("completion")
    if tokenizer is not None and isinstance(text, str):
        return len(tokenizer.encode(text, add_special_tokens=False))
    return None
