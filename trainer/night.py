"""Training on a night's shards: the loop, fed from the lake and writing back into it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline import schema
from pipeline.batch_room import check_clip_room, check_rollout_room
from pipeline.config import EngineConfig, MiningConfig, SamplingConfig, TrainConfig, VerifyConfig
from pipeline.engines.base import Engine, UpdatableEngine
from pipeline.engines.choice import open_engine
from pipeline.engines.transformers import TransformersEngine
from pipeline.errors import ConfigError
from pipeline.experts import experts_of
from pipeline.forgotten import Forgotten
from pipeline.hashing import content_id
from pipeline.ingest import ingest
from pipeline.lake import Lake
from pipeline.models import load_model, policy_of
from pipeline.records import Group, Judgement, Policy, Prompt, Run
from pipeline.rewards import VerifierPool
from pipeline.rollouts import Sampled, rollout_rows
from pipeline.shards import load_clips
from pipeline.tokenization import completion_text, load_tokenizer
from pipeline.training_metrics import METRICS
from trainer.live_engine import LiveEngine
from trainer.loop import train
from trainer.metrics import StepMetrics
from trainer.ranks import ALONE, Ranks
from trainer.tracking import write_settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def train_on_shards(
    lake: Lake,
    run: Run,
    model_folder: Path,
    model_name: str,
    prompts: Sequence[Prompt],
    shards: Path | None,
    config: TrainConfig,
    sampling: SamplingConfig,
    engine_config: EngineConfig,
    verify: VerifyConfig,
    rules: MiningConfig,
    progress: Callable[[StepMetrics], None] | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Trains the model on-policy beside the shards' clips, or those of its own batches.

    The same training is done once.

    Its rollouts enter the lake with origin `trainer`, each clip's use goes to `clip_uses`, and the folder
    `runs/<run>/training-<id>` gets `metrics.jsonl`, `checkpoint/` and `training.json`. Of several processes
    (`ranks`) the first one writes.

    Returns:
        the training's result as plain values, in the first process with `folder` and `metrics` (one dict
        per step).
    """
    tokenizer = load_tokenizer(model_folder)
    policy = policy_of(model_folder, model_name, tokenizer)
    clips = load_clips(shards, policy.tokenizer_hash) if shards else []
    config = config.of_model(model_name)
    prompts = Forgotten.of(lake).without(prompts)
    experts = experts_of(lake, prompts, model_folder, config, sampling)
    with VerifierPool(verify) as pool, ExitStack() as opened:
        training_id = (
            "training-"
            + content_id(
                run.run_id,
                policy.weights_hash,
                [clip.clip_id for clip in clips],
                [prompt.prompt_id for prompt in prompts],
                sorted(expert.rollout_id for known in experts.values() for expert in known),
                [config.of_steps()]
                + [part.model_dump(mode="json") for part in (sampling, engine_config, rules)],
                [pool.name, pool.version],
            )[:16]
        )
        folder = lake.folder / "runs" / run.run_id / training_id
        done = folder / "training.json"
        sampling = sampling.model_copy(update={"group_size": config.group_size})
        if done.is_file():
            return _with_metrics(json.loads(done.read_text()), folder)
        check_rollout_room(prompts, experts, config, sampling, tokenizer)
        check_clip_room(clips, config)
        model = load_model(model_folder, engine_config.device, engine_config.dtype)
        if ranks.size > 1 and config.engine == "vllm":
            raise ConfigError(
                "train.engine = vllm samples for one process. Set it to model, or train with one."
            )
        engine = opened.enter_context(
            closing(_engine(config, engine_config, model, tokenizer, model_folder, folder))
        )

        def judge(groups: Sequence[Group]) -> list[list[Judgement]]:
            return pool.judge(
                groups,
                [[completion_text(tokenizer, s.completion_ids.tolist()) for s in g.samples] for g in groups],
            )

        def write_rollouts(
            groups: Sequence[Group], judgements: Sequence[Sequence[Judgement]], policy_version: int
        ) -> None:
            # The weights between two optimizer steps have no file; the version tells them apart.
            if not ranks.is_first:
                return
            now = Policy(model_name, policy.weights_hash, policy.tokenizer_hash, policy_version)
            sampled = Sampled(
                Run(training_id, run.night, "trainer"),
                now,
                sampling,
                engine.logprobs_kind,
                engine.entropy_kind,
                pool.name,
                pool.version,
                engine_config.entropy_bits,
                engine_config.logprob_bits,
            )
            rows, refused = rollout_rows(sampled, groups, judgements, tokenizer)
            ingest(lake, rows, [training_id] * len(rows), [group.prompt for group in groups], refused)

        def write_uses(uses: list[tuple[str, int, float]]) -> None:
            if ranks.is_first:
                lake.commit({"clip_uses": _uses(training_id, uses)})

        settings = {"model": model_name, "train": config.model_dump(mode="json")}
        write_settings(ranks.own(folder), {"training_id": training_id, **settings})
        result = train(
            model,
            tokenizer,
            engine,
            prompts,
            clips,
            config,
            sampling,
            judge,
            write_rollouts,
            write_uses,
            folder,
            training_id,
            policy.policy_version,
            progress,
            rules,
            experts,
            ranks,
        )
    if not ranks.is_first:
        return asdict(result)
    summary = asdict(result) | {"checkpoint": str(result.checkpoint)}
    partial = done.with_suffix(".partial")
    partial.write_text(json.dumps(summary, indent=2) + "\n")
    os.replace(partial, done)
    return _with_metrics(summary, folder)


def _engine(
    config: TrainConfig,
    engine_config: EngineConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    model_folder: Path,
    folder: Path,
) -> Engine:
    """What samples from `model`, which was loaded from `model_folder`."""
    if config.engine == "model":
        return TransformersEngine(model, tokenizer, engine_config.entropy_kind)
    engine = open_engine(model_folder, tokenizer, engine_config.model_copy(update={"kind": config.engine}))
    assert isinstance(engine, UpdatableEngine)
    return LiveEngine(engine, model, folder / "weights")


def _uses(training_id: str, uses: Sequence[tuple[str, int, float]]) -> pa.Table:
    now = datetime.now(UTC)
    return pa.Table.from_pylist(
        [
            {
                "training_id": training_id,
                "clip_id": clip_id,
                "optim_step": optim_step,
                "clip_loss": loss,
                "created_at": now,
            }
            for clip_id, optim_step, loss in uses
        ],
        schema.CLIP_USES,
    )


def _with_metrics(summary: dict[str, Any], folder: Path) -> dict[str, Any]:
    lines = (folder / METRICS).read_text().splitlines()
    return summary | {"folder": str(folder), "metrics": [json.loads(line) for line in lines]}
