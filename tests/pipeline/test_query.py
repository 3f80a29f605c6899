"""A user's query reads the lake, all of it, and nothing else."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sample_lake import SampleLake

from pipeline.errors import QueryError
from pipeline.lake_reader import Reader
from pipeline.query import Selection

Run = Callable[[str], Selection]

# Each holds {outside}, a folder beyond the lake with secrets in it, or {lake}, the lake's data files.
WRITES = [
    "insert into rollouts select * from rollouts",
    "delete from lake.rollouts",
    "update lake.rollouts set reward = 1",
    "merge into lake.rollouts using rollouts as r on true when matched then delete",
    "with gone as (delete from lake.rollouts returning *) from gone",
    "truncate lake.rollouts",
    "create table x (a int)",
    "create temp table x as select 1",
    "create temp macro x() as 1",
    "alter table lake.rollouts drop column reward",
    "drop view groups",
    "copy rollouts to '{outside}/stolen.csv'",
    "copy (select 1) to '{lake}/stolen.csv'",
    "export database '{outside}/stolen'",
    "comment on table lake.rollouts is 'x'",
    "begin",
    "vacuum",
    "checkpoint",
]
SETTINGS = [
    "attach '{outside}/other.sqlite' as other (type sqlite)",
    "detach lake",
    "use memory",
    "pragma database_list",
    "set threads = 1",
    "reset threads",
    "prepare p as select 1",
    "call ducklake_snapshots('lake')",
    "call ducklake_expire_snapshots('lake')",
    "call sqlite_attach('{outside}/other.sqlite')",
    "install httpfs",
    "load sqlite",
]
FILES = [
    "from read_csv('{outside}/secret.csv')",
    "from READ_CSV('{outside}/secret.csv')",
    "from system.main.read_parquet('{outside}/secret.parquet')",
    "from parquet_metadata('{outside}/secret.parquet')",
    "from read_text('/etc/passwd')",
    "from read_blob('/etc/passwd')",
    "from glob('/*')",
    "from glob('{lake}/**')",
    "from sniff_csv('{outside}/secret.csv')",
    "from '{outside}/secret.parquet'",
    "from '{outside}/secret.csv'",
    'from "{outside}/secret.csv"',
    "from '{lake}/../../../outside/secret.csv'",
    "describe '{outside}/secret.csv'",
    "summarize '{outside}/secret.csv'",
    "from read_duckdb('{outside}/other.duckdb')",
    "from sqlite_scan('{outside}/other.sqlite', 'secret')",
    "from __ducklake_metadata_lake.sqlite_master",
    "from system.main.\"SQLITE_SCAN\"('{outside}/other.sqlite', 'secret')",
    "from sqlite_query('{outside}/other.sqlite', 'select 1')",
    "from '{outside}/other.sqlite'",
    "from '{outside}/other.sqlite'.secret",
    "from 'https://example.org/data.parquet'",
]
HIDDEN = [
    "select (select a from read_csv('{outside}/secret.csv'))",
    "with x as (from read_csv('{outside}/secret.csv')) from x",
    "with recursive r as (select 'a' union all select a from read_csv('{outside}/secret.csv')) from r",
    "select * from groups where exists (from sqlite_scan('{outside}/other.sqlite', 'secret'))",
    "select 1 limit (select 1 from read_text('/etc/passwd'))",
    "select 1 order by (select 1 from read_text('/etc/passwd'))",
    "select sum(1) over (order by (select 1 from read_text('/etc/passwd')))",
    "select list_transform([1], lambda x: (select 1 from read_text('/etc/passwd')))",
    "select * from rollouts, lateral (from read_text('/etc/passwd'))",
    "from (describe from read_csv('{outside}/secret.csv'))",
    "from query('select 1')",
    "from query_table('rollouts')",
    "from json_execute_serialized_sql(json_serialize_sql('select 1'))",
    "explain copy (select 1) to '{outside}/stolen.csv'",
    "explain analyze copy (select 1) to '{outside}/stolen.csv'",
    "/* so */ explain analyze copy (select 1) to '{outside}/stolen.csv'",
    "-- so\nexplain/**/analyze select * from read_csv('{outside}/secret.csv')",
    "explain (analyze) from read_text('/etc/passwd')",
    "explain (select * from sqlite_scan('{outside}/other.sqlite', $$) select 1 -- $$))",
    "explain explain select 1",
    "select 1; select 2",
    "select 1; drop table lake.rollouts",
]
BEYOND = [
    "select getenv('HOME')",
    "values (getenv('HOME'))",
    "select write_log('x')",
    "from duckdb_secrets()",
    "from which_secret('s', 's3')",
    "from checkpoint('lake')",
    "from force_checkpoint('lake')",
    "from enable_logging()",
    "from arrow_scan(1, 2, 3)",
    "from pandas_scan(1)",
    "from ducklake_add_data_files('lake', 'rollouts', '{outside}/secret.parquet')",
    "from ducklake_delete_orphaned_files('lake', cleanup_all => true)",
    "from ducklake_expire_snapshots('lake', versions => [1])",
    "from python_variable",
    "from sql",
]
WRONG = [
    "",
    "selec 1",
    "select $x",
    "select \ud800",
    "from no_such_relation",
    "select no_such_column from rollouts",
]

READS = [
    ("select count(*) as n from rollouts", ["n"]),
    ("select count(*) as n from rollouts;", ["n"]),
    ("with a as (from clips) select clip_rank from a", ["clip_rank"]),
    ("from zero_advantage_groups", None),
    ("table groups", None),
    ("from steps limit 1", None),
    ("from quarantine", None),
    ("from snapshots", ["snapshot", "created_at", "changes"]),
    ("from ducklake_snapshots('lake')", None),
    ("from ducklake_table_changes('lake', 'main', 'rollouts', 1, 1)", None),
    ("describe rollouts", None),
    ("describe select 1 as a", None),
    ("summarize groups", None),
    ("show tables", ["name"]),
    ("show all tables", None),
    ("explain select * from groups", None),
    ("explain analyze select 1", None),
    ("-- why\n/* so */ EXPLAIN (format json) select 1", None),
    ("pivot groups on group_class in ('mixed', 'all_success') using count(*) group by model", None),
    ("unpivot (select 1 as a, 2 as b) on a, b", ["name", "value"]),
    ("values (1)", ["col0"]),
    ("select 1 as a, 2 as a", ["a", "a"]),
    ("select unnest([1, 2]) as a", ["a"]),
    ("from range(3)", ["range"]),
    ("select 'read_csv(''x'')' as text", ["text"]),
]


@pytest.fixture(scope="module")
def reader(sample_lake: SampleLake) -> Iterator[Reader]:
    with sample_lake.lake.reader() as reader:
        yield reader


@pytest.fixture(scope="module")
def outside(sample_lake: SampleLake) -> Path:
    """A folder beside the lake, with something to steal in every form."""
    outside = sample_lake.lake.folder.parent / "outside"
    outside.mkdir()
    (outside / "secret.csv").write_text("a\nsecret\n")
    pq.write_table(pa.table({"a": ["secret"]}), outside / "secret.parquet")
    with sqlite3.connect(outside / "other.sqlite") as other:
        other.execute("create table secret (a)")
    other.close()
    return outside


@pytest.mark.parametrize("sql", WRITES + SETTINGS + FILES + HIDDEN + BEYOND + WRONG)
def test_what_is_more_than_reading_the_lake_is_refused_in_one_line(
    reader: Reader, outside: Path, sql: str
) -> None:
    python_variable = pa.table({"a": ["secret"]})
    before = sorted(outside.iterdir())
    query = sql.replace("{outside}", str(outside)).replace("{lake}", str(reader.lake.files))
    with pytest.raises(QueryError) as refusal:
        reader.select(query)
    assert len(str(refusal.value).splitlines()) == 1
    assert "secret\n" not in str(refusal.value)
    assert sorted(outside.iterdir()) == before
    assert python_variable.num_rows == 1


def test_a_refusal_says_what_goes_beyond_the_lake(reader: Reader) -> None:
    with pytest.raises(QueryError, match="only reads this lake, and `read_csv` goes beyond it"):
        reader.select("select 1 from read_csv('x.csv')")
    with pytest.raises(QueryError, match="only reads, and this is a delete statement"):
        reader.select("delete from lake.rollouts")
    with pytest.raises(QueryError, match="holds 2 statements"):
        reader.select("select 1; select 2")
    with pytest.raises(QueryError, match=r"Name the values of the pivot"):
        reader.select("pivot groups on group_class using count(*)")


@pytest.mark.parametrize(("sql", "names"), READS)
def test_what_only_reads_is_answered(reader: Reader, sql: str, names: list[str] | None) -> None:
    answer = reader.select(sql)
    assert answer.table.num_columns == len(answer.names)
    if names is not None:
        assert answer.names == names


def test_the_queries_before_did_not_change_the_lake(reader: Reader, sample_lake: SampleLake) -> None:
    count = "select count(*) as n from rollouts"
    with sample_lake.lake.reader() as newest:
        assert newest.snapshot == reader.snapshot
        assert newest.rows(count) == reader.rows(count)


def test_the_macros_give_what_the_mining_uses(reader: Reader) -> None:
    answer = reader.select(
        "select group_class(2, 2, 1.0, 1.0) as solved, group_class(1, 2, 1.0, 1.0) as lost, "
        "clip_ids([5, 6, 7], [2, 3], 0) as ids"
    )
    assert answer.table.to_pylist() == [{"solved": "all_success", "lost": "incomplete", "ids": [5, 6]}]


def test_an_older_version_of_a_table_can_be_asked_for(reader: Reader) -> None:
    sql = "select count(*) as n from lake.rollouts at (version => 1)"  # the tables, still empty
    assert reader.select(sql).table.to_pylist() == [{"n": 0}]
    assert reader.select("select count(*) as n from rollouts").table["n"][0].as_py() > 0
