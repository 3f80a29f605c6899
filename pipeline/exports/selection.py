"""Which clips of a mining an export holds, decided in SQL before anything is written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.config import ExportConfig
from pipeline.errors import FormatError, MiningError, NothingToMine
from pipeline.lake_reader import Reader
from pipeline.prompts import read_prompts
from pipeline.sqlfiles import sql_file

WINDOW_CLIPS = 8192  # clips in memory at once


@dataclass(frozen=True)
class Selection:
    """The clips of one mining that an export keeps; their tokens are still in the lake.

    Attributes:
        mining: its mining_id, config_hash and snapshot.
        num_clips: kept.
        dropped: left out, by reason.
        tokenizer_hash: of all kept clips; None if there is none.
        content_hash: of the kept clips' names in their order.
        excluded: what was to be kept out, as it enters the export's name.
    """

    mining: Mapping[str, Any]
    num_clips: int
    dropped: Mapping[str, int]
    tokenizer_hash: str | None
    content_hash: str
    excluded: list[list[str]]


def select(reader: Reader, config: ExportConfig, mining_id: str | None) -> Selection:
    """Decides over every clip of a mining (the newest by default); `windows` then reads what is kept.

    Raises:
        NothingToMine: the lake was never mined.
        MiningError: no such mining, or its clips are of several tokenizers.
        FormatError: the prompts to keep out cannot be read.
    """
    ids, messages = _excluded(config.exclude_prompts)
    mining = _mining(reader, mining_id)
    reader.materialize_rows("excluded_prompts", _excluded_rows(ids, messages))
    # What was withdrawn since stays withdrawn, however old the snapshot is.
    with reader.lake.reader() as newest:
        withdrawn = newest.table(
            "select clip_id from withdrawn_clips where mining_id = $mining_id",
            {"mining_id": mining["mining_id"]},
        )
    reader.materialize_rows("withdrawn", withdrawn)
    params = {"mining_id": mining["mining_id"], "max_tokens": config.max_tokens}
    reader.materialize("export_decisions", sql_file("staging/export_decisions"), params)
    hashes = reader.rows(
        "select distinct tokenizer_hash from export_decisions where position is not null order by all"
    )
    if len(hashes) > 1:
        raise MiningError(
            f"Mining {mining['mining_id'][:12]} has clips of {len(hashes)} tokenizers, which cannot share "
            "an export. Mine one run at a time (`echomine mine --run RUN`), then export."
        )
    dropped = reader.rows(
        "select drop_reason, count(*) as n from export_decisions where drop_reason is not null "
        "group by all order by all"
    )
    num_clips, content_hash = _kept(reader)
    return Selection(
        mining,
        num_clips,
        {row["drop_reason"]: row["n"] for row in dropped},
        hashes[0]["tokenizer_hash"] if hashes else None,
        content_hash,
        [sorted(ids), sorted(messages)],
    )


def windows(reader: Reader, num_clips: int, multiple_of: int) -> Iterator[pa.Table]:
    """The kept clips in clip_rank order, as rows of `sql/staging/export_clips.sql`, a bounded number at once.

    Args:
        multiple_of: clips of one file; a window ends where a file does.
    """
    size = multiple_of * max(1, WINDOW_CLIPS // multiple_of)
    for first in range(0, num_clips, size):
        yield reader.table(sql_file("staging/export_clips"), {"first": first, "last": first + size})


def no_clips(reader: Reader) -> pa.Table:
    """The columns of a window, without a row."""
    return reader.table(sql_file("staging/export_clips"), {"first": 0, "last": 0})


def _mining(reader: Reader, mining_id: str | None) -> dict[str, Any]:
    folder = reader.lake.folder
    minings = reader.rows("select mining_id, config_hash, snapshot from mining_runs order by created_at desc")
    if not minings:
        raise NothingToMine(
            f"The lake in {folder} was never mined by snapshot {reader.snapshot}. Run `echomine mine` first."
        )
    chosen = [mining for mining in minings if mining["mining_id"].startswith(mining_id or "")]
    if not chosen:
        raise MiningError(
            f'The lake in {folder} has no mining {mining_id}. See `echomine sql "from mining_runs"`.'
        )
    if mining_id and len(chosen) > 1:
        raise MiningError(
            f"{len(chosen)} minings of the lake in {folder} begin with {mining_id}. Give more digits "
            '(see `echomine sql "select mining_id from mining_runs"`).'
        )
    return chosen[0]


def _kept(reader: Reader) -> tuple[int, str]:
    digest, num_clips = hashlib.sha256(), 0
    kept = "select clip_id from export_decisions where position is not null order by position"
    for batch in reader.batches(kept, 65_536):
        num_clips += batch.num_rows
        digest.update("\n".join(batch["clip_id"].to_pylist()).encode() + b"\n")
    return num_clips, digest.hexdigest()


def _excluded(source: Path | None) -> tuple[set[str], set[str]]:
    """Prompt ids and messages to keep out: of a prompt file, or of a `.txt` file with an id on each line."""
    if source is None:
        return set(), set()
    if source.suffix == ".txt":
        try:
            ids = set(source.read_text(encoding="utf-8").split())
        except (OSError, UnicodeDecodeError) as error:
            raise FormatError(f"Cannot read {source}: {error}. Check --exclude-prompts.") from error
        if not ids:
            # nothing to keep out is more likely a mistake than a wish, and would leak the evaluation
            raise FormatError(f"{source} names no prompt to keep out. Check --exclude-prompts.")
        return ids, set()
    prompts = read_prompts(str(source))
    # Messages too: the same question with another ground truth is still the evaluation's question.
    messages = {
        json.dumps([dict(message) for message in prompt.messages], ensure_ascii=False) for prompt in prompts
    }
    return {prompt.prompt_id for prompt in prompts}, messages


def _excluded_rows(ids: set[str], messages: set[str]) -> pa.Table:
    rows = [(name, None) for name in sorted(ids)] + [(None, text) for text in sorted(messages)]
    return pa.table(
        {
            "prompt_id": pa.array([name for name, _ in rows], pa.string()),
            "messages": pa.array([text for _, text in rows], pa.string()),
        }
    )
