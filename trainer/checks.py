"""What a training cannot begin with, said before it begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.config import SamplingConfig, TrainConfig
from pipeline.engines.base import Engine
from pipeline.errors import ConfigError
from pipeline.experts import Expert, check_experts
from pipeline.objective_checks import idle_option, sampled_logprobs_known
from pipeline.records import Prompt
from pipeline.shards import Clip


def check_stock(prompts: Sequence[Prompt], clips: Sequence[Clip], config: TrainConfig) -> None:
    if config.optim_steps and not prompts and not (clips and config.clips_per_step):
        raise ConfigError(
            "There are neither prompts nor clips to train on. "
            "Give prompts, mine clips, or set train.optim_steps to 0."
        )
    if config.echo_source != "shards" and not prompts:
        raise ConfigError(
            f"train.echo_source is {config.echo_source}, and there are no prompts to sample groups of. "
            "Give prompts, or take clips of shards."
        )


def check_options(
    prompts: Sequence[Prompt],
    experts: Mapping[str, Sequence[Expert]],
    config: TrainConfig,
    sampling: SamplingConfig,
    engine: Engine,
) -> None:
    known = sampled_logprobs_known(engine.logprobs_kind, sampling)
    why = idle_option(config, sampling.max_tokens, sampling.temperature, known)
    if why is not None:
        raise ConfigError(f"{why}.")
    if config.optim_steps and prompts:
        check_experts(experts, prompts, config.objective)
    if config.echo_source != "shards" and engine.entropy_kind is None:
        raise ConfigError(
            f"train.echo_source is {config.echo_source}, but the engine tells no entropies, by which clips "
            "are found. Sample with another engine, or take clips of shards."
        )
