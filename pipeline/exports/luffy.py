"""`echomine export luffy`: verl's prompt Parquet with a `target`, as LUFFY and EchoRL read it.

Their reader (`mix_src/rl_dataset_with_target.py`) renders `prompt` with the chat template, takes
`target[0]["content"]`, cuts a leading "<think>\\n" if the rendered prompt already ends with it, and tokenizes
the rest without special tokens. It leaves the end-of-sequence token to the rollout worker: a target counts
as a whole trace there, and a clip is one only where `extra_info.is_whole` says so. A prompt with several
clips has a row for each, since the reader looks at the first target only.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from pipeline.exports.core import Form
from pipeline.exports.text import MESSAGES, UNKNOWN_MESSAGES, clip_texts, held_with_messages
from pipeline.tokenization import tokenizer_hash

EXTRA_INFO = pa.struct(
    [
        ("split", pa.string()),
        ("index", pa.int64()),
        ("clip_id", pa.string()),
        ("is_whole", pa.bool_()),
        ("step_entropy", pa.float32()),  # nats
        ("policy_version", pa.int64()),
    ]
)
LUFFY = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", MESSAGES),
        ("target", MESSAGES),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
        ("extra_info", EXTRA_INFO),
    ]
)


def luffy(tokenizer: Any) -> Form:
    """One row of `LUFFY` a clip.

    Args:
        tokenizer: of the model that sampled the clips.
    """

    def rows(clips: pa.Table) -> pa.Table:
        texts = clip_texts(tokenizer, clips)
        given = clips.drop_columns(["prompt_ids", "clip_ids"]).to_pylist()
        return pa.Table.from_pylist(
            [_row(clip, text) for clip, text in zip(given, texts, strict=True)], LUFFY
        )

    return Form(
        "luffy",
        ".parquet",
        rows,
        held_with_messages(tokenizer),
        UNKNOWN_MESSAGES,
        tokenizer_hash=tokenizer_hash(tokenizer),
    )


def _row(clip: dict[str, Any], text: str) -> dict[str, Any]:
    return {
        "data_source": clip["data_source"] or "echomine",
        "prompt": clip["messages"],
        "target": [{"role": "assistant", "content": text}],
        "ability": "",
        "reward_model": {"style": "rule", "ground_truth": clip["ground_truth"] or ""},
        "extra_info": {
            "split": "train",
            "index": clip["position"],
            "clip_id": clip["clip_id"],
            "is_whole": clip["is_whole"],
            "step_entropy": clip["step_entropy"],
            "policy_version": clip["policy_version"],
        },
    }
