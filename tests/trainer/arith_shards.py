"""EchoClips that the embedded model can train on."""

from __future__ import annotations

from pathlib import Path

from sample_lake import LakeBuilder

from pipeline.config import ExportConfig, MiningConfig
from pipeline.exports.core import export_clips
from pipeline.exports.shards import SHARDS
from pipeline.mine import mine
from pipeline.models import model_folder
from pipeline.tokenization import load_tokenizer, tokenizer_hash

SUMS = ("17+25", "40+2", "30+12", "31+11")


def export_arith_shards(lake_folder: Path, shards: Path, sums=SUMS) -> None:
    """One clip for each of the sums, which are all 42."""
    builder = LakeBuilder(lake_folder)
    builder.tokenizer = load_tokenizer(model_folder("arith"))
    builder.tokenizer_hash = tokenizer_hash(builder.tokenizer)
    for written in sums:
        ways = [f"{written}\n10+32=42\n#42", f"{written}\n#42"]
        builder.add_group(ways, [1.0, 1.0], question=f"{written}\n")
    for row in builder.rows:
        row["completion_ids"][-1] = builder.tokenizer.eos_token_id
    lake = builder.commit()
    mining_id = mine(lake, MiningConfig()).mining_id
    export_clips(lake, shards, SHARDS, ExportConfig(), mining_id)
