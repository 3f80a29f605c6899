"""JSON of unknown origin, line by line or whole, and the rollouts made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import FormatError
from pipeline.formats.json_lines import NO_OBJECT, first_object, numbered_lines, parsed
from pipeline.formats.source_rows import SourceRow, check_file
from pipeline.hashing import content_id


def json_lines(path: Path) -> Iterator[SourceRow]:
    """The lines of a file as they stand: an object's members in `values`, or a `problem`.

    Raises:
        FormatError: the file cannot be opened or read.
    """
    check_file(path)
    for number, row in numbered_lines(path):
        source = f"{path.name}:{number}"
        if isinstance(row, dict):
            yield SourceRow(source, row)
        else:
            yield SourceRow(source, {"line": row}, NO_OBJECT)


def json_file(path: Path) -> Any:
    """The one value of a file.

    Raises:
        FormatError: the file cannot be read, or is no JSON.
    """
    check_file(path)
    value = parsed(path.read_bytes())
    if isinstance(value, str):
        raise FormatError(f"{path} is no JSON in valid Unicode. Copy it again, or check the path.")
    return value


def first_row(path: Path) -> Mapping[str, Any]:
    """The first object among the first lines; empty for a file of another kind."""
    return first_object(path) or {}


def first_line_id(path: Path) -> str:
    """A name for a file that stays while lines are appended: the same groups occur in every training."""
    check_file(path)
    with path.open("rb") as lines:
        return content_id(next((line for line in lines if line.strip()), b""))[:16]


def rollouts(
    rows: Iterable[SourceRow],
    group: Callable[[Mapping[str, Any]], str | None],
    values: Callable[[Mapping[str, Any]], dict[str, Any]],
    assumed: str | None = None,
    sample_id: Callable[[Mapping[str, Any]], str | None] | None = None,
) -> Iterator[SourceRow]:
    """What `values` makes of each row, in the groups that `group` names.

    A row that is refused keeps its group: a rollout that is lost must not make the rest look like a whole
    group. Samples are not numbered, since a group may go on in another file.

    Args:
        group: the group's name; None if the row does not say.
        values: the row in the words of `rollouts`; raises FormatError with the reason it refuses.
        assumed: as in `SourceRow`.
        sample_id: what the row calls its sample; None if it does not.
    """
    for row in rows:
        if row.problem:
            yield row
            continue
        place: dict[str, Any] = {}
        sample = sample_id(row.values) if sample_id is not None else None
        try:
            name = group(row.values)
            if name is None:
                raise FormatError("the row does not say which group it belongs to")
            place = {"group_id": name}
            yield SourceRow(row.source, place | values(row.values), assumed=assumed, sample_id=sample)
        except FormatError as error:
            yield SourceRow(row.source, {**row.values, **place}, str(error), sample_id=sample)
