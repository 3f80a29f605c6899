"""A night runs from prompts to report, once, and a night that was cut off goes on."""

import json
from dataclasses import replace
from datetime import date

import pytest
from filelock import FileLock
from nights import rows
from prefect.testing.utilities import prefect_test_harness

from flows import tasks
from flows.announce import summary_rows
from flows.nightly import nightly
from pipeline import generate as generation
from pipeline import runs
from pipeline.config import NightlyConfig
from pipeline.engines.choice import open_engine
from pipeline.errors import BusyError, LakeError
from pipeline.imports.core import import_rollouts, with_formats
from pipeline.lake import Lake

SETTINGS = {
    "max_prompts": 24,
    "night": "2026-05-31",
    "sampling": {"group_size": 4, "max_tokens": 64},
    "engine": {"kind": "transformers", "batch_rollouts": 32},
    "train": {"optim_steps": 2, "prompts_per_step": 2, "group_size": 4, "clips_per_step": 4},
}


def config(**changes):
    return NightlyConfig.model_validate(SETTINGS | changes)


@pytest.fixture(scope="module", autouse=True)
def server():
    """One Prefect server with an empty database for all tests of this file."""
    with prefect_test_harness(server_startup_timeout=600):
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished night and its lake."""
    lake = tmp_path_factory.mktemp("night") / "lake"
    return nightly(config(), lake), lake


def test_a_night_leaves_rollouts_clips_shards_a_checkpoint_and_a_report(done):
    result, lake = done
    assert result.generated + result.refused == 24 * 4
    assert sum(result.mining["groups"].values()) == 24
    assert result.mining["clips"] == len(rows(lake, "select * from echo_clips")) > 0
    assert (lake / "shards" / "latest.json").is_file()
    assert json.loads((lake / "runs" / result.run_id / "run.json").read_text())["done"]
    assert "<html" in (lake / "runs" / result.run_id / "report.html").read_text()
    assert result.training["optim_steps"] == 2


def test_every_rollout_says_where_it_comes_from(done):
    result, lake = done
    [facts] = rows(
        lake,
        "select count(*) as n, count(distinct rollout_id) as different, min(night) as night, "
        "bool_and(len(completion_entropies) = len(completion_ids)) as aligned, min(entropy_kind) as kind "
        f"from rollouts where run_id = '{result.run_id}'",
    )
    assert facts == {
        "n": result.generated,
        "different": result.generated,
        "night": date(2026, 5, 31),
        "aligned": True,
        "kind": "full_vocab",
    }


def test_what_the_trainer_samples_comes_back_with_the_version_that_sampled_it(done):
    _, lake = done
    versions = rows(
        lake,
        "select policy_version, count(*) as n from rollouts where origin = 'trainer' "
        "group by policy_version order by policy_version",
    )
    assert versions == [{"policy_version": 0, "n": 8}, {"policy_version": 1, "n": 8}]
    uses = rows(lake, "select distinct optim_step from clip_uses order by optim_step")
    assert [row["optim_step"] for row in uses] == [0, 1]


def test_the_same_night_again_generates_mines_and_trains_nothing(done):
    result, lake = done
    tables = ("rollouts", "echo_clips", "mining_runs", "clip_uses", "shards")
    before = [rows(lake, f"select count(*) as n from {table}") for table in tables]
    again = nightly(config(), lake)
    assert again.resumed
    assert again.generated == 0
    assert again.mining == result.mining
    assert [rows(lake, f"select count(*) as n from {table}") for table in tables] == before


def test_a_night_that_failed_after_its_first_batch_goes_on_with_the_same_tokens(done, tmp_path, monkeypatch):
    _, finished = done
    lake = tmp_path / "lake"
    commit, calls = runs.commit, []

    def commit_once(run, path):
        calls.append(path)
        if len(calls) == 2:
            raise LakeError("the disk is full")
        return commit(run, path)

    monkeypatch.setattr(runs, "commit", commit_once)
    with pytest.raises(LakeError):
        nightly(config(), lake)
    kept = rows(lake, "select count(distinct group_id) as n from rollouts")
    assert kept == [{"n": 8}]
    monkeypatch.undo()
    assert nightly(config(), lake).resumed
    sampled = "select rollout_id from rollouts where origin = 'policy' order by rollout_id"
    assert rows(lake, sampled) == rows(finished, sampled)


class TellsNoEntropies:
    """An engine as a pool of servers has it."""

    logprobs_kind, entropy_kind, overlaps = "raw", None, False

    def __init__(self, engine):
        self.engine, self.close = engine, engine.close

    def generate(self, requests, sampling):
        for group in self.engine.generate(requests, sampling):
            yield replace(group, samples=tuple(replace(one, entropies=None) for one in group.samples))


def put_unreadable(run, folder):
    """A rollout of the run that is longer than the model's context."""
    place = {"run_id": run.run_id, "group_id": "long", "sample_index": 0}
    tokens = {"prompt_ids": [5], "completion_ids": [5] * 600, "completion_entropies": None}
    (folder / "dump.jsonl").write_text(json.dumps(place | tokens | {"reward": 1.0}))
    done = import_rollouts(run.lake(), with_formats([folder / "dump.jsonl"]), run.tokenizer())
    assert done.rows.written == 1


