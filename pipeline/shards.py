"""Shards as a trainer reads them: checked against their manifest, and only by the model that they fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import FormatError
from pipeline.exports.manifest import damaged_file, newest_manifest, read_manifest
from pipeline.exports.shards import SHARD
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


def load_clips(folder: Path, tokenizer_hash: str) -> list[Clip]:
    """The clips of an export, or of the newest one of a folder of exports, checked against its manifest.

    Clips that were withdrawn or forgotten since are left out.

    Raises:
        FormatError: no export there, one of another form, a file is missing, cut off or changed, a newer
            format.
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
    damaged = damaged_file(manifest_path.parent, manifest)
    if damaged is not None:
        raise FormatError(f"{damaged} is missing or not as it was exported. Export the shards again.")
    noticed = noticed_clips(manifest_path.parent)
    return [
        clip
        for file in manifest["files"]
        for clip in _clips(pq.read_table(manifest_path.parent / Path(file["file"]).name, schema=SHARD))
        if clip.clip_id not in noticed
    ]


def _clips(table: pa.Table) -> Sequence[Clip]:
    plain = table.drop_columns(["prompt_ids", "clip_ids"]).to_pylist()
    prompts = [np.asarray(ids.values, dtype=np.int32) for ids in table["prompt_ids"]]
    clips = [np.asarray(ids.values, dtype=np.int32) for ids in table["clip_ids"]]
    return [
        Clip(prompt_ids=prompt, clip_ids=clip, **row)
        for row, prompt, clip in zip(plain, prompts, clips, strict=True)
    ]
