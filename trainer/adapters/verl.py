"""EchoClips in the actor update of verl 0.9.1: rows among the rollouts, and policy losses that know them.

verl hands a policy loss the old log-probs, log-probs, advantages and response mask of a micro-batch, nothing
else of a row. So a clip is a row whose

    response_mask  is 0: verl counts its tokens neither for the loss nor for the entropy and KL terms
    old_log_probs  are `CLIP_MARK` on the clip's tokens, which no token's can be
    advantages     are λ · weight / (K · |c|) there, for K clips of |c| tokens in an optimizer step

and its loss Σ −advantage · log-prob, which needs no count of the batch: however verl cuts the mini-batch
into micro-batches and spreads it over processes, they add up to λ · EchoClip loss.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline.errors import ConfigError, said
from trainer.adapters.verl_rows import CLIP_MARK, Split, check_rollouts, join_rows
from trainer.echoclips import EchoClips, check_echo_weight

try:
    from verl import DataProto
    from verl.trainer.ppo.core_algos import get_policy_loss_fn, register_policy_loss
    from verl.utils.tensordict_utils import assign_non_tensor
except ImportError as error:
    raise ConfigError(
        f"`trainer.adapters.verl` needs verl, which cannot be imported: {said(error)}. "
        "Run `pip install verl==0.9.1`."
    ) from error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BASES = ("vanilla", "gspo")


def register_echo_loss(base: str) -> None:
    """Registers `echo_<base>`: verl's loss `base` of the rollouts, plus the EchoClip term of clip rows."""
    rollout_loss = get_policy_loss_fn(base)  # type: ignore[no-untyped-call]  # verl has no types

    @register_policy_loss(f"echo_{base}")
    def echo_loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """As verl calls it; tensors are [rows, T]. `actor/echo_term` is the micro-batch's share, with λ."""
        in_clip = old_log_prob == CLIP_MARK
        loss, metrics = rollout_loss(
            old_log_prob=torch.where(in_clip, log_prob.detach(), old_log_prob),
            log_prob=log_prob,
            advantages=advantages.masked_fill(in_clip, 0),
            response_mask=response_mask,
            loss_agg_mode=loss_agg_mode,
            config=config,
            rollout_is_weights=rollout_is_weights,
        )
        if not in_clip.any():
            return loss, metrics | {"actor/echo_term": 0.0}
        num_processes = config.global_batch_info.get("dp_size", 1)  # over which gradients are averaged
        term = -num_processes * (advantages[in_clip] * log_prob[in_clip]).sum()
        return loss + term, metrics | {"actor/echo_term": term.item()}


for _base in BASES:
    register_echo_loss(_base)


