"""The entropy dump of EchoRL's release: `step_N/samples.json` and one `.npy` of entropies per sample.

Traps of its writer: `prompt_ids` of a rollout is the whole padded sequence, prompt and response;
`response_ids` is padded on the right; the entropies are those of the real tokens alone, so that their
number is the completion's length. Golden trajectories are experts', without a reward. There is no group:
samples of one step with the same prompt are one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import FormatError
from pipeline.formats.fields import said, short, token_ids
from pipeline.formats.json_rows import json_file, rollouts
from pipeline.formats.source_rows import SourceRow
from pipeline.hashing import content_id, file_sha256, ids_array

NAME = "echorl"
_ASSUMED = (
    "EchoRL's dump names no groups and no temperature: rows of one step with the same prompt were taken "
    "as one, and the entropies as of temperature 1."
)
_CATEGORIES = ("correct_rollouts", "wrong_rollouts", "golden_trajectories")
_HEAD_BYTES = 1 << 14


def recognizes(path: Path) -> bool:
    """By the first names in the file, which is read whole only by `read`."""
    if path.suffix != ".json":
        return False
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return False
    return head.lstrip()[:1] == b"{" and b'"correct_rollouts"' in head


def read(path: Path) -> Iterator[SourceRow]:
    """Every sample of one step; the file is one object, so all of it is in memory at once.

    Raises:
        FormatError: the file is no such JSON.
    """
    dump = json_file(path)
    if not isinstance(dump, dict) or not all(isinstance(dump.get(name, []), list) for name in _CATEGORIES):
        raise FormatError(f"{path} has no lists {', '.join(_CATEGORIES)}. Give a samples.json of EchoRL.")
    rows = [
        SourceRow(f"{path.name}:{name}[{number}]", {"category": name, "sample": sample})
        for name in _CATEGORIES
        for number, sample in enumerate(dump.get(name, []))
    ]
    pad_id = _pad_id(dump, path.parent)
    file = file_sha256(path)[:16]

    def group(row: Mapping[str, Any]) -> str:
        sample = _sample(row)
        prompt_ids = _prompt_ids(sample, pad_id)
        return f"echorl/{file}/{content_id(short(sample.get('step')), ids_array(prompt_ids))[:16]}"

    def values(row: Mapping[str, Any]) -> dict[str, Any]:
        return _values(row, path.parent, pad_id)

    yield from rollouts(rows, group, values, _ASSUMED)


def _values(row: Mapping[str, Any], folder: Path, pad_id: int | None) -> dict[str, Any]:
    sample, golden = _sample(row), row["category"] == "golden_trajectories"
    response = token_ids(sample.get("response_ids"), "response_ids")
    entropies = _entropies(sample, folder)
    if not 0 < len(entropies) <= len(response):
        raise FormatError(f"{len(entropies)} entropies for {len(response)} response tokens")
    padding = response[len(entropies) :]
    if len(set(padding)) > 1:
        raise FormatError(f"{len(entropies)} entropies end before the response does")
    whole = _is_whole_sequence(sample)
    if whole and pad_id is None:
        raise FormatError("no response of the file is padded, so the padding of the prompts is unknown")
    return said(
        {
            "prompt_ids": _prompt_ids(sample, pad_id),
            "completion_ids": response[: len(entropies)],
            "completion_entropies": entropies.tolist(),
            # the release's scripts sample and train at temperature 1
            "entropy_kind": "full_vocab",
            # nothing is said of most experts, and what is given to be learned is held to be right
            "reward": 1.0 if golden and sample.get("reward") is None else sample.get("reward"),
            "policy_version": sample.get("step"),
            "origin": "expert" if golden else "policy",
            # responses are padded to the limit: one without padding ran into it
            "finish_reason": "length" if whole and not padding else "stop",
        }
    )


def _sample(row: Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(row["sample"], dict):
        raise FormatError("the sample is no JSON object")
    return row["sample"]


def _prompt_ids(sample: Mapping[str, Any], pad_id: int | None) -> list[int]:
    """The prompt without the response that the writer left behind it, and without padding before it."""
    ids = token_ids(sample.get("prompt_ids"), "prompt_ids")
    if _is_whole_sequence(sample):
        ids = ids[: len(ids) - len(sample["response_ids"])]
    start = next((place for place, token in enumerate(ids) if token != pad_id), len(ids))
    return ids[start:]


def _is_whole_sequence(sample: Mapping[str, Any]) -> bool:
    prompt, response = sample.get("prompt_ids"), sample.get("response_ids")
    if not isinstance(prompt, list) or not isinstance(response, list) or not response:
        return False
    return len(prompt) > len(response) and prompt[-len(response) :] == response


def _pad_id(dump: Mapping[str, Sequence[Any]], folder: Path) -> int | None:
    """What stands behind the first response that is longer than its entropies."""
    for sample in (sample for name in _CATEGORIES for sample in dump.get(name, [])):
        try:
            response = token_ids(sample["response_ids"], "response_ids")
            if len(_entropies(sample, folder)) < len(response):
                return response[-1]
        except (FormatError, KeyError, TypeError):
            continue  # the row is refused, with its reason, when it is read
    return None


def _entropies(sample: Mapping[str, Any], folder: Path) -> np.ndarray:
    """[T] nats, from the file that the sample names within the dump's own folder."""
    name = sample.get("entropy_tensor_file")
    if not isinstance(name, str):
        raise FormatError("the sample names no `entropy_tensor_file`, which tells where its response ends")
    try:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise FormatError(f"`entropy_tensor_file` {name!r:.120} leaves the dump's folder")
        # mapped, so that a header cannot claim more memory than the file has bytes
        entropies = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise FormatError(f"`entropy_tensor_file` {name!r:.120} cannot be read: {error!s:.120}") from None
    if not isinstance(entropies, np.ndarray) or entropies.ndim != 1 or entropies.dtype.kind != "f":
        raise FormatError(f"`entropy_tensor_file` {name!r:.120} holds no list of entropies")
    return entropies
