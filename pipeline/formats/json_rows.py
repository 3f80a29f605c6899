"""JSON of unknown origin, line by line or whole, and the rollouts made of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.errors import FormatError
from pipeline.formats.source_rows import SourceRow
from pipeline.hashing import content_id

SUFFIXES = (".jsonl", ".ndjson")
_SNIFFED_LINES = 20
NO_OBJECT = "no JSON object in valid Unicode: the line is cut off, or no line of such a dump"


def json_lines(path: Path) -> Iterator[SourceRow]:
    """The lines of a file as they stand: an object's members in `values`, or a `problem`.

    Raises:
        FormatError: the file cannot be opened or read.
    """
    with _opened(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                source = f"{path.name}:{number}"
                parsed = parsed_line(line)
                if isinstance(parsed, dict):
                    yield SourceRow(source, parsed)
                else:
                    yield SourceRow(source, {"line": line.decode("utf-8", "backslashreplace")}, NO_OBJECT)


def json_file(path: Path) -> Any:
    """The one value of a file.

    Raises:
        FormatError: the file cannot be read, or is no JSON.
    """
    with _opened(path) as file:
        parsed = parsed_line(file.read())
    if parsed is None:
        raise FormatError(f"{path} is no JSON in valid Unicode. Copy it again, or check the path.")
    return parsed


def first_object(path: Path) -> Mapping[str, Any]:
    """The first object among the first lines; empty if there is none, or no such file."""
    if path.suffix not in SUFFIXES:
        return {}
    try:
        lines = islice(json_lines(path), _SNIFFED_LINES)
        return next((line.values for line in lines if line.problem is None), {})
    except FormatError:
        return {}


def first_line_id(path: Path) -> str:
    """A name for a file that stays while lines are appended: the same groups occur in every training."""
    with _opened(path) as lines:
        return content_id(next((line for line in lines if line.strip()), b""))[:16]


def rollouts(
    rows: Iterable[SourceRow],
    group: Callable[[Mapping[str, Any]], str | None],
    values: Callable[[Mapping[str, Any]], dict[str, Any]],
) -> Iterator[SourceRow]:
    """What `values` makes of each row, numbered within its group in the order they come.

    A row that is refused keeps its place in the group: a rollout that is lost must not make the rest
    look like a whole group. All have the policy version of the group's first, since trainers that sample
    while they train mix versions in a group, and a group is of one. Memory grows with the number of groups,
    not of rows.

    Args:
        group: the group's name; None if the row does not say.
        values: the row in the words of `rollouts`; raises FormatError with the reason it refuses.
    """
    numbers: Counter[str] = Counter()
    versions: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row.problem:
            yield row
            continue
        place: dict[str, Any] = {}
        try:
            name = group(row.values)
            if name is None:
                raise FormatError("the row does not say which group it belongs to")
            place = {"group_id": name, "sample_index": numbers[name]}
            numbers[name] += 1
            made = place | values(row.values)
            version = {"policy_version": made.pop("policy_version")} if "policy_version" in made else {}
            yield SourceRow(row.source, made | versions.setdefault(name, version))
        except FormatError as error:
            yield SourceRow(row.source, {**row.values, **place}, str(error))


def _opened(path: Path) -> Any:
    if not path.is_file():
        raise FormatError(f"There is no file {path}. Check the path.")
    try:
        return path.open("rb")
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error}. Check the file.") from None


def parsed_line(text: bytes) -> Any:
    """The JSON value of some bytes; None if they are none, or hold half a surrogate pair."""
    try:
        parsed = json.loads(text)
        if b"\\ud" in text.lower():
            json.dumps(parsed, ensure_ascii=False).encode()  # half a surrogate pair is no text
        return parsed
    except (ValueError, RecursionError):
        return None
