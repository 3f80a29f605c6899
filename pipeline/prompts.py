"""Prompts from files and from reasoning_gym, and their token ids."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import PromptError
from pipeline.gym_tasks import GYM_PREFIX, gym_prompts
from pipeline.records import Int32, Prompt

PARQUET_BATCH_ROWS = 1024
EMBEDDED = Path(__file__).resolve().parent.parent / "data" / "arith" / "prompts.jsonl"
# Columns with a meaning of their own; what else a row holds goes to `extra_info`.
_KNOWN = {"prompt", "ground_truth", "data_source", "reward_model", "extra_info"}


def read_prompts(source: str, limit: int | None = None) -> list[Prompt]:
    """The prompts of a file or of a reasoning_gym task, in order, each prompt_id once.

    Args:
        source: `arith` (the embedded problems); a .parquet or .jsonl file, in verl's format or with `prompt`
            (text or messages) and `ground_truth`; or `reasoning_gym:<task>?size=200&seed=1&…`, as in
            `gym_tasks`.
        limit: only the first so many distinct prompts; the rest of a file is not read.

    Raises:
        PromptError: the file is missing, empty, cut off or of an unknown kind, or one of its rows is no
            prompt (with its line, or row in Parquet, from 1); the task or a parameter is unknown.
    """
    if limit is not None and limit < 1:
        raise PromptError(
            f"{limit} prompts of {source} were asked for. Ask for 1 at least, or give no limit."
        )
    path = EMBEDDED if source == "arith" else Path(source)
    found = gym_prompts(source) if source.startswith(GYM_PREFIX) else _file_prompts(path)
    prompts: dict[str, Prompt] = {}
    for prompt in found:
        prompts.setdefault(prompt.prompt_id, prompt)
        if len(prompts) == limit:
            break
    if not prompts:
        raise PromptError(f"{source} holds no prompts. Give a file with one prompt a row.")
    return list(prompts.values())


def prompt_messages_ids(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> Int32:
    """The ids an engine continues: the chat template up to the assistant's turn, if there is one.

    Args:
        tokenizer: a Hugging Face tokenizer; without a chat template the contents are joined by newlines.

    Returns:
        [P] int32.

    Raises:
        PromptError: the template refuses the messages (some know no system role), or nothing is left.
    """
    if getattr(tokenizer, "chat_template", None):
        from jinja2 import TemplateError

        try:
            ids = tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,  # the default is a dict of lists since transformers 5
            )
        except TemplateError as error:
            raise PromptError(
                f"The model's chat template refuses a prompt with the roles "
                f"{', '.join(message['role'] for message in messages)}: {error}. Change its messages."
            ) from None
    else:
        ids = tokenizer.encode("\n".join(message["content"] for message in messages))
    if len(ids) == 0:
        raise PromptError(
            f"The prompt {[dict(m) for m in messages]!r} has no tokens in this model's tokenizer. "
            f"Leave it out."
        )
    return np.asarray(ids, dtype=np.int32)


def _file_prompts(path: Path) -> Iterator[Prompt]:
    if not path.is_file():
        raise PromptError(
            f"There is no prompt file {path}. Check the path, or name a task as {GYM_PREFIX}<task>?size=200."
        )
    readers = {".parquet": _parquet_rows, ".jsonl": _jsonl_rows}
    if path.suffix.lower() not in readers:
        raise PromptError(
            f"Prompt file {path} ends in `{path.suffix}`. "
            f"Give a .parquet or a .jsonl file (one JSON object a line)."
        )
    try:
        if path.stat().st_size == 0:
            raise PromptError(f"Prompt file {path} is empty. Write it again.")
        for where, row in readers[path.suffix.lower()](path):
            yield _row_prompt(row, where, path.stem)
    except OSError as error:
        raise PromptError(f"Prompt file {path} cannot be read: {error}. Check the file.") from None


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                yield where, json.loads(line.decode("utf-8-sig"), parse_constant=_refuse_constant)
            except (ValueError, RecursionError) as error:
                raise PromptError(
                    f"{where} is not JSON: {error}. Write one JSON object a line, in UTF-8."
                ) from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    # `__index_level_0__` and the like are pandas' row labels
                    yield f"{path} row {number}", {k: v for k, v in row.items() if not k.startswith("__")}
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise PromptError(
            f"Prompt file {path} is no whole Parquet file (after row {number}): {error}. "
            f"Copy or write it again."
        ) from None


def _row_prompt(row: Any, where: str, stem: str) -> Prompt:
    """One row of either format as a Prompt; every complaint names the row."""
    if not isinstance(row, dict):
        raise PromptError(
            f"{where} is a {type(row).__name__}, not an object with a `prompt`. Write it as one."
        )
    reward_model, extra = row.get("reward_model"), row.get("extra_info")
    for key, value in (("reward_model", reward_model), ("extra_info", extra)):
        if not isinstance(value, dict | None):
            raise PromptError(f"{where}: `{key}` is {value!r}, not an object. Mend it, or leave it out.")
    truth = row["ground_truth"] if "ground_truth" in row else (reward_model or {}).get("ground_truth")
    rest = {key: value for key, value in row.items() if key not in _KNOWN}
    style = {key: value for key, value in (reward_model or {}).items() if key != "ground_truth"}
    try:
        extra_info = _plain({**rest, **({"reward_model": style} if style else {}), **(extra or {})})
        prompt = Prompt(_messages(row.get("prompt")), _truth_text(truth), _source(row, stem), extra_info)
        # a lone surrogate is valid JSON, yet no text that a store or a tokenizer takes
        f"{prompt.text}{prompt.ground_truth}{json.dumps(extra_info, ensure_ascii=False)}".encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"{where} holds half a character ({error}). Write its text as UTF-8.") from None
    except (TypeError, ValueError) as error:
        raise PromptError(f"{where}: {error}. Mend the row, or leave it out.") from None
    return prompt


def _source(row: Mapping[str, Any], stem: str) -> str:
    source = row.get("data_source")
    if not isinstance(source, str | None):
        raise TypeError(f"`data_source` is {source!r}, not text")
    return source or stem


def _messages(prompt: Any) -> tuple[dict[str, str], ...]:
    if prompt is None:
        raise ValueError("it has no `prompt`")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, list):
        raise TypeError(f"`prompt` is {prompt!r}, neither text nor a list of messages")
    for message in messages:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise TypeError(f"the message {message!r} has no text `role` and `content`")
        # an image or a tool call that is left out would make it another problem
        more = [key for key, value in message.items() if key not in ("role", "content") and value]
        if more:
            raise TypeError(f"a message holds `{more[0]}`, and only `role` and `content` are understood")
    if not any(message["content"].strip() for message in messages):
        raise ValueError("its `prompt` is empty")
    return tuple({"role": message["role"], "content": message["content"]} for message in messages)


def _truth_text(value: Any) -> str | None:
    """Text stays, numbers become their text, lists and objects their JSON."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"its ground truth is {value}")
    plain = _plain(value)
    return plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)


def _plain(value: Any) -> Any:
    """The value with JSON types only; what JSON cannot say without loss is refused."""
    if isinstance(value, dict):
        return {str(key): _plain(below) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(below) for below in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None  # a missing number, as pandas writes it
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, date | time):
        return value.isoformat()
    raise TypeError(f"a column holds {type(value).__name__}, which is no text, number or list of them")
