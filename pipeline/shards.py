"""Shards: EchoClips as immutable Parquet files for training, with a manifest that vouches for them.

folder/latest.json              names the newest complete export
folder/<export>/manifest.json   versions, hashes, counts
folder/<export>/clips-00000.parquet …
folder/<export>/withdrawn.json  clips that may teach no more, if there are any (see `withdrawal`)
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import schema
from pipeline.config import ExportConfig
from pipeline.errors import FormatError, LakeError, MiningError, NothingToMine
from pipeline.hashing import content_id, file_sha256
from pipeline.lake import Lake
from pipeline.parquet import write_data_file
from pipeline.prompts import read_prompts
from pipeline.records import Int32
from pipeline.sqlfiles import sql_file
from pipeline.withdrawal import noticed_clips, withdrawn_clips

SHARD_VERSION = 1

SHARD = pa.schema(
    [
        ("clip_id", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("clip_ids", pa.list_(pa.int32())),
        ("step_entropy", pa.float32()),  # nats
        ("reward", pa.float64()),
        ("policy_version", pa.int64()),
        ("tokenizer_hash", pa.string()),
        ("weight", pa.float32()),
    ]
)


@dataclass(frozen=True)
class Clip:
    """One EchoClip as the trainer reads it: [P] prompt tokens and [C] tokens to learn."""

    clip_id: str
    prompt_ids: Int32
    clip_ids: Int32
    step_entropy: float
    reward: float
    policy_version: int
    tokenizer_hash: str
    weight: float


@dataclass(frozen=True)
class Export:
    """A complete export: its folder, how many clips it holds, and how many were left out by reason."""

    folder: Path
    clips: int
    dropped: Mapping[str, int]
    manifest: Mapping[str, Any]


class UnknownTokenizer(FormatError):
    def __init__(self, tokenizer_hash: str, folder: Path) -> None:
        super().__init__(
            f"The shards in {folder} were mined with tokenizer {tokenizer_hash[:12]}, which is not this "
            "model's. Train the model that sampled them, or export a mining of this model's rollouts."
        )


def export_shards(lake: Lake, folder: Path, config: ExportConfig, mining_id: str | None = None) -> Export:
    """Writes a mining's clips (the newest mining by default), in rank order. The same export is written once.

    Raises:
        NothingToMine: the lake was never mined.
        MiningError: no such mining, or clips of several tokenizers.
        LakeError: the folder cannot be written.
    """
    excluded_ids, excluded_messages = _excluded(config.exclude_prompts)
    with lake.reader() as reader:
        minings = reader.rows(
            "select mining_id, config_hash, snapshot from mining_runs order by created_at desc"
        )
        if not minings:
            raise NothingToMine(f"The lake in {lake.folder} was never mined. Run `echomine mine` first.")
        chosen = [m for m in minings if m["mining_id"].startswith(mining_id or "")]
        if not chosen:
            raise MiningError(
                f'The lake in {lake.folder} has no mining {mining_id}. See `echomine sql "from mining_runs"`.'
            )
        mining = chosen[0]
        rows = reader.table(sql_file("staging/shard_rows"), {"mining_id": mining["mining_id"]})
        withdrawn = withdrawn_clips(reader).get(mining["mining_id"], set())
    rows, dropped = _selected(rows, config, excluded_ids, excluded_messages)
    if withdrawn:
        dropped["withdrawn"] = len(withdrawn)
    hashes = pc.unique(rows["tokenizer_hash"]).to_pylist()
    if len(hashes) > 1:
        raise MiningError(
            f"Mining {mining['mining_id'][:12]} has clips of {len(hashes)} tokenizers, which cannot share "
            "a shard. Mine one run at a time (`echomine mine --run RUN`), then export."
        )
    settings = config.model_dump(mode="json", exclude={"exclude_prompts"}) | {
        "excluded": content_id(sorted(excluded_ids), sorted(excluded_messages))
    }
    if withdrawn:  # what was exported before they were is another export
        settings["withdrawn"] = content_id(sorted(withdrawn))
    export_id = content_id(mining["mining_id"], settings)[:16]
    manifest = {
        "schema_version": SHARD_VERSION,
        "mining_id": mining["mining_id"],
        "snapshot": mining["snapshot"],
        "config_hash": content_id(mining["config_hash"], settings),
        "tokenizer_hash": hashes[0] if hashes else None,
        "clips": rows.num_rows,
        "dropped": dropped,
        "prompt_tokens": _total(rows["prompt_ids"]),
        "clip_tokens": _total(rows["clip_ids"]),
    }
    target = folder.absolute() / export_id
    if _is_complete(target):
        manifest = _read_manifest(target / "manifest.json")
    else:
        manifest = _write(rows, target, manifest, config.clips_per_shard)
    lake.commit({"shards": _shard_rows(target, manifest)})
    if manifest["clips"]:  # a trainer that follows latest.json keeps its clips when a night found none
        latest = {"export": export_id, "mining_id": mining["mining_id"]}
        _replace_json(folder.absolute() / "latest.json", latest)
    return Export(target, manifest["clips"], manifest["dropped"], manifest)


def _is_complete(target: Path) -> bool:
    """Whether an export is there with all its files as they were written."""
    try:
        files = _read_manifest(target / "manifest.json")["files"]
        return all(file_sha256(target / Path(file["file"]).name) == file["sha256"] for file in files)
    except (FormatError, OSError):
        return False


def _excluded(source: Path | None) -> tuple[set[str], set[str]]:
    """Prompt ids and messages to keep out: of a prompt file, or of a `.txt` file with an id on each line."""
    if source is None:
        return set(), set()
    if source.suffix == ".txt":
        try:
            ids = set(source.read_text(encoding="utf-8").split())
        except (OSError, UnicodeDecodeError) as error:
            raise FormatError(f"Cannot read {source}: {error}. Check --exclude-prompts.") from error
        if not ids:
            # nothing to keep out is more likely a mistake than a wish, and would leak the evaluation
            raise FormatError(f"{source} names no prompt to keep out. Check --exclude-prompts.")
        return ids, set()
    prompts = read_prompts(str(source))
    # Messages too: the same question with another ground truth is still the evaluation's question.
    messages = {
        json.dumps([dict(message) for message in prompt.messages], ensure_ascii=False) for prompt in prompts
    }
    return {prompt.prompt_id for prompt in prompts}, messages


def _selected(
    rows: pa.Table, config: ExportConfig, excluded_ids: set[str], excluded_messages: set[str]
) -> tuple[pa.Table, dict[str, int]]:
    excluded = pc.or_(
        pc.is_in(rows["prompt_id"], pa.array(sorted(excluded_ids), pa.string())),
        pc.is_in(rows["messages"], pa.array(sorted(excluded_messages), pa.string())),
    )
    tokens = pc.add(pc.list_value_length(rows["prompt_ids"]), pc.list_value_length(rows["clip_ids"]))
    limit = 2**31 - 1 if config.max_tokens is None else config.max_tokens
    long = pc.and_(pc.greater(tokens, limit), pc.invert(excluded))
    kept = rows.filter(pc.invert(pc.or_(excluded, long)))
    counts = {"excluded_prompt": pc.sum(excluded).as_py() or 0, "max_tokens": pc.sum(long).as_py() or 0}
    return kept.select(SHARD.names).cast(SHARD), {name: n for name, n in counts.items() if n}


def _write(rows: pa.Table, target: Path, manifest: dict[str, Any], clips_per_shard: int) -> dict[str, Any]:
    """Everything into a folder aside, which is renamed when it is complete."""
    building = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        building.mkdir(parents=True)
        files = []
        for number, start in enumerate(range(0, max(rows.num_rows, 1), clips_per_shard)):
            part = rows.slice(start, clips_per_shard)
            path = building / f"clips-{number:05d}.parquet"
            sha256 = write_data_file(part, path)
            tokens = _total(part["prompt_ids"]) + _total(part["clip_ids"])
            files.append({"file": path.name, "clips": part.num_rows, "tokens": tokens, "sha256": sha256})
        complete = manifest | {"files": files, "created_at": datetime.now(UTC).isoformat()}
        (building / "manifest.json").write_text(json.dumps(complete, indent=2) + "\n")
        shutil.rmtree(target, ignore_errors=True)  # a folder without a manifest is no export
        building.rename(target)
        return complete
    except OSError as error:
        raise LakeError(
            f"Cannot write shards to {target}: {error.strerror or error}. "
            "Choose another folder; nothing is half-written."
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


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


def _replace_json(path: Path, content: Mapping[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    partial.write_text(json.dumps(content) + "\n")
    os.replace(partial, path)


def _total(lists: pa.ChunkedArray) -> int:
    return pc.sum(pc.list_value_length(lists)).as_py() or 0


def load_clips(folder: Path, tokenizer_hash: str) -> list[Clip]:
    """The clips of an export, or of the newest one of a folder of exports, checked against its manifest.

    Clips that were withdrawn or forgotten since are left out.

    Raises:
        FormatError: no export there, a file is missing, cut off or changed, a newer format.
        UnknownTokenizer: another tokenizer's clips.
    """
    manifest_path = _newest_manifest(folder)
    manifest = _read_manifest(manifest_path)
    if manifest["clips"] and manifest["tokenizer_hash"] != tokenizer_hash:
        raise UnknownTokenizer(str(manifest["tokenizer_hash"]), manifest_path.parent)
    clips: list[Clip] = []
    for file in manifest["files"]:
        path = manifest_path.parent / Path(file["file"]).name
        if not path.is_file() or file_sha256(path) != file["sha256"]:
            raise FormatError(f"{path} is missing or not as it was exported. Export the shards again.")
        clips += _clips(pq.read_table(path, schema=SHARD))
    noticed = noticed_clips(manifest_path.parent)
    return [clip for clip in clips if clip.clip_id not in noticed]


def _clips(table: pa.Table) -> Sequence[Clip]:
    plain = table.drop_columns(["prompt_ids", "clip_ids"]).to_pylist()
    prompts = [np.asarray(ids.values, dtype=np.int32) for ids in table["prompt_ids"]]
    clips = [np.asarray(ids.values, dtype=np.int32) for ids in table["clip_ids"]]
    return [
        Clip(prompt_ids=prompt, clip_ids=clip, **row)
        for row, prompt, clip in zip(plain, prompts, clips, strict=True)
    ]


def _newest_manifest(folder: Path) -> Path:
    if (folder / "manifest.json").is_file():
        return folder / "manifest.json"
    if (folder / "latest.json").is_file():
        manifest = folder / Path(str(_read_json(folder / "latest.json").get("export"))).name / "manifest.json"
        if manifest.is_file():
            return manifest
    raise FormatError(
        f"{folder} holds no shards (no manifest.json or latest.json). Run `echomine export shards`."
    )


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = _read_json(path)
    version = manifest.get("schema_version")
    if isinstance(version, int) and version > SHARD_VERSION:
        raise FormatError(f"{path} has format {version}. Update EchoMine to read it.")
    files = manifest.get("files")
    complete = {"schema_version", "clips", "tokenizer_hash", "dropped"} <= manifest.keys()
    if (
        not complete
        or not isinstance(files, list)
        or not all(
            isinstance(file, dict) and {"file", "sha256", "clips", "tokens"} <= file.keys() for file in files
        )
    ):
        raise FormatError(f"{path} is no manifest of shards. Export the shards again.")
    return manifest


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} is no JSON: {error}. Export the shards again.") from error
    if not isinstance(content, dict):
        raise FormatError(f"{path} is no JSON object. Export the shards again.")
    return content
