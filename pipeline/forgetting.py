"""What a lake holds of prompts that are to be forgotten: rows of every table, and who learned from them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.errors import PromptError
from pipeline.forgotten import Forgotten, messages_fingerprint, tokens_fingerprint
from pipeline.lake import Lake
from pipeline.lake_reader import Reader
from pipeline.prompts import read_prompts
from pipeline.sqlfiles import sql_file
from pipeline.withdrawal import clips_by_mining

_ID = re.compile(r"[0-9a-f]{32}")
MIN_TEXT_CHARS = 8  # a shorter text stands in too many rows to tell what they are about


@dataclass
class Forgetting:
    """What belongs to the prompts that are to be forgotten.

    Attributes:
        fingerprints: (kind, fingerprint, prompt_id), as in `forgotten_prompts`.
        messages: as JSON, of those whose text is known, from the lake or from a prompt file.
        keys: by table, the values of the first column in `COLUMNS` of the rows that go.
        clips: ids by mining.
        trainings: that consumed some of the clips; their checkpoints have learned from them.
    """

    fingerprints: set[tuple[str, str, str]] = field(default_factory=set)
    messages: set[str] = field(default_factory=set)
    keys: dict[str, set[str]] = field(default_factory=dict)
    clips: dict[str, set[str]] = field(default_factory=dict)
    trainings: list[str] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)

    @property
    def prompt_ids(self) -> set[str]:
        return {prompt_id for _, _, prompt_id in self.fingerprints}


# By which column the rows of a table are told.
COLUMNS = {
    "rollouts": "rollout_id",
    "verdicts": "rollout_id",
    "scorings": "rollout_id",
    "echo_clips": "rollout_id",
    "clip_uses": "clip_id",
    "prompts": "prompt_id",
    "quarantine": "row",
}

# A training names a clip of its own rollouts after the rollout and its length, as a mining does.
_ONLINE_USES = """
    select clip_uses.clip_id as value
    from clip_uses
    where clip_uses.clip_id in (
        select 'online-' || md5(rollout_id || ':' || unnest(range(1, len(completion_ids) + 1)))
        from rollouts
        where origin = 'trainer' and rollout_id in (select meant_rollouts.rollout_id from meant_rollouts)
    )
