"""A damaged data file is set aside: the lake works on without it, and its rows can be brought back."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from lake_worker import rollout
from sample_lake import character_tokenizer
from test_lake import cut_off, data_files, finished, flip_a_byte, group, groups_in, start

from flows.cli import main
from pipeline.config import MaintainConfig, MiningConfig
from pipeline.doctor import examine_lake
from pipeline.errors import LakeError
from pipeline.imports.core import import_rollouts, with_formats
from pipeline.ingest import Ingested
from pipeline.lake import Lake
from pipeline.lake_writer import INLINED_ROWS
from pipeline.maintenance import maintain
from pipeline.mine import mine
from pipeline.schema import CLIP_USES, QUARANTINE, VERDICTS
from pipeline.set_aside import SetAside, set_aside

TOKENIZER = character_tokenizer()
DAMAGE = pytest.mark.parametrize("damage", [cut_off, flip_a_byte, Path.unlink])


def dump(path: Path, *groups: str, run_id: str = "run") -> Path:
    rows = [rollout(name, index) | {"run_id": run_id} for name in groups for index in (0, 1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(lake: Lake, sql: str) -> list[dict[str, Any]]:
    with lake.reader() as reader:
        return reader.rows(sql)


def newest(lake: Lake) -> int:
    with lake.reader() as reader:
        return reader.snapshot


def file_of(lake: Lake, group_id: str) -> Path:
    (row,) = rows_of(lake, f"select distinct filename from rollouts where group_id = '{group_id}'")
    return Path(row["filename"])


def bad(lake: Lake) -> list[str]:
    return [finding.name for finding in examine_lake(lake.folder) if not finding.ok]


@pytest.fixture
def two_imports(lake: Lake, tmp_path: Path) -> tuple[Lake, Path]:
    """A lake of two imports in a file each, and the dump of the second."""
    import_rollouts(lake, with_formats([dump(tmp_path / "first.jsonl", "a")]), TOKENIZER)
    second = dump(tmp_path / "second.jsonl", "b", "c", run_id="run-2")
    import_rollouts(lake, with_formats([second]), TOKENIZER)
    return lake, second


@DAMAGE
def test_the_same_dump_brings_exactly_the_lost_rollouts_back(
    two_imports: tuple[Lake, Path], damage: Callable[[Path], None]
) -> None:
    lake, second = two_imports
    columns = "* exclude (created_at)"
    before = rows_of(lake, f"select {columns} from rollouts order by rollout_id")
    path = file_of(lake, "b")
    damage(path)
    missing = not path.exists()
    content = b"" if missing else path.read_bytes()
    (lost,) = set_aside(lake)
    relative = str(path.relative_to(lake.folder))
    assert (lost.path, lost.table, lost.num_rows) == (relative, "rollouts", 4)
    assert (lost.first_run, lost.last_run) == ("run-2", "run-2")
    assert not path.exists()
    if missing:
        assert (lost.kept, lost.problem) == (None, "is missing")
    else:
        assert lost.kept is not None
        assert (lake.folder / lost.kept).read_bytes() == content
        assert "SHA-256 differs" in lost.problem
    assert groups_in(lake) == ["a"]
    assert bad(lake) == []
    assert mine(lake, MiningConfig()).groups == {"all_success": 1}
    assert import_rollouts(lake, with_formats([second]), TOKENIZER).rows == Ingested(written=4)
    assert rows_of(lake, f"select {columns} from rollouts order by rollout_id") == before
    assert mine(lake, MiningConfig()).groups == {"all_success": 3}
    assert bad(lake) == []


def test_quarantine_names_the_file_once_and_a_second_run_does_nothing(
    two_imports: tuple[Lake, Path],
) -> None:
    lake, _ = two_imports
    flip_a_byte(file_of(lake, "b"))
    (lost,) = set_aside(lake)
    (row,) = rows_of(lake, "from quarantine")
    assert row["reason"] == f"damaged data file: it {lost.problem}"
    assert (row["source"], row["run_id"]) == (lost.path, "run-2")
    assert SetAside(**{k: v for k, v in json.loads(row["row"]).items() if k != "run_id"}) == lost
    snapshot = newest(lake)
    assert set_aside(lake) == []
    assert newest(lake) == snapshot


@pytest.mark.parametrize("after", ["nothing", "moved", "ended"])
def test_killed_between_two_steps_and_run_again_it_ends_as_if_undisturbed(
    two_imports: tuple[Lake, Path], after: str
) -> None:
    lake, _ = two_imports
    path = file_of(lake, "b")
    flip_a_byte(path)
    content = path.read_bytes()
    ((code, _),) = finished([start("set_aside", lake.folder, after)])
    assert code == -signal.SIGKILL
    assert path.exists() == (after == "nothing")
    set_aside(lake)
    (row,) = rows_of(lake, "from quarantine")
    assert "SHA-256 differs" in row["reason"]
    assert groups_in(lake) == ["a"]
    (kept,) = (lake.folder / "damaged").rglob("*.parquet*")
    assert kept.read_bytes() == content
    assert kept == lake.folder / json.loads(row["row"])["kept"]
    assert bad(lake) == []


def test_an_older_snapshot_names_the_file_and_says_what_is_wrong_until_it_is_put_back(
    two_imports: tuple[Lake, Path],
) -> None:
    lake, _ = two_imports
    path, then = file_of(lake, "b"), newest(lake)
    backup = path.read_bytes()
    path.unlink()
    set_aside(lake)
    with pytest.raises(LakeError, match=r"cannot be read: .*Run `echomine doctor`"):
        groups_in(lake, then)
    with pytest.raises(LakeError, match=rf"{path.name} .* is missing"):
        mine(lake, MiningConfig(), snapshot=then)
    path.write_bytes(backup)
    assert groups_in(lake, then) == ["a", "b", "c"]
    assert groups_in(lake) == ["a"]


def test_a_backup_of_the_file_can_be_imported_after_it_was_set_aside(
    two_imports: tuple[Lake, Path], tmp_path: Path
) -> None:
    lake, _ = two_imports
    before = rows_of(lake, "select * from rollouts order by rollout_id")
    path = file_of(lake, "b")
    backup = tmp_path / path.name
    backup.write_bytes(path.read_bytes())
    cut_off(path)
    set_aside(lake)
    assert import_rollouts(lake, with_formats([backup]), TOKENIZER).rows == Ingested(written=4)
    assert rows_of(lake, "select * from rollouts order by rollout_id") == before


def test_the_news_since_before_the_lost_file_can_be_mined(two_imports: tuple[Lake, Path]) -> None:
    lake, second = two_imports
    path = file_of(lake, "b")
    flip_a_byte(path)
    set_aside(lake)
    assert mine(lake, MiningConfig(), since_snapshot=1).groups == {"all_success": 1}
    lost = newest(lake)
    import_rollouts(lake, with_formats([second]), TOKENIZER)
    assert mine(lake, MiningConfig(), since_snapshot=lost).groups == {"all_success": 2}
    assert mine(lake, MiningConfig(), since_snapshot=1).groups == {"all_success": 3}


def test_upkeep_goes_on_and_deletes_nothing_that_was_set_aside(two_imports: tuple[Lake, Path]) -> None:
    lake, second = two_imports
    path = file_of(lake, "b")
    path.unlink()
    with pytest.raises(LakeError, match=rf"{path.name} .*is missing.*--set-aside"):
        maintain(lake, MaintainConfig())
    path.write_bytes(b"cut")
    (lost,) = set_aside(lake)
    import_rollouts(lake, with_formats([second]), TOKENIZER)
    assert maintain(lake, MaintainConfig(grace_hours=0)).merged_files == 2
    assert lost.kept is not None
    assert (lake.folder / lost.kept).read_bytes() == b"cut"
    assert groups_in(lake) == ["a", "b", "c"]
    assert mine(lake, MiningConfig(), since_snapshot=1).groups == {"all_success": 3}
    assert bad(lake) == []


def test_clips_of_a_lost_file_come_back_under_their_names_with_the_same_mining(lake: Lake) -> None:
    lake.commit(group("a"))
    mining = mine(lake, MiningConfig())
    clips = rows_of(lake, "from echo_clips")
    (path,) = (path for path in data_files(lake) if "echo_clips" in path.parts)
    flip_a_byte(path)
    (lost,) = set_aside(lake)
    assert (lost.table, lost.num_rows, lost.first_run) == ("echo_clips", 1, None)
    assert bad(lake) == ["check miscounted_minings"]
    assert mine(lake, MiningConfig()).mining_id == mining.mining_id
    assert rows_of(lake, "from echo_clips") == clips
    assert bad(lake) == []


NOW = datetime(2026, 3, 1, tzinfo=UTC)
MANY = range(INLINED_ROWS + 1)  # so that they are in a data file
TABLES = {
    "verdicts": pa.Table.from_pylist(
        [{"rollout_id": "r", "verifier": "exact", "reward": 1.0, "judged_at": NOW}], VERDICTS
    ),
    "quarantine": pa.Table.from_pylist([{"reason": f"bad {n}", "row": "{}"} for n in MANY], QUARANTINE),
    "clip_uses": pa.Table.from_pylist([{"training_id": "t", "optim_step": n} for n in MANY], CLIP_USES),
}


@pytest.mark.parametrize(
    ("table", "damage"), [("verdicts", cut_off), ("quarantine", Path.unlink), ("clip_uses", flip_a_byte)]
)
def test_a_file_of_any_table_is_set_aside(lake: Lake, table: str, damage: Callable[[Path], None]) -> None:
    lake.commit(group("a"))
    lake.commit({table: TABLES[table]})
    (path,) = (path for path in data_files(lake) if table in path.parts)
    damage(path)
    (lost,) = set_aside(lake)
    assert (lost.table, lost.num_rows) == (table, TABLES[table].num_rows)
    assert rows_of(lake, f"select count(*) as n from {table}") == [{"n": int(table == "quarantine")}]
    assert [row["source"] for row in rows_of(lake, "from quarantine")] == [lost.path]
    assert bad(lake) == []
    assert lake.commit({table: TABLES[table]}) == {table: TABLES[table].num_rows}


def test_a_file_that_cannot_be_moved_changes_nothing(two_imports: tuple[Lake, Path]) -> None:
    lake, _ = two_imports
    cut_off(file_of(lake, "b"))
    snapshot = newest(lake)
    (lake.folder / "damaged").write_text("a file in the way")
    with pytest.raises(LakeError, match=r"Cannot move .*the catalog was not changed"):
        set_aside(lake)
    assert newest(lake) == snapshot
    assert bad(lake)[0].startswith("file files/main/rollouts/")


def test_the_doctor_says_what_is_lost_and_how_it_comes_back(
    two_imports: tuple[Lake, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    lake, _ = two_imports
    mine(lake, MiningConfig())
    path = file_of(lake, "b")
    flip_a_byte(path)
    assert main(["doctor", "--lake", str(lake.folder)]) == 2
    assert "`echomine doctor --set-aside`" in capfd.readouterr().out
    main(["doctor", "--set-aside", "--lake", str(lake.folder)])
    lines = capfd.readouterr().out.splitlines()
    (line,) = (line for line in lines if f"set aside {os.path.relpath(path, lake.folder)}" in line)
    assert "it held 4 rows of run-2" in line
    assert f"It is now {lake.folder}/damaged/main/rollouts/{path.name}." in line
    assert "echomine import rollouts COPY --format canonical" in line
    (line,) = (line for line in lines if "lost clips" in line)
    assert "at least 2 groups lost rollouts that 2 recorded clips are of" in line
