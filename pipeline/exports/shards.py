"""`echomine export shards`: Parquet for EchoMine's own trainer and for loops that read token ids."""

from __future__ import annotations

import pyarrow as pa

from pipeline.exports.core import Form

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

# `load_clips` of `pipeline.shards` reads them.
SHARDS = Form("shards", ".parquet", lambda clips: clips.select(SHARD.names).cast(SHARD))
