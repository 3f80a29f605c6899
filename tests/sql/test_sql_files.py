"""Every file in `sql/` does what its header says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.config import MiningConfig
from pipeline.lake_reader import Reader
from pipeline.mine import STAGES, WHOLE_LAKE
from pipeline.report import LIMITS
from pipeline.report_charts import CLASS_COLOURS
from pipeline.schema import TABLES
from pipeline.sqlfiles import SQL_FOLDER, params_of

FILES = sorted(path for path in SQL_FOLDER.rglob("*.sql") if path.name != "macros.sql")
MAY_BE_EMPTY = {"checks"}  # a sound lake has no offending rows
SCORER_PARAMS = {"rescore": True, "weights_hash": "0123", "tokenizer_hash": "4567", "context": 512}
UPKEEP_PARAMS = {"named_since": datetime(2020, 1, 1, tzinfo=UTC)}
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
        start = re.fullmatch(r" (grain|inputs|params|columns):(.*)", line)
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
def reader(sample_lake) -> Iterator[Reader]:
    """The sample lake with its views and with the mining's stages, in their order."""
    with sample_lake.lake.reader() as reader:
        reader.materialize_rows("touched_groups", reader.touched_groups(reader.snapshot))
        export_drops = {"reason": ["max_tokens"], "num_dropped": [3]}
        reader.materialize_rows("export_drops", pa.table(export_drops))
        every_run = params(sample_lake) | WHOLE_LAKE
        for stage in STAGES:
            reader.materialize(stage, (SQL_FOLDER / f"mining/{stage}.sql").read_text(), every_run)
        yield reader


def params(sample_lake) -> dict[str, object]:
    mining = MiningConfig(clips_per_group=2, max_policy_lag=7).model_dump()
    ids = {"run_id": sample_lake.run_id, "mining_id": sample_lake.mining_id}
    return {
        **mining,
        **WHOLE_LAKE,
        "few_twins": None,
        **LIMITS,
        **SCORER_PARAMS,
        **REPORT_PARAMS,
        **UPKEEP_PARAMS,
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
    assert header_of(file).summary.endswith((".", "!"))


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
        assert result.num_rows > 1 or header_of(file).grain in (["run_id"], ["mining_id"])


def test_the_params_are_those_that_the_query_binds(file):
    assert header_of(file).params == set(params_of(file.read_text()))


def test_the_inputs_are_the_relations_that_the_query_reads(file):
    code = re.sub(r"--[^\n]*", "", file.read_text())
    own = set(re.findall(r"^([a-z_]+) as \(", code, re.MULTILINE))
    known = set(TABLES) | {relation_of(path) for path in FILES} | {"touched_groups", "export_drops"}
    read = set(re.findall(r"\b(?:from|join)\s+([a-z_]+)(?![a-z_]*\()", code)) - own
    if "the catalog" in header_of(file).inputs:
        assert read <= {"ducklake_snapshots"}
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
