"""prime-rl's rollouts: `rollouts/step_N/…/traces.jsonl`, and since summer 2026 `traces/stream.jsonl`.

Both hold one Episode of verifiers a line, with the training run that asked for it in `run`. Give the files
under `all/`, not those under `effective/` as well: these are the same traces again. What the trainer
learned later (entropies, advantages) stands beside a stream, in `annotations/`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from pipeline.errors import FormatError
from pipeline.formats.annotations import annotated
from pipeline.formats.fields import member
from pipeline.formats.json_rows import first_line_id, first_row, json_lines, rollouts
from pipeline.formats.source_rows import SourceRow
from pipeline.formats.traces import is_episode, trace_group, trace_id, trace_values, traces

NAME = "prime-rl"
_NO_ROLLOUTS = {
    "micro_step": "token exports hold neither rewards nor groups",
    "trace_id": "annotations hold no rollouts; they are read with the stream beside them",
    "rl_weights": "training samples hold neither rewards nor groups",
}


def recognizes(path: Path) -> bool:
    row = first_row(path)
    return is_episode(row) and member(row, "run").get("type") == "train"


def read(path: Path) -> Iterator[SourceRow]:
    """Every trace of the file, annotations folded in.

    Raises:
        FormatError: the file cannot be read, or is one of prime-rl's that holds no rollouts.
    """
    first = first_row(path)
    for name, why in _NO_ROLLOUTS.items():
        if name in first and not is_episode(first):
            raise FormatError(f"{path}: {why}. Give traces.jsonl or traces/stream.jsonl.")
    group = partial(trace_group, f"prime-rl/{first_line_id(path)}")
    rows = annotated(path, traces(json_lines(path)))
    yield from rollouts(rows, group, trace_values, sample_id=trace_id)