class EchoRows:
    """Lays the next clips of a folder of shards among the rollouts of each update of verl's actor."""

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
            clips_per_step: at most, in each optimizer step, which is a mini-batch of verl's.

        Raises:
            ConfigError: λ is negative or no number; less than one clip per step.
            FormatError: see `EchoClips`.
        """
        check_echo_weight(echo_weight)
        self.clips = EchoClips(shards, tokenizer, clips_per_step, seed)
        self._echo_weight = echo_weight
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self._pad_token_id = next(known for known in ids if known is not None)

    def join(self, batch: DataProto, split: Split, loss_agg_mode: str = "token-mean") -> DataProto:
        """The batch that `RayPPOTrainer._update_actor` gets, with clips: see `join_rows`.

        Raises:
            ConfigError: see `check_rollouts`.
            FormatError: see `join_rows` and `EchoClips.next_batch`.
        """
        rollouts = batch.batch.to_dict()
        check_rollouts(rollouts, split, loss_agg_mode)
        if any(batch.non_tensor_batch.get("multi_modal_inputs", ())):
            raise ConfigError("The batch holds images, and EchoClips are text. Train a language model.")
        clips = [self.clips.next_batch() for _ in range(split.num_steps)]
        tensors = join_rows(rollouts, clips, split, self._echo_weight, self._pad_token_id)
        # a copy: what verl notes here of the joined rows must not reach the rollouts
        joined: DataProto = DataProto.from_dict(tensors, meta_info=dict(batch.meta_info))
        return joined


class EchoUpdate:
    """Clips in the actor updates of a `RayPPOTrainer`, which it stands before:

        class EchoTrainer(EchoUpdate, RayPPOTrainer):
            shards = "data/shards"

    Each optimizer step, that is each mini-batch of verl's, gets clips of its own, and its loss is verl's of
    the same rollouts without clips plus λ · EchoClip loss. Epochs of `ppo_epochs` repeat a batch's clips.

    Attributes:
        shards: an export, or a folder of them.
        echo_weight: λ.
        clips_per_step: at most, in each optimizer step.
        echo_seed: of the order of clips.
    """

    shards: Path | str
    echo_weight: float = 1e-3
    clips_per_step: int = 16
    echo_seed: int = 0

    config: Any  # verl's, as are the next two
    tokenizer: Any
    actor_rollout_wg: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As `RayPPOTrainer`.

        Raises:
            ConfigError: see `check_config` and `EchoRows`.
            FormatError: see `EchoRows`.
        """
        super().__init__(*args, **kwargs)
        check_config(self.config)
        self.echo_rows = EchoRows(
            self.shards, self.tokenizer, self.echo_weight, self.clips_per_step, self.echo_seed
        )

    def _update_actor(self, batch: DataProto, *args: Any, **kwargs: Any) -> Any:
        """verl's, with clips among its rows. It cannot know their number, so its workers are told."""
        if not isinstance(batch, DataProto):
            raise ConfigError(
                "EchoClips go into the batches of verl's `RayPPOTrainer`, and its V1 trainers keep theirs "
                "elsewhere. Set `trainer.use_v1=False`, and put `EchoUpdate` before `RayPPOTrainer`."
            )
        check_config(self.config)  # again, for verl's bypass mode sets another loss on the way
        num_processes = self._get_dp_size(self.actor_rollout_wg, "actor")  # type: ignore[attr-defined]
        split = split_of(self.config, len(batch), num_processes)
        joined = self.echo_rows.join(batch, split, self.config.actor_rollout_ref.actor.loss_agg_mode)
        workers = self.actor_rollout_wg
        self.actor_rollout_wg = _WithMiniBatches(workers, len(joined) // split.num_steps)
        try:
            return super()._update_actor(joined, *args, **kwargs)  # type: ignore[misc]
        finally:
            self.actor_rollout_wg = workers


class _WithMiniBatches:
    """verl's workers, told the size of mini-batches; what losses are divided by stays as verl set it."""

    def __init__(self, workers: Any, mini_batch_size: int) -> None:
        self._workers, self._mini_batch_size = workers, mini_batch_size

    def update_actor(self, batch: Any) -> Any:
        assign_non_tensor(batch, mini_batch_size=self._mini_batch_size)
        return self._workers.update_actor(batch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._workers, name)


def split_of(config: Any, num_rollouts: int, num_processes: int) -> Split:
    """How verl's workers cut an update of `num_rollouts` rows.

    Raises:
        ConfigError: into parts of unequal size, which verl cannot, with clips or without.
    """
    actor = config.actor_rollout_ref.actor
    mini_batch_size = actor.ppo_mini_batch_size * config.actor_rollout_ref.rollout.n
    if num_rollouts % mini_batch_size or mini_batch_size % num_processes:
        raise ConfigError(
            f"verl cannot cut {num_rollouts} rollouts into mini-batches of {mini_batch_size} on "
            f"{num_processes} processes. "
            "Let `ppo_mini_batch_size` divide `train_batch_size`, and the processes divide both."
        )
    micro_batch_rows = 1 if actor.use_dynamic_bsz else actor.ppo_micro_batch_size_per_gpu
    return Split(num_rollouts // mini_batch_size, num_processes, micro_batch_rows)


def check_config(config: Any) -> None:
    """Raises ConfigError where verl, so configured, would not learn what `EchoUpdate` says."""
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    loss_mode = actor.policy_loss.loss_mode
    if loss_mode not in [f"echo_{base}" for base in BASES]:
        raise ConfigError(
            f"verl's loss is `{loss_mode}`, which knows no EchoClips. Set "
            "`actor_rollout_ref.actor.policy_loss.loss_mode` to "
            "`echo_vanilla` or `echo_gspo`, and no `rollout_correction.bypass_mode`."
        )
    if rollout.temperature != 1.0:
        raise ConfigError(
            f"verl trains at the temperature {rollout.temperature} of its rollouts, and EchoClips are "
            "learned at 1. Set `actor_rollout_ref.rollout.temperature=1.0`."
        )
    if actor.shuffle:
        raise ConfigError(
            "verl shuffles rows between optimizer steps, and each has its own EchoClips. "
            "Set `actor_rollout_ref.actor.shuffle=False`; its prompts come shuffled anyway (`data.shuffle`)."
        )
    if (config.get("distillation") or {}).get("enabled"):
        raise ConfigError(
            "verl distils with losses that know no EchoClips. Set `distillation.enabled=False`."
        )
