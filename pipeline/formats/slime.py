"""slime's debug dump: one `.pt` per rollout step, {"rollout_id", "samples": [Sample as a dict]}.

Loaded with `weights_only`, which builds tensors and plain values and nothing else. The file is one object,
so all of it is in memory at once.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import FormatError
from pipeline.errors import said as said_by
from pipeline.formats.fields import (
    flat,
    is_count,
    items,
    known_messages,
    numbers,
    per_token,
    said,
    sampled_run,
    short,
    token_ids,
    truth,
)
from pipeline.formats.json_rows import rollouts
from pipeline.formats.source_rows import SourceRow, check_file
from pipeline.hashing import file_sha256

NAME = "slime"
_MARKS = (b"samples", b"response_length", b"group_index")
_HEAD_BYTES = 1 << 16


def recognizes(path: Path) -> bool:
    """Looks at the names at the start of the pickle, without reading it as one."""
    if path.suffix not in (".pt", ".pth"):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                return False
            with archive.open(pickles[0]) as pickle:
                head = pickle.read(_HEAD_BYTES)
    except Exception:  # a damaged archive can fail anywhere, and is not recognized
        return False
    return all(mark in head for mark in _MARKS)


def read(path: Path) -> Iterator[SourceRow]:
    """Every sample of one file.

    Raises:
        FormatError: the file cannot be read, holds more than tensors and plain values, or no samples.
    """
    dump = _loaded(path)
    samples = dump.get("samples") if isinstance(dump, dict) else None
    if not isinstance(samples, list):
        raise FormatError(f"{path} has no list `samples`. Give a file of --save-debug-rollout-data.")
    rows = (
        SourceRow(f"{path.name}:{number}", sample)
        if isinstance(sample, dict)
        else SourceRow(f"{path.name}:{number}", {"sample": short(sample)}, "the sample is no dict")
        for number, sample in enumerate(samples, start=1)
    )
    file = file_sha256(path)[:16]

    def group(row: Mapping[str, Any]) -> str | None:
        index = row.get("group_index")
        return f"slime/{file}/{index}" if is_count(index) else None

    for row in rollouts(rows, group, _values):
        yield row if row.problem is None else SourceRow(row.source, flat(row.values), row.problem)


def _loaded(path: Path) -> Any:
    import torch

    check_file(path)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise FormatError(
                        f"{path} is compressed, which torch.save does not do. It is not opened."
                    )
        return torch.load(path, map_location="cpu", weights_only=True)
    except FormatError:
        raise
    except Exception as error:  # damaged and hostile files fail in many ways, and all of them mean the same
        first = said_by(error).split(". ")[0]
        raise FormatError(
            f"{path} is no whole .pt file of tensors and plain values, and others are not opened: {first}."
        ) from None


def _values(row: Mapping[str, Any]) -> dict[str, Any]:
    status = row.get("status")
    if status in ("pending", "aborted", "failed"):
        raise FormatError(f"the sample is {status}")
    ids = token_ids(_plain(row.get("tokens")), "tokens")
    length = row.get("response_length")
    if not is_count(length) or not 0 < length < len(ids):
        raise FormatError(f"`response_length` is {short(length)} for {len(ids)} tokens")
    response = ids[len(ids) - length :]
    start, end = _sampled(_plain(row.get("loss_mask")), length)
    logprobs = per_token(_plain(row.get("rollout_log_probs")), "rollout_log_probs", length)
    versions = [int(version) for version in items(row, "weight_versions") if _is_number(version)]
    reward, parts = _reward(row)
    prompt = row.get("prompt")
    return said(
        {
            "prompt_ids": ids[: len(ids) - length],
            "messages": known_messages(prompt, "prompt"),
            "prompt_text": prompt if isinstance(prompt, str) and prompt else None,
            "completion_ids": response[start:end],
            "completion_logprobs": logprobs[start:end] if logprobs else None,
            "reward": reward,
            "reward_parts": parts,
            # a rollout that was paused and went on has several; the oldest
            "policy_version": min(versions, default=None),
            "finish_reason": "length" if status == "truncated" else "stop",
            "ground_truth": truth(row.get("label")),
        }
    )


def _sampled(flags: Any, length: int) -> tuple[int, int]:
    """Where the sampled tokens of the response are: all of them without a loss mask."""
    if flags is None:
        return 0, length
    start, end = sampled_run(flags, "loss_mask", length)
    if start:
        raise FormatError("several sampled turns: the response starts with tokens that were not sampled")
    return start, end


def _reward(row: Mapping[str, Any]) -> tuple[Any, dict[str, float] | None]:
    """The reward; of several in a dict the one that was trained on, if the sample says it."""
    reward = row.get("reward")
    if not isinstance(reward, dict):
        return reward, None
    parts = numbers(reward)
    raw = row.get("metadata")
    trained = raw.get("raw_reward") if isinstance(raw, dict) else None
    if trained is None and len(parts) == 1:
        trained = next(iter(parts.values()))
    if trained is None:
        trained = parts.get("score")
    if trained is None:
        raise FormatError(
            f"the reward has the parts {', '.join(sorted(parts))[:80]}, and none is called score"
        )
    return trained, parts


def _plain(values: Any) -> Any:
    """A tensor as a list; anything else as it stands."""
    return values.tolist() if hasattr(values, "tolist") else values


def _is_number(version: Any) -> bool:
    """Whether an engine named its weights by the step they come from; some say `default`."""
    return is_count(version) or (isinstance(version, str) and version.isdecimal() and len(version) < 10)
