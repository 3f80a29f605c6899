"""How every form of export is written: streamed from the lake, complete or not at all, vouched for.

folder/latest.json              names the newest complete export
folder/<export>/manifest.json   versions, hashes, counts
folder/<export>/clips.json      the clip ids of each file, row by row, whatever its form
folder/<export>/clips-00000.parquet …
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import schema
from pipeline.config import ExportConfig
from pipeline.errors import FormatError, LakeError
from pipeline.exports.manifest import CLIPS, EXPORT_VERSION, is_complete, read_manifest, replace_json
from pipeline.exports.selection import Selection, no_clips, select, windows
from pipeline.forgotten import Forgotten
from pipeline.hashing import content_id, file_sha256
from pipeline.lake import Lake
from pipeline.lake_reader import Reader
from pipeline.parquet import write_data_file


@dataclass(frozen=True)
class Form:
    """How one format lays out clips, which come as rows of `sql/staging/export_clips.sql`.

    Attributes:
        name: as the command and the manifest call it.
        suffix: of its files: `.parquet` or `.jsonl`.
        rows: the rows of one file, one for each of the clips it is given.
        held: those of the clips that the format can hold; the rest is counted under `drop_reason`.
        settings: what else decides the files' content.
        tokenizer_hash: the clips must be this tokenizer's, if it is given.
        readme: the text of a README.md beside the files, made from the manifest.
    """

    name: str
    suffix: str
    rows: Callable[[pa.Table], pa.Table]
    held: Callable[[pa.Table], pa.Table] = lambda clips: clips
    drop_reason: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    tokenizer_hash: str | None = None
    readme: Callable[[Mapping[str, Any]], str] | None = None


@dataclass(frozen=True)
class Export:
    """A complete export: its folder, how many clips it holds, and how many were left out by reason."""

    folder: Path
    clips: int
    dropped: Mapping[str, int]
    manifest: Mapping[str, Any]


def export_clips(
    lake: Lake,
    folder: Path,
    form: Form,
    config: ExportConfig,
    mining_id: str | None = None,
    snapshot: int | None = None,
) -> Export:
    """Writes a mining's clips (the newest mining by default), in rank order. The same export is written once.

    Args:
        snapshot: the lake as of this snapshot; default: the newest.

    Raises:
        NothingToMine: the lake was never mined.
        MiningError: no such mining, or clips of several tokenizers.
        FormatError: clips of another tokenizer than the form's, or prompts to exclude that cannot be read.
        LakeError: no such snapshot, the folder cannot be written, or prompts were forgotten meanwhile.
    """
    with lake.reader(snapshot) as reader:
        forgotten = Forgotten.as_of(reader)
        selection = select(reader, config, mining_id)
        _refuse_other_tokenizer(selection, form)
        settings = (
            config.model_dump(mode="json", exclude={"exclude_prompts"})
            | {"excluded": selection.excluded, "format": form.name}
            | dict(form.settings)
        )
        mining = selection.mining
        export_id = content_id(mining["mining_id"], settings, selection.content_hash)[:16]
        target = folder.absolute() / export_id
        was_there = is_complete(target)
        if was_there:
            manifest = read_manifest(target / "manifest.json")
        else:
            facts = {
                "schema_version": EXPORT_VERSION,
                "format": form.name,
                "mining_id": mining["mining_id"],
                "snapshot": mining["snapshot"],
                "config_hash": content_id(mining["config_hash"], settings),
                "tokenizer_hash": selection.tokenizer_hash,
            }
            manifest = _write(reader, selection, form, config.clips_per_shard, target, facts)
    try:
        forgotten.commit(lake, {"shards": _shard_rows(target, manifest)})
    except LakeError:  # what is not recorded would not be found when its prompts are forgotten
        if not was_there:
            shutil.rmtree(target)
        raise
    if manifest["clips"]:  # a trainer that follows latest.json keeps its clips when a night found none
        latest = {"export": export_id, "mining_id": manifest["mining_id"]}
        replace_json(folder.absolute() / "latest.json", latest)
    return Export(target, manifest["clips"], manifest["dropped"], manifest)


def _refuse_other_tokenizer(selection: Selection, form: Form) -> None:
    if form.tokenizer_hash and selection.tokenizer_hash not in (None, form.tokenizer_hash):
        raise FormatError(
            f"Mining {selection.mining['mining_id'][:12]} has clips of tokenizer "
            f"{str(selection.tokenizer_hash)[:12]}, which is not the one given. Give the folder of the model "
            "that sampled them with --tokenizer."
        )


def _write(
    reader: Reader,
    selection: Selection,
    form: Form,
    clips_per_file: int,
    target: Path,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything into a folder aside, which is renamed when it is complete."""
    building = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    totals: Counter[str] = Counter()
    files, clip_ids = [], {}
    try:
        building.mkdir(parents=True)
        for number, clips in enumerate(_parts(reader, selection, form, clips_per_file, totals)):
            path = building / f"clips-{number:05d}{form.suffix}"
            prompt_tokens, clip_tokens = _total(clips["prompt_ids"]), _total(clips["clip_ids"])
            totals.update(clips=clips.num_rows, prompt_tokens=prompt_tokens, clip_tokens=clip_tokens)
            clip_ids[path.name] = clips["clip_id"].to_pylist()
            files.append(
                {
                    "file": path.name,
                    "clips": clips.num_rows,
                    "tokens": prompt_tokens + clip_tokens,
                    "sha256": _write_file(form.rows(clips), path),
                }
            )
        dropped = dict(selection.dropped)
        if totals["unheld"]:
            dropped[form.drop_reason] = totals["unheld"]
        manifest = {
            **facts,
            "clips": totals["clips"],
            "dropped": dropped,
            "prompt_tokens": totals["prompt_tokens"],
            "clip_tokens": totals["clip_tokens"],
            "files": files,
            "created_at": datetime.now(UTC).isoformat(),
        }
        (building / CLIPS).write_text(json.dumps(clip_ids) + "\n", encoding="utf-8")
        if form.readme is not None:
            (building / "README.md").write_text(form.readme(manifest), encoding="utf-8")
        (building / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)  # a folder without a manifest is no export
        building.rename(target)
        return manifest
    except OSError as error:
        raise LakeError(
            f"Cannot write {form.name} to {target}: {error.strerror or error}. "
            "Choose another folder; nothing is half-written."
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _parts(
    reader: Reader, selection: Selection, form: Form, clips_per_file: int, totals: Counter[str]
) -> Iterator[pa.Table]:
    """The clips of each file; one file without a clip if there is none at all."""
    for window in windows(reader, selection.num_clips, clips_per_file):
        held = form.held(window)
        totals["unheld"] += window.num_rows - held.num_rows
        for start in range(0, held.num_rows, clips_per_file):
            yield held.slice(start, clips_per_file)
    if not totals["clips"]:
        yield form.held(no_clips(reader))


def _write_file(rows: pa.Table, path: Path) -> str:
    if path.suffix == ".parquet":
        return write_data_file(rows, path)
    with path.open("w", encoding="ascii") as lines:
        for batch in rows.to_batches(max_chunksize=256):
            # ASCII: some readers take U+2028, which models write, for the end of a line
            lines.writelines(json.dumps(row) + "\n" for row in batch.to_pylist())
    return file_sha256(path)


def _shard_rows(target: Path, manifest: Mapping[str, Any]) -> pa.Table:
    now = datetime.now(UTC)
    return pa.Table.from_pylist(
        [
            {
                "path": str(target / file["file"]),
                "mining_id": manifest["mining_id"],
                "num_clips": file["clips"],
                "num_tokens": file["tokens"],
                "sha256": file["sha256"],
                "created_at": now,
            }
            for file in manifest["files"]
        ],
        schema.SHARDS,
    )


def _total(lists: pa.ChunkedArray) -> int:
    return pc.sum(pc.list_value_length(lists)).as_py() or 0
