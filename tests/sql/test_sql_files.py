"""Every file in `sql/` does what its header says."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path

import pyarrow as pa
import pytest
from sample_lake import overturned

from pipeline.checks import run_checks
from pipeline.config import MiningConfig
from pipeline.lake import Lake
from pipeline.lake_reader import Reader
from pipeline.mine import NO_GROUPS, STAGES, WHOLE_LAKE
from pipeline.report import LIMITS
from pipeline.report_charts import CLASS_COLOURS
from pipeline.schema import TABLES
from pipeline.sqlfiles import SQL_FOLDER, params_of

FILES = sorted(path for path in SQL_FOLDER.rglob("*.sql") if path.name != "macros.sql")
GIVEN = {
    "touched_groups",
    "new_steps",
    "export_drops",
    "excluded_prompts",
    "dump_rows",
    "incoming_rollouts",
    "staged_rollouts",
    "named",
    "withdrawn",
}  # by the pipeline
MAY_BE_EMPTY = {"checks"}  # a sound lake has no offending rows
VERIFIER_PARAMS = {"prompt_id": None, "stored_verifier": None, "verifier": "math", "verifier_version": "1"}
SCORER_PARAMS = {"rescore": True, "weights_hash": "0123", "tokenizer_hash": "4567", "context": 512}
EXPORT_PARAMS = {"max_tokens": None, "first": 0, "last": 100}
UPKEEP_PARAMS = {"named_since": datetime(2020, 1, 1, tzinfo=UTC), "since": 0}
REPORT_PARAMS = {"night": date(2026, 3, 2), "model": "small", "num_clips": 20}


@dataclass(frozen=True)
class Header:
    """The comment at the top of a SQL file."""

    summary: str
    grain: list[str]
    inputs: list[str]
    params: set[str]
    columns: list[str]


def header_of(path: Path) -> Header:
    """Reads the header: fields start with `-- name:`, and go on over lines that are indented deeper."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("--"):
            break
        lines.append(line.removeprefix("--"))
    fields: dict[str, str] = {"summary": ""}
    name = "summary"
    for line in lines:
        start = re.fullmatch(r" (cure|grain|inputs|params|columns):(.*)", line)
        if start:
            name, line = start[1], start[2]
            fields[name] = ""
        fields[name] += f"{line}\n"
    missing = {"grain", "inputs", "params", "columns"} - fields.keys()
    assert not missing, f"{path}: the header lacks {missing}"
    columns = [line.split()[0] for line in fields["columns"].splitlines() if line.strip()]
    return Header(
        fields["summary"].strip(),
        [name.strip() for name in fields["grain"].split(",")],
        [name.strip() for name in fields["inputs"].split(",")],
        set(re.findall(r"\$([a-z_][a-z0-9_]*)", fields["params"])),
        columns,
    )


def relation_of(path: Path) -> str:
    return re.sub(r"^\d+_", "", path.stem)


@pytest.fixture(scope="module")
def reader(sample_lake, tmp_path_factory) -> Iterator[Reader]:
    """The sample lake, two clips overturned, with its views and the mining's stages in their order."""
    folder = tmp_path_factory.mktemp("judged") / "lake"
    shutil.copytree(sample_lake.lake.folder, folder)
    judged = Lake.open(folder)
    overturned(judged, 2)
    with judged.reader() as reader:
        named = reader.table("select distinct prompt_id from echo_clips")
        reader.materialize_rows("named", named)
        reader.materialize_rows("touched_groups", NO_GROUPS)
        export_drops = {"reason": ["max_tokens"], "num_dropped": [3]}
        reader.materialize_rows("export_drops", pa.table(export_drops))
        # the lake's rollouts, come again: by name, and with another reward in the same places
        incoming = "select row_number() over () as nth, * replace (reward + 1 as reward) from rollouts"
        reader.materialize("incoming_rollouts", incoming, {})
        given = "nth, 0 as file, false as is_refused, null::varchar as sample_id"
        numbered = "if(nth % 2 = 0, sample_index, null) as sample_index"
        staged = f"select {given}, * exclude (nth) replace ({numbered}) from incoming_rollouts"
        reader.materialize("staged_rollouts", staged, {})
        for stage in ("staged_samples", "held_rollouts", "sample_places"):
            reader.materialize(stage, (SQL_FOLDER / f"staging/{stage}.sql").read_text(), {})
        reader.materialize_rows("withdrawn", reader.table("select clip_id from withdrawn_clips limit 1"))
        reader.materialize_rows("excluded_prompts", pa.table({"prompt_id": ["none"], "messages": ["none"]}))
        every_run = params(sample_lake) | WHOLE_LAKE
        for stage in STAGES:
            reader.materialize(stage, (SQL_FOLDER / f"mining/{stage}.sql").read_text(), every_run)
        new_steps = (
            "select rollout_id, step_ends, step_entropies from rollouts join successes using (rollout_id)"
        )
        reader.materialize("new_steps", new_steps, {})
        reader.materialize(
            "dump_rows",
            "select row_number() over () as nth_row, null::varchar as sample_id, group_id, sample_index, "
            "reward, group_size, origin, len(completion_ids) as num_tokens from rollouts",
            every_run,
        )
        reader.materialize("dump_rollouts", (SQL_FOLDER / "staging/dump_rollouts.sql").read_text(), every_run)
        decisions = (SQL_FOLDER / "staging/export_decisions.sql").read_text()
        reader.materialize("export_decisions", decisions, every_run)
        yield reader


