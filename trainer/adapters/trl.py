"""EchoClips beside TRL's GRPOTrainer: its loss, whichever it is, plus λ · EchoClip loss. With TRL 1.16.0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import DistributedType
from torch import Tensor

from pipeline.errors import ConfigError, said
from pipeline.logprobs import check_head
from trainer.echoclips import EchoClips, check_echo_weight

try:
    from trl import GRPOTrainer
except ImportError as error:
    raise ConfigError(
        f"`trainer.adapters.trl` needs TRL, which cannot be imported: {said(error)}. "
        "Run `pip install trl==1.16.0`."
    ) from error

SPLIT_WEIGHTS = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


class EchoGRPOTrainer(GRPOTrainer):  # type: ignore[misc]  # TRL has no types
    """TRL's trainer with the EchoClip term; it logs `echo_loss`, before λ, in nats per token.

    Beside every batch of rollouts that goes through the model goes one of clips, and the term of an optimizer
    step is the mean over the `gradient_accumulation_steps` of them, as TRL's own loss is. Evaluation is
    TRL's alone.
    """

    def __init__(
        self,
        *args: Any,
        shards: Path | str,
        echo_weight: float,
        clips_per_batch: int = 16,
        clip_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        """What TRL takes, and:

        Args:
            shards: an export or a folder of exports, mined from rollouts of this model's tokenizer.
            echo_weight: λ.
            clips_per_batch: which go through the model together.
            clip_seed: of the order of the clips.

        Raises:
            ConfigError: λ is negative or no number, or the weights are to be split over processes.
            ModelError: the model caps or scales its logits.
            FormatError: see `EchoClips`.
        """
        check_echo_weight(echo_weight)
        super().__init__(*args, **kwargs)
        check_whole_weights(self.accelerator.distributed_type)
        check_head(self.model.eval())  # dropout would make a difference; training sets its mode itself
        self.echo_weight = echo_weight
        self.echo_clips = EchoClips(shards, self.processing_class, clips_per_batch, clip_seed)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """TRL's loss of a batch, and in training λ · EchoClip loss of the next clips."""
        loss: Tensor = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.model.training:
            return loss
        echo_loss = self.echo_clips.loss(self.accelerator.unwrap_model(model))
        self._metrics["train"]["echo_loss"].append(echo_loss.item())
        share: float = self.echo_weight / self.current_gradient_accumulation_steps
        return loss + share * echo_loss


def check_whole_weights(distributed: DistributedType) -> None:
    """Raises ConfigError where a process holds a part of the weights: clips bypass what gathers them."""
    if distributed in SPLIT_WEIGHTS:
        raise ConfigError(
            f"EchoGRPOTrainer needs whole weights in every process, and {distributed.value} splits them. "
            "Run it without."
        )
