"""Verdicts stand beside the old ones, the newest counts, and a false success teaches no more."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from sample_lake import LakeBuilder, SampleLake, overturned, prompt_id

from flows.cli import main
from pipeline.config import ExportConfig, MiningConfig, VerifyConfig
from pipeline.errors import LakeError, VerifierError
from pipeline.exports.core import export_clips
from pipeline.exports.shards import SHARDS
from pipeline.forget import Forgot, forget
from pipeline.lake import Lake
from pipeline.mine import mine
from pipeline.reverify import Reverified, Scope, reverify
from pipeline.shards import load_clips
from pipeline.withdrawal import notice_shards, withdrawn_clips

VERIFY = VerifyConfig(timeout_seconds=1.0, workers=1)
TROUBLED = "verifiers_for_tests:troubled"


@pytest.fixture
def judged(sample_lake: SampleLake, tmp_path: Path) -> Lake:
    """A copy of the sample lake that may be changed."""
    shutil.copytree(sample_lake.lake.folder, tmp_path / "sample")
    return Lake.open(tmp_path / "sample")


def num(lake: Lake, sql: str, snapshot: int | None = None) -> int:
    with lake.reader(snapshot) as reader:
        return int(reader.rows(f"select count(*) as n from {sql}")[0]["n"])


def solved(folder: Path, *texts: str, **columns: object) -> Lake:
    builder = LakeBuilder(folder)
    builder.add_group(texts, [1.0] * len(texts), **columns)
    return builder.commit()


def test_a_hang_and_a_death_cost_their_own_rollout_and_are_asked_again(tmp_path: Path) -> None:
    lake = solved(tmp_path / "lake", "hang", "exit 3", "nothing", "fine")
    first = reverify(lake, VERIFY, Scope(), TROUBLED)
    assert first == Reverified(judged=1, failed=3)
    with lake.reader() as reader:
        errors = {row["error"] for row in reader.rows("select error from verdicts")}
    assert errors == {
        "timed out after 1 s",
        "died with exit code 3",
        "returned NoneType as `reward`, not a number",
        None,
    }
    mining = mine(lake, MiningConfig())
    assert reverify(lake, VERIFY, Scope(), TROUBLED) == Reverified(judged=0, failed=3, known=1)
    assert num(lake, "verdicts") == 4, "what failed again alike is not written again"
    assert mine(lake, MiningConfig()) == mining
    assert mine(lake, MiningConfig()).groups == {"all_success": 1}, "what cannot be judged is not overturned"


def test_an_older_verdict_is_given_again_after_another_verifier_spoke(tmp_path: Path) -> None:
    lake = solved(tmp_path / "lake", "#42", "#42")
    for verifier in (
        "verifiers_for_tests:nothing_is_right",
        TROUBLED,
        TROUBLED,
        "verifiers_for_tests:nothing_is_right",
    ):
        reverify(lake, VERIFY, Scope(), verifier)
    assert num(lake, "verdicts") == 6
    assert mine(lake, MiningConfig()).groups == {"all_fail": 1}


def test_a_dump_does_not_choose_what_code_runs(tmp_path: Path) -> None:
    lake = solved(tmp_path / "lake", "touch /tmp/no", "x", verifier="os:system")
    with pytest.raises(VerifierError, match="None of the 2 rollouts names a built-in verifier"):
        reverify(lake, VERIFY, Scope())
    assert num(lake, "verdicts") == 0


def test_a_scope_without_rollouts_and_an_unknown_verifier_are_refused(judged: Lake) -> None:
    with pytest.raises(LakeError, match="no rollout of that run, night and prompt"):
        reverify(judged, VERIFY, Scope(run_id="run-99"))
    with pytest.raises(VerifierError, match="did you mean `math`"):
        reverify(judged, VERIFY, Scope(), "maths")


def test_rollouts_of_unknown_prompts_are_counted_and_keep_their_reward(tmp_path: Path) -> None:
    builder = LakeBuilder(tmp_path / "lake")
    builder.add_group(["#1", "#2"], [1.0, 1.0])
    builder.prompts.clear()
    assert reverify(builder.commit(), VERIFY, Scope()) == Reverified(unknown_prompt=2)


@pytest.mark.parametrize("verifier", ["exact", "math"])
def test_where_the_verifier_needs_a_ground_truth_and_there_is_none_nothing_is_written(
    tmp_path: Path, verifier: str, capfd: pytest.CaptureFixture[str]
) -> None:
    lake = solved(tmp_path / "lake", "#1", "#2")  # its prompt has no ground truth
    mining = mine(lake, MiningConfig())
    with lake.reader() as reader:
        before = reader.snapshot
    assert reverify(lake, VERIFY, Scope(), verifier) == Reverified(no_ground_truth=2)
    assert num(lake, "verdicts") == 0
    with lake.reader() as reader:
        assert reader.snapshot == before
    assert mine(lake, MiningConfig()) == mining
    assert main(["reverify", "--lake", str(lake.folder), "--verifier", verifier]) == 0
    said = " ".join(capfd.readouterr().err.split())
    assert "2 rollouts are of prompts without a ground truth" in said
    assert "hung, died or raised" not in said


def test_a_group_with_an_overturned_rollout_is_mixed_now_and_was_solved_then(judged: Lake) -> None:
    with judged.reader() as reader:
        before = reader.snapshot
    old = mine(judged, MiningConfig())
    (rollout_id,) = overturned(judged)
    new = mine(judged, MiningConfig())
    assert new.mining_id != old.mining_id
    assert new.snapshot > old.snapshot
    assert new.groups["mixed"] == old.groups["mixed"] + 1
    assert new.groups["all_success"] == old.groups["all_success"] - 1
    mixed = "groups where group_class = 'mixed' and origin = 'policy'"
    assert num(judged, mixed) == num(judged, mixed, before) + 1
    stored = f"rollouts where rollout_id = '{rollout_id}' and reward = 1"
    assert num(judged, stored) == 1, "nothing is overwritten"


def test_a_withdrawn_clip_is_in_no_export_view_or_old_shard(
    judged: Lake, sample_lake: SampleLake, tmp_path: Path
) -> None:
    builder = LakeBuilder(tmp_path / "one")  # of one tokenizer and model, so that it can be exported
    for question in ("What is 17+25?", "What is 40+2?"):
        builder.add_group(["1\n#42", "20\n30\n#42"], [1.0, 1.0], question=question)
    lake = builder.commit()
    mining = mine(lake, MiningConfig()).mining_id
    old = export_clips(lake, tmp_path / "shards", SHARDS, ExportConfig())
    assert (old.clips, len(load_clips(old.folder, builder.tokenizer_hash))) == (2, 2)
    overturned(lake)
    with lake.reader() as reader:
        withdrawn = withdrawn_clips(reader)
        (shard,) = notice_shards(reader, withdrawn, "overturned")
        assert len(reader.rows("select * from clips")) == 1
    assert (shard.clips, shard.noticed, Path(shard.path).parent) == (1, True, old.folder)
    assert json.loads((old.folder / "withdrawn.json").read_text()) == {
        "overturned": sorted(withdrawn[mining])
    }
    (left,) = load_clips(old.folder, builder.tokenizer_hash)
    assert left.clip_id not in withdrawn[mining]
    new = export_clips(lake, tmp_path / "shards", SHARDS, ExportConfig(), mining)
    assert (new.clips, new.dropped, new.folder == old.folder) == (1, {"withdrawn": 1}, False)


def test_a_verdict_that_restores_a_rollout_restores_its_clip_in_shards_too(tmp_path: Path) -> None:
    lake = solved(tmp_path / "lake", "#42\nsurely", "#42")
    mine(lake, MiningConfig())
    export = export_clips(lake, tmp_path / "shards", SHARDS, ExportConfig())
    assert reverify(lake, VERIFY, Scope(), "verifiers_for_tests:nothing_is_right").withdrawn_clips == 1
    assert load_clips(export.folder, LakeBuilder(tmp_path / "x").tokenizer_hash) == []
    assert reverify(lake, VERIFY, Scope(), TROUBLED).withdrawn_clips == 0
    assert len(load_clips(export.folder, LakeBuilder(tmp_path / "x").tokenizer_hash)) == 1


def test_verdicts_on_rollouts_that_are_forgotten_meanwhile_are_not_written(tmp_path: Path) -> None:
    builder = LakeBuilder(tmp_path / "lake")
    builder.add_group(["#1", "#2"], [1.0, 1.0])
    builder.add_group(["#3", "#4"], [1.0, 1.0], question="What is 1+1?")
    lake = builder.commit()
    forgotten: list[Forgot] = []

    def forget_first(num_verdicts: int) -> None:  # all are judged by then, and none is committed
        forgotten.append(forget(Lake.open(lake.folder), [prompt_id("What is 1+1?")]))

    reverify(lake, VERIFY, Scope(), "verifiers_for_tests:nothing_is_right", forget_first)
    assert [done.rows["rollouts"] for done in forgotten] == [2]
    assert num(lake, "verdicts") == num(lake, "verdicts semi join rollouts using (rollout_id)") == 2
