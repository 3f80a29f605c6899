"""Clips that may teach no more: those whose rollout was overturned, and those of forgotten prompts.

An export leaves them out. Shards that are out already are immutable, so a notice is put beside their
manifest, `withdrawn.json`, and whoever loads the shards leaves out what it names.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.errors import FormatError
from pipeline.exports.manifest import clip_ids
from pipeline.lake_reader import Reader

NOTICE = "withdrawn.json"
Reason = Literal["overturned", "forgotten"]
ClipsByMining = Mapping[str, set[str]]


@dataclass(frozen=True)
class TouchedShard:
    """An exported file with clips that may teach no more.

    Attributes:
        clips: how many of them; where nothing tells which it holds, how many at most.
        noticed: whether the notice stands beside it; if not, whoever holds a copy must be told.
    """

    path: str
    clips: int
    noticed: bool


def withdrawn_clips(reader: Reader) -> dict[str, set[str]]:
    """Clip ids by mining."""
    return clips_by_mining(reader, "select mining_id, clip_id from withdrawn_clips")


def clips_by_mining(
    reader: Reader, sql: str, params: Mapping[str, object] | None = None
) -> dict[str, set[str]]:
    """The clip ids by mining of a query that gives `mining_id` and `clip_id`."""
    found: dict[str, set[str]] = {}
    for row in reader.rows(sql, params):
        found.setdefault(row["mining_id"], set()).add(row["clip_id"])
    return found


def notice_shards(reader: Reader, clips: ClipsByMining, reason: Reason) -> list[TouchedShard]:
    """Puts notices beside the exports that hold any of `clips`, and says which files do.

    Overturned clips replace those noticed before, since a newer verdict may have restored some; forgotten
    ones stay forgotten.
    """
    touched: list[TouchedShard] = []
    named: dict[Path, set[str]] = {}
    for row in reader.rows("select distinct path, mining_id from shards order by path"):
        path, wanted = Path(row["path"]), clips.get(row["mining_id"], set())
        held, is_there = clip_ids(path), path.is_file()
        hit = wanted if held is None else wanted & held  # a notice may name clips that are not there
        if is_there:
            named.setdefault(path.parent, set()).update(hit)
        if hit:
            touched.append(TouchedShard(str(path), len(hit), is_there))
    unnoticed = {folder for folder, hit in named.items() if not _write_notice(folder, hit, reason)}
    return [
        TouchedShard(shard.path, shard.clips, False) if Path(shard.path).parent in unnoticed else shard
        for shard in touched
    ]


def noticed_clips(folder: Path) -> set[str]:
    """The clips of an export that may teach no more.

    Raises:
        FormatError: the notice is damaged.
    """
    return {clip for clips in _read_notice(folder).values() for clip in clips}


def _write_notice(folder: Path, clips: set[str], reason: Reason) -> bool:
    """Whether the notice stands now."""
    try:
        before = _read_notice(folder)
        now = clips | set(before.get("forgotten", ())) if reason == "forgotten" else clips
        notice = {name: names for name, names in {**before, reason: sorted(now)}.items() if names}
        if notice == before:
            return True
        partial = folder / f".{NOTICE}.{uuid.uuid4().hex}"
        partial.write_text(json.dumps(notice, indent=2) + "\n")
        os.replace(partial, folder / NOTICE)
        return True
    except (OSError, FormatError):
        return False


def _read_notice(folder: Path) -> dict[str, list[str]]:
    path = folder / NOTICE
    try:
        notice = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} is no JSON: {error}. Export the shards again.") from error
    if not isinstance(notice, dict) or not all(isinstance(names, list) for names in notice.values()):
        raise FormatError(f"{path} is no notice of withdrawn clips. Export the shards again.")
    return notice
