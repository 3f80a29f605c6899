"""Whether every row that a training may read fits a forward pass, said before it begins and not midway."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError
from pipeline.prompts import prompt_messages_ids

if TYPE_CHECKING:
    from pipeline.config import SamplingConfig, TrainConfig
    from pipeline.experts import Expert
    from pipeline.records import Prompt
    from pipeline.shards import Clip


def check_rollout_room(
    prompts: Sequence[Prompt],
    experts: Mapping[str, Sequence[Expert]],
    config: TrainConfig,
    sampling: SamplingConfig,
    tokenizer: Any,
) -> None:
    """A rollout may have all of `sampling.max_tokens`; UFT's hint, up to a whole solution, comes before it.

    Args:
        experts: by prompt_id; LUFFY's are rows of their own.

    Raises:
        ConfigError: a prompt and what may follow it are longer than `train.batch_tokens`.
    """
    if not config.optim_steps:
        return
    for prompt in prompts:
        num_prompt = len(prompt_messages_ids(tokenizer, prompt.messages))
        solution = max((len(one.completion_ids) for one in experts.get(prompt.prompt_id, ())), default=0)
        hint = solution if config.objective == "uft" else 0
        longest = num_prompt + max(hint + sampling.max_tokens, solution)
        if longest > config.batch_tokens:
            behind = f", its hint up to {hint}" if hint else ""
            raise ConfigError(
                f"Prompt {prompt.prompt_id} ({prompt.text[:40]!r}) has {num_prompt} tokens{behind}; with "
                f"sampling.max_tokens = {sampling.max_tokens} that makes {longest}, and train.batch_tokens, "
                f"which one forward pass takes, is {config.batch_tokens}. Raise it, lower max_tokens, or "
                "leave the prompt out."
            )


def check_clip_room(clips: Sequence[Clip], config: TrainConfig) -> None:
    """
    Raises:
        ConfigError: a clip and its prompt are longer than `train.batch_tokens`.
    """
    longest = max((len(clip.prompt_ids) + len(clip.clip_ids) for clip in clips), default=0)
    if longest > config.batch_tokens:
        raise ConfigError(
            f"The longest clip of the shards has {longest} tokens with its prompt, and train.batch_tokens, "
            f"which one forward pass takes, is {config.batch_tokens}. Raise it, or export with --max-tokens "
            f"{config.batch_tokens}."
        )