def params(sample_lake) -> dict[str, object]:
    mining = MiningConfig(clips_per_group=2, max_policy_lag=7).model_dump()
    ids = {
        "run_id": sample_lake.run_id,
        "mining_id": sample_lake.mining_id,
        "few_twins": None,
        "splitter": "U+0020-1",
    }
    others = (LIMITS, SCORER_PARAMS, EXPORT_PARAMS, REPORT_PARAMS, UPKEEP_PARAMS, VERIFIER_PARAMS)
    return {
        **mining,
        **WHOLE_LAKE,
        **{name: value for given in others for name, value in given.items()},
        **ids,
    }


@pytest.fixture(params=FILES, ids=lambda path: str(path.relative_to(SQL_FOLDER)))
def file(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def result(file, reader, sample_lake) -> pa.Table:
    return reader.table(file.read_text(), params(sample_lake))


def test_a_file_has_one_select_and_a_header_with_a_sentence(file, reader):
    statements = reader.connection.extract_statements(file.read_text())
    assert [statement.type.name for statement in statements] == ["SELECT"]
    assert header_of(file).summary.endswith((".", "?"))


def test_the_columns_are_those_of_the_header_in_its_order(file, result):
    assert result.column_names == header_of(file).columns


def test_the_grain_is_unique_and_never_null(file, result):
    grain = header_of(file).grain
    keys = [tuple(row[name] for name in grain) for row in result.to_pylist()]
    assert len(set(keys)) == len(keys)
    assert all(value is not None for key in keys for value in key)


def test_the_sample_lake_gives_rows(file, result):
    if file.parent.name in MAY_BE_EMPTY:
        assert result.num_rows == 0
    else:
        few = file.parent.name == "examples" or header_of(file).grain in (["run_id"], ["mining_id"])
        assert result.num_rows > (0 if few else 1)


def test_the_params_are_those_that_the_query_binds(file):
    assert header_of(file).params == set(params_of(file.read_text()))


def test_the_inputs_are_the_relations_that_the_query_reads(file):
    code = re.sub(r"--[^\n]*", "", file.read_text())
    own = set(re.findall(r"^([a-z_]+) as \(", code, re.MULTILINE))
    known = set(TABLES) | {relation_of(path) for path in FILES} | GIVEN
    read = set(re.findall(r"\b(?:from|join)\s+([a-z_]+)(?![a-z_]*\()", code)) - own
    if "the catalog" in header_of(file).inputs:
        assert read - known <= {"ducklake_snapshots", "__ducklake_metadata_lake"}
    else:
        assert read == set(header_of(file).inputs)
        assert read <= known


def test_a_view_is_named_after_its_file(reader):
    built = {row["view_name"] for row in reader.rows("select view_name from duckdb_views() where temporary")}
    assert {relation_of(path) for path in FILES if path.parent.name == "views"} <= built


def test_no_two_files_make_the_same_relation():
    names = [relation_of(path) for path in FILES]
    assert len(set(names)) == len(names)
    assert not set(names) & set(TABLES)


def test_the_sample_lake_has_every_class_of_group(reader):
    rows = reader.rows("select distinct group_class from groups")
    assert {row["group_class"] for row in rows} == set(CLASS_COLOURS)


def test_every_check_names_a_cure(reader):
    assert all(check.cure.endswith(".") for check in run_checks(reader))
