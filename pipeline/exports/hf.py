"""`echomine export hf`: a folder that `datasets.load_dataset(folder)` opens, with a card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from pipeline.exports.core import Form
from pipeline.exports.text import MESSAGES, clip_texts, prompt_texts
from pipeline.tokenization import tokenizer_hash

HF = pa.schema(
    [
        ("clip_id", pa.string()),
        ("messages", MESSAGES),
        ("prompt", pa.string()),
        ("clip", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("clip_ids", pa.list_(pa.int32())),
        ("is_whole", pa.bool_()),
        ("step_entropy", pa.float32()),
        ("reward", pa.float64()),
        ("policy_version", pa.int64()),
        ("weight", pa.float32()),
    ]
)
MEANINGS = {
    "clip_id": "names the clip in the lake it was mined from",
    "messages": "the prompt's chat messages; null where the lake knows its tokens only",
    "prompt": "what the model read, special tokens kept",
    "clip": "the clip's text, without special tokens",
    "prompt_ids": "tokens of the prompt",
    "clip_ids": "tokens of the clip, as they were sampled",
    "is_whole": "whether the clip is the whole completion",
    "step_entropy": "mean entropy of the clip's last step, nats per token",
    "reward": "the completion's task reward",
    "policy_version": "optimizer steps behind the weights that sampled it",
    "weight": "1.0",
}

# `configs` names the data, so that manifest.json is not taken for some.
_CARD = """\
---
configs:
- config_name: default
  data_files:
  - split: train
    path: clips-*.parquet
tags:
- echoclip
- reinforcement-learning
---

# EchoClips

{clips} EchoClips of {clip_tokens} tokens, most uncertain first: prefixes of verified successes, each up to
its most uncertain reasoning step ([EchoRL, arXiv 2605.31228](https://arxiv.org/abs/2605.31228)).
Exported by EchoMine.

| | |
|---|---|
| mining | `{mining_id}` |
| snapshot of the lake | {snapshot} |
| tokenizer | `{tokenizer_hash}` |
| left out | {dropped} |
| written | {created_at} |

| column | meaning |
|---|---|
{columns}
"""


def card(manifest: Mapping[str, Any]) -> str:
    """The README.md of an export: YAML that tells `datasets` which files are data, then text for people."""
    columns = "\n".join(f"| `{name}` | {meaning} |" for name, meaning in MEANINGS.items())
    dropped = ", ".join(f"{reason} {n}" for reason, n in manifest["dropped"].items()) or "none"
    return _CARD.format_map({**manifest, "dropped": dropped, "columns": columns})


def hf(tokenizer: Any) -> Form:
    """One row of `HF` a clip.

    Args:
        tokenizer: of the model that sampled the clips.
    """

    def rows(clips: pa.Table) -> pa.Table:
        known = [None if text is None else json.loads(text) for text in clips["messages"].to_pylist()]
        texts = {
            "messages": pa.array(known, MESSAGES),
            "prompt": pa.array(prompt_texts(tokenizer, clips), pa.string()),
            "clip": pa.array(clip_texts(tokenizer, clips), pa.string()),
        }
        columns = [
            texts[name] if name in texts else clips[name].cast(HF.field(name).type) for name in HF.names
        ]
        return pa.table(columns, schema=HF)

    return Form("hf", ".parquet", rows, tokenizer_hash=tokenizer_hash(tokenizer), readme=card)
