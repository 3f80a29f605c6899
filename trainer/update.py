"""One optimizer step on a batch of rollouts and some EchoClips, unless what it gives is no number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pipeline.config import TrainConfig
from trainer import learner
from trainer.clip_schedule import echo_weight
from trainer.guard import Guard
from trainer.optimizer import MasterAdamW
from trainer.padding import counted
from trainer.ranks import ALONE, Ranks
from trainer.rollout_batch import RolloutBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pipeline.shards import Clip


@dataclass(frozen=True)
class StepClips:
    """The C clips of one step.

    Attributes:
        rows: of each clip, the row of the batch whose completion it begins; None where it needs a forward
            pass of its own.
    """

    clips: Sequence[Clip]
    rows: Sequence[int | None]


@dataclass(frozen=True)
class Update:
    """What came of a step.

    Attributes:
        losses: loss, rl_loss, echo_loss, grad_norm; the two terms' norms where each was collected apart.
        clip_losses: of each clip, nats per token before the update.
        echo_weight: λ of this step.
        padding_share: share of the positions that the model read for nothing; None if it read none.
        skipped: nothing was learned, as a loss or norm is not finite.
    """

    rl: learner.RolloutPass
    losses: dict[str, float]
    clip_losses: list[float]
    echo_weight: float
    padding_share: float | None
    skipped: bool


@dataclass(frozen=True)
class Updater:
    """Takes a model's steps.

    Attributes:
        temperature: what the rollouts are sampled at.
    """

    model: PreTrainedModel
    config: TrainConfig
    temperature: float
    optimizer: MasterAdamW
    guard: Guard
    ranks: Ranks = ALONE

    def update(self, batch: RolloutBatch, step: StepClips, optim_step: int) -> Update:
        """
        Raises:
            ModelError: see `Guard.refuses`.
        """
        weight, num_clips = echo_weight(self.config, optim_step), len(step.clips)
        tokens = {
            row: len(clip.clip_ids)
            for clip, row in zip(step.clips, step.rows, strict=True)
            if row is not None
        }
        every = self.config.grad_norms_every
        # Processes must do equally many backward passes, also where one's rows hold no clip.
        measured = bool(every) and (optim_step + 1) % every == 0 and self.ranks.size == 1
        apart = [clip for clip, row in zip(step.clips, step.rows, strict=True) if row is None]
        with counted(self.model) as reading:
            rl = learner.backward_rollouts(
                self.model,
                batch,
                self.config,
                self.temperature,
                self.optimizer.collect,
                tokens,
                weight / max(num_clips, 1),
                self.optimizer.swap if measured else None,
                self.ranks,
            )
            norms = {"rl_grad_norm": self.optimizer.norm()}
            self.optimizer.swap()
            echo_loss, losses_apart = learner.backward_clips(
                self.model,
                apart,
                weight,
                self.config.batch_tokens,
                self.optimizer.collect,
                num_clips,
                self.ranks,
            )
        reading.num_positions = int(self.ranks.total(torch.tensor(reading.num_positions)))
        rows_read = [*batch.rows, *((clip.prompt_ids, clip.clip_ids) for clip in apart)]
        echo_loss += sum(rl.clip_losses.values()) / max(num_clips, 1)
        norms["echo_grad_norm"] = self.optimizer.norm()
        losses = {
            "loss": rl.loss + weight * echo_loss,
            "rl_loss": rl.loss,
            "echo_loss": echo_loss,
            "grad_norm": self.optimizer.clip(),
            **(norms if measured or not tokens else {}),
        }
        skipped = self.guard.refuses(optim_step, losses, batch, step.clips)
        if skipped:
            self.optimizer.drop()
        else:
            self.optimizer.step()
        waiting = iter(losses_apart)
        clip_losses = [next(waiting) if row is None else rl.clip_losses[row] for row in step.rows]
        return Update(rl, losses, clip_losses, weight, reading.padding_share(rows_read), skipped)
