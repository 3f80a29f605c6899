"""EchoClips in the actor update of verl 0.9.1: rows beside the rollouts, and policy losses that know them.

verl hands a policy loss the old log-probs, log-probs, advantages and response mask of a micro-batch, nothing
else of a row. So a clip is a row whose

    response_mask  is 0: verl counts its tokens neither for the loss nor for the entropy and KL terms
    old_log_probs  are `CLIP_MARK` on the clip's tokens, which no token's can be
    advantages     are λ · weight / (K · |c|) there, for K clips of |c| tokens

and its loss Σ −advantage · log-prob, which needs no count of the batch: however verl cuts the mini-batch
into micro-batches and spreads it over processes, they add up to λ · EchoClip loss.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from pipeline.errors import ConfigError, FormatError, said
from pipeline.records import Int32
from trainer.echoclips import EchoClips, check_echo_weight
from trainer.packed_clips import PackedClips

try:
    from verl import DataProto
    from verl.trainer.ppo.core_algos import get_policy_loss_fn, register_policy_loss
except ImportError as error:
    raise ConfigError(
        f"`trainer.adapters.verl` needs verl, which cannot be imported: {said(error)}. "
        "Run `pip install verl==0.9.1`."
    ) from error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CLIP_MARK = 1.0  # survives bfloat16; a log-prob is above 0 by rounding only
TOKEN_MODES = ("token-mean", "token-sum")
BASES = ("vanilla", "gspo")
OPTIONAL_KEYS = ("ref_log_prob", "rollout_is_weights")


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
        term = -(advantages[in_clip] * log_prob[in_clip]).sum()
        num_processes = config.global_batch_info.get("dp_size", 1)  # over which gradients are averaged
        return loss + num_processes * term, metrics | {"actor/echo_term": term.item()}


for _base in BASES:
    register_echo_loss(_base)


class EchoRows:
    """Joins the next clips of a folder of shards to each batch that verl's actor is updated with.

    Where verl's trainer hands the batch over:

        class EchoTrainer(RayPPOTrainer):
            def _update_actor(self, batch):
                return super()._update_actor(self.echo_rows(batch))
    """

    def __init__(
        self,
        shards: Path | str,
        tokenizer: PreTrainedTokenizerBase,
        echo_weight: float = 1e-3,
        clips_per_step: int = 16,
        loss_agg_mode: str = "token-mean",
        seed: int = 0,
    ) -> None:
        """
        Args:
            echo_weight: λ.
            clips_per_step: at most, in each batch that is given: verl cuts it into `ppo_mini_batch_size`.
            loss_agg_mode: verl's `actor.loss_agg_mode`.

        Raises:
            ConfigError: λ is negative or no number; less than one clip per step.
            FormatError: see `EchoClips`.
        """
        check_echo_weight(echo_weight)
        self.clips = EchoClips(shards, tokenizer, clips_per_step, seed)
        self._echo_weight, self._loss_agg_mode = echo_weight, loss_agg_mode
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self._pad_token_id = next(known for known in ids if known is not None)

    def __call__(self, batch: DataProto) -> DataProto:
        """The batch with clips: see `add_clips`."""
        clips = self.clips.next_batch()
        return add_clips(batch, clips, self._echo_weight, self._pad_token_id, self._loss_agg_mode)


def add_clips(
    batch: DataProto,
    clips: PackedClips,
    echo_weight: float,
    pad_token_id: int,
    loss_agg_mode: str = "token-mean",
) -> DataProto:
    """The batch of one optimizer step with its clips, for verl's `update_actor` under an `echo_` loss.

    Args:
        batch: R rows as `RayPPOTrainer._update_actor` gets them: text, left-padded prompts of width P,
            right-padded responses of width T, old log-probs and advantages computed.
        clips: K of them.
        echo_weight: λ.
        pad_token_id: the tokenizer's.
        loss_agg_mode: verl's. The `seq-mean` ones divide by all R + K rows, clips included; the rollouts'
            advantages are multiplied by (R + K) / R against it.

    Returns:
        R + K rows with the tensors that verl's actor update reads, clips last.

    Raises:
        ConfigError: λ is negative or no number; no rollout has a token; a temperature other than 1, at
            which the clips' loss would be another; images.
        FormatError: a clip does not fit the widths.
    """
    check_echo_weight(echo_weight)
    rollouts = batch.batch
    check_rollouts(batch)
    rows = [
        _clip_row(*row, rollouts, echo_weight * weight / len(clips), pad_token_id)
        for row, weight in zip(clips.rows(), clips.weights.tolist(), strict=True)
    ]
    num_rollouts = len(batch)
    dilution = 1.0 if loss_agg_mode in TOKEN_MODES else (num_rollouts + len(rows)) / num_rollouts
    keys = [*rows[0], *(key for key in OPTIONAL_KEYS if key in rollouts.keys())]  # noqa: SIM118  # no dict
    tensors = {}
    for key in keys:
        theirs = rollouts[key] * dilution if key == "advantages" else rollouts[key]
        # a clip has neither reference nor engine
        ours = [row[key] if key in row else torch.zeros(theirs.shape[1]) for row in rows]
        tensors[key] = torch.cat([theirs, torch.stack(ours).to(theirs)])
    joined: DataProto = DataProto.from_dict(tensors, meta_info=batch.meta_info)
    return joined


def check_rollouts(batch: DataProto) -> None:
    """Raises ConfigError where clips cannot go beside the rollouts of a batch: see `add_clips`."""
    if not batch.batch["response_mask"].any():
        raise ConfigError(
            "The batch has no token of a rollout, and clips need some beside them. Leave it out."
        )
    temperature = batch.meta_info.get("temperature", 1.0)
    if temperature != 1.0:
        raise ConfigError(
            f"verl trains at the temperature {temperature} of its rollouts, and EchoClips are learned at 1. "
            "Set `actor_rollout_ref.rollout.temperature=1.0`."
        )
    if batch.batch["position_ids"].dim() != 2 or any(batch.non_tensor_batch.get("multi_modal_inputs", ())):
        raise ConfigError("The batch holds images, and EchoClips are text. Train a language model.")


def _clip_row(
    prompt_ids: Int32, clip_ids: Int32, rollouts: Any, share: float, pad_token_id: int
) -> dict[str, Tensor]:
    """One row, without the rows' dimension, of the rollouts' widths. `share` is λ · weight / K."""
    prompt, tokens = (torch.as_tensor(ids, dtype=torch.int64) for ids in (prompt_ids, clip_ids))
    widths = rollouts["prompts"].shape[1], rollouts["responses"].shape[1]
    before, after = widths[0] - len(prompt), widths[1] - len(tokens)
    if before < 0 or after < 0:
        raise FormatError(
            f"A clip of {len(prompt)} + {len(tokens)} tokens does not fit verl's {widths[0]} + {widths[1]}. "
            "Raise `data.max_prompt_length` or `data.max_response_length`, or export with `--max-tokens`."
        )
    in_clip = pad(torch.ones(len(tokens)), (0, after))
    attention = pad(torch.ones(len(prompt) + len(tokens), dtype=torch.int64), (before, after))
    prompts = pad(prompt, (before, 0), value=pad_token_id)
    responses = pad(tokens, (0, after), value=pad_token_id)
    return {
        "prompts": prompts,
        "responses": responses,
        "input_ids": torch.cat([prompts, responses]),
        "attention_mask": attention,
        "position_ids": (attention.cumsum(0) - 1).clamp_min(0),
        "response_mask": torch.zeros(widths[1], dtype=torch.int64),
        "old_log_probs": in_clip * CLIP_MARK,
        "advantages": in_clip * (share / len(tokens)),
    }
