"""EchoClips for a training loop of your own: the clips of an export, and their loss, in two calls."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.errors import FormatError
from pipeline.logprobs import completion_logprobs
from pipeline.shards import load_clips
from pipeline.tokenization import tokenizer_hash
from trainer.batches import step_batches
from trainer.objectives import clip_losses, echo_clip_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STREAM = 2  # apart from the loop's own orders of prompts and clips


class EchoClips:
    """The clips of a folder of shards, dealt out a batch at a time in a seeded order, epoch after epoch."""

    def __init__(
        self,
        shards: Path | str,
        tokenizer: PreTrainedTokenizerBase,
        clips_per_step: int = 16,
        seed: int = 0,
    ) -> None:
        """
        Raises:
            FormatError: no shards there, damaged ones, none with a clip, or another tokenizer's.
        """
        self.clips = load_clips(Path(shards), tokenizer_hash(tokenizer))
        if not self.clips:
            raise FormatError(f"The shards in {shards} hold no clip. Mine and export again.")
        self._order = step_batches(len(self.clips), clips_per_step, seed, STREAM)

    def loss(self, model: PreTrainedModel) -> Tensor:
        """The EchoClip term of the next batch of clips, before λ; backpropagates into `model`.

        Returns:
            [] nats per token: the mean over the clips of the mean NLL of each clip's own tokens
            (arXiv 2605.31228).
        """
        batch = [self.clips[i] for i in next(self._order)]
        stats = completion_logprobs(model, [(clip.prompt_ids, clip.clip_ids) for clip in batch])
        weights = torch.tensor([clip.weight for clip in batch], device=stats.logprobs.device)
        losses = clip_losses(stats.logprobs, stats.lengths)
        return echo_clip_loss(losses, weights, num_clips=len(batch))
