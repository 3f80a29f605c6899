"""A lake whose catalog is a PostgreSQL database; what both catalogs do alike is in test_lake.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import duckdb
import pytest
from lake_worker import rollout
from postgres_server import PASSWORD, Server
from test_lake import data_files, finished, group, groups_in, start

from pipeline.catalog import load_extension, session
from pipeline.catalog_postgres import MARKER, postgres_url
from pipeline.errors import LakeError, QueryError
from pipeline.forget import forget
from pipeline.lake import Lake
from pipeline.rollouts import rollout_table


@pytest.fixture
def database(postgres: Server) -> str:
    """The name of a new, empty database."""
    name = f"new_{postgres.execute('select count(*) from pg_database')}"
    postgres.execute(f"create database {name}")
    return name


def test_the_folder_names_the_database_and_holds_no_password(
    postgres: Server, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    lake = Lake.create(tmp_path / "lake", postgres.url_by_tcp(database))
    lake.commit(group("a"))
    address = f"{postgres.url_by_tcp(database)}?connect_timeout=10\n"
    assert (lake.folder / MARKER).read_text() == address
    assert sorted(path.name for path in lake.folder.iterdir()) == [MARKER, "files", "verified.json"]
    assert groups_in(Lake.open(lake.folder)) == ["a"]


def test_a_second_machine_joins_the_lake_that_is_there(
    postgres: Server, database: str, tmp_path: Path
) -> None:
    first = Lake.create(tmp_path / "lake", postgres.url(database))
    first.commit(group("a"))
    again = Lake.create(tmp_path / "lake", postgres.url(database))
    assert groups_in(again) == ["a"]
    (tmp_path / "elsewhere").symlink_to(tmp_path / "lake")  # the same folder, mounted under another name
    elsewhere = Lake.open(tmp_path / "elsewhere")
    elsewhere.commit(group("b"))
    assert groups_in(first) == ["a", "b"]
    with elsewhere.reader() as reader:
        assert reader.verification(everything=True).damaged() == []


def test_a_folder_and_a_database_of_two_lakes_are_not_joined(
    postgres: Server, database: str, tmp_path: Path
) -> None:
    Lake.create(tmp_path / "lake", postgres.url(database)).commit(group("a"))
    with pytest.raises(LakeError, match=r"whose files are not in .*other: files/main/rollouts/.* is missing"):
        Lake.create(tmp_path / "other", postgres.url(database))
    assert not (tmp_path / "other" / MARKER).exists()
    Lake.create(tmp_path / "sqlite")
    with pytest.raises(LakeError, match=r"has its catalog in .*catalog\.sqlite, .* cannot be moved"):
        Lake.create(tmp_path / "sqlite", postgres.url(database))


def test_a_database_of_another_ducklake_is_left_alone(
    postgres: Server, database: str, tmp_path: Path
) -> None:
    with session() as connection:
        load_extension(connection, "postgres")
        attached = f"attach 'ducklake:postgres:{postgres.url(database)}' as lake (data_path '{tmp_path}/')"
        connection.execute(attached)
        connection.execute("create table lake.sales (amount int)")
    with pytest.raises(LakeError, match=r"holds a DuckLake that is none of EchoMine's"):
        Lake.create(tmp_path / "lake", postgres.url(database))
    assert not (tmp_path / "lake" / MARKER).exists()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("postgresql://miner:hidden@db/lake", r"Leave the password out .*PGPASSWORD"),
        ("postgresql://db/lake?password=hidden", r"Leave the password out .*PGPASSWORD"),
        ("postgresql://db/lake?sslmod=require", r"unknown option `sslmod`: did you mean `sslmode`\?"),
        ("postgresql://db/lake?sslkey=/etc/shadow", r"unknown option `sslkey`"),
        ("postgresql://db/lake?options=-c%20log_statement=all", r"unknown option `options`"),
        ("postgresql://db", r"names no database"),
        ("postgresql://db:port/lake", r"cannot be read: .*Give postgresql://user@host:5432/database"),
        ("postgresql://db/la ke", r"is none of PostgreSQL"),
        ("mysql://miner:hidden@db/lake", r"'mysql://miner:…@db/lake' is none of PostgreSQL"),
        ("dbname=lake", r"is none of PostgreSQL"),
    ],
)
def test_an_address_that_is_none_is_refused_without_showing_its_password(text: str, complaint: str) -> None:
    with pytest.raises(LakeError, match=complaint) as refusal:
        postgres_url(text)
    assert "hidden" not in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            lambda url: url.replace("127.0.0.1", "no.such.host.invalid"),
            r"no\.such\.host\.invalid.*Start the server",
        ),
        (
            lambda url: url[: url.rindex(":") + 1] + "1/lake",
            r"Connection refused.*Start the server, or mend",
        ),
        (
            lambda url: url[: url.rindex("/") + 1] + "none",
            r'database "none" does not exist\. Make it with `createdb`',
        ),
        (lambda url: url.replace("echomine@", "nobody@"), r"authentication failed.*PGPASSWORD"),
    ],
    ids=["unknown host", "no server", "no database", "unknown user"],
)
def test_a_server_that_does_not_answer_as_it_should_is_an_error_of_one_line(
    postgres: Server,
    database: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[str], str],
    complaint: str,
) -> None:
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    url = change(postgres.url_by_tcp(database))
    with pytest.raises(LakeError, match=complaint) as refusal:
        Lake.create(tmp_path / "lake", url)
    assert PASSWORD not in str(refusal.value)
    assert not (tmp_path / "lake" / MARKER).exists()
    lake = Lake.create(tmp_path / "lake", postgres.url_by_tcp(database))
    (lake.folder / MARKER).write_text(url)
    with pytest.raises(LakeError, match=complaint):
        Lake.open(lake.folder)


def test_a_wrong_or_missing_password_is_named_but_not_shown(
    postgres: Server, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PGPASSWORD", raising=False)
    with pytest.raises(LakeError, match=r"no password supplied\. Give it in PGPASSWORD or in ~/\.pgpass"):
        Lake.create(tmp_path / "lake", postgres.url_by_tcp(database))
    monkeypatch.setenv("PGPASSWORD", "mistaken")
    with pytest.raises(
        LakeError, match=r"password authentication failed .* Give it in PGPASSWORD"
    ) as refusal:
        Lake.create(tmp_path / "lake", postgres.url_by_tcp(database))
    assert "mistaken" not in str(refusal.value)


def test_a_database_that_lost_its_catalog_is_no_empty_lake(
    postgres: Server, database: str, tmp_path: Path
) -> None:
    lake = Lake.create(tmp_path / "lake", postgres.url(database))
    lake.commit(group("a"))
    postgres.execute(f"drop database {database}")
    postgres.execute(f"create database {database}")
    for way in (Lake.open, Lake.create):
        with pytest.raises(LakeError, match=r"It holds no lake: restore it from a backup"):
            way(lake.folder)
    assert len(data_files(lake)) == 1


@pytest.mark.slow
def test_a_writer_whose_server_drops_its_connections_loses_nothing_when_started_again(
    postgres: Server, database: str, tmp_path: Path
) -> None:
    lake = Lake.create(tmp_path / "lake", postgres.url(database))
    written = 0
    for goal in (2, 5):  # DuckDB ends the whole process if it is in the middle of a commit then
        worker = start("write", lake.folder, "a", 8)
        while worker.poll() is None and written < goal:
            time.sleep(0.2)
            written = len(groups_in(lake))
        drop = f"select count(pg_terminate_backend(pid)) from pg_stat_activity where datname = '{database}'"
        while worker.poll() is None and postgres.execute(drop) == "0":
            pass
        finished([worker])
    assert finished([start("write", lake.folder, "a", 8)]) == [(0, "")]
    with lake.reader() as reader:
        sizes = reader.rows("select group_id, count(*) as n from rollouts group by all")
        assert {row["group_id"]: row["n"] for row in sizes} == {f"a-{number}": 2 for number in range(8)}
        assert reader.verification(everything=True).damaged() == []


def test_text_that_postgresql_cannot_hold_comes_back_as_it_was(
    postgres: Server, database: str, tmp_path: Path
) -> None:
    lake = Lake.create(tmp_path / "lake", postgres.url(database))
    text = "a\0b"  # PostgreSQL's text has no NUL
    lake.commit({"rollouts": rollout_table([rollout("a", i) | {"completion": text} for i in (0, 1)])})
    with lake.reader() as reader:
        assert reader.rows("select distinct completion from rollouts") == [{"completion": text}]


@pytest.mark.parametrize(
    "query",
    [
        "from __ducklake_metadata_lake.pg_catalog.pg_authid",
        "from __DUCKLAKE_METADATA_LAKE.information_schema.tables",
        "select 1 from rollouts where exists (from __ducklake_metadata_lake.secrets)",
        "describe __ducklake_metadata_lake.secrets",
        "from postgres_query('__ducklake_metadata_lake', 'select passwd from pg_shadow')",
        "call postgres_execute('__ducklake_metadata_lake', 'drop table secrets')",
        "from postgres_scan('{url}', 'public', 'secrets')",
        "attach '{url}' as mine (type postgres)",
        "insert into __ducklake_metadata_lake.secrets values ('mine')",
        "delete from __ducklake_metadata_lake.ducklake_snapshot",
    ],
)
def test_a_users_query_reads_the_lake_and_nothing_else_in_the_database(lake: Lake, query: str) -> None:
    url = getattr(lake.catalog, "url")  # noqa: B009
    with session() as connection:
        load_extension(connection, "postgres")
        connection.execute(f"attach '{url}' as newest (type postgres)")
        connection.execute("create table newest.secrets as select 'secret' as a")
    with lake.reader() as reader, pytest.raises(QueryError):
        reader.select(query.replace("{url}", url))


def test_a_users_query_on_a_locked_down_session_still_reaches_the_catalog(lake: Lake) -> None:
    lake.commit(group("a"))
    with lake.reader() as reader:
        for _ in range(2):
            assert reader.select("select count(*) as n from rollouts").table.to_pylist() == [{"n": 2}]
        assert reader.select("from __ducklake_metadata_lake.ducklake_data_file").table.num_rows == 1
        with pytest.raises(duckdb.Error):
            reader.connection.execute("from read_csv('/etc/passwd')")


def test_no_prompt_is_forgotten_where_the_server_keeps_old_rows(lake: Lake) -> None:
    with pytest.raises(LakeError, match=r"cannot be forgotten there\. Import its dumps into a new lake"):
        forget(lake, ["0" * 32])
