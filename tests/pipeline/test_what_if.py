"""Simulated minings: what they compare, and that nothing of them stays."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict

import pytest
from sample_lake import SampleLake

from flows.cli import main
from pipeline.config import MiningConfig
from pipeline.errors import ConfigError, LakeError, NothingToMine
from pipeline.lake import Lake
from pipeline.mine import mine
from pipeline.what_if import Overlap, Simulation, parse_changes, simulate


@pytest.fixture
def what_if(sample_lake: SampleLake):
    def run(text: str, **options: object) -> Simulation:
        return simulate(sample_lake.lake, parse_changes(text), **options)  # type: ignore[arg-type]

    return run


def state(lake: Lake) -> object:
    with lake.reader() as reader:
        return reader.snapshot, reader.rows("select * from mining_runs order by mining_id")


def test_the_same_settings_give_the_last_mining_again(what_if, sample_lake):
    again = what_if("clips_per_group=2")
    assert again.mining_id == sample_lake.mining_id
    assert again.what_if == again.last
    assert again.overlap == Overlap(both=9, only_what_if=0, only_last=0)


def test_a_wider_scope_finds_the_old_clips_and_new_ones(what_if, sample_lake):
    before = state(sample_lake.lake)
    wider = what_if("scope=any_success,clips_per_group=4")
    assert wider.changes == {"scope": "any_success", "clips_per_group": 4}
    assert wider.overlap == Overlap(both=9, only_what_if=4, only_last=0)
    assert (wider.last.clips, wider.what_if.clips) == (9, 13)
    assert wider.what_if.clip_tokens > wider.last.clip_tokens
    assert state(sample_lake.lake) == before, "nothing was written"


def test_a_damaged_file_is_named_and_nothing_is_simulated(sample_lake, tmp_path):
    shutil.copytree(sample_lake.lake.folder, tmp_path / "lake")
    copy = Lake.open(tmp_path / "lake")
    path = next(copy.files.rglob("rollouts/*.parquet"))
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(LakeError, match=rf"{path.name} .*SHA-256 differs.*nothing was mined"):
        simulate(copy, {"clips_per_group": "4"})


def test_a_simulation_finds_what_the_mining_with_its_settings_then_finds(what_if, sample_lake, tmp_path):
    shutil.copytree(sample_lake.lake.folder, tmp_path / "lake")
    simulated = what_if("clips_per_group=1,max_policy_lag=none,min_step_entropy=0.1").what_if
    mined = mine(Lake.open(tmp_path / "lake"), MiningConfig(min_step_entropy=0.1))
    assert (mined.clips, mined.groups, mined.dropped) == (
        simulated.clips,
        simulated.groups,
        simulated.dropped,
    )


def test_a_run_is_compared_with_its_own_last_mining(what_if):
    # 3+9 and 6+7 are solved under the first version; of each two clips with the same tokens, one stays
    simulation = what_if("clips_per_group=2", run_id="run-4")
    assert (simulation.last.clips, simulation.last.groups_with_clips, simulation.last.clip_tokens) == (
        2,
        2,
        20,
    )
    assert simulation.last.mean_step_entropy == 0.25
    assert simulation.what_if.dropped == {"duplicate": 2}
    assert simulation.overlap == Overlap(both=2, only_what_if=0, only_last=0)


def test_no_clip_has_no_mean_entropy(what_if):
    nothing = what_if("min_step_entropy=100").what_if
    assert (nothing.clips, nothing.clip_tokens, nothing.mean_step_entropy) == (0, 0, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scop=any_success", r"`scop` in --what-if: did you mean `scope`\?"),
        ("scope=all", r"`scope` in --what-if is 'all'"),
        ("clips_per_group=two", "valid integer"),
        ("clips_per_group=", "no setting"),
        ("", "no setting"),
    ],
)
def test_a_wrong_setting_is_named(what_if, text, message):
    with pytest.raises(ConfigError, match=message):
        what_if(text)


def test_without_a_mining_there_is_nothing_to_compare_with(what_if, lake):
    with pytest.raises(NothingToMine, match="never mined"):
        simulate(lake, {"max_clips": "1"})
    with pytest.raises(NothingToMine, match="Run run-9 was never mined"):
        what_if("max_clips=1", run_id="run-9")


def test_the_command_prints_the_comparison_for_people_and_programs(what_if, sample_lake, capsys):
    lake = ["--lake", str(sample_lake.lake.folder)]
    assert main(["mine", "--what-if", "scope=any_success", "--json", *lake]) == 0
    expected = json.loads(json.dumps(asdict(what_if("scope=any_success"))))
    assert json.loads(capsys.readouterr().out) == expected
    assert main(["mine", "--what-if", "max_policy_lag=none", *lake]) == 0
    shown = capsys.readouterr().out
    assert "what if max_policy_lag=none" in shown
    assert "Nothing was written." in shown
