"""The training loop: on-policy RL beside the EchoClip term, L = L_RLVR + λ · L_echo (arXiv 2605.31228)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch

from pipeline.config import MiningConfig, SamplingConfig, TrainConfig
from pipeline.engines.base import Engine
from pipeline.errors import ConfigError
from pipeline.experts import Expert, check_experts
from pipeline.logprobs import check_head
from pipeline.objective_checks import idle_option, sampled_logprobs_known
from pipeline.records import Prompt
from trainer import learner
from trainer.batches import step_batches
from trainer.checkpoints import save_checkpoint
from trainer.guard import Guard
from trainer.metrics import StepMetrics, TrainingResult, open_metrics, write_metrics
from trainer.optimizer import MasterAdamW
from trainer.rollout_batch import RolloutBatch, Rollouts, rollout_batch
from trainer.sampling import Judge, OnRollouts, RolloutSource
from trainer.step_metrics import step_metrics

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pipeline.shards import Clip

OnClipUses: TypeAlias = Callable[[list[tuple[str, int, float]]], None]

CLIP_STREAM = 1


@dataclass(frozen=True)
class _Training:
    """What stays the same over the steps of one training."""

    model: PreTrainedModel
    config: TrainConfig
    sampling: SamplingConfig
    rules: MiningConfig
    logprobs_known: bool
    source: RolloutSource
    guard: Guard
    optimizer: MasterAdamW
    on_clip_uses: OnClipUses


def train(
    policy_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    engine: Engine,
    prompts: Sequence[Prompt],
    clips: Sequence[Clip],
    config: TrainConfig,
    sampling: SamplingConfig,
    judge: Judge,
    on_rollouts: OnRollouts,
    on_clip_uses: OnClipUses,
    folder: Path,
    training_id: str,
    start_policy_version: int,
    progress: Callable[[StepMetrics], None] | None = None,
    rules: MiningConfig | None = None,
    experts: Mapping[str, Sequence[Expert]] | None = None,
) -> TrainingResult:
    """Train the model in place for `config.optim_steps`, and leave `folder/checkpoint` and `metrics.jsonl`.

    Each batch of `prompts_per_step` groups is sampled from the model as it stands, judged, handed out, and
    learned from in `updates_per_batch` AdamW steps, each beside `clips_per_step` clips. A step takes a prompt
    or clip once at most. Without clips this is the objective alone, without prompts supervised learning on
    the clips.

    Args:
        engine: samples from `policy_model` itself, so that its rollouts are on-policy.
        judge: groups to judgements, one per sample; a sample without reward keeps its group out of the loss.
        on_rollouts: takes each batch's groups, judgements and sampling policy version, but for groups that
            were sampled behind a hint (UFT).
        on_clip_uses: takes (clip_id, optim_step, clip loss in nats per token before that step's update).
        training_id: names the training's groups, so it decides, with `config.seed`, the sampling noise.
        progress: called after each step.
        rules: what counts as success and as equal rewards; by default as mining's defaults have it.
        experts: by prompt_id, for LUFFY and UFT.

    Raises:
        ConfigError: there are neither prompts nor clips, an option would have no effect, the objective
            learns from experts and there are none, or the folder cannot be written.
        ModelError: three steps in a row had a loss or gradient that is not finite (the model keeps the last
            good step's weights), the model's logits are not plain, or the checkpoint cannot be written.
        FormatError: a clip does not fit the model.
    """
    prompts = list({prompt.prompt_id: prompt for prompt in prompts}.values())
    logprobs_known = sampled_logprobs_known(engine.logprobs_kind, sampling)
    _check_stock(prompts, clips, config)
    _check_options(prompts, experts or {}, config, sampling.max_tokens, logprobs_known)
    torch.manual_seed(config.seed)
    policy_model.train(False)  # dropout would set the learner's log-probs apart from the sampler's
    check_head(policy_model)
    rules = rules or MiningConfig()
    source = RolloutSource(
        engine, prompts, experts or {}, config, sampling, rules, judge, on_rollouts, training_id
    )
    training = _Training(
        policy_model,
        config,
        sampling,
        rules,
        logprobs_known,
        source,
        Guard(folder, training_id),
        MasterAdamW(policy_model, config.lr, config.weight_decay, config.max_grad_norm),
        on_clip_uses,
    )
    echo_before = learner.mean_clip_loss(policy_model, clips, config.batch_tokens)
    steps = _run(training, clips, folder / "metrics.jsonl", start_policy_version, progress)
    num_good = sum(not step.skipped for step in steps)
    return TrainingResult(
        training_id=training_id,
        optim_steps=len(steps),
        echo_loss_before=echo_before,
        echo_loss_after=learner.mean_clip_loss(policy_model, clips, config.batch_tokens),
        reward_before=steps[0].reward_mean if steps else None,
        reward_after=steps[-1].reward_mean if steps else None,
        num_rollouts=source.num_rollouts,
        num_clip_uses=num_good * min(config.clips_per_step, len(clips)),
        num_skipped=training.guard.num_skipped,
        checkpoint=save_checkpoint(
            policy_model,
            tokenizer,
            folder / "checkpoint",
            policy_version=start_policy_version + num_good,
            model_name=policy_model.name_or_path or type(policy_model).__name__,
            training_id=training_id,
        ),
    )


def _run(
    training: _Training,
    clips: Sequence[Clip],
    metrics_path: Path,
    policy_version: int,
    progress: Callable[[StepMetrics], None] | None,
) -> list[StepMetrics]:
    config = training.config
    clip_order = step_batches(len(clips), config.clips_per_step, config.seed, CLIP_STREAM)
    steps: list[StepMetrics] = []
    with open_metrics(metrics_path) as metrics_file:
        for optim_step in range(config.optim_steps):
            started = time.perf_counter()
            if optim_step % config.updates_per_batch == 0:
                rollouts = training.source.sample(optim_step, policy_version)
                batch = _batch(training, rollouts)
            due = [clips[i] for i in next(clip_order)]
            metrics, batch = _update(training, rollouts, batch, due, optim_step, policy_version, started)
            policy_version += not metrics.skipped
            write_metrics(metrics_file, metrics)
            steps.append(metrics)
            if progress:
                progress(metrics)
    return steps


def _batch(training: _Training, rollouts: Rollouts) -> RolloutBatch:
    return rollout_batch(
        rollouts,
        training.config,
        logprobs_known=training.logprobs_known,
        max_tokens=training.sampling.max_tokens,
        reward_tolerance=training.rules.reward_tolerance,
    )


def _update(
    training: _Training,
    rollouts: Rollouts,
    batch: RolloutBatch,
    clips: Sequence[Clip],
    optim_step: int,
    policy_version: int,
    started: float,
) -> tuple[StepMetrics, RolloutBatch]:
    """One optimizer step, unless its loss is not finite; and the batch as the next update on it needs it."""
    config, optimizer = training.config, training.optimizer
    rl = learner.backward_rollouts(
        training.model, batch, config, training.sampling.temperature, optimizer.collect
    )
    rl_grad_norm = optimizer.set_aside()
    echo_loss, clip_losses = learner.backward_clips(
        training.model, clips, config.echo_weight, config.batch_tokens, optimizer.collect
    )
    echo_grad_norm = optimizer.norm()
    losses = {
        "loss": rl.loss + config.echo_weight * echo_loss,
        "rl_loss": rl.loss,
        "echo_loss": echo_loss,
        "grad_norm": optimizer.clip(),
        "rl_grad_norm": rl_grad_norm,
        "echo_grad_norm": echo_grad_norm,
    }
    skipped = training.guard.refuses(optim_step, losses, batch, clips)
    if skipped:
        optimizer.drop()
    else:
        optimizer.step()
    if clips and not skipped:
        training.on_clip_uses(
            [(clip.clip_id, optim_step, value) for clip, value in zip(clips, clip_losses, strict=True)]
        )
    metrics = step_metrics(
        rollouts, batch, clips, rl, losses, config, training.rules,
        optim_step=optim_step, policy_version=policy_version, skipped=skipped, started=started,
    )  # fmt: skip
    if batch.trainer_logprobs is None:
        batch = replace(batch, trainer_logprobs=rl.logprobs)
    return metrics, batch


def _check_stock(prompts: Sequence[Prompt], clips: Sequence[Clip], config: TrainConfig) -> None:
    if config.optim_steps and not prompts and not (clips and config.clips_per_step):
        raise ConfigError(
            "There are neither prompts nor clips to train on. "
            "Give prompts, mine clips, or set train.optim_steps to 0."
        )


def _check_options(
    prompts: Sequence[Prompt],
    experts: Mapping[str, Sequence[Expert]],
    config: TrainConfig,
    max_tokens: int,
    logprobs_known: bool,
) -> None:
    why = idle_option(config, max_tokens, logprobs_known)
    if why is not None:
        raise ConfigError(f"{why}.")
    if config.optim_steps and prompts:
        check_experts(experts, prompts, config.objective)
