"""Clips and prompts as text, for the forms that hold text.

Text is decoded without special tokens. A clip is a prefix of a completion, so it may end within a character
of several tokens; what is decoded of such a character (U+FFFD) is taken off the end.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import PromptError
from pipeline.prompts import prompt_messages_ids
from pipeline.records import Int32
from pipeline.tokenization import completion_text

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
UNKNOWN_MESSAGES = "unknown_messages"

Messages = list[dict[str, str]]


def clip_text(tokenizer: Any, clip_ids: Int32) -> str:
    return completion_text(tokenizer, clip_ids.tolist()).rstrip("\ufffd")


def clip_texts(tokenizer: Any, clips: pa.Table) -> list[str]:
    """The text of every clip."""
    return [clip_text(tokenizer, ids) for ids in id_lists(clips, "clip_ids")]


def prompt_texts(tokenizer: Any, clips: pa.Table) -> list[str]:
    """What the model read before every clip, special tokens kept, so that the chat's form stays."""
    return [str(tokenizer.decode(ids.tolist())) for ids in id_lists(clips, "prompt_ids")]


def id_lists(clips: pa.Table, name: str) -> Iterator[Int32]:
    """The token ids of a column, row by row."""
    return (np.asarray(ids.values, dtype=np.int32) for ids in clips[name])


def prompt_messages(tokenizer: Any, known: str | None, prompt_ids: Int32) -> Messages | None:
    """The messages of a prompt: those of the lake, or one user message that leads to the same tokens.

    Returns:
        None for a prompt that is known by its tokens only, and that no single user message makes again
        (a chat of several turns, say): any other message would be another prompt.
    """
    if known is not None:
        return [{"role": message["role"], "content": message["content"]} for message in json.loads(known)]
    message = {"role": "user", "content": _user_content(tokenizer, prompt_ids)}
    try:
        same = np.array_equal(prompt_messages_ids(tokenizer, [message]), prompt_ids)
    except PromptError:
        return None
    return [message] if same else None


def _user_content(tokenizer: Any, prompt_ids: Int32) -> str:
    """A prompt's text without what the chat template puts around a single user message."""
    if not getattr(tokenizer, "chat_template", None):
        return completion_text(tokenizer, prompt_ids.tolist())
    mark = "user content"
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": mark}], add_generation_prompt=True, tokenize=False
    )
    before, _, after = rendered.rpartition(mark)
    return str(tokenizer.decode(prompt_ids.tolist())).removeprefix(before).removesuffix(after)


def held_with_messages(tokenizer: Any) -> Callable[[pa.Table], pa.Table]:
    """Keeps the clips whose prompts have messages, and puts these in the place of the JSON in `messages`."""

    def held(clips: pa.Table) -> pa.Table:
        found = [
            prompt_messages(tokenizer, known, prompt_ids)
            for known, prompt_ids in zip(
                clips["messages"].to_pylist(), id_lists(clips, "prompt_ids"), strict=True
            )
        ]
        place = clips.schema.get_field_index("messages")
        clips = clips.set_column(place, "messages", pa.array(found, MESSAGES))
        return clips.filter(clips["messages"].is_valid())

    return held
