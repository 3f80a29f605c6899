"""What the rows of one import share: its tokenizer, its name, and how prompts are made of their words."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import orjson

from pipeline.errors import FormatError
from pipeline.formats.fields import is_count
from pipeline.imports.token_facts import TokenFacts
from pipeline.prompts import prompt_messages_ids
from pipeline.records import Prompt
from pipeline.tokenization import tokenizer_hash


class ImportContext:
    """What the rows of one import share: who they are of, and what is remembered of their tokens."""

    def __init__(self, tokenizer: Any, run_id: str) -> None:
        self.tokenizer = tokenizer
        self.tokenizer_hash = tokenizer_hash(tokenizer)
        self.vocabulary_size = len(tokenizer)
        self.run_id = run_id
        self.facts = TokenFacts(tokenizer)
        # The rollouts of a group share their prompt.
        self._messages_ids = lru_cache(maxsize=1024)(self._tokenized_messages)
        self._text_ids = lru_cache(maxsize=1024)(self._tokenized_text)

    def prompt(self, values: Mapping[str, Any], *, has_ids: bool) -> Prompt | None:
        """The prompt of a row that says it in words; None if it is known by its tokens only.

        Args:
            has_ids: the row has `prompt_ids`. Its messages may then be the whole conversation, which ends
                with the completion: that is no part of the prompt.

        Raises:
            FormatError: its messages are none.
        """
        text = values.get("prompt_text", values.get("prompt"))
        messages = values.get("messages")
        if messages is None and isinstance(text, str):
            messages = [{"role": "user", "content": text}]
        if messages is None:
            return None
        plain = isinstance(messages, list) and all(
            isinstance(message, dict) and isinstance(message.get("role"), str | None)
            and isinstance(message.get("content"), str) for message in messages
        )  # fmt: skip
        if not plain or not messages:
            raise FormatError("`messages` is no list of messages with a text `role` and `content`")
        if has_ids and messages[-1].get("role") == "assistant":
            messages = messages[:-1]
            if not messages:
                return None
        spoken = tuple({"role": m.get("role") or "user", "content": m["content"]} for m in messages)
        source = _optional_text(values.get("data_source")) or ""
        prompt = Prompt(spoken, _optional_text(values.get("ground_truth")), source)
        if not is_unicode(f"{prompt.text}{prompt.ground_truth}{source}"):
            raise FormatError("the prompt is no valid Unicode")
        return prompt

    def prompt_ids(self, values: Mapping[str, Any], prompt: Prompt | None) -> list[int]:
        """The prompt's tokens: as they stand in the row, or made of its text or messages.

        Raises:
            FormatError: there is neither, or no token in it.
            PromptError: the chat template refuses the messages.
        """
        if values.get("prompt_ids") is not None:
            return self.checked_ids(values["prompt_ids"], "prompt_ids")
        if prompt is None:
            raise FormatError("column `prompt_ids` is missing, and there is no text in `prompt`")
        if isinstance(values.get("prompt_text"), str):
            return list(self._text_ids(values["prompt_text"]))
        return list(self._messages_ids(orjson.dumps([dict(message) for message in prompt.messages])))

    def checked_ids(self, values: Any, name: str) -> list[int]:
        """Raises FormatError unless `values` are token ids of this tokenizer."""
        if not isinstance(values, list) or not all(is_count(value) for value in values):
            raise FormatError(f"column `{name}` is no list of token ids")
        if values and max(values) >= self.vocabulary_size:
            raise FormatError(
                f"unknown tokenizer: {name} holds {max(values)}, "
                f"the tokenizer has {self.vocabulary_size} tokens"
            )
        return values

    def tokenized(self, texts: list[str]) -> list[list[int]]:
        """The tokens of texts as they stand."""
        if not texts:
            return []
        encoded: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return encoded

    def _tokenized_text(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenized([text])[0])

    def _tokenized_messages(self, messages: bytes) -> tuple[int, ...]:
        return tuple(prompt_messages_ids(self.tokenizer, orjson.loads(messages)).tolist())


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold it: half a surrogate pair, which JSON and SQLite can, is no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _optional_text(value: Any) -> str | None:
    return None if value is None else str(value)
