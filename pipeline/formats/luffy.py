"""LUFFY's prompt file (EchoRL's too): verl's columns, and in `target` the messages of an expert's solution.

As its trainer does, element 0 of `target` is taken; `target_lst` has alternatives, which it does not train
on by default, and `target_ds_qwen_7b_probs` another model's probabilities, which are no log-probs of ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import FormatError
from pipeline.formats.fields import content_text, short
from pipeline.formats.prompt_files import columns, expert_rows
from pipeline.formats.source_rows import SourceRow

NAME = "luffy"


def recognizes(path: Path) -> bool:
    names = columns(path)
    return "prompt" in names and "target" in names


def read(path: Path) -> Iterator[SourceRow]:
    """Every row with its target.

    Raises:
        FormatError: the file is no whole Parquet file.
    """
    yield from expert_rows(NAME, path, "target", _values)


def _values(prompt: list[dict[str, str]], target: Any) -> dict[str, Any]:
    if not isinstance(target, list) or not isinstance(target[0], dict):
        raise FormatError("`target` is no list of messages")
    if target[0].get("role") not in (None, "assistant"):
        raise FormatError(f"`target` is a message of {short(target[0]['role'])}, not of the assistant")
    return {"messages": prompt, "completion": content_text(target[0].get("content"), "target")}
