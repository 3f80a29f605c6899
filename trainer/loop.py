"""The training loop: on-policy RL beside the EchoClip term, L = L_RLVR + λ · L_echo (arXiv 2605.31228)."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch

from pipeline.config import MiningConfig, SamplingConfig, TrainConfig
from pipeline.engines.base import Engine
from pipeline.experts import Expert
from pipeline.logprobs import check_head
from pipeline.objective_checks import sampled_logprobs_known
from pipeline.records import Prompt
from pipeline.tokenization import tokenizer_hash
from trainer import learner
from trainer.checkpoints import save_checkpoint
from trainer.checks import check_options, check_stock
from trainer.clip_schedule import ClipSchedule
from trainer.guard import Guard
from trainer.metrics import StepMetrics, TrainingResult
from trainer.online import OnlineClips
from trainer.optimizer import MasterAdamW
from trainer.ranks import ALONE, Ranks
from trainer.resume import Resumption, identity
from trainer.rollout_batch import RolloutBatch, Rollouts, rollout_batch
from trainer.sampling import Judge, OnRollouts, RolloutSource
from trainer.sharding import SharedEngine, copy_back, sharded, shared_judge
from trainer.step_metrics import step_metrics
from trainer.tracking import open_tracks
from trainer.update import StepClips, Updater

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pipeline.shards import Clip

OnClipUses: TypeAlias = Callable[[list[tuple[str, int, float]]], None]


@dataclass(frozen=True)
class _Training:
    """What stays the same over the steps of one training."""

    config: TrainConfig
    sampling: SamplingConfig
    rules: MiningConfig
    logprobs_known: bool
    source: RolloutSource
    schedule: ClipSchedule
    online: OnlineClips | None
    updater: Updater
    resumption: Resumption
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
    ranks: Ranks = ALONE,
) -> TrainingResult:
    """Train the model in place for `config.optim_steps`, and leave `folder/checkpoint` and `metrics.jsonl`.

    Killed and called again, it goes on from the newest state in `folder/states`, handing out what came after.

    Each batch of `prompts_per_step` groups is sampled from the model as it stands, judged, handed out, and
    learned from in `updates_per_batch` AdamW steps, each beside the clips that are due. A step takes a prompt
    or clip once at most. Without clips this is the objective alone, without prompts supervised learning.

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
        ranks: all processes call this with the same arguments, and the first one writes.

    Raises:
        ConfigError: there are neither prompts nor clips, an option would have no effect, the objective
            learns from experts and there are none, or the folder cannot be written or is another training's.
        ModelError: three steps in a row had a loss or gradient that is not finite (the model keeps the last
            good step's weights), the model's logits are not plain, or the checkpoint cannot be written.
        FormatError: a clip does not fit the model.
    """
    prompts = list({prompt.prompt_id: prompt for prompt in prompts}.values())
    check_stock(prompts, clips, config)
    check_options(prompts, experts or {}, config, sampling, engine)
    torch.manual_seed(config.seed)
    policy_model.train(False)  # dropout would set the learner's log-probs apart from the sampler's
    check_head(policy_model)
    rules, known = rules or MiningConfig(), experts or {}
    learned, own = sharded(policy_model, ranks), ranks.own(folder)
    if ranks.size > 1:
        engine = SharedEngine(engine, ranks, lambda: copy_back(learned, policy_model))
        judge = shared_judge(judge, ranks)
    source = RolloutSource(engine, prompts, known, config, sampling, rules, judge, on_rollouts, training_id)
    hashed = tokenizer_hash(tokenizer)
    finds = OnlineClips(tokenizer, hashed, rules, config.group_size, training_id)
    schedule = ClipSchedule(() if config.echo_source == "online" else clips, config)
    optimizer = MasterAdamW(learned, config.lr, config.weight_decay, config.max_grad_norm, ranks)
    updater = Updater(learned, config, sampling.temperature, optimizer, Guard(own, training_id), ranks)
    named = identity(policy_model, hashed, training_id, config, sampling, rules, prompts, clips, known)
    training = _Training(
        config,
        sampling,
        rules,
        sampled_logprobs_known(engine.logprobs_kind, sampling),
        source,
        schedule,
        None if config.echo_source == "shards" else finds,
        updater,
        Resumption(folder / "states", named, source, schedule, updater),
        on_clip_uses,
    )
    echo_before = learner.mean_clip_loss(policy_model, clips, config.batch_tokens)
    steps = _run(training, own, start_policy_version, progress)
    copy_back(learned, policy_model)
    num_good = sum(not step.skipped for step in steps)
    if not ranks.is_first:
        shutil.rmtree(own)
    return TrainingResult(
        training_id=training_id,
        optim_steps=len(steps),
        echo_loss_before=echo_before,
        echo_loss_after=learner.mean_clip_loss(policy_model, clips, config.batch_tokens),
        reward_before=steps[0].reward_mean if steps else None,
        reward_after=steps[-1].reward_mean if steps else None,
        num_rollouts=source.num_rollouts,
        num_clip_uses=training.schedule.num_uses,
        num_skipped=len(steps) - num_good,
        checkpoint=folder / "checkpoint"
        if not ranks.is_first
        else save_checkpoint(
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
    folder: Path,
    policy_version: int,
    progress: Callable[[StepMetrics], None] | None,
) -> list[StepMetrics]:
    config, resumption = training.config, training.resumption
    steps, policy_version = resumption.restore(policy_version)
    with open_tracks(folder, config, steps) as tracks:
        for optim_step in range(len(steps), config.optim_steps):
            started = time.perf_counter()
            if optim_step % config.updates_per_batch == 0:
                resumption.save_if_due(steps, policy_version)
                rollouts = training.source.sample(optim_step, policy_version)
                batch = _batch(training, rollouts)
                found = training.online.of(rollouts) if training.online else []
            clips = _step_clips(training, batch, found, policy_version)
            update = training.updater.update(batch, clips, optim_step)
            if not update.skipped:
                _note_uses(training, clips, update.clip_losses, optim_step)
            metrics = step_metrics(
                rollouts, batch, clips.clips, update, config, training.rules,
                optim_step=optim_step, policy_version=policy_version, started=started,
                num_retired=training.schedule.num_retired(policy_version + (not update.skipped)),
            )  # fmt: skip
            if batch.trainer_logprobs is None:
                batch = replace(batch, trainer_logprobs=update.rl.logprobs)
            policy_version += not update.skipped
            tracks.write(metrics)
            steps.append(metrics)
            if progress:
                progress(metrics)
    return steps


def _step_clips(
    training: _Training,
    batch: RolloutBatch,
    found: Sequence[tuple[Clip, tuple[int, int]]],
    policy_version: int,
) -> StepClips:
    """The clips of one step, of shards and of its own batch, as far as they are due."""
    row_of = {place: row for row, place in enumerate(batch.places)}
    rows = {clip.clip_id: row_of.get(place) for clip, place in found}
    due = training.schedule.due((clip for clip, _ in found), policy_version)
    clips = [*training.schedule.deal(policy_version), *due]
    return StepClips(clips, [rows.get(clip.clip_id) for clip in clips])


def _note_uses(training: _Training, clips: StepClips, losses: Sequence[float], optim_step: int) -> None:
    training.schedule.used(clips.clips, losses)
    if clips.clips:
        training.on_clip_uses(
            [(clip.clip_id, optim_step, value) for clip, value in zip(clips.clips, losses, strict=True)]
        )


def _batch(training: _Training, rollouts: Rollouts) -> RolloutBatch:
    return rollout_batch(
        rollouts,
        training.config,
        logprobs_known=training.logprobs_known,
        max_tokens=training.sampling.max_tokens,
        reward_tolerance=training.rules.reward_tolerance,
    )
