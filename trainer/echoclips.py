"""EchoClips for a training loop of your own: the clips of an export, and their loss, in two calls."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pipeline.errors import ConfigError, FormatError
from pipeline.logprobs import completion_logprobs
from pipeline.tokenization import tokenizer_hash
from trainer.objectives import clip_losses, echo_clip_loss
from trainer.packed_clips import PackedClips
from trainer.shard_stream import ShardStream

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class EchoClips:
    """The clips of a folder of shards, dealt out a batch at a time in a seeded order, epoch after epoch.

    Where an epoch ends the folder is read again: a newer export takes over there, and clips that were
    withdrawn since are dealt no more.
    """

    def __init__(
        self,
        shards: Path | str,
        tokenizer: PreTrainedTokenizerBase,
        clips_per_step: int = 16,
        seed: int = 0,
    ) -> None:
        """
        Args:
            clips_per_step: at most; an epoch is cut into steps of equal size.

        Raises:
            ConfigError: less than one clip per step.
            FormatError: no shards there, none with a clip, or another tokenizer's.
        """
        if clips_per_step < 1:
            raise ConfigError(f"There are {clips_per_step} EchoClips per step. Give 1 or more.")
        self._stream = ShardStream(shards, tokenizer_hash(tokenizer), batch_clips=clips_per_step, seed=seed)
        self._batches = self._epochs()

    def next_batch(self) -> PackedClips:
        """The next clips, each once.

        Raises:
            FormatError: damaged shards, or as at the start, of what lies in the folder where an epoch ends.
        """
        return next(self._batches)

    def loss(self, model: PreTrainedModel) -> Tensor:
        """The EchoClip term of the next batch of clips, before λ; backpropagates into `model`.

        Returns:
            [] nats per token: the mean over the clips of the mean NLL of each clip's own tokens
            (arXiv 2605.31228).

        Raises:
            FormatError: see `next_batch`; a clip that is longer than the model's context.
        """
        batch = self.next_batch()
        stats = completion_logprobs(model, batch.rows())
        losses = clip_losses(stats.logprobs, stats.lengths)
        return echo_clip_loss(losses, batch.weights.to(losses.device), num_clips=len(batch))

    def state_dict(self) -> dict[str, Any]:
        """Where the dealing stands, as JSON values."""
        return self._stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a dealing stood; see `ShardStream.load_state_dict`."""
        self._stream.load_state_dict(state)
        self._batches = self._epochs()

    def _epochs(self) -> Iterator[PackedClips]:
        dealt = True
        while True:
            before, dealt = dealt, False
            for batch in self._stream:
                dealt = True
                yield batch
            if not (before or dealt):  # one alone may be the end of an epoch that was gone on with
                raise FormatError(
                    f"All clips in {self._stream.shards.folder} were withdrawn. Mine and export again."
                )


def check_echo_weight(echo_weight: float) -> None:
    """Raises ConfigError where λ is negative or no number."""
    if not (math.isfinite(echo_weight) and echo_weight >= 0):
        raise ConfigError(f"`echo_weight` is {echo_weight}. Give a number, 0 or more.")
