"""Generation: the groups that a night lacks, sampled by an engine and staged in batches as they finish.

The engine goes on sampling while a batch is verified and committed. What was committed or staged when a night
was killed is not sampled again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.engines.base import Engine, GroupRequest
from pipeline.engines.choice import open_engine
from pipeline.forgotten import Forgotten
from pipeline.hashing import content_id
from pipeline.records import Group, group_id, sample_seed
from pipeline.runs import NightRun, facts, update_facts
from pipeline.staging import stage, staged_prompt_ids
from pipeline.tokenization import load_tokenizer

STAGE_SECONDS = 120.0  # a slow night is not kept from the lake for longer, however few groups are finished

_streams: dict[str, Iterator[Path]] = {}  # by run: what samples at the moment, in this process


def generate(run: NightRun) -> Path | None:
    """The next staged batch of finished groups; None, and the engine closed, once the run has them all.

    Raises:
        EngineError: the engine cannot go on. What was staged stays, and the next call starts anew.
    """
    if run.run_id not in _streams:
        _streams[run.run_id] = _batches(run)
    stream = _streams[run.run_id]
    try:
        batch = next(stream, None)
    except BaseException:
        stop_generating(run)
        raise
    if batch is None:
        stop_generating(run)
    return batch


def stop_generating(run: NightRun) -> None:
    """Closes the run's engine, if one samples; what it has not finished is given up."""
    stream = _streams.pop(run.run_id, None)
    if stream is not None:
        stream.close()  # type: ignore[attr-defined]  # it is a generator


def missing_groups(run: NightRun) -> list[str]:
    """Prompt ids of the groups that are not in the lake, in the order of the prompts; no forgotten ones."""
    done = _finished_groups(run)
    wanted = Forgotten.of(run.lake()).without(run.prompts())
    return [prompt.prompt_id for prompt in wanted if _group_of(run, prompt.prompt_id) not in done]


def _batches(run: NightRun) -> Iterator[Path]:
    left_over = sorted((run.folder / "staging").glob("*.parquet"))
    kept = {prompt_id for path in left_over for prompt_id in staged_prompt_ids(path)}
    yield from left_over
    missing = [prompt_id for prompt_id in missing_groups(run) if prompt_id not in kept]
    if not missing:
        return
    engine = open_engine(run.model_folder, load_tokenizer(run.model_folder), run.config.engine)
    update_facts(run, logprobs_kind=engine.logprobs_kind, entropy_kind=engine.entropy_kind)
    try:
        yield from _sampled(run, engine, missing)
    finally:
        engine.close()


def _sampled(run: NightRun, engine: Engine, prompt_ids: list[str]) -> Iterator[Path]:
    """Batches of `engine.batch_rollouts`, the last one smaller."""
    by_id = {prompt.prompt_id: prompt for prompt in run.prompts()}
    sampling = run.config.sampling
    requests = [
        GroupRequest(
            by_id[i],
            tuple(sample_seed(sampling.seed, _group_of(run, i), k) for k in range(sampling.group_size)),
        )
        for i in prompt_ids
    ]
    per_batch = max(1, run.config.engine.batch_rollouts // sampling.group_size)
    order = {prompt_id: place for place, prompt_id in enumerate(prompt_ids)}
    batch: list[Group] = []
    spent, since = facts(run).get("generate_seconds", 0.0), time.monotonic()
    for group in engine.generate(requests, sampling):
        batch.append(group)
        if len(batch) < per_batch and time.monotonic() - since < STAGE_SECONDS:
            continue
        spent += time.monotonic() - since
        since = time.monotonic()
        yield _stage(run, batch, order, spent)
        batch = []
        if not engine.overlaps:
            since = time.monotonic()
    if batch:
        yield _stage(run, batch, order, spent + time.monotonic() - since)


def _stage(run: NightRun, groups: list[Group], order: dict[str, int], seconds: float) -> Path:
    groups = sorted(groups, key=lambda group: order[group.prompt.prompt_id])
    name = content_id([group.prompt.prompt_id for group in groups])
    path = stage(run.folder / "staging" / f"{name}.parquet", groups)
    tokens = sum(len(sample.completion_ids) for group in groups for sample in group.samples)
    generated = facts(run).get("generated_tokens", 0) + tokens
    update_facts(run, generate_seconds=seconds, generated_tokens=generated)
    return path


def _finished_groups(run: NightRun) -> set[str]:
    """Groups with rollouts in the lake, or whose verifier refused them all."""
    with run.lake().reader() as reader:
        rows = reader.rows(
            "select distinct group_id from rollouts where run_id = $run_id "
            "union select distinct group_id from quarantine where run_id = $run_id",
            {"run_id": run.run_id},
        )
    return {row["group_id"] for row in rows}


def _group_of(run: NightRun, prompt_id: str) -> str:
    return group_id(run.run_id, prompt_id, run.policy.policy_version)
