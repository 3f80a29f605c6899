"""The training loop: on-policy GRPO beside the EchoClip term, L = L_RLVR + λ · L_echo (arXiv 2605.31228)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch

from pipeline.config import MiningConfig, SamplingConfig, TrainConfig
from pipeline.engines.base import Engine, GroupRequest
from pipeline.errors import ConfigError, ModelError
from pipeline.logprobs import check_head
from pipeline.records import Group, Judgement, Prompt, group_id, sample_seed
from trainer import learner
from trainer.batches import step_batches
from trainer.checkpoints import save_checkpoint
from trainer.metrics import (
    StepMetrics,
    TrainingResult,
    class_shares,
    open_metrics,
    reward_mean,
    write_metrics,
)
from trainer.optimizer import MasterAdamW

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pipeline.shards import Clip

Judge: TypeAlias = Callable[[Sequence[Group]], Sequence[Sequence[Judgement]]]
OnRollouts: TypeAlias = Callable[[Sequence[Group], Sequence[Sequence[Judgement]], int], None]
OnClipUses: TypeAlias = Callable[[list[tuple[str, int, float]]], None]

PROMPT_STREAM, CLIP_STREAM = 0, 1


@dataclass(frozen=True)
class _Training:
    """What stays the same over the steps of one training."""

    model: PreTrainedModel
    engine: Engine
    config: TrainConfig
    sampling: SamplingConfig
    rules: MiningConfig
    judge: Judge
    on_rollouts: OnRollouts
    on_clip_uses: OnClipUses
    training_id: str
    optimizer: MasterAdamW


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
) -> TrainingResult:
    """Train the model in place for `config.optim_steps`, and leave `folder/checkpoint` and `metrics.jsonl`.

    Each step samples `prompts_per_step` groups from the model as it stands, judges them, hands them out, and
    takes one AdamW step on them and on `clips_per_step` clips. A step takes a prompt or clip once at most.
    Without clips this is GRPO, without prompts supervised learning on the clips.

    Args:
        engine: samples from `policy_model` itself, so that its rollouts are on-policy.
        judge: groups to judgements, one per sample; a sample without reward keeps its group out of the loss.
        on_rollouts: takes each step's groups, judgements and sampling policy version.
        on_clip_uses: takes (clip_id, optim_step, clip loss in nats per token before that step's update).
        training_id: names the training's groups, so it decides, with `config.seed`, the sampling noise.
        progress: called after each step.
        rules: what counts as success and as equal rewards; by default as mining's defaults have it.

    Raises:
        ConfigError: there are neither prompts nor clips, or the folder cannot be written.
        ModelError: the loss or gradient is not finite (the model keeps the last good step's weights), the
            model's logits are not plain, or the checkpoint cannot be written.
        FormatError: a clip does not fit the model.
    """
    prompts = list({prompt.prompt_id: prompt for prompt in prompts}.values())
    _check_stock(prompts, clips, config)
    torch.manual_seed(config.seed)
    policy_model.train(False)  # dropout would set the learner's log-probs apart from the sampler's
    check_head(policy_model)
    sampling = sampling.model_copy(update={"group_size": config.group_size})
    optimizer = MasterAdamW(policy_model, config.lr, config.weight_decay, config.max_grad_norm)
    training = _Training(
        policy_model,
        engine,
        config,
        sampling,
        rules or MiningConfig(),
        judge,
        on_rollouts,
        on_clip_uses,
        training_id,
        optimizer,
    )
    echo_before = learner.mean_clip_loss(policy_model, clips, config.batch_tokens)
    steps = _run(training, prompts, clips, folder / "metrics.jsonl", start_policy_version, progress)
    return TrainingResult(
        training_id=training_id,
        optim_steps=len(steps),
        echo_loss_before=echo_before,
        echo_loss_after=learner.mean_clip_loss(policy_model, clips, config.batch_tokens),
        reward_before=steps[0].reward_mean if steps else None,
        reward_after=steps[-1].reward_mean if steps else None,
        num_rollouts=len(steps) * min(config.prompts_per_step, len(prompts)) * config.group_size,
        num_clip_uses=len(steps) * min(config.clips_per_step, len(clips)),
        checkpoint=save_checkpoint(
            policy_model,
            tokenizer,
            folder / "checkpoint",
            policy_version=start_policy_version + len(steps),
            model_name=policy_model.name_or_path or type(policy_model).__name__,
            training_id=training_id,
        ),
    )


def _run(
    training: _Training,
    prompts: Sequence[Prompt],
    clips: Sequence[Clip],
    metrics_path: Path,
    start_policy_version: int,
    progress: Callable[[StepMetrics], None] | None,
) -> list[StepMetrics]:
    config = training.config
    prompt_order = step_batches(len(prompts), config.prompts_per_step, config.seed, PROMPT_STREAM)
    clip_order = step_batches(len(clips), config.clips_per_step, config.seed, CLIP_STREAM)
    steps = []
    with open_metrics(metrics_path) as metrics_file:
        for optim_step in range(config.optim_steps):
            metrics = _step(
                training,
                [prompts[i] for i in next(prompt_order)],
                [clips[i] for i in next(clip_order)],
                optim_step,
                start_policy_version + optim_step,
            )
            write_metrics(metrics_file, metrics)
            steps.append(metrics)
            if progress:
                progress(metrics)
    return steps


def _step(
    training: _Training,
    prompts: Sequence[Prompt],
    clips: Sequence[Clip],
    optim_step: int,
    policy_version: int,
) -> StepMetrics:
    started = time.perf_counter()
    config, optimizer = training.config, training.optimizer
    groups = _sample(training, prompts, policy_version)
    judgements = training.judge(groups) if groups else []
    if groups:
        training.on_rollouts(groups, judgements, policy_version)
    batch = learner.rollout_batch(
        groups,
        judgements,
        config,
        logprobs_known=learner.sampled_logprobs_known(training.engine.logprobs_kind, training.sampling),
        max_tokens=training.sampling.max_tokens,
        reward_tolerance=training.rules.reward_tolerance,
    )
    rl = learner.backward_rollouts(
        training.model, batch, config, training.sampling.temperature, optimizer.collect
    )
    echo_loss, clip_losses = learner.backward_clips(
        training.model, clips, config.echo_weight, config.batch_tokens, optimizer.collect
    )
    loss = rl.loss + config.echo_weight * echo_loss
    grad_norm = optimizer.clip()
    _check_finite(loss, grad_norm, optim_step, training.training_id)
    optimizer.step()
    if clips:
        training.on_clip_uses(
            [(clip.clip_id, optim_step, value) for clip, value in zip(clips, clip_losses, strict=True)]
        )
    seconds = time.perf_counter() - started
    num_completion_tokens = sum(len(sample.completion_ids) for group in groups for sample in group.samples)
    num_clip_tokens = sum(len(clip.clip_ids) for clip in clips)
    classes = class_shares(judgements, config.group_size, training.rules)
    return StepMetrics(
        optim_step=optim_step,
        policy_version=policy_version,
        reward_mean=reward_mean(judgements),
        classes=classes,
        zero_advantage_share=1 - classes["mixed"] - classes["incomplete"] if classes else None,
        rl_loss=rl.loss,
        echo_loss=echo_loss if clips else None,
        loss=loss,
        grad_norm=grad_norm,
        entropy_mean=rl.entropy_mean,
        logprob_gap=rl.logprob_gap,
        num_completion_tokens=num_completion_tokens,
        num_clip_tokens=num_clip_tokens,
        seconds=seconds,
        tokens_per_second=(num_completion_tokens + num_clip_tokens) / seconds,
    )


def _sample(training: _Training, prompts: Sequence[Prompt], policy_version: int) -> list[Group]:
    """One group per prompt, in the prompts' order: the engine yields them as they finish."""
    if not prompts:
        return []
    requests = []
    for prompt in prompts:
        group = group_id(training.training_id, prompt.prompt_id, policy_version)
        seeds = [sample_seed(training.config.seed, group, i) for i in range(training.config.group_size)]
        requests.append(GroupRequest(prompt, tuple(seeds)))
    groups = {g.prompt.prompt_id: g for g in training.engine.generate(requests, training.sampling)}
    return [groups[prompt.prompt_id] for prompt in prompts]


def _check_stock(prompts: Sequence[Prompt], clips: Sequence[Clip], config: TrainConfig) -> None:
    if config.optim_steps and not prompts and not (clips and config.clips_per_step):
        raise ConfigError(
            "There are neither prompts nor clips to train on. "
            "Give prompts, mine clips, or set train.optim_steps to 0."
        )


def _check_finite(loss: float, grad_norm: float, optim_step: int, training_id: str) -> None:
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise ModelError(
            f"Training {training_id} stopped at optim_step {optim_step}: its loss is {loss} and its gradient "
            f"norm {grad_norm}. Lower train.lr, or look for the cause in that step's rollouts and clips."
        )
