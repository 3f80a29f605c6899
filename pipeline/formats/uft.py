"""UFT's prompt file: verl's columns, and in `hint` an expert's solution, cut into pieces of text.

Its trainer reads the first message's content without a chat template, and the pieces joined as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import FormatError
from pipeline.formats.prompt_files import columns, expert_rows
from pipeline.formats.source_rows import SourceRow

NAME = "uft"


def recognizes(path: Path) -> bool:
    names = columns(path)
    return "prompt" in names and "hint" in names and "target" not in names


def read(path: Path) -> Iterator[SourceRow]:
    """Every row with its hint.

    Raises:
        FormatError: the file is no whole Parquet file.
    """
    yield from expert_rows(NAME, path, "hint", _values)


def _values(prompt: list[dict[str, str]], hint: Any) -> dict[str, Any]:
    if not isinstance(hint, list) or not all(isinstance(piece, str) for piece in hint):
        raise FormatError("`hint` is no list of texts")
    return {"prompt_text": prompt[0]["content"], "completion": "".join(hint)}
