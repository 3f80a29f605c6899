"""What the reward part of an audit reads from dumps: a group, a reward, and a length if there is one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import FormatError, said
from pipeline.formats.source_rows import Format, SourceRow

DUMP_ROWS = pa.schema(
    [
        ("nth_row", pa.int64()),
        ("group_id", pa.string()),
        ("sample_index", pa.int64()),
        ("reward", pa.float64()),
        ("num_tokens", pa.int64()),
        ("group_size", pa.int64()),
        ("origin", pa.string()),
    ]
)
LENGTHS = ("completion_ids", "completion_entropies", "completion_logprobs")
_READ = {"group_id", "sample_index", "reward", "group_size", "origin", "completion", *LENGTHS}
_BATCH_ROWS = 65_536


def source_rows(dumps: Sequence[tuple[Path, Format]]) -> Iterator[SourceRow]:
    """Every row of the dumps in the words of the table `rollouts`.

    Raises:
        FormatError: a file is cut off, or of another kind.
    """
    for path, kind in dumps:
        # Of canonical Parquet a few columns are enough, and none is required but a group and a reward.
        columnar = kind.NAME == "canonical" and path.suffix == ".parquet"
        yield from _parquet_rows(path) if columnar else kind.read(path)


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


def _parquet_rows(path: Path) -> Iterator[SourceRow]:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            columns = [name for name in file.schema_arrow.names if name in _READ]
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield SourceRow(f"{path.name}:{number}", row)
    except (pa.ArrowException, OSError) as error:
        raise FormatError(f"{path} is no complete Parquet file: {said(error)}. Copy it again.") from error


def _reward_row(number: int, row: SourceRow, tokenizer: Any | None) -> dict[str, Any]:
    values = row.values  # of a row that cannot be imported, too, if its group and its reward can be read
    group, reward = values.get("group_id"), values.get("reward")
    if not isinstance(group, str):
        raise FormatError("column `group_id` is missing or no text")
    if isinstance(reward, bool) or not isinstance(reward, int | float):
        raise FormatError("the reward is missing" if reward is None else "the reward is no number")
    if not math.isfinite(reward):
        raise FormatError(f"the reward is {reward}")
    return {
        "nth_row": number,
        "group_id": group,
        "sample_index": _whole(values.get("sample_index")),
        "reward": float(reward),
        "num_tokens": _num_tokens(values, tokenizer),
        "group_size": _whole(values.get("group_size")),
        "origin": values["origin"] if values.get("origin") == "expert" else "policy",
    }


def _whole(value: Any) -> int | None:
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
    return value if is_count else None


def _num_tokens(values: Mapping[str, Any], tokenizer: Any | None) -> int | None:
    for name in LENGTHS:
        if isinstance(values.get(name), list):
            return len(values[name])
    text = values.get("completion")
    if tokenizer is not None and isinstance(text, str):
        return len(tokenizer.encode(text, add_special_tokens=False))
    return None
