"""What commands print: one JSON object, or lines for people."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import click


def print_json(value: Mapping[str, Any]) -> None:
    click.echo(json.dumps(_finite(value), default=str, allow_nan=False))


def _finite(value: Any) -> Any:
    """NaN and infinity, which JSON cannot say, as null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def counted(counts: Mapping[str, int]) -> str:
    """`all_fail 3, mixed 5`, or none."""
    return ", ".join(f"{name} {n}" for name, n in sorted(counts.items())) or "none"


def print_counts(as_json: bool, counts: Mapping[str, Any]) -> None:
    if as_json:
        print_json(counts)
    else:
        click.echo(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in counts.items()))


def note(text: str) -> None:
    """One line beside a result, on standard error."""
    click.echo(text, err=True)
