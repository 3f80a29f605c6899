"""The lake keeps what it was given: all of a commit or nothing, for every process, wherever it is moved."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest
from lake_worker import rollout

from pipeline import schema
from pipeline.config import MiningConfig
from pipeline.errors import LakeError
from pipeline.lake import Lake
from pipeline.lake_upkeep import delete_orphans
from pipeline.lake_writer import Writer
from pipeline.mine import mine
from pipeline.news import news_since
from pipeline.quarantine import Refused, quarantine_table
from pipeline.rollouts import rollout_table

WORKER = Path(__file__).with_name("lake_worker.py")


def group(name: str, num_tokens: int = 2) -> dict[str, pa.Table]:
    return {"rollouts": rollout_table([rollout(name, i, num_tokens) for i in (0, 1)])}


def groups_in(lake: Lake, snapshot: int | None = None) -> list[str]:
    with lake.reader(snapshot) as reader:
        return [row["group_id"] for row in reader.rows("select distinct group_id from rollouts order by 1")]


def data_files(lake: Lake) -> list[Path]:
    return sorted(path for path in lake.files.rglob("*") if path.is_file())


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(WORKER), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit code and what was said of each."""
    said = [process.communicate(timeout=600) for process in processes]
    return [(p.returncode, "".join(text)) for p, text in zip(processes, said, strict=True)]


def test_a_new_lake_has_every_table_and_nothing_half_made(empty: Path) -> None:
    with Lake.create(empty).reader() as reader:
        for table, columns in schema.TABLES.items():
            assert [c["column_name"] for c in reader.rows(f"describe lake.{table}")] == columns.names
    assert not list(empty.glob("building*"))


def test_a_folder_without_a_lake_is_no_lake(tmp_path: Path) -> None:
    with pytest.raises(LakeError, match=r"There is no lake in .*--lake"):
        Lake.open(tmp_path)


def test_a_lake_below_a_file_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LakeError, match=r"Cannot make or write a lake in .*Choose another folder"):
        Lake.create(tmp_path / "file" / "lake")


def test_a_catalog_that_is_no_catalog_is_named(tmp_path: Path) -> None:
    (tmp_path / "catalog.sqlite").write_text("no database at all" * 100)
    with pytest.raises(LakeError, match=r"catalog\.sqlite cannot be read: .*Restore it from a backup"):
        Lake.open(tmp_path)


def test_a_lake_of_a_newer_schema_is_refused(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "SCHEMA_VERSION", 2)
    with pytest.raises(LakeError, match=r"has schema 3, this EchoMine knows 2\. Update EchoMine"):
        Lake.open(lake.folder)


def test_a_lake_of_an_older_schema_gets_the_tables_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = {"scorings", "verdicts", "forgotten_prompts"}
    older = {name: columns for name, columns in schema.TABLES.items() if name not in later}
    with monkeypatch.context() as patch:
        patch.setattr(schema, "TABLES", older)
        patch.setattr(schema, "SCHEMA_VERSION", 2)
        patch.setattr(Writer, "_note_spanning_groups", lambda self, rows: None)  # as it once was
        old = Lake.create(tmp_path / "lake")
        for run in ("first", "second"):
            rows = [rollout("a", i) | {"run_id": run} for i in (len(run), len(run) + 1)]
            old.commit({"rollouts": rollout_table(rows)})
    lake = Lake.open(tmp_path / "lake")
    assert groups_in(lake) == ["a"]
    with lake.reader() as reader:
        spanning = "select value from meta where ends_with(key, ' a') order by value"
        assert reader.rows(spanning) == [{"value": "first"}, {"value": "second"}]
    with lake.reader() as reader:
        for table in later:
            assert reader.rows(f"select count(*) as n from lake.{table}") == [{"n": 0}]
        assert reader.rows("select value from meta where key = 'schema_version'") == [{"value": "3"}]
        snapshot = reader.snapshot
    with Lake.open(tmp_path / "lake").reader() as reader:
        assert reader.snapshot == snapshot  # once is enough


def test_the_same_rollout_twice_is_one_row(lake: Lake) -> None:
    twice = pa.concat_tables([group("a")["rollouts"], group("a")["rollouts"]])
    assert lake.commit({"rollouts": twice}) == {"rollouts": 2}
    num_files = len(data_files(lake))
    assert lake.commit(group("a")) == {"rollouts": 0}
    assert len(data_files(lake)) == num_files
    with lake.reader() as reader:
        assert reader.rows("select count(*) as n from rollouts") == [{"n": 2}]


def test_a_commit_whose_second_table_fails_leaves_no_row_and_no_file(lake: Lake) -> None:
    wrong = pa.table({"key": ["k"], "value": ["v"], "no such column": [1]})
    with pytest.raises(LakeError, match="Nothing of this commit was kept"):
        lake.commit({**group("a"), "meta": wrong})
    assert groups_in(lake) == []
    assert data_files(lake) == []
    assert lake.commit(group("a")) == {"rollouts": 2}


