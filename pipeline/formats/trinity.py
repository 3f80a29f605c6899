"""Trinity-RFT's SQLite buffer: one experience a row, its tokens in a pickle that is read but never run.

The table is found by its columns, since its name is free; newer versions keep the pickle in a table of its
own, `<name>_blob`. What the columns say counts before what the pickle says. A task of a batch is a group.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.errors import FormatError
from pipeline.errors import said as said_by
from pipeline.formats.fields import flat, is_count, member, per_token, said, sampled_run, short, token_ids
from pipeline.formats.json_rows import rollouts
from pipeline.formats.pickled import read_pickle
from pipeline.formats.source_rows import SourceRow, check_file
from pipeline.hashing import content_id

NAME = "trinity"
_CLASSES = frozenset({"trinity.common.experience.Experience", "trinity.common.experience.EID"})
_BLOB = "experience_bytes"
_SHOWN = ("id", "prompt", "response", "reward", "model_version", "task_id", "run_id", "msg_id")
_MAGIC = b"SQLite format 3\0"


def recognizes(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                return False
        with closing(_connection(path)) as connection:
            _query(connection, path)
    except (OSError, sqlite3.Error, FormatError):
        return False
    return True


def read(path: Path) -> Iterator[SourceRow]:
    """Every experience, by a cursor.

    Raises:
        FormatError: the file is no such database, or is damaged.
    """
    check_file(path)
    try:
        with closing(_connection(path)) as connection:
            query = _query(connection, path)
            group = partial(_group, _first_blob_id(connection, query))
            for row in rollouts(_rows(connection, query, path.name), group, _values):
                yield row if row.problem is None else SourceRow(row.source, flat(row.values), row.problem)
    except sqlite3.Error as error:
        raise FormatError(f"{path} is no whole SQLite database: {said_by(error)}. Copy it again.") from None


def _connection(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
    connection.row_factory = sqlite3.Row
    connection.text_factory = lambda text: text.decode("utf-8", "replace")
    connection.execute("pragma trusted_schema = off")
    return connection


def _first_blob_id(connection: sqlite3.Connection, query: str) -> str:
    """A name for the buffer that stays while it grows: the same tasks occur in every training."""
    first = connection.execute(f"{query} limit 1").fetchone()
    blob = first[_BLOB] if first else None
    return content_id(blob if isinstance(blob, bytes) else b"")[:16]


def _rows(connection: sqlite3.Connection, query: str, file: str) -> Iterator[SourceRow]:
    for number, row in enumerate(connection.execute(query), start=1):
        shown = {name: row[name] for name in _SHOWN if name in row.keys()}  # noqa: SIM118 - of columns
        source = f"{file}:{number}"
        try:
            blob = row[_BLOB]
            if not isinstance(blob, bytes):
                raise FormatError("the row has no pickle, and with it no tokens and no group")
            experience = read_pickle(blob, _CLASSES)
            if not isinstance(experience, dict):
                raise FormatError("its pickle is no Experience")
        except FormatError as error:
            yield SourceRow(source, shown, str(error))
        else:
            yield SourceRow(source, shown | {"experience": experience})


def _query(connection: sqlite3.Connection, path: Path) -> str:
    """Selects the rows of the experiences, with their pickles.

    Raises:
        FormatError: no table has the columns of one.
    """
    listed = connection.execute("select name from sqlite_master where type = 'table' order by name")
    tables = {name: _columns(connection, name) for (name,) in listed}
    for name, columns in tables.items():
        if {"id", "reward", _BLOB} <= columns:
            return f"select * from {_quoted(name)} order by id"
        if {"id", "reward"} <= columns and {"id", _BLOB} <= tables.get(f"{name}_blob", set()):
            return f"select * from {_quoted(name)} left join {_quoted(f'{name}_blob')} using (id) order by id"
    raise FormatError(f"{path} has no table with `reward` and `{_BLOB}`. Give a buffer of Trinity-RFT.")


def _columns(connection: sqlite3.Connection, table: str) -> set[str]:
    return {column["name"] for column in connection.execute(f"pragma table_info({_quoted(table)})")}


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _group(buffer: str, row: Mapping[str, Any]) -> str | None:
    eid = member(row["experience"], "eid")
    batch, task = eid.get("batch"), row["task_id"] if row.get("task_id") is not None else eid.get("task")
    if not is_count(batch) and not isinstance(batch, str):
        return None
    return f"trinity/{buffer}/{batch}/{task}" if is_count(task) or isinstance(task, str) else None


def _values(row: Mapping[str, Any]) -> dict[str, Any]:
    experience = row["experience"]
    if experience.get("chosen") is not None or experience.get("rejected") is not None:
        raise FormatError("a pair of preferences, no rollout")
    if member(experience, "eid").get("step"):
        raise FormatError("several sampled turns: a later step of its run, with a prompt of its own")
    if experience.get("truncate_status") == "prompt_truncated":
        raise FormatError("its prompt was cut off")
    ids = token_ids(experience.get("tokens"), "tokens")
    start = experience.get("prompt_length")
    if not is_count(start) or not 0 < start < len(ids):
        raise FormatError(f"`prompt_length` is {short(start)} for {len(ids)} tokens")
    completion = ids[start:]
    flags = experience.get("action_mask")
    first, end = (0, len(completion)) if flags is None else sampled_run(flags, "action_mask", len(completion))
    logprobs = per_token(experience.get("logprobs"), "logprobs", len(completion))
    version, prompt = row.get("model_version"), row.get("prompt") or experience.get("prompt_text")
    return said(
        {
            "prompt_ids": ids[: start + first],
            "prompt_text": prompt if isinstance(prompt, str) else None,
            "completion_ids": completion[first:end],
            "completion_logprobs": logprobs[first:end] if logprobs else None,
            "reward": row["reward"] if row["reward"] is not None else experience.get("reward"),
            "policy_version": version
            if is_count(version)
            else member(experience, "info").get("model_version"),
            "finish_reason": "length" if experience.get("truncate_status") == "response_truncated" else None,
        }
    )
