"""`echomine export trl`: prompts and clips as Parquet for TRL's SFTTrainer.

`prompt` and `completion` are text. `input_ids` and `completion_mask` are the tokens as they were sampled,
and TRL takes them as they are: from text alone it would put an end-of-sequence token after every clip, which
teaches the model to stop in the middle of its reasoning (TRL 1.16.0, `SFTTrainer._prepare_dataset`). TRL
averages over the tokens of a batch; the per-clip mean of the EchoClip loss is in `shards` and `prime-rl`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.exports.core import Form
from pipeline.exports.text import clip_texts, id_lists, prompt_texts
from pipeline.tokenization import tokenizer_hash

TRL = pa.schema(
    [
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("completion_mask", pa.list_(pa.int8())),
        ("clip_id", pa.string()),
    ]
)


def trl(tokenizer: Any) -> Form:
    """One row of `TRL` a clip.

    Args:
        tokenizer: of the model that sampled the clips.
    """

    def rows(clips: pa.Table) -> pa.Table:
        parts = list(zip(id_lists(clips, "prompt_ids"), id_lists(clips, "clip_ids"), strict=True))
        masks = [np.repeat(np.array([0, 1], np.int8), [len(prompt), len(clip)]) for prompt, clip in parts]
        return pa.table(
            [
                pa.array(prompt_texts(tokenizer, clips), pa.string()),
                pa.array(clip_texts(tokenizer, clips), pa.string()),
                pa.array([np.concatenate(part) for part in parts], pa.list_(pa.int32())),
                pa.array(masks, pa.list_(pa.int8())),
                clips["clip_id"],
            ],
            schema=TRL,
        )

    return Form("trl", ".parquet", rows, tokenizer_hash=tokenizer_hash(tokenizer))
