"""Shards as a trainer reads them: checked against their manifest, and only by the model that they fit."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import FormatError, said
from pipeline.exports.manifest import newest_manifest, read_manifest
from pipeline.exports.shards import SHARD
from pipeline.hashing import content_id
from pipeline.records import Int32
from pipeline.withdrawal import noticed_clips


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


class UnknownTokenizer(FormatError):
    def __init__(self, tokenizer_hash: str, folder: Path) -> None:
        super().__init__(
            f"The shards in {folder} were mined with tokenizer {tokenizer_hash[:12]}, which is not this "
            "model's. Train the model that sampled them, or export a mining of this model's rollouts."
        )


@dataclass(frozen=True)
class ShardFile:
    """One file of an export, as the manifest tells."""

    path: Path
    sha256: str
    num_clips: int
    num_tokens: int


@dataclass(frozen=True)
class Shards:
    """An export that fits a model, as its manifest tells; `read_shard` checks the files against it.

    Attributes:
        content: names what is in the files, wherever they lie.
        withdrawn: ids of clips that may teach no more.
    """

    folder: Path
    files: tuple[ShardFile, ...]
    content: str
    withdrawn: frozenset[str]

    @property
    def num_clips(self) -> int:
        return sum(file.num_clips for file in self.files)


def open_shards(folder: Path, tokenizer_hash: str) -> Shards:
    """An export, or the newest one of a folder of exports.

    Raises:
        FormatError: no export there, one of another form, or a newer format.
        UnknownTokenizer: another tokenizer's clips.
    """
    manifest_path = newest_manifest(folder)
    manifest = read_manifest(manifest_path)
    form = manifest.get("format", "shards")
    if form != "shards":
        raise FormatError(
            f"{manifest_path.parent} holds an export of the form {form}. Export shards to a folder of their "
            "own with `echomine export shards`."
        )
    if manifest["clips"] and manifest["tokenizer_hash"] != tokenizer_hash:
        raise UnknownTokenizer(str(manifest["tokenizer_hash"]), manifest_path.parent)
    if not all(_is_count(file[name]) for file in manifest["files"] for name in ("clips", "tokens")):
        raise FormatError(f"{manifest_path} does not count its clips and tokens. Export the shards again.")
    files = tuple(
        ShardFile(
            manifest_path.parent / Path(str(file["file"])).name,
            str(file["sha256"]),
            file["clips"],
            file["tokens"],
        )
        for file in manifest["files"]
    )
    content = content_id([file.sha256 for file in files])
    return Shards(manifest_path.parent, files, content, frozenset(noticed_clips(manifest_path.parent)))


def read_shard(file: ShardFile) -> pa.Table:
    """The rows of a file, columns as in `SHARD`; the bytes that are parsed are the bytes that were hashed.

    Raises:
        FormatError: the file is missing, cut off or changed, or no shard.
    """
    damaged = FormatError(f"{file.path} is missing or not as it was exported. Export the shards again.")
    try:
        content = file.path.read_bytes()
    except OSError as error:
        raise damaged from error
    if hashlib.sha256(content).hexdigest() != file.sha256:
        raise damaged
    try:
        table = (
            pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False).select(SHARD.names).cast(SHARD)
        )
    except (pa.ArrowException, KeyError, OSError) as error:
        raise FormatError(f"{file.path} is no shard: {said(error)}. Export the shards again.") from error
    if table.num_rows != file.num_clips or any(column.null_count for column in table.columns):
        raise FormatError(f"{file.path} does not hold its {file.num_clips} clips. Export the shards again.")
    return table


def load_clips(folder: Path, tokenizer_hash: str) -> list[Clip]:
    """The clips of an export, or of the newest one of a folder of exports, checked against its manifest.

    Clips that were withdrawn or forgotten since are left out.

    Raises:
        FormatError: see `open_shards` and `read_shard`.
    """
    shards = open_shards(folder, tokenizer_hash)
    return [
        clip
        for file in shards.files
        for clip in _clips(read_shard(file))
        if clip.clip_id not in shards.withdrawn
    ]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value >= 0


def _clips(table: pa.Table) -> Sequence[Clip]:
    plain = table.drop_columns(["prompt_ids", "clip_ids"]).to_pylist()
    prompts = [np.asarray(ids.values, dtype=np.int32) for ids in table["prompt_ids"]]
    clips = [np.asarray(ids.values, dtype=np.int32) for ids in table["clip_ids"]]
    return [
        Clip(prompt_ids=prompt, clip_ids=clip, **row)
        for row, prompt, clip in zip(plain, prompts, clips, strict=True)
    ]
