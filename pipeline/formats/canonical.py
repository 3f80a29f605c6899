"""The canonical dump: Parquet or JSONL with the columns of the table `rollouts`.

Required: group_id, sample_index, prompt_ids (or prompt), completion_ids, completion_entropies, reward.
`completion_entropies` may be null: such a rollout awaits the scorer. Defaults of the rest: origin policy,
policy_version 0, finish_reason stop, entropy_kind full_vocab, group_size the number of the group's rows
(experts not counted), night today, run_id the files' content.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import schema
from pipeline.errors import EchoMineError, FormatError, nearest
from pipeline.hashing import content_id, file_sha256, ids_array
from pipeline.ingest import Ingested, ingest
from pipeline.lake import Lake
from pipeline.prompts import prompt_messages_ids
from pipeline.records import Prompt
from pipeline.rollouts import Refused
from pipeline.steps import SPLITTER
from pipeline.tokenization import completion_step_ends, completion_text, tokenizer_hash

REQUIRED = ("group_id", "sample_index", "completion_ids", "completion_entropies", "reward")
ORIGINS = ("policy", "trainer", "expert")
FINISH_REASONS = ("stop", "length")
ENTROPY_KINDS = ("full_vocab", "full_vocab_tempered", "rescored")
SUFFIXES = (".parquet", ".jsonl", ".ndjson")
BATCH_ROLLOUTS = 4096


@dataclass
class _Dump:
    """What the rows of one import share."""

    tokenizer: Any
    tokenizer_hash: str
    vocabulary_size: int
    run_id: str
    night: date
    group_sizes: Counter[str]
    now: datetime = field(default_factory=lambda: datetime.now(UTC))


def import_canonical(
    lake: Lake,
    files: Sequence[Path],
    tokenizer: Any,
    progress: Callable[[int], None] | None = None,
) -> Ingested:
    """Reads dumps into the lake, steps split on the way; a row that cannot enter goes to quarantine.

    Importing the same files again changes nothing. Groups may lie scattered over the files; each is
    committed whole.

    Args:
        progress: called with the number of rows read so far.

    Raises:
        FormatError: a file is missing, cut off, of another kind, or lacks a required column.
    """
    check_files(files)
    group_sizes: Counter[str] = Counter()
    expected: Counter[str] = Counter()
    places: set[tuple[str, str]] = set()
    for source, row in _rows(files):
        if isinstance(row, dict) and isinstance(row.get("group_id"), str):
            group, index = row["group_id"], row.get("sample_index")
            expected[group] += 1
            # A rollout that is there twice is one; a row without a valid index is one that was lost.
            place = group, str(index) if _is_count(index) else f"{source} {len(places)}"
            if row.get("origin") != "expert" and place not in places:
                places.add(place)
                group_sizes[group] += 1
    places.clear()
    run_id = "import-" + content_id(sorted(file_sha256(path) for path in files))[:16]
    dump = _Dump(
        tokenizer, tokenizer_hash(tokenizer), len(tokenizer), run_id, datetime.now(UTC).date(), group_sizes
    )
    total = Ingested()
    waiting: dict[str, list[tuple[dict[str, Any], str]]] = {}
    whole: list[tuple[dict[str, Any], str]] = []
    refused: list[Refused] = []
    prompts: dict[str, Prompt] = {}
    for number, (source, row) in enumerate(_rows(files), start=1):
        try:
            complete, prompt = _completed(row, dump)
        except EchoMineError as error:
            refused.append(Refused(str(error), source, row if isinstance(row, dict) else {"line": row}))
        else:
            waiting.setdefault(complete["group_id"], []).append((complete, source))
            if prompt is not None:
                prompts[prompt.prompt_id] = prompt
        group = row.get("group_id") if isinstance(row, dict) else None
        if isinstance(group, str):
            expected[group] -= 1
            if not expected[group]:
                whole += waiting.pop(group, [])
        if len(whole) >= BATCH_ROLLOUTS:
            total += _flush(lake, whole, prompts, refused)
        if progress is not None:
            progress(number)
    return total + _flush(lake, whole, prompts, refused)


def _flush(
    lake: Lake, whole: list[tuple[dict[str, Any], str]], prompts: dict[str, Prompt], refused: list[Refused]
) -> Ingested:
    rows, sources = [row for row, _ in whole], [source for _, source in whole]
    done = ingest(lake, rows, sources, list(prompts.values()), refused)
    for used in (whole, prompts, refused):
        used.clear()
    return done


def check_files(files: Sequence[Path]) -> None:
    """Raises FormatError for a file that is missing, of another kind, cut off, or without a required column.

    Called before anything is written, so that a mistyped path costs nothing.
    """
    for path in files:
        if not path.is_file():
            raise FormatError(f"There is no file {path}. Check the path.")
        if path.suffix not in SUFFIXES:
            raise FormatError(f"{path} is neither .parquet nor .jsonl. Convert it, or check the path.")
        if path.suffix == ".parquet":
            next(_parquet_rows(path), None)


def _rows(files: Sequence[Path]) -> Iterator[tuple[str, Any]]:
    """Every row with its source (`file:line`), as a dict; a line that is no JSON comes as its text."""
    for path in files:
        if path.suffix == ".parquet":
            yield from _parquet_rows(path)
            continue
        with path.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path.name}:{number}", _parsed(line)


def _parsed(line: str) -> Any:
    try:
        parsed = json.loads(line)
        if "\\ud" in line.lower():
            json.dumps(parsed, ensure_ascii=False).encode()  # half a surrogate pair is no text
        return parsed
    except (ValueError, RecursionError):
        return line


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            needed = [name for name in REQUIRED if name not in names]
            if "prompt_ids" not in names and "prompt" not in names:
                needed.append("prompt_ids")
            if needed:
                raise FormatError(f"{path} has no column `{needed[0]}`: {nearest(needed[0], names)}")
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path.name}:{number}", row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: a damaged column name
        raise FormatError(f"{path} is no complete Parquet file: {error}. Copy it again.") from error


def _completed(row: Any, dump: _Dump) -> tuple[dict[str, Any], Prompt | None]:
    """A dump's row with the defaults filled in and its steps split.

    Raises:
        FormatError: the reason it is refused.
    """
    if not isinstance(row, dict):
        raise FormatError("no JSON object in valid Unicode")
    for name in REQUIRED:
        if name not in row:
            raise FormatError(f"column `{name}` is missing")
    given = {
        name: value for name, value in row.items() if name in schema.ROLLOUTS.names and value is not None
    }
    if given.get("tokenizer_hash", dump.tokenizer_hash) != dump.tokenizer_hash:
        raise FormatError(
            f"unknown tokenizer {str(given['tokenizer_hash'])[:12]}, not the one of --tokenizer"
        )
    if not isinstance(given.get("group_id"), str) or not _is_count(given.get("sample_index")):
        raise FormatError("group_id must be text and sample_index a whole number from 0")
    completion_ids = _token_ids(given.get("completion_ids"), "completion_ids", dump)
    prompt_ids, prompt = _prompt(row, dump)
    finish_reason, origin = given.get("finish_reason", "stop"), given.get("origin", "policy")
    if finish_reason not in FINISH_REASONS or origin not in ORIGINS:
        raise FormatError(f"finish_reason must be one of {FINISH_REASONS}, origin one of {ORIGINS}")
    entropies = _nats(row, "completion_entropies")
    prompt_id = prompt.prompt_id if prompt is not None else content_id("tokens", ids_array(prompt_ids))
    group = given["group_id"]
    defaults = {
        "prompt_id": prompt_id,
        "run_id": dump.run_id,
        "night": dump.night,
        "model": "imported",
        "policy_version": 0,
        "group_size": dump.group_sizes[group] or 1,
        "completion": completion_text(dump.tokenizer, completion_ids),
        "entropy_kind": "full_vocab" if entropies is not None else None,
        "logprobs_kind": "raw" if row.get("completion_logprobs") is not None else None,
        "step_ends": completion_step_ends(dump.tokenizer, completion_ids),
        "splitter": SPLITTER if "step_ends" not in given else "given",
        "created_at": dump.now,
    }
    fixed = {
        "origin": origin,
        "finish_reason": finish_reason,
        "tokenizer_hash": dump.tokenizer_hash,
        "prompt_ids": prompt_ids,
        "completion_ids": completion_ids,
        "completion_entropies": entropies,
        "completion_logprobs": _nats(row, "completion_logprobs"),
        "reward": row["reward"],
    }
    return _fits(defaults | given | fixed), prompt


def _fits(row: dict[str, Any]) -> dict[str, Any]:
    """The row, if each scalar fits its column; a wrong type is this row's fault, not the batch's."""
    if isinstance(row["night"], str):
        row["night"] = _date(row["night"])
    if isinstance(row["created_at"], str):
        row["created_at"] = _time(row["created_at"])
    if isinstance(row.get("reward_parts"), dict):
        row["reward_parts"] = list(row["reward_parts"].items())
    for name, least in (("policy_version", 0), ("group_size", 1), ("max_tokens", 1), ("temperature", 0)):
        value = row.get(name)
        if isinstance(value, int | float) and value < least:
            raise FormatError(f"column `{name}` is {value}, less than {least}")
    if row["entropy_kind"] not in (None, *ENTROPY_KINDS):
        raise FormatError(f"entropy_kind {row['entropy_kind']!r:.40} is none of {ENTROPY_KINDS}")
    if not row["prompt_ids"]:
        raise FormatError("prompt_ids is empty, and a completion cannot be trained without a prompt")
    for column in schema.ROLLOUTS:
        value = row.get(column.name)
        if value is None or column.name in ("reward", "completion_entropies", "completion_logprobs"):
            continue
        try:
            pa.array([value], column.type)
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            raise FormatError(
                f"column `{column.name}` holds {value!r:.60}, which is no {column.type}"
            ) from None
    return row


def _date(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise FormatError(f"night {text!r:.40} is no date like 2026-05-31") from None


def _time(text: str) -> datetime:
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise FormatError(f"created_at {text!r:.40} is no time like 2026-05-31T02:00:00Z") from None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _prompt(row: dict[str, Any], dump: _Dump) -> tuple[list[int], Prompt | None]:
    text = row.get("prompt")
    prompt = None
    if isinstance(text, str):
        prompt = Prompt(({"role": "user", "content": text},), _optional_text(row.get("ground_truth")))
    if row.get("prompt_ids") is not None:
        return _token_ids(row["prompt_ids"], "prompt_ids", dump), prompt
    if prompt is None:
        raise FormatError("column `prompt_ids` is missing, and there is no text in `prompt`")
    return prompt_messages_ids(dump.tokenizer, prompt.messages).tolist(), prompt


def _optional_text(value: Any) -> str | None:
    return None if value is None else str(value)


def _token_ids(values: Any, name: str, dump: _Dump) -> list[int]:
    if not isinstance(values, list) or not all(_is_count(value) for value in values):
        raise FormatError(f"column `{name}` is no list of token ids")
    if values and max(values) >= dump.vocabulary_size:
        raise FormatError(
            f"unknown tokenizer: {name} holds {max(values)}, the tokenizer has {dump.vocabulary_size} tokens"
        )
    return values


def _nats(row: dict[str, Any], name: str) -> list[float] | None:
    values = row.get(name)
    if values is None:
        return None
    numbers = isinstance(values, list) and all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in values
    )
    if not numbers:
        raise FormatError(f"column `{name}` is no list of numbers")
    try:
        return [float(value) for value in values]
    except OverflowError:  # an integer beyond every float
        raise FormatError(f"{name} holds NaN or infinite values") from None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
