"""Rows of clips and of padding, laid among the rollouts of verl's actor update so that each step has its own.

verl cuts the rows of an update in order: into equal shares for its D processes, each share into parts for
the S optimizer steps (its mini-batches), each part into micro-batches. So clips go behind the rollouts of
each of the D · S parts, and rows of padding behind them where verl needs equal counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from pipeline.errors import ConfigError, FormatError
from pipeline.records import Int32
from trainer.packed_clips import PackedClips

CLIP_MARK = 1.0  # survives bfloat16; a log-prob is above 0 by rounding only
OPTIONAL_KEYS = ("ref_log_prob", "rollout_is_weights")  # a clip has neither reference nor engine
ROW_KEYS = ("routed_experts", "teacher_logprobs", "teacher_ids", "multi_modal_inputs")  # clips have none


@dataclass(frozen=True)
class Split:
    """How verl cuts R rollouts.

    Attributes:
        num_steps: optimizer steps, S; each has R / S rollouts.
        num_processes: data-parallel ones, D; each has R / (S · D) rollouts of a step.
        micro_batch_rows: per process; 1 where verl cuts by tokens.
    """

    num_steps: int
    num_processes: int = 1
    micro_batch_rows: int = 1


def join_rows(
    rollouts: Mapping[str, Tensor],
    clips: Sequence[PackedClips],
    split: Split,
    echo_weight: float,
    pad_token_id: int,
) -> dict[str, Tensor]:
    """The tensors that verl's actor update reads, of rollouts, clips and padding.

    Args:
        rollouts: R rows: left-padded prompts of width P, right-padded responses of width T, old log-probs
            and advantages computed.
        clips: S batches, one for each optimizer step.
        echo_weight: λ.
        pad_token_id: the tokenizer's.

    Returns:
        R + S · D · k rows, k of them behind each part's rollouts: the least multiple of the micro-batch's
        rows that has room for a process's share of every step's clips.

    Raises:
        FormatError: a clip does not fit the widths.
    """
    num_steps, num_processes, unit = split.num_steps, split.num_processes, split.micro_batch_rows
    width = unit * max(-(-len(batch) // (num_processes * unit)) for batch in clips)
    filler = _row([pad_token_id], [pad_token_id], rollouts, 0.0, pad_token_id, mark=0.0)
    steps = []
    for batch in clips:
        rows = [
            _row(*row, rollouts, echo_weight * weight / len(batch), pad_token_id)
            for row, weight in zip(batch.rows(), batch.weights.tolist(), strict=True)
        ]
        steps.append(rows + [filler] * (width * num_processes - len(rows)))
    # dealt out one by one: the processes' shares of a step differ by one clip at most
    rows = [row for process in range(num_processes) for step in steps for row in step[process::num_processes]]
    parts = (num_processes, num_steps, -1)
    joined = {}
    for key in (*filler, *(key for key in OPTIONAL_KEYS if key in rollouts)):
        theirs = rollouts[key]
        ours = torch.stack([row[key] if key in row else torch.zeros(theirs.shape[1]) for row in rows])
        both = [tensor.reshape(*parts, tensor.shape[1]) for tensor in (theirs, ours.to(theirs))]
        joined[key] = torch.cat(both, dim=2).flatten(0, 2)
    return joined


def check_rollouts(rollouts: Mapping[str, Tensor], split: Split, loss_agg_mode: str) -> None:
    """Raises ConfigError where clips cannot go beside the rollouts of an update.

    `rollouts` have text only, and with `token-mean` each optimizer step has a token of theirs: verl divides
    by their number, so that its loss is NaN without any, and the step's clips would be lost with it.
    """
    if rollouts["position_ids"].dim() != 2:
        raise ConfigError("The batch holds images, and EchoClips are text. Train a language model.")
    for key in ROW_KEYS:
        if key in rollouts:
            raise ConfigError(
                f"The batch holds `{key}`, which EchoClips have none of. "
                "Switch router replay, distillation and images off."
            )
    has_token = rollouts["response_mask"].bool().any(dim=1)
    has_token = has_token.reshape(split.num_processes, split.num_steps, -1).any(2).any(0)
    without = [step for step, has_one in enumerate(has_token.tolist()) if not has_one]
    if without and loss_agg_mode == "token-mean":
        raise ConfigError(
            f"Mini-batch {without[0]} has no token of a rollout, and verl's token-mean divides by their "
            "number. Set `actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean`, or mask fewer rollouts."
        )


def _row(
    prompt_ids: Int32 | list[int],
    response_ids: Int32 | list[int],
    rollouts: Mapping[str, Tensor],
    share: float,
    pad_token_id: int,
    mark: float = CLIP_MARK,
) -> dict[str, Tensor]:
    """One row, without the rows' dimension, of the rollouts' widths. `share` is λ · weight / K."""
    prompt, tokens = (torch.as_tensor(ids, dtype=torch.int64) for ids in (prompt_ids, response_ids))
    widths = rollouts["prompts"].shape[1], rollouts["responses"].shape[1]
    before, after = widths[0] - len(prompt), widths[1] - len(tokens)
    if before < 0 or after < 0:
        raise FormatError(
            f"A clip of {len(prompt)} + {len(tokens)} tokens does not fit verl's {widths[0]} + {widths[1]}. "
            "Raise `data.max_prompt_length` or `data.max_response_length`, or export with `--max-tokens`."
        )
    in_row = pad(torch.ones(len(tokens)), (0, after))
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
        "old_log_probs": in_row * mark,
        "advantages": in_row * (share / len(tokens)),
    }
