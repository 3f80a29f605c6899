"""The keys of a configuration by name: for messages, `docs/config.md` and the README's table."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel

from pipeline.errors import nearest


def nearest_key(model: type[BaseModel], location: tuple[int | str, ...]) -> str:
    """Of a key that is none of `model`: which valid one of its section is meant, or which there are."""
    *sections, key = location
    for section in sections:
        model = _section_type(model, str(section)) or model
    return nearest(str(key), list(model.model_fields))


def config_keys(model: type[BaseModel], prefix: str = "") -> list[tuple[str, str, str]]:
    """Every key as (dotted name, default, meaning), in the order of the sections."""
    rows: list[tuple[str, str, str]] = []
    for name, info in model.model_fields.items():
        below = _section_type(model, name)
        if below is not None:
            rows += config_keys(below, f"{prefix}{name}.")
            continue
        rows.append((f"{prefix}{name}", _shown(info.default), info.description or ""))
    return rows


def config_table(model: type[BaseModel]) -> str:
    """Every key, its default and its meaning as a Markdown table; the README and docs/config.md hold it."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for row in config_keys(model):
        key, default, meaning = (cell.replace("|", "\\|").replace("<", "&lt;") for cell in row)
        lines.append(f"| `{key}` | `{default}` | {meaning} |")
    return "\n".join(lines) + "\n"


def _section_type(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The section that a key of `model` holds, or None if the key holds a value."""
    annotation = model.model_fields[key].annotation
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _shown(default: Any) -> str:
    if default is None:
        return "none"
    return str(default).lower() if isinstance(default, bool) else str(default)
