"""A user's query reads the lake, all of it, and nothing else."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from attempts import EXTENSIONS, FILES, NETWORK, SETTINGS, WRITES
from sample_lake import SampleLake

from pipeline.errors import QueryError
from pipeline.lake_reader import Reader
from pipeline.query import Limits, Selection

Run = Callable[[str], Selection]

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
    "select pg_sleep(1)",
    "select json_serialize_plan('from sqlite_scan(''{outside}/other.sqlite'', ''secret'')')",
    "from variance_top_p((select count(*) from glob('/*')))",
    "select question(getenv('HOME'))",
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
    ("from variance_top_p(0.5)", None),
    ("from Variance_Top_P(0.5)", None),
    ("from tokens limit 1", None),
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
    (outside / "no_suffix").write_text("a\nsecret\n")
    pq.write_table(pa.table({"a": ["secret"]}), outside / "secret.parquet")
    with sqlite3.connect(outside / "other.sqlite") as other:
        other.execute("create table secret (a)")
    other.close()
    return outside


@pytest.mark.parametrize("sql", WRITES + SETTINGS + EXTENSIONS + FILES + NETWORK + HIDDEN + BEYOND + WRONG)
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


def test_a_list_of_rewards_has_a_spread_and_a_class_under_a_tolerance(reader: Reader) -> None:
    answer = reader.select(
        "select rewards, reward_spread(rewards) as spread, group_class(rewards) as strict, "
        "group_class(rewards, 0.25) as lenient "
        "from (values ([1.0, 0.75]), ([0.5, 0.5]), ([0.0, 0.25]), ([1.0]), ([1.0, 0.0])) as given(rewards)"
    )
    assert [tuple(row.values())[1:] for row in answer.table.to_pylist()] == [
        (0.25, "mixed", "all_success"),
        (0.0, "all_equal", "all_equal"),
        (0.25, "mixed", "all_fail"),
        (0.0, "incomplete", "incomplete"),
        (1.0, "mixed", "mixed"),
    ]


def test_the_entropy_at_a_step_is_the_stored_step_entropy(reader: Reader) -> None:
    answer = reader.select(
        "select step_entropies[i] as stored, "
        "entropy_at(completion_entropies, step_ends, i - 1)::float as own "
        "from rollouts, range(1, 9) as steps(i) where i <= len(step_ends) and step_entropies is not null"
    )
    assert answer.table.num_rows > 100
    assert answer.table["stored"].to_pylist() == answer.table["own"].to_pylist()


@pytest.mark.parametrize(("p", "num_groups"), [(0, 0), (0.12, 1), (0.2, 2), (0.75, 7), (1, 9)])
def test_the_top_groups_are_the_fewest_that_hold_the_share_of_the_variance(
    reader: Reader, p: float, num_groups: int
) -> None:
    # eight groups with rewards 1 and 0 (variance 1/2 each), and one with 1, 1, 3/4, 3/4 (1/48)
    answer = reader.select(f"from variance_top_p({p})").table.to_pylist()
    assert len(answer) == num_groups
    assert all(row["reward_variance"] == 0.5 for row in answer[:8])
    if num_groups == 9:
        assert answer[8]["reward_variance"] == pytest.approx(1 / 48)
        assert answer[8]["cumulative_share"] == pytest.approx(1)


def test_looking_into_one_rollout_reads_the_tokens_of_no_other(reader: Reader) -> None:
    rollout_id = reader.rows("select min(rollout_id) as id from rollouts")[0]["id"]
    rows = reader.select(f"explain analyze from tokens where rollout_id = '{rollout_id}'").table
    plan = rows["explain_value"][0].as_py()
    scan = plan[plan.index("TABLE_SCAN") :]
    assert f"rollout_id='{rollout_id}'" in re.sub(r"[│\s]+", "", scan)
    assert re.search(r"│ +1 row ", scan), "the filter is the scan's"


def test_the_tokens_of_a_rollout_are_its_lists_side_by_side(reader: Reader) -> None:
    rollout = reader.rows("select * from rollouts where len(step_ends) > 2 order by rollout_id limit 1")[0]
    tokens = reader.rows(
        "from tokens where rollout_id = $id order by position", {"id": rollout["rollout_id"]}
    )
    assert [token["token_id"] for token in tokens] == rollout["completion_ids"]
    assert [token["entropy"] for token in tokens] == rollout["completion_entropies"]
    assert [token["logprob"] for token in tokens] == rollout["completion_logprobs"]
    assert [t["position"] + 1 for t in tokens if t["is_step_end"]] == rollout["step_ends"]
    assert [t["step_index"] for t in tokens if t["is_step_end"]] == list(range(len(rollout["step_ends"])))


def test_a_query_beyond_its_time_or_memory_is_stopped_and_the_next_is_answered(
    sample_lake: SampleLake,
) -> None:
    endless = "select sum(a.range * b.range) from range(10000000) as a, range(10000000) as b"
    with sample_lake.lake.reader() as reader:
        limits = Limits(timeout_seconds=0.2, memory="100MB")
        with pytest.raises(QueryError, match=r"longer than 0\.2 s and was stopped.*--timeout"):
            reader.select(endless, limits)
        with pytest.raises(QueryError, match=r"more memory than 100MB.*--memory-limit"):
            reader.select("select list(range) from range(100000000)", Limits(memory="100MB"))
        assert reader.select("select 1 as a", limits).table.to_pylist() == [{"a": 1}]


def test_ctrl_c_stops_the_query_and_the_session_goes_on(sample_lake: SampleLake) -> None:
    endless = "select sum(a.range * b.range) from range(10000000) as a, range(10000000) as b"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    with sample_lake.lake.reader() as reader:
        reader.select("select 1")
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            reader.select(endless, Limits(timeout_seconds=60))
        assert reader.select("select 1 as a").table.to_pylist() == [{"a": 1}]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_answer_can_be_cut_off_after_some_rows(reader: Reader) -> None:
    answer = reader.select("from range(1000000000000)", Limits(max_rows=3))
    assert (answer.table["range"].to_pylist(), answer.cut_off) == ([0, 1, 2], True)
    whole = reader.select("from range(3)", Limits(max_rows=3))
    assert (whole.table.num_rows, whole.cut_off) == (3, False)


@pytest.mark.parametrize("size", ["2", "GB", "-1GB", "0GB", "1GB'; select 1", "50%"])
def test_a_memory_limit_is_a_size(size: str) -> None:
    with pytest.raises(QueryError, match="is no size"):
        Limits(memory=size)


def test_an_older_version_of_a_table_can_be_asked_for(reader: Reader) -> None:
    sql = "select count(*) as n from lake.rollouts at (version => 1)"  # the tables, still empty
    assert reader.select(sql).table.to_pylist() == [{"n": 0}]
    assert reader.select("select count(*) as n from rollouts").table["n"][0].as_py() > 0
