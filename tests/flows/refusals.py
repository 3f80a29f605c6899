"""What the one line of a refusal must hold."""

from __future__ import annotations


def says(line: str, *parts: object) -> None:
    for part in parts:
        assert str(part) in line
