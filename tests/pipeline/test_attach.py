"""The lines that `echomine sql --attach` prints open the lake where they are pasted, for reading."""

from __future__ import annotations

import shutil
import subprocess
import sys

import duckdb
import pytest
from attempts import WRITES
from sample_lake import SampleLake

from flows.cli import main
from pipeline.attach import attach_lines
from pipeline.lake import Lake

PROGRAMS = ("the DuckDB command line", "Python", "polars")


@pytest.fixture(scope="module")
def lake(sample_lake: SampleLake, tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """The sample lake, moved into a folder whose name must be quoted."""
    folder = tmp_path_factory.mktemp("attach") / "a b" / 'it\'s "mine"'
    shutil.copytree(sample_lake.lake.folder, folder)
    return Lake.open(folder)


@pytest.fixture(scope="module")
def attached(lake: Lake) -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect()
    for line in attach_lines(lake)["the DuckDB command line"]:
        connection.execute(line)
    return connection


def num_rollouts(lake: Lake) -> int:
    with lake.reader() as reader:
        return int(reader.rows("select count(*) as n from rollouts")[0]["n"])


def test_the_command_prints_two_lines_for_each_program(
    lake: Lake, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sql", "--attach", "--lake", str(lake.folder)]) == 0
    blocks = [block.splitlines() for block in capsys.readouterr().out.strip().split("\n\n")]
    assert blocks == [[f"# {program}", *lines] for program, lines in attach_lines(lake).items()]
    assert [block[0][2:] for block in blocks] == list(PROGRAMS)
    assert {len(block) for block in blocks} == {3}


def test_the_lines_for_duckdb_open_the_lake(lake: Lake, attached: duckdb.DuckDBPyConnection) -> None:
    assert attached.execute("select count(*) from rollouts").fetchone() == (num_rollouts(lake),)


@pytest.mark.parametrize(
    ("program", "then"),
    [
        ("Python", "print(lake.sql('select count(*) from rollouts').fetchone()[0])"),
        ("polars", "print(type(rollouts).__module__, rollouts.height)"),
    ],
)
def test_the_lines_for_python_and_polars_run_as_they_are(lake: Lake, program: str, then: str) -> None:
    code = "\n".join([*attach_lines(lake)[program], then])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    last = done.stdout.splitlines()[-1]
    assert last.split()[-1] == str(num_rollouts(lake))
    assert program != "polars" or last.startswith("polars.")


def test_the_lines_of_a_snapshot_open_the_lake_as_of_it(lake: Lake) -> None:
    connection = duckdb.connect()
    for line in attach_lines(lake, snapshot=1)["the DuckDB command line"]:
        connection.execute(line)
    assert connection.execute("select count(*) from rollouts").fetchone() == (0,)


@pytest.mark.parametrize("query", [query for query in WRITES if "rollouts" in query and "copy" not in query])
def test_what_was_attached_cannot_be_written(
    lake: Lake, attached: duckdb.DuckDBPyConnection, query: str
) -> None:
    before = num_rollouts(lake)
    with pytest.raises(duckdb.Error):
        attached.execute(query)
    assert num_rollouts(lake) == before


@pytest.mark.parametrize(
    "query",
    [
        "create table x (a int)",
        "create view x as from rollouts",
        "create schema x",
        "drop table rollouts",
        "call ducklake_expire_snapshots('lake', versions => [1])",
        "call ducklake_set_option('lake', 'data_inlining_row_limit', '1')",
    ],
)
def test_what_was_attached_cannot_be_changed(
    lake: Lake, attached: duckdb.DuckDBPyConnection, query: str
) -> None:
    before = lake.catalog.path.read_bytes()
    with pytest.raises(duckdb.Error):
        attached.execute(query)
    assert lake.catalog.path.read_bytes() == before
