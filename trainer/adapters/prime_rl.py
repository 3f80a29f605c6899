"""EchoClips in prime-rl: training samples whose CE component is the EchoClip term of an optimizer step.

For steps that are made while they are trained; `pipeline/exports/prime_rl.py` has the derivation, and writes
the same samples into files.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.exports.prime_rl import ENV_NAME, ce_weights
from trainer.echoclips import EchoClips, check_echo_weight
from trainer.packed_clips import PackedClips

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class EchoSamples:
    """Deals the clips of a folder of shards, those of one optimizer step at a time."""

    def __init__(
        self,
        shards: Path | str,
        tokenizer: PreTrainedTokenizerBase,
        echo_weight: float = 1e-3,
        clips_per_step: int = 16,
        seed: int = 0,
    ) -> None:
        """
        Args:
            echo_weight: λ.

        Raises:
            ConfigError: λ is negative or no number; less than one clip per step.
            FormatError: see `EchoClips`.
        """
        check_echo_weight(echo_weight)
        self.clips = EchoClips(shards, tokenizer, clips_per_step, seed)
        self._echo_weight = echo_weight

    def next_step(self) -> list[dict[str, Any]]:
        """Fields of prime-rl's `TrainingSample`, a dict a clip, to go into one step whole.

        prime-rl divides its CE component by the number of the step's tokens with a CE weight: let no other
        sample of the step have one.
        """
        return training_samples(self.clips.next_batch(), self._echo_weight)


def training_samples(clips: PackedClips, echo_weight: float) -> list[dict[str, Any]]:
    """K clips as samples whose CE component, in a step with all of them, is λ · EchoClip loss."""
    per_token = ce_weights(clips.clip_lengths.numpy(), echo_weight) * clips.weights.numpy()
    return [_sample(*row, float(weight)) for row, weight in zip(clips.rows(), per_token, strict=True)]


def _sample(prompt_ids: np.ndarray, clip_ids: np.ndarray, weight: float) -> dict[str, Any]:
    in_clip = np.repeat([False, True], [len(prompt_ids), len(clip_ids)])
    nothing = [0.0] * len(in_clip)
    return {
        "token_ids": [*prompt_ids.tolist(), *clip_ids.tolist()],
        "mask": in_clip.tolist(),
        "logprobs": nothing,
        "temperatures": [1.0] * len(in_clip),
        "env_name": ENV_NAME,
        "rl_weights": nothing,
        "ce_weights": (in_clip * weight).tolist(),
    }
