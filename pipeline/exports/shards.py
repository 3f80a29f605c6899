"""`echomine export shards`: Parquet for EchoMine's own trainer and for loops that read token ids."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from pipeline.config import ExportConfig
from pipeline.exports.core import Export, Form, export_clips
from pipeline.lake import Lake

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


def export_shards(
    lake: Lake,
    folder: Path,
    config: ExportConfig,
    mining_id: str | None = None,
    snapshot: int | None = None,
) -> Export:
    """One row of `SHARD` a clip. `load_clips` of `pipeline.shards` reads them. Raises as `export_clips`."""
    form = Form("shards", ".parquet", lambda clips: clips.select(SHARD.names).cast(SHARD))
    return export_clips(lake, folder, form, config, mining_id, snapshot)
