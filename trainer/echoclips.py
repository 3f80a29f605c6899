"""EchoClips for a training loop of your own: the clips of an export, and their loss, in two calls."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.errors import ConfigError, FormatError
from pipeline.logprobs import completion_logprobs
from pipeline.shards import Clip, load_clips
from pipeline.tokenization import tokenizer_hash
from trainer.batches import step_batches
from trainer.objectives import clip_losses, echo_clip_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STREAM = 2  # apart from the loop's own orders of prompts and clips


class EchoClips:
    """The clips of a folder of shards, dealt out a batch at a time in a seeded order, epoch after epoch.

    Where an epoch ends the folder is read again: a newer export takes over there, and clips that were
    withdrawn since are dealt no more.

    Attributes:
        clips: of this epoch.
    """

    def __init__(
        self,
        shards: Path | str,
        tokenizer: PreTrainedTokenizerBase,
        clips_per_step: int = 16,
        seed: int = 0,
    ) -> None:
        """
        Raises:
            ConfigError: less than one clip per step.
            FormatError: no shards there, damaged ones, none with a clip, or another tokenizer's.
        """
        if clips_per_step < 1:
            raise ConfigError(f"There are {clips_per_step} EchoClips per step. Give 1 or more.")
        self._shards, self._tokenizer_hash = Path(shards), tokenizer_hash(tokenizer)
        self._clips_per_step, self._seed = clips_per_step, seed
        self._start(self._read())

    def next_batch(self) -> list[Clip]:
        """The next clips, each once; fewer than `clips_per_step` where there are fewer.

        Raises:
            FormatError: as at the start, of what lies in the folder where an epoch ends.
        """
        if self._left_of_epoch <= 0:
            clips = self._read()
            if _ids(clips) != _ids(self.clips):
                self._start(clips)
            else:
                self._left_of_epoch += len(clips)
        batch = [self.clips[i] for i in next(self._order)]
        self._left_of_epoch -= len(batch)
        return batch

    def loss(self, model: PreTrainedModel) -> Tensor:
        """The EchoClip term of the next batch of clips, before λ; backpropagates into `model`.

        Returns:
            [] nats per token: the mean over the clips of the mean NLL of each clip's own tokens
            (arXiv 2605.31228).

        Raises:
            FormatError: see `next_batch`; a clip that is longer than the model's context.
        """
        batch = self.next_batch()
        stats = completion_logprobs(model, [(clip.prompt_ids, clip.clip_ids) for clip in batch])
        weights = torch.tensor([clip.weight for clip in batch], device=stats.logprobs.device)
        losses = clip_losses(stats.logprobs, stats.lengths)
        return echo_clip_loss(losses, weights, num_clips=len(batch))

    def _read(self) -> list[Clip]:
        clips = load_clips(self._shards, self._tokenizer_hash)
        if not clips:
            raise FormatError(f"The shards in {self._shards} hold no clip. Mine and export again.")
        return clips

    def _start(self, clips: list[Clip]) -> None:
        self.clips = clips
        self._order = step_batches(len(clips), self._clips_per_step, self._seed, STREAM)
        self._left_of_epoch = len(clips)


def _ids(clips: list[Clip]) -> list[str]:
    return [clip.clip_id for clip in clips]
