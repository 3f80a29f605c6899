"""How much of what a model reads is padding, counted where it reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from pipeline.logprobs import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Reading:
    """Positions that a model's decoder has read, padding included."""

    num_positions: int = 0

    def padding_share(self, rows: Iterable[Row]) -> float | None:
        """Share of the positions that none of these rows needed; None if nothing was read.

        A row needs all its tokens but the last, which predicts nothing; without a completion none of them.
        """
        needed = sum(len(prompt) + len(completion) - 1 for prompt, completion in rows if len(completion))
        return 1 - needed / self.num_positions if self.num_positions else None


@contextmanager
def counted(model: PreTrainedModel) -> Iterator[Reading]:
    """Count what the model reads meanwhile, however its batches are formed."""
    reading = Reading()

    def count(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        ids = given["input_ids"] if "input_ids" in given else args[0]
        reading.num_positions += ids.numel()

    decoder: nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
    handle = decoder.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield reading
    finally:
        handle.remove()
