"""The report's view of the best EchoClips: each token of the completion, shaded by its entropy."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from pipeline.report_text import with_newlines_marked
from pipeline.steps import mean_step_entropies
from pipeline.tokenization import completion_step_ends, token_texts, tokenizer_hash

NUM_SHADES = 10  # besides shade 0, which is none
_SURE_NATS = 0.1  # the darkest shade stands for at least this much, however sure the model is


@dataclass(frozen=True)
class Token:
    text: Markup
    shade: int
    hint: str


@dataclass(frozen=True)
class Step:
    """A step as it is drawn; `place` is "clip", "chosen" (the clip's last step) or "after"."""

    number: int
    entropy: float | None
    place: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Clip:
    """A clip as it is drawn, with the figures of its row and its steps."""

    row: Mapping[str, Any]
    messages: tuple[tuple[str, Markup], ...]
    steps: tuple[Step, ...]
    decoded: bool


@dataclass(frozen=True)
class Clips:
    """Clips in rank order; `darkest_nats` is the entropy from which on the shade is the darkest."""

    clips: tuple[Clip, ...]
    darkest_nats: float


def clip_views(rows: Sequence[Mapping[str, Any]], tokenizer: Any) -> Clips:
    """The clips of `sql/reports/best_clips.sql`, made ready for the template.

    The shades of all of them have one scale: up to the 99th percentile of the entropies shown, so that
    one wild token does not bleach the rest. Rollouts of another tokenizer show token ids, not text.
    """
    shown = [np.asarray(row["completion_entropies"], dtype=np.float64) for row in rows]
    darkest = max(_SURE_NATS, float(np.quantile(np.concatenate(shown), 0.99))) if rows else _SURE_NATS
    known_hash = tokenizer_hash(tokenizer)
    return Clips(tuple(_clip(row, tokenizer, known_hash, darkest) for row in rows), darkest)


def _clip(row: Mapping[str, Any], tokenizer: Any, known_hash: str, darkest: float) -> Clip:
    decoded = row["tokenizer_hash"] in (None, known_hash) and _in_vocabulary(row, tokenizer)
    ids = row["completion_ids"]
    texts = token_texts(tokenizer, ids) if decoded else [f"{token} " for token in ids]
    logprobs = row["completion_logprobs"] or [None] * len(ids)
    tokens = [
        _token(text, entropy, logprob, darkest)
        for text, entropy, logprob in zip(texts, row["completion_entropies"], logprobs, strict=True)
    ]
    first, ends, entropies = _steps(row, tokenizer, decoded)
    steps = tuple(
        Step(index + 1, entropy, _place(index, row["step_index"]), tuple(tokens[start:end]))
        for index, (start, end, entropy) in enumerate(
            zip([0, *ends[:-1]], ends, entropies, strict=True), first
        )
    )
    return Clip(row, _messages(row, tokenizer, decoded), steps, decoded)


def _steps(
    row: Mapping[str, Any], tokenizer: Any, decoded: bool
) -> tuple[int, Sequence[int], Sequence[float | None]]:
    """The mining's steps as the index of the first that is drawn, and the ends and entropies of the drawn."""
    chosen = row["step_index"]
    if row["delimiter"] is None:
        return 0, row["step_ends"], row["step_entropies"]
    if decoded:
        ends = completion_step_ends(tokenizer, row["completion_ids"], row["delimiter"])
        nats = np.array(row["completion_entropies"], np.float32)
        means = mean_step_entropies(nats, np.array(ends, np.int32), np.zeros(len(ends), np.int64))
        return 0, ends, means.tolist()
    if chosen + 1 == row["num_steps"]:
        return chosen, [row["clip_tokens"]], [row["step_entropy"]]
    return chosen, [row["clip_tokens"], len(row["completion_ids"])], [row["step_entropy"], None]


def _in_vocabulary(row: Mapping[str, Any], tokenizer: Any) -> bool:
    size = len(tokenizer)
    return all(0 <= token < size for ids in (row["prompt_ids"], row["completion_ids"]) for token in ids or ())


def _place(index: int, chosen: int) -> str:
    return "chosen" if index == chosen else "clip" if index < chosen else "after"


def _token(text: str, entropy: float, logprob: float | None, darkest: float) -> Token:
    hint = f"entropy {entropy:.3f} nats"
    if logprob is not None:
        hint += f", logprob {logprob:.3f}"
    shade = min(NUM_SHADES, max(0, round(NUM_SHADES * entropy / darkest)))
    # A token that holds a part of a character only has no text of its own.
    return Token(with_newlines_marked(text) if text else Markup('<i class="part"></i>'), shade, hint)


def _messages(row: Mapping[str, Any], tokenizer: Any, decoded: bool) -> tuple[tuple[str, Markup], ...]:
    """(role, text) of the prompt's messages; of a prompt that the lake does not hold, its tokens' text."""
    if row["messages"] is not None:
        return tuple(
            (str(message["role"]), with_newlines_marked(str(message["content"])))
            for message in json.loads(row["messages"])
        )
    ids = row["prompt_ids"] or []
    text = "".join(token_texts(tokenizer, ids)) if decoded else " ".join(map(str, ids))
    return (("prompt", with_newlines_marked(text)),)
