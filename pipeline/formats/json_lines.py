"""Files with one JSON object a line, read fast; what the fast parser refuses, Python's own may take."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

NO_OBJECT = "no JSON object in valid Unicode"
_SNIFFED_LINES, _SNIFFED_BYTES = 20, 64 << 20


def numbered_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The number, from 1, and the value of every line that is not blank; its text if it is no JSON."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, parsed(line)


def parsed(line: bytes) -> Any:
    """What a line says; its text if that is no JSON, or none that UTF-8 can hold."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        pass
    text = line.decode("utf-8", errors="replace")
    try:  # NaN and very long numbers, which Python writes as JSON
        value = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
        return value
    except (ValueError, RecursionError):
        return text


def first_object(path: Path) -> dict[str, Any] | None:
    """The first JSON object among a file's first lines; None for a file of another kind."""
    try:
        with path.open("rb") as lines:
            for _ in range(_SNIFFED_LINES):
                value = parsed(lines.readline(_SNIFFED_BYTES))
                if isinstance(value, dict):
                    return value
    except OSError:
        pass
    return None
