"""Reasoning steps: where they end, and how uncertain each one is.

Tokens are judged by their text, never by a list of newline ids: many tokenizers merge `".\\n\\n"` into
one token, and an id list misses it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import EchoMineError

DELIMITER = "\n"
SPLITTER = "newline-1"  # recorded beside each rollout; a changed rule gets another number


class StepSpanError(EchoMineError):
    """Step ends that do not cover a completion."""

    def __init__(self, num_tokens: int, step_ends: object) -> None:
        super().__init__(
            f"Step ends {step_ends} do not cover a completion of {num_tokens} tokens. "
            "Leave `step_ends` out to have steps split on import."
        )


def step_ends(
    token_texts: Sequence[str], special_positions: Collection[int] = (), delimiter: str = DELIMITER
) -> list[int]:
    """Where the reasoning steps of one completion end. T = tokens, S = steps.

    A token is content if its text has a non-space character (`str.isspace`) and it is not special.
    Between two neighbouring content tokens lies a gap: the white space that ends the first, the tokens
    between, and the white space that starts the second. A delimiter in the gap ends a step: after the
    last token whose text in the gap has it, or right before the second content token if only that
    token's leading white space has it. Special tokens never hold a delimiter.

    Args:
        token_texts: [T] what each token adds to the decoded completion.
        special_positions: positions of special tokens.
        delimiter: one character.

    Returns:
        [S] exclusive ends, strictly increasing, the last equal to T; empty for no tokens.
    """
    ends: list[int] = []
    gap_end: int | None = None  # after the last token of the gap with a delimiter in it
    seen_content = False
    special = frozenset(special_positions)
    for position, text in enumerate(token_texts):
        if position in special:
            continue
        body = text.strip()
        if not body:
            if delimiter in text:
                gap_end = position + 1
            continue
        if seen_content:
            if gap_end is not None:
                ends.append(gap_end)
            elif delimiter in text[: text.index(body)]:
                ends.append(position)
        seen_content = True
        gap_end = position + 1 if delimiter in text[text.index(body) + len(body) :] else None
    if len(token_texts):
        ends.append(len(token_texts))
    return ends


def mean_step_entropies(
    entropies: NDArray[np.float32], ends: NDArray[np.int32], rows: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Mean entropy of each step of many completions at once. N = all tokens, S = all steps.

    Args:
        entropies: [N] nats, completions one after the other.
        ends: [S] exclusive ends within each completion, completions one after the other.
        rows: [S] where in `entropies` the completion of each step begins.

    Returns:
        [S] nats per token: sums in float64 (long steps lose digits in float32), stored as float32.
    """
    if not len(ends):
        return np.empty(0, np.float32)
    same_row = np.concatenate([[False], rows[1:] == rows[:-1]])
    starts = rows + np.where(same_row, np.concatenate([[0], ends[:-1]]), 0)
    lengths = rows + ends - starts
    totals = np.add.reduceat(entropies, starts, dtype=np.float64)
    return np.asarray(totals / lengths, dtype=np.float32)