def test_a_night_that_another_engine_began_without_entropies_is_scored_and_says_what_it_cannot(
    tmp_path, monkeypatch, capfd
):
    settings = config(max_prompts=16, train={"optim_steps": 0})
    run = runs.open_run(settings, tmp_path / "lake")
    monkeypatch.setattr(generation, "open_engine", lambda *given: TellsNoEntropies(open_engine(*given)))
    runs.commit(run, runs.verify(run, generation.generate(run)))
    generation.stop_generating(run)
    monkeypatch.undo()
    put_unreadable(run, tmp_path)
    kinds = "select entropy_kind as kind, count(*) as n from rollouts group by all order by all"
    assert rows(tmp_path / "lake", kinds) == [{"kind": None, "n": 33}]
    capfd.readouterr()
    result = nightly(settings, tmp_path / "lake")
    assert result.resumed
    # those that the second engine measured, too: a mining ranks one kind
    assert rows(tmp_path / "lake", kinds) == [{"kind": "rescored", "n": 64}, {"kind": None, "n": 1}]
    assert result.facts["num_scored"] == 64
    assert result.mining["clips"] > 0
    assert "1 rollouts still wait: 0 are of another tokenizer" in capfd.readouterr().err


def test_a_night_cut_off_before_midnight_keeps_its_date(tmp_path):
    settings = config(night=None)
    evening = runs.open_run(settings, tmp_path / "lake", today=date(2026, 5, 31))
    morning = runs.open_run(settings, tmp_path / "lake", today=date(2026, 6, 1))
    assert (morning.run_id, morning.night, morning.resumed) == (evening.run_id, date(2026, 5, 31), True)
    runs.finish(morning)
    assert runs.open_run(settings, tmp_path / "lake", today=date(2026, 6, 1)).night == date(2026, 6, 1)


def test_other_weights_prompts_or_sampling_are_another_run(tmp_path):
    first = runs.open_run(config(), tmp_path / "lake")
    others = [
        runs.open_run(config(max_prompts=23), tmp_path / "lake"),
        runs.open_run(config(sampling={"group_size": 4, "max_tokens": 65}), tmp_path / "lake"),
        runs.open_run(config(night="2026-06-01"), tmp_path / "lake"),
    ]
    assert len({first.run_id, *(run.run_id for run in others)}) == 4


def test_a_night_refuses_to_start_beside_another_where_the_config_says_so(tmp_path):
    lake = Lake.create(tmp_path / "lake")
    with FileLock(lake.folder / "nightly.lock"), pytest.raises(BusyError, match="Another night is running"):
        nightly(config(on_overlap="refuse"), lake.folder)


def test_lost_connections_are_tried_again_and_mistakes_are_not(monkeypatch, tmp_path):
    tries = []

    def flaky(_config, _lake):
        tries.append("try")
        if len(tries) == 1:
            raise ConnectionResetError("the server went away")
        return "opened"

    monkeypatch.setattr(runs, "open_run", flaky)
    assert tasks.open_run.with_options(retry_delay_seconds=0)(config(), tmp_path) == "opened"
    assert len(tries) == 2

    def mistaken(_config, _lake):
        tries.append("try")
        raise LakeError("no such folder")

    monkeypatch.setattr(runs, "open_run", mistaken)
    with pytest.raises(LakeError):
        tasks.open_run.with_options(retry_delay_seconds=0)(config(), tmp_path)
    assert len(tries) == 3


def test_the_summary_names_what_a_user_wants_to_know(done):
    result, _ = done
    names = [name for name, _ in summary_rows(result.__dict__)]
    for name in ("rollouts", "tokens/s", "EchoClips", "dropped", "EchoClip loss", "report"):
        assert name in names
    assert any(name.startswith("groups ") for name in names)


def test_prefect_keeps_the_summary_and_the_best_clips_as_artifacts(done):
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        artifacts = {artifact.key: artifact for artifact in client.read_artifacts()}
        names = [run.name for run in client.read_flow_runs()]
    assert "EchoClips" in artifacts["nightly-summary"].data
    assert "step_entropy" in artifacts["best-echoclips"].data
    assert "nightly 2026-05-31 arith" in names
