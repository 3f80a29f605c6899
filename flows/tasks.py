"""The stages of a night as Prefect tasks, one line each. They pass ids and paths, never tables.

A lost connection is tried again; a user's mistake or a fault of ours is not.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from prefect import Task, task
from prefect.client.schemas.objects import State, TaskRun

from flows import announce
from flows.progress import bar, training_progress
from pipeline import generate as generation
from pipeline import mine as mining
from pipeline import runs, scoring
from pipeline.config import NightlyConfig
from pipeline.exports.core import Export, export_clips
from pipeline.exports.shards import SHARDS
from pipeline.ingest import Ingested
from pipeline.mine import Mining
from pipeline.night_report import write_night_report
from pipeline.runs import NightRun
from pipeline.scoring import Scored
from trainer.night import train_on_shards

P = ParamSpec("P")
R = TypeVar("R")

TRANSIENT = (ConnectionError, TimeoutError)


async def is_transient(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Whether trying again can help."""
    return isinstance(await state.aresult(raise_on_failure=False), TRANSIENT)


def stage(name: str) -> Callable[[Callable[P, R]], Task[P, R]]:
    """A task of a night: named after its stage, tried again after 2, 10 and 60 s if what failed may pass."""
    return task(
        name=name,
        retries=3,
        retry_delay_seconds=[2, 10, 60],
        retry_condition_fn=is_transient,
        persist_result=False,
    )


@stage("open run")
def open_run(config: NightlyConfig, lake: Path) -> NightRun:
    return runs.open_run(config, lake)


@stage("find missing groups")
def missing_groups(run: NightRun) -> list[str]:
    return generation.missing_groups(run)


@stage("generate")
def generate(run: NightRun) -> Path | None:
    return generation.generate(run)


@stage("verify")
def verify(run: NightRun, staged: Path) -> Path:
    return runs.verify(run, staged)


@stage("commit")
def commit(run: NightRun, judged: Path) -> Ingested:
    return runs.commit(run, judged)


@stage("score")
def score(run: NightRun) -> Scored:
    with bar("scoring rollouts", None) as update:
        return scoring.score_run(run, update)


@stage("mine")
def mine(run: NightRun) -> Mining:
    return mining.mine(
        run.lake(), run.config.mining, runs.sealed_snapshot(run), None, run.run_id, run.tokenizer
    )


@stage("export")
def export(run: NightRun, mined: Mining) -> Export:
    folder = run.lake_folder / "shards"
    return export_clips(run.lake(), folder, SHARDS, run.config.export, mined.mining_id)


@stage("train")
def train(run: NightRun, exported: Export) -> dict[str, Any]:
    config = run.config
    with training_progress(config.train.optim_steps) as progress:
        return train_on_shards(
            run.lake(),
            run.record,
            run.model_folder,
            config.model,
            run.prompts(),
            exported.folder,
            config.train,
            config.sampling,
            config.engine,
            config.verify,
            config.mining,
            progress,
        )


@stage("report")
def report(run: NightRun, mined: Mining, exported: Export, training: dict[str, Any]) -> Path:
    runs.update_facts(
        run,
        mining_id=mined.mining_id,
        export_dropped=dict(exported.dropped),
        training_id=training["training_id"],
    )
    return write_night_report(run.lake(), run.run_id)


@stage("announce")
def publish(run: NightRun, mined: Mining, summary: dict[str, Any]) -> None:
    announce.publish(run, mined, summary)
