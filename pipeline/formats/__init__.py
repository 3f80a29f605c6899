"""Readers of rollout dumps, one module a format, and which of them reads a file.

A format is a module of this folder named after it, with the names of `source_rows.Format`.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, cast

from pipeline.errors import FormatError, nearest
from pipeline.formats.source_rows import check_file

if TYPE_CHECKING:
    from pipeline.formats.source_rows import Format

# Modules are imported when they are asked for, so that the command starts without them.
NAMES = (
    "areal",
    "canonical",
    "echorl",
    "luffy",
    "nemo-rl",
    "prime-rl",
    "slime",
    "trinity",
    "trl",
    "uft",
    "verifiers",
    "verl",
)


def named(name: str) -> Format:
    """The format of that name.

    Raises:
        FormatError: there is none.
    """
    if name not in NAMES:
        raise FormatError(f"There is no format `{name}`: {nearest(name, NAMES)}")
    return cast("Format", import_module(f"{__name__}.{name.replace('-', '_')}"))


def format_of(path: Path) -> Format:
    """The one format that recognizes a file by its content.

    Raises:
        FormatError: there is no such file, or none or several recognize it.
    """
    check_file(path)
    found = [kind for kind in map(named, NAMES) if kind.recognizes(path)]
    if len(found) == 1:
        return found[0]
    if found:
        raise FormatError(
            f"{path} may be {' or '.join(kind.NAME for kind in found)}. Say which with --format."
        )
    if path.suffix == ".parquet":
        from pipeline.formats.parquet_rows import parquet_tables

        next(parquet_tables(path), None)  # says so if it is cut off
    known = path.suffix in (".parquet", ".jsonl")
    raise FormatError(
        f"{path} {'has the fields of no dump that is known' if known else 'is neither .parquet nor .jsonl'}. "
        f"Convert it, or say what it is with --format ({', '.join(NAMES)})."
    )
