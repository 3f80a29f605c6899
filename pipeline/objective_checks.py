"""Which options of a training would do nothing under the way its rollouts are sampled.

They are looked for before anything is sampled: when a configuration is read, and again by the trainer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.config_section import Section
from pipeline.objective_config import DapoConfig

if TYPE_CHECKING:
    from pipeline.config import SamplingConfig, TrainConfig


def sampled_logprobs_known(logprobs_kind: str, sampling: SamplingConfig) -> bool:
    """Whether an engine's log-probs are those of the whole distribution at the sampling temperature."""
    truncated = sampling.top_p < 1 or sampling.top_k > 0
    return not truncated and (logprobs_kind == "processed" or sampling.temperature == 1)


def idle_option(config: TrainConfig, max_tokens: int, temperature: float, logprobs_known: bool) -> str | None:
    """Which option nothing would read, why, and what to do instead, without a full stop; None without one.

    Args:
        max_tokens: completion tokens at most, as sampled.
        temperature: as sampled.
        logprobs_known: see `sampled_logprobs_known`.
    """
    options, section = config.options, f"train.{config.objective}"
    if config.correction != "none" and not logprobs_known:
        return (
            f"train.correction is {config.correction}, but the engine's log-probs are not those of the "
            "trained distribution. Sample with temperature 1, top_p 1 and top_k 0, or set it to none"
        )
    if isinstance(options, DapoConfig) and (options.overlong_buffer_tokens or 0) > max_tokens:
        return (
            f"`{section}.overlong_buffer_tokens` is {options.overlong_buffer_tokens}, more than the "
            f"{max_tokens} tokens of a completion. Lower it, or raise sampling.max_tokens"
        )
    if config.echo_source != "shards" and temperature != 1:
        return (
            f"train.echo_source is {config.echo_source}, but the forward pass over rollouts of temperature "
            f"{temperature} is not that of the clips' loss. Sample at temperature 1, or use shards"
        )
    if config.echo_source == "online" and config.clips_per_step != _default(config, "clips_per_step"):
        return (
            "`train.clips_per_step` has no effect: it is of shards, and train.echo_source is online. "
            "Set that to both, or leave the option out"
        )
    # Then π_old is the trainer's own π of the same weights.
    always_one = config.updates_per_batch == 1 and (config.correction != "none" or not logprobs_known)
    for key in ("clip_low", "clip_high"):
        if always_one and getattr(options, key) != _default(options, key):
            return (
                f"`{section}.{key}` has no effect: in the one update on each batch every ratio is 1. "
                "Raise train.updates_per_batch, or leave the option out"
            )
    return None


def _default(section: Section, key: str) -> Any:
    return type(section).model_fields[key].default
