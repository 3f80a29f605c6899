"""`echomine export sft`: chat messages as JSON lines, as most fine-tuning scripts read them.

The last message is the assistant's: the clip's text. Two things to know before training on it. A chat
template puts an end-of-turn after it, although only a clip with `is_whole` ended there when it was sampled.
And text is tokenized anew, not always into the tokens that were sampled. Where tokens matter, export
`shards`, `trl` or `prime-rl`.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from pipeline.exports.core import Form
from pipeline.exports.text import MESSAGES, UNKNOWN_MESSAGES, clip_texts, held_with_messages
from pipeline.tokenization import tokenizer_hash

SFT = pa.schema(
    [
        ("messages", MESSAGES),
        ("clip_id", pa.string()),
        ("is_whole", pa.bool_()),
        ("step_entropy", pa.float32()),  # nats
        ("reward", pa.float64()),
        ("policy_version", pa.int64()),
        ("weight", pa.float32()),
    ]
)


def sft(tokenizer: Any) -> Form:
    """One JSON object of `SFT` a line.

    Args:
        tokenizer: of the model that sampled the clips.
    """

    def rows(clips: pa.Table) -> pa.Table:
        conversations = [
            [*messages, {"role": "assistant", "content": text}]
            for messages, text in zip(
                clips["messages"].to_pylist(), clip_texts(tokenizer, clips), strict=True
            )
        ]
        place = clips.schema.get_field_index("messages")
        return (
            clips.set_column(place, "messages", pa.array(conversations, MESSAGES)).select(SFT.names).cast(SFT)
        )

    return Form(
        "sft",
        ".jsonl",
        rows,
        held_with_messages(tokenizer),
        UNKNOWN_MESSAGES,
        tokenizer_hash=tokenizer_hash(tokenizer),
    )
