"""What prime-rl's trainer learned of a trace after it was written: one update a line, beside the stream.

An update's values cover all tokens of a branch, null where they are unknown; the newest update of a trace
counts. Only entropies are folded in: they save the scorer's work.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.formats.fields import is_count
from pipeline.formats.json_lines import parsed
from pipeline.formats.source_rows import SourceRow

_FOLDER = "annotations"


def annotated(stream: Path, rows: Iterator[SourceRow]) -> Iterator[SourceRow]:
    """The traces, with entropies from `annotations/` beside the stream or beside its folder of chunks.

    Memory holds one place in a file per annotated trace, not its values.
    """
    folders = [stream.parent / _FOLDER, stream.parent.parent / _FOLDER]
    places = next((_places(folder) for folder in folders if folder.is_dir()), {})
    for row in rows:
        trace = row.values.get("trace")
        identity = trace.get("id") if isinstance(trace, dict) else None
        if isinstance(identity, str) and identity in places:
            path, offset = places[identity]
            with path.open("rb") as file:
                file.seek(offset)
                _fold(row.values["trace"], json.loads(file.readline()))
        yield row


def _places(folder: Path) -> dict[str, tuple[Path, int]]:
    """Where the newest update with entropies starts, per trace."""
    places: dict[str, tuple[Path, int]] = {}
    for path in sorted(folder.rglob("*.jsonl")):
        offset = 0
        with path.open("rb") as file:
            for line in file:
                if b'"entropies"' in line:
                    update = parsed(line)
                    if isinstance(update, dict) and isinstance(update.get("trace_id"), str):
                        places[update["trace_id"]] = path, offset
                offset += len(line)
    return places


def _fold(trace: Mapping[str, Any], update: Mapping[str, Any]) -> None:
    """Gives each sampled message its entropies; one that is not covered whole stays without."""
    nodes = trace.get("nodes")
    if not isinstance(nodes, list) or not all(isinstance(node, dict) for node in nodes):
        return  # refused for itself, when the trace is read
    branches = _branches(nodes)
    for branch in _listed(update.get("branches")):
        index = branch.get("index") if isinstance(branch, dict) else None
        values = branch.get("entropies") if isinstance(branch, dict) else None
        if not is_count(index) or index >= len(branches) or not isinstance(values, list):
            continue
        start = 0
        for node in branches[index]:
            flags = _listed(node.get("mask"))
            sampled = [v for v, flag in zip(values[start : start + len(flags)], flags, strict=False) if flag]
            start += len(flags)
            if sampled and start <= len(values) and None not in sampled:
                node["entropies"] = sampled


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _branches(nodes: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The messages from the first to each one that none follows, in the order of these last ones."""
    parents = {node.get("parent") for node in nodes if is_count(node.get("parent"))}
    branches = []
    for leaf in (number for number in range(len(nodes)) if number not in parents):
        branch = [nodes[leaf]]
        number, parent = leaf, nodes[leaf].get("parent")
        while is_count(parent) and parent < number:  # a parent stands before its child
            branch.append(nodes[parent])
            number, parent = parent, nodes[parent].get("parent")
        branches.append(branch[::-1])
    return branches