def test_a_commit_that_is_tried_again_leaves_one_file(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    insert, calls = Writer._insert, []

    def locked_once(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            raise duckdb.TransactionException("database is locked")
        insert(*arguments)

    monkeypatch.setattr(Writer, "_insert", locked_once)
    lake.commit(group("a"))
    assert len(calls) == 2
    assert len(data_files(lake)) == 1
    assert groups_in(lake) == ["a"]


def test_every_commit_can_be_read_again(lake: Lake) -> None:
    lake.commit(group("a"))
    with lake.reader() as reader:
        first = reader.snapshot
    lake.commit(group("b"))
    assert groups_in(lake, first) == ["a"]
    assert groups_in(lake) == ["a", "b"]
    with lake.reader() as reader:
        assert reader.data_snapshot() == reader.snapshot > first
        assert news_since(reader, first).groups.to_pydict() == {"group_id": ["b"]}
        assert news_since(reader, reader.snapshot).groups.num_rows == 0
    with pytest.raises(LakeError, match=r"has no snapshot 99\. See"), lake.reader(99):
        pass


def test_a_reader_does_not_see_what_is_committed_after_it_opened(lake: Lake) -> None:
    with lake.reader() as reader:
        lake.commit(group("a"))
        assert reader.rows("select count(*) as n from rollouts") == [{"n": 0}]


def test_a_lake_may_be_moved_and_its_old_place_forgotten(lake: Lake, tmp_path: Path) -> None:
    lake.commit(group("a"))
    (tmp_path / "it's new").mkdir()
    moved = Lake.open(Path(shutil.move(lake.folder, tmp_path / "it's new" / "place")))
    moved.commit(group("b"))
    assert groups_in(moved) == ["a", "b"]
    assert mine(moved, MiningConfig()).groups == {"all_success": 2}
    with moved.reader() as reader:
        assert reader.verification(everything=True).damaged() == []
    assert not lake.folder.exists()


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("damage", "problem"), [(flip_a_byte, "SHA-256"), (cut_off, "SHA-256"), (Path.unlink, "is missing")]
)
def test_mining_refuses_a_damaged_file_and_records_nothing(lake: Lake, damage, problem: str) -> None:
    lake.commit(group("a"))
    (path,) = data_files(lake)
    damage(path)
    with pytest.raises(LakeError, match=rf"{path.name} .*{problem}.*Restore it from a backup"):
        mine(lake, MiningConfig())
    with lake.reader() as reader:
        (found,) = reader.verification(everything=True).damaged()
        assert found.path == str(path.relative_to(lake.folder))
        assert problem in found.problem
        assert reader.rows("select * from mining_runs") == []


@pytest.mark.parametrize(
    ("damage", "problem"), [(flip_a_byte, "SHA-256"), (cut_off, "SHA-256"), (Path.unlink, "is missing")]
)
def test_a_file_that_was_damaged_after_a_mining_is_refused_by_the_next(lake: Lake, damage, problem) -> None:
    lake.commit(group("a"))
    mine(lake, MiningConfig())
    path = next(path for path in data_files(lake) if "rollouts" in path.parts)
    damage(path)
    with pytest.raises(LakeError, match=rf"{path.name} .*{problem}.*Restore it from a backup"):
        mine(lake, MiningConfig(clips_per_group=2))


@pytest.mark.parametrize("damage", [cut_off, Path.unlink])
def test_reading_a_damaged_file_is_an_error_of_one_line(lake: Lake, damage) -> None:
    lake.commit(group("a"))
    damage(data_files(lake)[0])
    again = Lake.open(lake.folder)
    with (
        pytest.raises(LakeError, match=r"cannot be read: .*Run `echomine doctor`"),
        again.reader() as reader,
    ):
        reader.rows("select completion_entropies from rollouts")


def test_a_copied_lake_is_read_again_before_its_clips_are_recorded(lake: Lake, tmp_path: Path) -> None:
    lake.commit(group("a"))
    copied = Lake.open(Path(shutil.copytree(lake.folder, tmp_path / "copy")))
    (path,) = data_files(copied)
    times = path.stat()
    flip_a_byte(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a copy that went wrong keeps them
    with pytest.raises(LakeError, match=r"SHA-256"):
        mine(copied, MiningConfig())
    assert mine(lake, MiningConfig()).clips == 1


def test_notes_of_verified_files_that_cannot_be_read_cost_time_only(lake: Lake) -> None:
    lake.commit(group("a"))
    (lake.folder / "verified.json").write_text("{half")
    assert mine(lake, MiningConfig()).clips == 1
    (path,) = (path for path in data_files(lake) if "rollouts" in path.parts)
    noted = json.loads((lake.folder / "verified.json").read_text())
    assert noted[str(path.relative_to(lake.folder))][0] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_full_disk_loses_nothing_and_leaves_nothing(lake: Lake) -> None:
    lake.commit(group("a"))
    before = data_files(lake)
    ((code, said),) = finished([start("fill", lake.folder)])
    assert code == 2, said
    assert "Cannot write" in said
    assert len(said.strip().splitlines()) == 1
    assert data_files(lake) == before
    assert groups_in(lake) == ["a"]


def test_a_lake_made_by_three_at_once_is_one_lake(tmp_path: Path) -> None:
    folder = tmp_path / "lake"
    assert finished([start("create", folder) for _ in range(3)]) == [(0, "")] * 3
    with Lake.open(folder).reader() as reader:
        version = {"key": "schema_version", "value": str(schema.SCHEMA_VERSION)}
        assert reader.rows("select * from meta") == [version]
    assert not list(folder.glob("building*"))


def test_two_writers_of_the_same_groups_write_each_once(lake: Lake) -> None:
    workers = [start("write", lake.folder, "same", 8) for _ in range(2)]
    assert finished(workers) == [(0, "")] * 2
    with lake.reader() as reader:
        counts = "select group_id, count(*) as n from rollouts group by all order by all"
        found = {row["group_id"]: row["n"] for row in reader.rows(counts)}
        assert found == {f"same-{number}": 2 for number in range(8)}
        assert len(reader.rows("from files")) == len(data_files(lake)) == 8


@pytest.mark.slow
def test_two_writers_and_two_readers_meet_no_error_and_lose_nothing(lake: Lake) -> None:
    workers = [start("write", lake.folder, name, 20) for name in ("a", "b")]
    workers += [start("read", lake.folder, 20) for _ in range(2)]
    assert finished(workers) == [(0, "")] * 4
    assert set(groups_in(lake)) == {f"{name}-{number}" for name in ("a", "b") for number in range(20)}
    assert len(data_files(lake)) == 40


@pytest.mark.slow
def test_readers_and_writers_go_on_while_the_lake_is_maintained(lake: Lake) -> None:
    for number in range(6):  # small files, for a maintenance that merges them
        lake.commit(group(f"before-{number}"))
    with lake.reader() as reader:
        workers = [start("write", lake.folder, "during", 10), start("read", lake.folder, 15)]
        maintenance = start("maintain", lake.folder, 5)
        assert finished(workers) == [(0, "")] * 2
        ((code, said),) = finished([maintenance])
        assert code == 0, said
        assert reader.rows("select count(*) as n from rollouts") == [{"n": 12}]  # as when it was opened
    expected = {f"before-{n}" for n in range(6)} | {f"during-{n}" for n in range(10)}
    assert set(groups_in(lake)) == expected
    with lake.reader() as reader:
        assert reader.verification(everything=True).damaged() == []
        assert reader.rows("select count(*) as n from rollouts") == [{"n": 32}]


def test_a_writer_killed_before_its_commit_leaves_only_an_orphan(lake: Lake) -> None:
    lake.commit(group("a"))
    (kept,) = data_files(lake)
    ((code, _),) = finished([start("die", lake.folder)])
    assert code == -signal.SIGKILL
    lake = Lake.open(lake.folder)
    assert mine(lake, MiningConfig()).groups == {"all_success": 1}
    clips = [path for path in data_files(lake) if "echo_clips" in path.parts]
    (orphan,) = set(data_files(lake)) - {kept, *clips}
    partial = kept.with_name(f".{kept.name}.0.partial")
    partial.write_bytes(b"cut off")
    assert delete_orphans(lake) == 0, "it may still be under way"
    os.utime(orphan, (0, 0))
    os.utime(partial, (0, 0))
    note = lake.folder / ".verified.json.0.partial"
    note.write_text("{")
    os.utime(note, (0, 0))
    assert delete_orphans(lake, older_than=timedelta(hours=1)) == 3
    assert not note.exists()
    assert set(data_files(lake)) == {kept, *clips}
    assert lake.commit(group("lost")) == {"rollouts": 2}
    assert groups_in(lake) == ["a", "lost"]


def test_large_rows_are_in_a_data_file_and_not_in_the_catalog(lake: Lake) -> None:
    small, large = (Refused("no", f"dump:{n}", {"line": "x" * n}) for n in (1_000, 1_000_000))
    assert lake.commit({"quarantine": quarantine_table([small])}) == {"quarantine": 1}
    assert not list(lake.folder.glob("files/main/quarantine/*"))
    assert lake.commit({"quarantine": quarantine_table([large])}) == {"quarantine": 1}
    assert len(list(lake.folder.glob("files/main/quarantine/*"))) == 1
    assert lake.commit({"quarantine": quarantine_table([small, large])}) == {"quarantine": 0}


@pytest.mark.parametrize("text", ["it's", "a\x00b", "</script>\x00'; --"])
def test_quarantine_takes_any_text(lake: Lake, text: str) -> None:
    refused = quarantine_table([Refused(text, "dump.jsonl:1", {"run_id": text, "group_id": text})])
    assert lake.commit({"quarantine": refused}) == {"quarantine": 1}
    assert lake.commit({"quarantine": refused}) == {"quarantine": 0}
