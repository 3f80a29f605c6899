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
_RULE = 1  # a changed rule gets another number

# What the rule asks of one token, as bits. Special tokens have none.
CONTENT, LEADS, TRAILS, BLANK = 1, 2, 4, 8  # content; delimiter before, after its content; without content


def splitter(delimiter: str = DELIMITER) -> str:
    """The name of the rule that splits at a delimiter, as it is recorded beside rollouts."""
    return f"newline-{_RULE}" if delimiter == DELIMITER else f"U+{ord(delimiter):04X}-{_RULE}"


SPLITTER = splitter()


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
        delimiter: one white-space character.

    Returns:
        [S] exclusive ends, strictly increasing, the last equal to T; empty for no tokens.
    """
    special = frozenset(special_positions)
    flags = [0 if i in special else token_flags(text, delimiter) for i, text in enumerate(token_texts)]
    ends, _ = step_ends_of_all(np.array(flags, dtype=np.uint8), np.array([0, len(flags)]))
    return [int(end) for end in ends]


def token_flags(text: str, delimiter: str = DELIMITER) -> int:
    """The bits of a token that is not special, from the text it adds."""
    body = text.strip()
    if not body:
        return BLANK if delimiter in text else 0
    start = text.index(body)
    leads = LEADS if delimiter in text[:start] else 0
    trails = TRAILS if delimiter in text[start + len(body) :] else 0
    return CONTENT | leads | trails


def step_ends_of_all(
    flags: NDArray[np.uint8], offsets: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """`step_ends` of many completions at once. N = all tokens, R = completions, S = all steps.

    Args:
        flags: [N] bits of each token, see `token_flags`; completions one after the other.
        offsets: [R + 1] where in `flags` each completion begins.

    Returns:
        [S] exclusive ends within each completion, completions one after the other, and [R] their numbers.
    """
    lengths = np.diff(offsets)
    near = _near_gaps(flags)
    content = near[(flags[near] & CONTENT) > 0]
    holders = near[(flags[near] & (TRAILS | BLANK)) > 0]  # tokens with a delimiter in the gap after content
    row = np.searchsorted(offsets, content[1:], side="right") - 1
    before, after = content[:-1], content[1:]  # neighbouring content tokens, and the gap between them
    in_one_row = before >= offsets[row]
    last = np.searchsorted(holders, after) - 1  # the last holder before `after`
    holder = np.where(last >= 0, holders[last] if len(holders) else 0, -1)
    held = holder >= before
    splits = in_one_row & (held | ((flags[after] & LEADS) > 0))
    inner = np.where(held, holder + 1, after)[splits]
    ends = np.sort(np.concatenate([inner, offsets[1:][lengths > 0]]))
    row = np.searchsorted(offsets, ends, side="left") - 1
    return np.asarray(ends - offsets[row], np.int32), np.bincount(row, minlength=len(lengths))


def _near_gaps(flags: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Positions of the tokens that are more than content, and of their neighbours: only there can steps end.

    They are few, and what is asked of each position costs ten times what is asked of each token.
    """
    odd = (flags & (CONTENT | LEADS | TRAILS | BLANK)) != CONTENT
    near = odd.copy()
    near[1:] |= odd[:-1]
    near[:-1] |= odd[1:]
    return np.flatnonzero(near)


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
