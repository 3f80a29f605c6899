"""Forgetting beside nights, trainings, scorers, imports and minings that hold what is forgotten."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime

import pyarrow as pa
import pytest
from filelock import FileLock
from forget_helpers import SECRET, SECRET_PROMPT, WRITTEN, everything, lake_rows
from sample_lake import LakeBuilder

from pipeline.checks import run_checks
from pipeline.config import MiningConfig
from pipeline.errors import BusyError, LakeError, MiningError, NothingToMine
from pipeline.forget import forget
from pipeline.forgetting import find
from pipeline.forgotten import Forgotten
from pipeline.imports.staging import ImportStaging
from pipeline.lake_writer import Writer
from pipeline.mine import mine
from pipeline.rollouts import rollout_table
from pipeline.schema import CLIP_USES, SCORINGS
from pipeline.set_aside import set_aside
from pipeline.what_if import parse_changes, simulate


def test_it_is_refused_while_a_night_runs_and_tidies_its_leavings_afterwards(
    builder: LakeBuilder,
) -> None:
    lake = builder.lake
    run = lake.folder / "runs" / "run-1"
    run.mkdir(parents=True)
    (run / "report.html").write_text(WRITTEN)
    (run / "run.json").write_text(json.dumps({"snapshot": 3, "done": True}))
    skipped = run / "training-1" / "skipped"
    skipped.mkdir(parents=True)
    (skipped / "step-000001.safetensors").write_text(WRITTEN)
    names = [SECRET_PROMPT.prompt_id]
    with FileLock(lake.folder / "nightly.lock"), pytest.raises(BusyError, match="Wait until it is done"):
        forget(lake, names)
    assert forget(lake, names).reports == [str(run / "report.html")]
    assert json.loads((run / "run.json").read_text()) == {"snapshot": None, "done": True}
    assert WRITTEN not in everything(lake.folder)


def test_a_clip_that_a_training_found_in_its_own_rollouts_is_forgotten_with_its_training_named(
    builder: LakeBuilder,
) -> None:
    facts = {"run_id": "training-1", "origin": "trainer", "policy_version": 3}
    builder.add_group(["3\n#42"], [1.0], question=SECRET, **facts)
    rollout = rollout_table(builder.rows[-1:])
    name = hashlib.md5(f"{rollout['rollout_id'][0]}:2".encode()).hexdigest()
    uses = [("training-1", f"online-{name}"), ("training-2", "online-0123")]
    values = {"optim_step": 0, "clip_loss": 1.0, "created_at": datetime.now(UTC)}
    rows = [{"training_id": training, "clip_id": clip, **values} for training, clip in uses]
    builder.lake.commit({"rollouts": rollout, "clip_uses": pa.Table.from_pylist(rows, CLIP_USES)})
    done = forget(builder.lake, [SECRET_PROMPT.prompt_id])
    assert "training-1" in done.trainings
    assert "training-2" not in done.trainings
    with builder.lake.reader() as reader:
        left = reader.rows("select clip_id from clip_uses where clip_id like 'online-%'")
    assert left == [{"clip_id": "online-0123"}]


def test_a_scorer_that_holds_its_rollouts_does_not_bring_them_back(builder: LakeBuilder) -> None:
    lake = builder.lake
    scored, kept = rollout_table(builder.rows[-1:]), rollout_table(builder.rows[:1])
    rows = pa.concat_tables([kept, scored])
    facts = {"model": "small", "weights_hash": "w", "policy_version": 0, "scored_at": datetime.now(UTC)}
    notes = [{"rollout_id": rollout_id, **facts} for rollout_id in rows["rollout_id"].to_pylist()]
    scorings = pa.Table.from_pylist(notes, SCORINGS)
    forget(lake, [SECRET_PROMPT.prompt_id])
    assert lake.replace_rollouts(rows, scorings) == 1
    assert lake.replace_rollouts(scored, scorings.slice(1)) == 0
    assert lake_rows(lake, "scorings")["rollout_id"].to_pylist() == kept["rollout_id"].to_pylist()
    assert WRITTEN not in everything(lake.folder)


def test_damaged_files_stop_it_and_once_set_aside_are_named_since_nothing_can_search_them(
    builder: LakeBuilder,
) -> None:
    lake = builder.lake
    path = sorted((lake.folder / "files" / "main" / "rollouts").glob("*.parquet"))[0]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(LakeError, match="Run `echomine doctor` to see what is damaged"):
        forget(lake, [SECRET_PROMPT.prompt_id])
    set_aside(lake)
    done = forget(lake, [SECRET_PROMPT.prompt_id])
    assert done.set_aside == [str(lake.folder / "damaged" / "main" / "rollouts" / path.name)]


def test_rollouts_that_came_after_the_user_asked_what_would_go_are_found_too(builder: LakeBuilder) -> None:
    lake = builder.lake
    assert len(find(lake, [SECRET_PROMPT.prompt_id]).keys["rollouts"]) == 2
    builder.add_group([f"{WRITTEN} again\n#42"], [1.0], question=SECRET)
    lake.commit({"rollouts": rollout_table(builder.rows[-1:])})
    assert forget(lake, [SECRET_PROMPT.prompt_id]).rows["rollouts"] == 3
    assert WRITTEN not in everything(lake.folder)


def test_what_a_killed_import_staged_goes_and_a_running_one_is_waited_for(builder: LakeBuilder) -> None:
    lake = builder.lake
    staged = lake.folder / "staging" / "killed"
    staged.mkdir(parents=True)
    staged.with_suffix(".lock").touch()
    (staged / "part-000").write_text(WRITTEN)
    with ImportStaging(lake.folder, 0) as running:
        with pytest.raises(BusyError, match=r"An import .* is running. Wait until it is done, then forget"):
            forget(lake, [SECRET_PROMPT.prompt_id])
        assert running.folder.is_dir()
        assert len(lake_rows(lake, "rollouts")) == 4
    forget(lake, [SECRET_PROMPT.prompt_id])
    assert WRITTEN not in everything(lake.folder)


def test_minings_say_how_many_clips_they_lost_and_other_losses_still_show(builder: LakeBuilder) -> None:
    lake = builder.lake
    forget(lake, [SECRET_PROMPT.prompt_id])
    (mining,) = lake_rows(lake, "mining_runs").to_pylist()
    assert (mining["num_clips"], dict(mining["dropped"])["forgotten"]) == (1, 1)

    def lose_clips(writer: Writer) -> None:
        writer.begin()
        writer.connection.execute("delete from echo_clips")

    lake.changed(lose_clips)
    with lake.reader() as reader:
        offending = {check.name for check in run_checks(reader) if check.num_offending}
    assert "miscounted_minings" in offending


def test_clips_that_were_found_before_are_not_recorded_afterwards(builder: LakeBuilder) -> None:
    lake = builder.lake
    before, clips = Forgotten.of(lake), lake_rows(lake, "echo_clips")
    forget(lake, [SECRET_PROMPT.prompt_id])
    with pytest.raises(
        LakeError, match=r"were forgotten meanwhile\. Nothing was recorded; run the command again"
    ):
        before.commit(lake, {"echo_clips": clips})
    assert len(lake_rows(lake, "echo_clips")) == 1


def test_afterwards_minings_name_a_snapshot_that_is_there(builder: LakeBuilder) -> None:
    lake = builder.lake
    mine(lake, MiningConfig(), since_snapshot=2)
    forget(lake, ["0" * 32])  # nothing of it was there
    changes = parse_changes("clips_per_group=1")
    with pytest.raises(NothingToMine, match=r"which has ended since\. Mine again"):
        simulate(lake, changes)
    with lake.reader() as reader:
        newest, begins = reader.snapshot, "the lake's history begins with"
    for since_the_second in (
        lambda: simulate(lake, changes, snapshot=newest),
        lambda: mine(lake, MiningConfig(), since_snapshot=2),
    ):
        with pytest.raises(MiningError, match=f"after snapshot 2 cannot be told: {begins} {newest}"):
            since_the_second()
    mined = mine(lake, MiningConfig())
    assert mined == mine(lake, MiningConfig()), "it is the same mining now"
    with lake.reader(mined.snapshot) as reader:
        assert len(reader.rows("from rollouts")) == 4
    assert simulate(lake, changes).snapshot == mined.snapshot
    assert mine(lake, MiningConfig(), since_snapshot=mined.snapshot).clips == 0
