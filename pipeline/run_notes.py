"""What each night notes of itself: `run.json` in its folder `runs/<run>/` of the lake."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import LakeError

NAME = "run.json"


def read_notes(folder: Path) -> dict[str, Any]:
    """What the run in `folder` has noted; nothing before it began.

    Raises:
        LakeError: the file is damaged.
    """
    path = folder / NAME
    try:
        notes = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise LakeError(_unreadable(path, str(error))) from error
    if not isinstance(notes, dict):
        raise LakeError(_unreadable(path, "it holds no object"))
    return notes


def write_notes(folder: Path, notes: dict[str, Any]) -> None:
    """Replaces what the run in `folder` has noted, at once."""
    partial = folder / f"{NAME}.partial"
    partial.write_text(json.dumps(notes, indent=2) + "\n")
    os.replace(partial, folder / NAME)


def noted_runs(lake: Path) -> Iterator[Path]:
    """The folders of the runs of the lake in this folder that have noted something."""
    return (path.parent for path in (lake / "runs").glob(f"*/{NAME}"))


def noted_at(folder: Path) -> float:
    """When the run in `folder` noted something last, in seconds since the epoch."""
    return (folder / NAME).stat().st_mtime


def _unreadable(path: Path, why: str) -> str:
    return (
        f"{path} cannot be read: {why}. Restore it from a backup, or move it away: what the night has "
        "committed stays in the lake."
    )
