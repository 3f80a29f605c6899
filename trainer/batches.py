"""Which items a step takes, and how they are cut into forward passes."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import ConfigError
from pipeline.logprobs import Row
from pipeline.packing import can_pack

if TYPE_CHECKING:
    from transformers import PreTrainedModel


FAIR_SHARE = 1.1  # of the tokens: rows do not fill equal passes to the brim


def step_batches(num_items: int, per_step: int, seed: int, stream: int) -> Iterator[list[int]]:
    """The items of each optimizer step, without end: a seeded shuffle per epoch, carried over steps.

    Every item comes once per epoch, and never twice in one step: a step takes `min(per_step, num_items)`.

    Args:
        stream: tells apart orders that share a seed (prompts and clips).
    """
    size = min(per_step, num_items)
    rng = np.random.default_rng([seed, stream])
    queue: list[int] = []
    while True:
        if len(queue) < size:
            waiting = set(queue)
            epoch = [int(item) for item in rng.permutation(num_items)]
            # What waits for this step must not come again within it, so its next turn moves back.
            queue += [i for i in epoch if i not in waiting] + [i for i in epoch if i in waiting]
        yield queue[:size]
        queue = queue[size:]


class Cursor:
    """A place in an order without end, to which another cursor of the same order can go."""

    def __init__(self, order: Iterator[list[int]]) -> None:
        self._order = order
        self.position = 0

    def take(self) -> list[int]:
        """The next batch."""
        self.position += 1
        return next(self._order)

    def go_to(self, position: int) -> None:
        """Pass over what lies before `position`."""
        while self.position < position:
            self.take()


def forward_batches(
    model: PreTrainedModel, rows: Sequence[Row], batch_tokens: int, num_processes: int = 1
) -> list[list[int]]:
    """Row indices cut into forward passes of at most `batch_tokens` tokens each, padding included.

    Several processes that share the passes get smaller ones where there were fewer than processes.

    Raises:
        ConfigError: a row is longer.
    """
    lengths = [len(prompt) + len(completion) for prompt, completion in rows]
    if max(lengths, default=0) > batch_tokens:
        raise ConfigError(
            f"{max(lengths)} tokens, a prompt and what follows it, do not fit train.batch_tokens = "
            f"{batch_tokens}. Raise it, or lower sampling.max_tokens, or leave out longer clips and experts."
        )
    if num_processes > 1:
        fair = math.ceil(FAIR_SHARE * sum(lengths) / num_processes)
        batch_tokens = min(batch_tokens, max(fair, *lengths, 1))
    return (packed_batches if can_pack(model) else padded_batches)(lengths, batch_tokens)


def packed_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Rows by best fit, the longest first: each goes where it leaves the least room, or begins a pass.

    Args:
        lengths: tokens of each row, prompt included.
    """
    passes: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens that a pass has left, which pass), ascending
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect_left(rooms, (lengths[row], 0))
        if place == len(rooms):
            room, number = batch_tokens, len(passes)
            passes.append([])
        else:
            room, number = rooms.pop(place)
        passes[number].append(row)
        insort(rooms, (room - lengths[row], number))
    return passes


def padded_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Rows of like length together, the longest first, so that little is padding.

    The largest pass comes first: memory that suffices for it suffices for all. A row longer than the budget
    goes alone.

    Args:
        lengths: tokens of each row, prompt included.
    """
    passes: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if passes and (len(passes[-1]) + 1) * lengths[passes[-1][0]] <= batch_tokens:
            passes[-1].append(row)
        else:
            passes.append([row])
    return passes