"""


def find(lake: Lake, names: list[str]) -> Forgetting:
    """What the lake holds of prompts, and what is to be remembered of them.

    Args:
        names: prompt ids; files with an id on each line; or prompt files (.jsonl, .parquet).

    Raises:
        PromptError: a name that is neither a file nor a prompt id, or a file that cannot be read.
    """
    found = Forgetting()
    with lake.reader() as reader:
        for name in names:
            _add_named(reader, found, name)
        _materialize(reader, found)
        _add_lake(reader, found)
    return found


def _add_named(reader: Reader, found: Forgetting, name: str) -> None:
    path = Path(name)
    if path.suffix.lower() in (".jsonl", ".parquet"):
        for prompt in read_prompts(name):
            found.fingerprints.add(("prompt", prompt.prompt_id, prompt.prompt_id))
            found.fingerprints.add(("messages", messages_fingerprint(prompt.messages), prompt.prompt_id))
            found.messages.add(json.dumps(prompt.messages))
        return
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else [name]
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"Cannot read {path}: {error}. Check --prompt.") from error
    ids = [line.strip() for line in lines if line.strip()]
    for prompt_id in ids:
        if not _ID.fullmatch(prompt_id) and not _knows(reader, prompt_id):
            raise PromptError(
                f"{prompt_id!r:.60} is neither a prompt id (32 hexadecimal digits, or one of the lake's) nor "
                "a file. "
                'See `echomine sql "select prompt_id, messages from prompts"`.'
            )
        found.fingerprints.add(("prompt", prompt_id, prompt_id))
    if not ids:
        raise PromptError(f"{path} names no prompt. Check --prompt.")


def _knows(reader: Reader, prompt_id: str) -> bool:
    """Whether the lake has, or had, a prompt of that id: a dump may bring ids of its own."""
    tables = ("rollouts", "prompts", "forgotten_prompts")
    exists = " or ".join(f"exists (select 1 from {table} where prompt_id = $id)" for table in tables)
    return bool(reader.rows(f"select {exists} as is_known", {"id": prompt_id})[0]["is_known"])


def _materialize(reader: Reader, found: Forgetting) -> None:
    """The prompts and rollouts that are meant, as relations of the session."""
    prints = [fingerprint for _, fingerprint, _ in found.fingerprints]
    reader.materialize_rows("named", pa.table({"fingerprint": pa.array(prints, pa.string())}))
    # The same question with another ground truth is another prompt_id and the same text.
    stored = reader.rows("select prompt_id, messages from prompts where messages is not null")
    named = set(prints)
    texts = {
        row["messages"]
        for row in stored
        if {row["prompt_id"], messages_fingerprint(json.loads(row["messages"]))} & named
    }
    for row in stored:
        if row["messages"] in texts:
            found.fingerprints.add(("prompt", row["prompt_id"], row["prompt_id"]))
            messages = messages_fingerprint(json.loads(row["messages"]))
            found.fingerprints.add(("messages", messages, row["prompt_id"]))
    reader.materialize_rows("named", pa.table({"prompt_id": pa.array(sorted(found.prompt_ids), pa.string())}))
    reader.materialize("meant_rollouts", sql_file("staging/named_rollouts"), {})
    found.messages |= texts


def _add_lake(reader: Reader, found: Forgetting) -> None:
    for row in reader.rows("select distinct prompt_id, prompt_ids from meant_rollouts"):
        found.fingerprints.add(("prompt", row["prompt_id"], row["prompt_id"]))
        found.fingerprints.add(("tokens", tokens_fingerprint(row["prompt_ids"]), row["prompt_id"]))
    rollouts = _values(reader, "select rollout_id as value from meant_rollouts")
    in_clips = "from echo_clips where rollout_id in (select meant_rollouts.rollout_id from meant_rollouts)"
    found.clips = clips_by_mining(reader, f"select mining_id, clip_id {in_clips}")
    clips = {clip for ids in found.clips.values() for clip in ids}
    online = _values(reader, _ONLINE_USES)
    found.keys = {
        **dict.fromkeys(("rollouts", "verdicts", "scorings", "echo_clips"), rollouts),
        "clip_uses": clips | online,
        "prompts": found.prompt_ids,
        "quarantine": _quarantined(reader, found),
    }
    used = f"clip_id in (select clip_id {in_clips}) or clip_id in (select value from ({_ONLINE_USES}))"
    trainings = _values(reader, f"select distinct training_id as value from clip_uses where {used}")
    found.trainings = sorted(trainings)
    found.runs = sorted(_values(reader, "select distinct run_id as value from meant_rollouts"))


def _values(reader: Reader, sql: str) -> set[str]:
    return {row["value"] for row in reader.rows(sql) if row["value"] is not None}


def _quarantined(reader: Reader, found: Forgetting) -> set[str]:
    """The refused rows (their JSON) that are of the prompts' groups, or hold their text."""
    forgotten = Forgotten(frozenset(fingerprint for _, fingerprint, _ in found.fingerprints))
    groups = _values(reader, "select distinct group_id as value from meant_rollouts")
    texts = {
        message["content"].strip()
        for messages in found.messages
        for message in json.loads(messages)
        if message["role"] != "system" and len(message["content"].strip()) >= MIN_TEXT_CHARS
    }
    gone = set()
    for entry in reader.rows('select group_id, "row" from quarantine'):
        row = json.loads(entry["row"])
        if (
            entry["group_id"] in groups
            or (isinstance(row, dict) and forgotten.holds(row))
            or any(text in string for string in _strings(row) for text in texts)
        ):
            gone.add(entry["row"])
    return gone


def _strings(value: Any) -> Iterator[str]:
    """Every text within a JSON value; a line that could not be read is also looked at as JSON spells it."""
    if isinstance(value, str):
        yield value
        yield value.replace("\\n", "\n").replace('\\"', '"')
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
