"""One row of a dump at a time: what is wrong with it, or the row with its defaults and steps.

This is the authority on what may enter. Rows that `import_columns` finds beyond doubt do not come here.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, date, datetime
from functools import lru_cache
from typing import Any

import orjson
import pyarrow as pa

from pipeline import schema
from pipeline.errors import FormatError
from pipeline.formats.fields import is_count
from pipeline.hashing import content_id, ids_array
from pipeline.prompts import prompt_messages_ids
from pipeline.records import Prompt
from pipeline.rollouts import problem_of
from pipeline.steps import SPLITTER
from pipeline.token_facts import TokenFacts
from pipeline.tokenization import completion_step_ends, completion_text, tokenizer_hash

ORIGINS = ("policy", "trainer", "expert")
FINISH_REASONS = ("stop", "length")
ENTROPY_KINDS = ("full_vocab", "full_vocab_tempered", "rescored")
# The least value of a column; a row below it is refused.
LEAST = {"policy_version": 0, "group_size": 1, "max_tokens": 1, "temperature": 0}
# What rows that do not say otherwise have.
DEFAULTS = {"origin": "policy", "finish_reason": "stop", "model": "imported", "policy_version": 0}


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

    def prompt(self, values: Mapping[str, Any]) -> Prompt | None:
        """The prompt of a row that says it in words; None if it is known by its tokens only.

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


# DuckLake pastes bounds of what is joined into queries of its catalog, which a NUL character cuts off.
NAMES = (
    "group_id",
    "prompt_id",
    "run_id",
    "model",
    "weights_hash",
    "verifier",
    "verifier_version",
    "splitter",
)


def completed_row(values: Mapping[str, Any], context: ImportContext) -> dict[str, Any]:
    """A dump's row with the defaults filled in and its steps split; group_size and time as they were given.

    Raises:
        FormatError: the reason it is refused.
        PromptError: the chat template refuses its prompt.
    """
    given = {
        name: value for name, value in values.items() if name in schema.ROLLOUTS.names and value is not None
    }
    if given.get("tokenizer_hash", context.tokenizer_hash) != context.tokenizer_hash:
        raise FormatError(
            f"unknown tokenizer {str(given['tokenizer_hash'])[:12]}, not the one of --tokenizer"
        )
    index = given.get("sample_index")
    if not isinstance(given.get("group_id"), str) or not (index is None or is_count(index)):
        raise FormatError("group_id must be text and sample_index a whole number from 0")
    for name in NAMES:
        if "\0" in str(given.get(name)):
            raise FormatError(f"column `{name}` holds a NUL character")
    if "completion_ids" not in given and isinstance(given.get("completion"), str):
        if not is_unicode(given["completion"]):
            raise FormatError("the completion is no valid Unicode")
        given["completion_ids"] = context.tokenized([given["completion"]])[0]
    completion_ids = context.checked_ids(given.get("completion_ids"), "completion_ids")
    prompt = context.prompt(values)
    prompt_ids = context.prompt_ids(values, prompt)
    finish_reason, origin = given.get("finish_reason", "stop"), given.get("origin", "policy")
    if finish_reason not in FINISH_REASONS or origin not in ORIGINS:
        raise FormatError(f"finish_reason must be one of {FINISH_REASONS}, origin one of {ORIGINS}")
    entropies = _nats(values, "completion_entropies")
    prompt_id = prompt.prompt_id if prompt is not None else content_id("tokens", ids_array(prompt_ids))
    defaults = DEFAULTS | {
        "prompt_id": prompt_id,
        "run_id": context.run_id,
        "completion": completion_text(context.tokenizer, completion_ids),
        "entropy_kind": "full_vocab" if entropies is not None else None,
        "logprobs_kind": "raw" if values.get("completion_logprobs") is not None else None,
        "step_ends": completion_step_ends(context.tokenizer, completion_ids),
        "splitter": SPLITTER if "step_ends" not in given else "given",
    }
    fixed = {
        "tokenizer_hash": context.tokenizer_hash,
        "prompt_ids": prompt_ids,
        "completion_ids": completion_ids,
        "completion_entropies": entropies,
        "completion_logprobs": _nats(values, "completion_logprobs"),
        "reward": values.get("reward"),
    }
    row = _fits(defaults | given | fixed)
    problem = problem_of(row)
    if problem is not None:
        raise FormatError(problem)
    return row | prompt_columns(prompt)


def prompt_columns(prompt: Prompt | None) -> dict[str, str | None]:
    """What is staged of a prompt beside its tokens: `messages` as JSON, `ground_truth`, `data_source`."""
    if prompt is None:
        return {"messages": None, "ground_truth": None, "data_source": None}
    messages = orjson.dumps([dict(message) for message in prompt.messages]).decode()
    return {"messages": messages, "ground_truth": prompt.ground_truth, "data_source": prompt.data_source}


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold it: half a surrogate pair, which JSON and SQLite can, is no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _fits(row: dict[str, Any]) -> dict[str, Any]:
    """The row, if each scalar fits its column; a wrong type is this row's fault, not the batch's."""
    if isinstance(row.get("night"), str):
        row["night"] = date_of(row["night"])
    if isinstance(row.get("created_at"), str):
        row["created_at"] = time_of(row["created_at"])
    if isinstance(row.get("reward_parts"), dict):
        row["reward_parts"] = list(row["reward_parts"].items())
    for name, least in LEAST.items():
        value = row.get(name)
        if isinstance(value, int | float) and value < least:
            raise FormatError(f"column `{name}` is {value}, less than {least}")
    if row["entropy_kind"] not in (None, *ENTROPY_KINDS):
        raise FormatError(f"entropy_kind {row['entropy_kind']!r:.40} is none of {ENTROPY_KINDS}")
    if not row["prompt_ids"]:
        raise FormatError("prompt_ids is empty, and a completion cannot be trained without a prompt")
    for column in schema.ROLLOUTS:
        value = row.get(column.name)
        if value is None or column.name in ("reward", "completion_entropies", "completion_logprobs"):
            continue
        try:
            pa.array([value], column.type)
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            raise FormatError(
                f"column `{column.name}` holds {value!r:.60}, which is no {column.type}"
            ) from None
    return row


def date_of(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise FormatError(f"night {text!r:.40} is no date like 2026-05-31") from None


def time_of(text: str) -> datetime:
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise FormatError(f"created_at {text!r:.40} is no time like 2026-05-31T02:00:00Z") from None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _optional_text(value: Any) -> str | None:
    return None if value is None else str(value)


def _nats(row: Mapping[str, Any], name: str) -> list[float] | None:
    values = row.get(name)
    if values is None:
        return None
    numbers = isinstance(values, list) and all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in values
    )
    if not numbers:
        raise FormatError(f"column `{name}` is no list of numbers")
    try:
        return [float(value) for value in values]
    except OverflowError:  # an integer beyond every float
        raise FormatError(f"{name} holds NaN or infinite values") from None
