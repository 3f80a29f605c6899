"""Upkeep: fewer files, the same rows, snapshots and minings; and nobody who reads or writes notices."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lake_worker import rollout

from pipeline.checks import run_checks
from pipeline.config import MaintainConfig, MiningConfig
from pipeline.doctor import examine_lake
from pipeline.errors import LakeError
from pipeline.lake import Lake
from pipeline.lake_upkeep import delete_orphans, maintained
from pipeline.maintenance import maintain, merge_small_files, record_merged_files
from pipeline.mine import mine
from pipeline.news import touched_groups
from pipeline.rollouts import rollout_table
from pipeline.schema import CLIP_USES

WORKER = Path(__file__).with_name("lake_worker.py")
AT_ONCE = MaintainConfig(grace_hours=0)


def put(lake: Lake, *names: str) -> int:
    """Commits a group for each name, one after the other; the newest snapshot."""
    for name in names:
        lake.commit({"rollouts": rollout_table([rollout(name, i) for i in (0, 1)])})
    with lake.reader() as reader:
        return reader.snapshot


def groups_in(lake: Lake, snapshot: int | None = None) -> list[str]:
    with lake.reader(snapshot) as reader:
        return [row["group_id"] for row in reader.rows("select distinct group_id from rollouts order by 1")]


def snapshots_of(lake: Lake) -> list[int]:
    with lake.reader() as reader:
        return [row["snapshot"] for row in reader.history()]


def files_of(lake: Lake, table: str = "rollouts") -> list[Path]:
    return sorted((lake.files / "main" / table).glob("*.parquet"))


def test_merged_files_hold_the_same_rows_at_every_snapshot_and_their_hash_is_recorded(lake: Lake) -> None:
    snapshots = [put(lake, name) for name in "abcd"]
    done = maintain(lake, MaintainConfig())
    assert (done.merged_files, done.hashed_files, done.expired_snapshots) == (4, 1, 0)
    for number, snapshot in enumerate(snapshots, 1):
        assert groups_in(lake, snapshot) == list("abcd")[:number]
    with lake.reader() as reader:
        assert reader.unrecorded_files() == []
        (path,) = reader.data_files()
        assert reader.recorded_hashes().keys() > {path}
        assert reader.verification(everything=True).damaged() == []
        news = touched_groups(reader, snapshots[1])
        assert sorted(news["group_id"].to_pylist()) == ["c", "d"], "merged rows are no news"
        assert touched_groups(reader, snapshots[3]).num_rows == 0
    assert len(files_of(lake)) == 5, "the merged ones stay for who reads them"


def test_upkeep_once_more_does_nothing_and_a_dry_run_says_what_would_be_done(lake: Lake) -> None:
    put(lake, *"abc")
    before = snapshots_of(lake)
    said = maintain(lake, MaintainConfig(), dry_run=True)
    assert (said.merged_files, snapshots_of(lake), len(files_of(lake))) == (3, before, 3)
    assert maintain(lake, MaintainConfig()).merged_files == 3
    before = snapshots_of(lake)
    assert set(maintain(lake, MaintainConfig()).as_dict().values()) == {0}
    assert snapshots_of(lake) == before


def test_replaced_files_are_deleted_after_their_grace(lake: Lake) -> None:
    put(lake, *"abc")
    assert maintain(lake, MaintainConfig()).deleted_files == 0
    said = maintain(lake, AT_ONCE, dry_run=True)
    assert (said.deleted_files, len(files_of(lake))) == (3, 4)
    assert maintain(lake, AT_ONCE).deleted_files == 3
    assert len(files_of(lake)) == 1
    assert groups_in(lake) == ["a", "b", "c"]


def test_a_mining_is_the_same_mining_before_and_after_a_merge(lake: Lake) -> None:
    then = put(lake, *"ab")
    old = mine(lake, MiningConfig())
    put(lake, *"cd")
    new = mine(lake, MiningConfig())
    news = mine(lake, MiningConfig(), since_snapshot=then)
    maintain(lake, MaintainConfig())
    assert mine(lake, MiningConfig(), snapshot=then) == old
    assert mine(lake, MiningConfig()) == new
    assert mine(lake, MiningConfig(), since_snapshot=then) == news
    with lake.reader() as reader:
        assert reader.rows("select count(*) as n from mining_runs") == [{"n": 3}]
    again = mine(lake, MiningConfig(min_step_entropy=0.1), since_snapshot=then)
    assert (again.snapshot, again.groups) == (new.snapshot, {"all_success": 2})


def test_named_snapshots_are_kept_and_the_others_expire(lake: Lake) -> None:
    first = put(lake, "a")
    mined = mine(lake, MiningConfig())
    unnamed = put(lake, "b")
    put(lake, "c")
    trained = mine(lake, MiningConfig(), snapshot=unnamed)
    newest = put(lake, "d")
    assert maintain(lake, MaintainConfig()).expired_snapshots == 0, "all were the newest a moment ago"
    assert maintain(lake, AT_ONCE).expired_snapshots > 0
    kept = snapshots_of(lake)
    assert {0, mined.snapshot, trained.snapshot, newest} <= set(kept)
    assert groups_in(lake, first) == ["a"]
    assert groups_in(lake, trained.snapshot) == ["a", "b"]
    assert set(maintain(lake, AT_ONCE).as_dict().values()) == {0}

    nothing_named = MaintainConfig(grace_hours=0, retention_days=0)
    assert maintain(lake, nothing_named).expired_snapshots > 0
    assert not {mined.snapshot, trained.snapshot} & set(snapshots_of(lake))
    assert groups_in(lake) == ["a", "b", "c", "d"]
    with pytest.raises(LakeError, match="has no snapshot"):
        groups_in(lake, first)


def test_a_training_keeps_the_snapshot_of_a_mining_that_is_older(lake: Lake) -> None:
    put(lake, "a")
    mined = mine(lake, MiningConfig())
    put(lake, "b")
    with maintained(lake) as connection:
        connection.execute("update mining_runs set created_at = now() - interval 100 days")
    assert mined.snapshot in snapshots_of(lake)
    with lake.reader() as reader:
        (clip,) = reader.rows("select clip_id from echo_clips")
    use = {"training_id": "t", "optim_step": 0, "clip_loss": 0.5, **clip}
    lake.commit({"clip_uses": pa.Table.from_pylist([use], CLIP_USES)})
    with maintained(lake) as connection:
        connection.execute("update clip_uses set created_at = now() - interval 10 days")
    maintain(lake, AT_ONCE)
    assert mined.snapshot in snapshots_of(lake)
    maintain(lake, MaintainConfig(grace_hours=0, retention_days=5))
    assert mined.snapshot not in snapshots_of(lake)


def test_a_reader_of_an_old_snapshot_reads_on_through_upkeep(lake: Lake) -> None:
    first = put(lake, "a")
    put(lake, *"bcd")
    with lake.reader(first) as reader:
        assert reader.rows("select count(*) as n from rollouts") == [{"n": 2}]
        maintain(lake, MaintainConfig(grace_hours=0, retention_days=0))
        put(lake, "e")
        maintain(lake, MaintainConfig(grace_hours=0, retention_days=0))
        assert reader.rows("select count(*) as n, min(group_id) as g from rollouts") == [{"n": 2, "g": "a"}]
    maintain(lake, MaintainConfig(grace_hours=0, retention_days=0))
    assert first not in snapshots_of(lake)


def test_a_merge_that_was_killed_before_its_hashes_were_recorded_is_named_and_finished(lake: Lake) -> None:
    put(lake, *"ab")
    assert merge_small_files(lake, MaintainConfig()) == 2
    (finding,) = [finding for finding in examine_lake(lake.folder) if not finding.ok]
    assert finding.name == "check unrecorded_files"
    assert "echomine maintain" in finding.text
    with lake.reader(1) as reader:
        assert all(check.num_offending == 0 for check in run_checks(reader)), "none was merged by then"
    assert maintain(lake, MaintainConfig()).hashed_files == 1
    assert all(finding.ok for finding in examine_lake(lake.folder))


def test_a_merged_file_that_is_lost_before_its_hash_was_recorded_is_named(lake: Lake) -> None:
    put(lake, *"ab")
    before = files_of(lake)
    merge_small_files(lake, MaintainConfig())
    (merged,) = set(files_of(lake)) - set(before)
    merged.unlink()
    with pytest.raises(LakeError, match=rf"{merged.name}.*--set-aside"):
        record_merged_files(lake)


def test_upkeep_names_a_night_whose_notes_are_damaged(lake: Lake) -> None:
    put(lake, "a")
    (lake.folder / "runs" / "night").mkdir(parents=True)
    (lake.folder / "runs" / "night" / "run.json").write_text('{"snapshot": 1')
    with pytest.raises(LakeError, match=r"runs/night/run.json cannot be read: .*backup"):
        maintain(lake, MaintainConfig())


def test_a_damaged_file_is_named_and_not_merged(lake: Lake) -> None:
    put(lake, *"ab")
    path = files_of(lake)[0]
    content = bytearray(path.read_bytes())
    times = path.stat()
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(LakeError, match=rf"{path.name} .*SHA-256.*nothing was merged"):
        maintain(lake, MaintainConfig())
    assert len(files_of(lake)) == 2


def test_a_merged_file_costs_no_more_bytes_than_its_parts(lake: Lake) -> None:
    draws = range(40)
    for number in range(3):
        rows = [rollout(f"{number}-{i // 8}", i % 8, num_tokens=400) for i in draws]
        for i, row in enumerate(rows):
            row["completion_ids"] = [(7919 * i * k) % 32_003 for k in range(400)]
            row["completion_entropies"] = [((i + 1) * k * 0.37) % 3.1 for k in range(400)]
        lake.commit({"rollouts": rollout_table(rows)})
    parts = files_of(lake)
    maintain(lake, MaintainConfig())
    (merged,) = set(files_of(lake)) - set(parts)
    assert merged.stat().st_size <= sum(path.stat().st_size for path in parts)
    columns = pq.read_metadata(merged).row_group(0)
    floats = [columns.column(i) for i in range(columns.num_columns)]
    split = {c.path_in_schema for c in floats if "BYTE_STREAM_SPLIT" in c.encodings}
    assert "completion_entropies.list.element" in split


def test_a_writer_and_a_reader_go_on_while_the_lake_is_maintained(lake: Lake) -> None:
    put(lake, *"abc")
    commands = [("write", lake.folder, "w", 8), ("read", lake.folder, 8)]
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for command in commands
    ]
    rounds = 0
    while any(worker.poll() is None for worker in workers):
        maintain(lake, MaintainConfig(retention_days=0))
        rounds += 1
    assert [(worker.returncode, worker.communicate()[0]) for worker in workers] == [(0, b"")] * 2
    assert rounds > 1
    assert groups_in(lake) == sorted([*"abc", *(f"w-{number}" for number in range(8))])
    maintain(lake, AT_ONCE)
    with lake.reader() as reader:
        assert reader.verification(everything=True).damaged() == []
        assert reader.unrecorded_files() == []
    assert delete_orphans(lake, timedelta(0)) == 0
