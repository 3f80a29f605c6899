"""A night's generation with a real vLLM engine, from the run to the lake."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from vllm_engines import config_of

from pipeline import generate as generation
from pipeline.config import EngineConfig, NightlyConfig, SamplingConfig
from pipeline.engines.base import GroupRequest
from pipeline.engines.vllm import VllmEngine
from pipeline.records import Group
from pipeline.runs import NightRun, commit, open_run, verify

NUM_PROMPTS, GROUP_SIZE, BATCH_GROUPS = 16, 4, 3


@dataclass
class Night:
    """What was seen of a night that another engine had begun.

    Attributes:
        asked: prompt ids that vLLM was given.
        staged_while_running: for each batch, the requests in the engine when it was staged.
        committed_while_running: the same, when the lake had it.
    """

    run: NightRun
    begun: set[str]
    engines: list[VllmEngine] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    staged_while_running: list[int] = field(default_factory=list)
    committed_while_running: list[int] = field(default_factory=list)


def run_with(folder: Path, engine: EngineConfig) -> NightRun:
    sampling = SamplingConfig(group_size=GROUP_SIZE, max_tokens=64)
    engine = engine.model_copy(update={"batch_rollouts": BATCH_GROUPS * GROUP_SIZE})
    config = NightlyConfig(max_prompts=NUM_PROMPTS, sampling=sampling, engine=engine)
    return open_run(config, folder, today=date(2026, 5, 31))


def group_sizes(run: NightRun) -> dict[str, int]:
    """Rollouts with entropies in the lake, by prompt."""
    with run.lake().reader() as reader:
        rows = reader.rows(
            "select prompt_id, count(completion_entropies) as size from rollouts group by prompt_id", {}
        )
    return {row["prompt_id"]: row["size"] for row in rows}


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Night:
    folder = tmp_path_factory.mktemp("night") / "lake"
    begun = run_with(folder, EngineConfig(kind="transformers", dtype="float32"))
    first = generation.generate(begun)
    assert first is not None
    commit(begun, verify(begun, first))
    generation.stop_generating(begun)

    seen = Night(run_with(folder, config_of(in_process=False, max_num_seqs=8)), set(group_sizes(begun)))
    open_engine, generate = generation.open_engine, VllmEngine.generate

    def noted_engine(*arguments: Any) -> Any:
        seen.engines.append(open_engine(*arguments))
        return seen.engines[-1]

    def noted_requests(
        engine: VllmEngine, requests: Sequence[GroupRequest], sampling: SamplingConfig
    ) -> Iterator[Group]:
        seen.asked += [request.prompt.prompt_id for request in requests]
        return generate(engine, requests, sampling)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "open_engine", noted_engine)
        patch.setattr(VllmEngine, "generate", noted_requests)
        try:
            while (staged := generation.generate(seen.run)) is not None:
                core = seen.engines[0]._cores[0]
                seen.staged_while_running.append(core.num_tapped())
                commit(seen.run, verify(seen.run, staged))
                seen.committed_while_running.append(core.num_tapped())
            assert generation.generate(seen.run) is None
        finally:
            generation.stop_generating(seen.run)
    return seen


def test_finished_groups_are_staged_and_committed_while_others_still_run(night: Night) -> None:
    assert len(night.staged_while_running) == 5  # 13 groups in threes
    assert all(running > 0 for running in night.staged_while_running[:3])
    assert all(running > 0 for running in night.committed_while_running[:3])
    assert night.staged_while_running[-1] == night.committed_while_running[-1] == 0


def test_only_groups_that_are_not_in_the_lake_are_sampled(night: Night) -> None:
    prompts = {prompt.prompt_id for prompt in night.run.prompts()}
    assert len(night.begun) == BATCH_GROUPS
    assert sorted(night.asked) == sorted(prompts - night.begun)
    assert group_sizes(night.run) == dict.fromkeys(prompts, GROUP_SIZE)


def test_a_night_that_has_all_its_groups_starts_no_engine(night: Night) -> None:
    assert generation.missing_groups(night.run) == []
    assert len(night.engines) == 1
