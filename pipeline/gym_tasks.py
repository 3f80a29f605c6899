"""reasoning_gym tasks as prompts, and as scorers of the answers to them."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any
from urllib.parse import parse_qsl

from pipeline.errors import PromptError, nearest
from pipeline.records import Prompt

GYM_PREFIX = "reasoning_gym:"
DEFAULT_SIZE, DEFAULT_SEED = 100, 0

# The wording of reasoning_gym's `simple` system prompt, kept here so that prompt ids outlive its releases.
SYSTEM_MESSAGE = (
    "You are a helpful assistant that answers questions accurately and concisely. When asked to solve a "
    "problem, show your work step by step. Provide your final answer between <answer> and </answer> tags."
)

# Their scorers compare grids of tuples with the entry's, which JSON turned into lists.
_TASKS_WITH_TUPLES = {"arc_agi", "rearc"}


def gym_prompts(source: str) -> Iterator[Prompt]:
    """The prompts of `reasoning_gym:<task>?size=…&seed=…&<parameter>=…`.

    Values are JSON where they parse as JSON, else text. `extra_info` holds the entry (`question`,
    `answer`, `metadata`) and the task's other parameters as `params`: some scorers depend on them.

    Raises:
        PromptError: an unknown task or parameter, or a value the task refuses.
    """
    task, _, query = source.removeprefix(GYM_PREFIX).partition("?")
    params = {key: _json_or_text(value) for key, value in parse_qsl(query, keep_blank_values=True)}
    size, seed = params.pop("size", DEFAULT_SIZE), params.pop("seed", DEFAULT_SEED)
    for key, value in (("size", size), ("seed", seed)):
        if type(value) is not int or value < 0:
            raise PromptError(f"`{key}` of {source} is {value!r}. Give a whole number, 0 or more.")
    _check_names(task, params, source)
    try:
        dataset = _dataset(task, {**params, "size": size, "seed": seed})
        for index in range(size):
            with contextlib.redirect_stdout(sys.stderr):  # some tasks print dots; stdout is for --json
                entry = dataset[index]
            yield _entry_prompt(task, params, entry)
    # the tasks check their parameters by assert, and some only when they first use them
    except Exception as error:
        said = str(error) or type(error).__name__
        raise PromptError(
            f"reasoning_gym refuses {source}: {said}. Change the parameters of the task."
        ) from error


def gym_score(prompt: Prompt, answer: str) -> float:
    """What the task's own scorer gives `answer`, mostly in [0, 1]; partial credit is the task's choice.

    Raises:
        ValueError: the prompt is of no reasoning_gym task, or carries no entry.
    """
    task = prompt.data_source.removeprefix(GYM_PREFIX)
    if not prompt.data_source.startswith(GYM_PREFIX) or "metadata" not in prompt.extra_info:
        raise ValueError(
            f"prompt {prompt.prompt_id} of `{prompt.data_source}` carries no reasoning_gym entry"
        )
    entry = dict(prompt.extra_info)
    params = entry.pop("params", {})
    if task in _TASKS_WITH_TUPLES:
        entry["metadata"] = {key: _tuples(value) for key, value in entry["metadata"].items()}
    scorer = _scorer(task, json.dumps(params, sort_keys=True))
    return float(scorer.score_answer(answer, entry))


@functools.lru_cache(maxsize=128)
def _scorer(task: str, params: str) -> Any:
    return _dataset(task, json.loads(params))


def _dataset(task: str, params: Mapping[str, Any]) -> Any:
    # here and not above: the package takes seconds to import, and most prompts are of other kinds
    import reasoning_gym
    from reasoning_gym.composite import DatasetSpec

    arguments = dict(params)
    if task == "composite" and isinstance(arguments.get("datasets"), list):
        arguments["datasets"] = [DatasetSpec(**spec) for spec in arguments["datasets"]]
    return reasoning_gym.create_dataset(task, **arguments)


def _check_names(task: str, params: Mapping[str, Any], source: str) -> None:
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise PromptError(f"Unknown reasoning_gym task `{task}` in {source}: {nearest(task, DATASETS)}")
    known = [field.name for field in fields(DATASETS[task][1])]
    for key in params:
        if key not in known:
            raise PromptError(
                f"Unknown parameter `{key}` of reasoning_gym task `{task}` in {source}: {nearest(key, known)}"
            )


def _entry_prompt(task: str, params: Mapping[str, Any], entry: Mapping[str, Any]) -> Prompt:
    plain = json.loads(json.dumps({**entry, "params": params}, allow_nan=False))
    answer = plain["answer"]
    if not isinstance(answer, str | None):
        answer = json.dumps(answer)
    messages = (
        {"role": "system", "content": SYSTEM_MESSAGE},
        {"role": "user", "content": plain["question"]},
    )
    return Prompt(messages, answer, f"{GYM_PREFIX}{task}", plain)


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(below) for below in value) if isinstance(value, list) else value
