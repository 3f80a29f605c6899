"""One row of a dump at a time: what is wrong with it, or the row with its defaults and steps.

This is the authority on what may enter. Rows that `columns` finds beyond doubt do not come here.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, date, datetime
from typing import Any

import orjson
import pyarrow as pa

from pipeline import schema
from pipeline.errors import FormatError
from pipeline.formats.fields import is_count
from pipeline.hashing import content_id, ids_array
from pipeline.imports.context import ImportContext, is_unicode
from pipeline.records import Prompt
from pipeline.rollouts import problem_of
from pipeline.steps import SPLITTER
from pipeline.tokenization import completion_step_ends, completion_text

ORIGINS = ("policy", "trainer", "expert")
FINISH_REASONS = ("stop", "length")
ENTROPY_KINDS = ("full_vocab", "full_vocab_tempered", "rescored")
# The least value of a column; a row below it is refused.
LEAST = {"policy_version": 0, "group_size": 1, "max_tokens": 1, "temperature": 0}
# What rows that do not say otherwise have.
DEFAULTS = {"origin": "policy", "finish_reason": "stop", "model": "imported", "policy_version": 0}


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
    prompt = context.prompt(values, has_ids=values.get("prompt_ids") is not None)
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
