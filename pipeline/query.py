"""What a user's query may do: read this lake, and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline.errors import QueryError, said
from pipeline.sqlfiles import table_macros

if TYPE_CHECKING:
    import duckdb

# Table functions that read the lake, its catalog or nothing at all. The others open files and other
# databases, maintain the lake, run SQL in strings or read memory, so whatever is not here is refused.
_TABLE_FUNCTIONS = re.compile(
    r"range|generate_series|unnest|repeat|repeat_row|json_each|json_tree|histogram|histogram_values|summary"
    r"|duckdb_(columns|functions|keywords|tables|types|views|settings|schemas|databases)|pragma_table_info"
    r"|ducklake_(current_snapshot|last_committed_snapshot|list_files|options|settings|snapshots)"
    r"|ducklake_table_(changes|deletions|info|insertions)",
    re.IGNORECASE,
)
# Scalar functions that do more than compute.
_REFUSED = re.compile(
    r"getenv|write_log|nextval|sleep_ms|pg_sleep|json_execute.*|json_serialize_plan|query|query_table",
    re.IGNORECASE,
)
_FILE = re.compile(r"[/\\]|\.(parquet|csv|tsv|json|jsonl|ndjson|db|duckdb|sqlite|gz|zst)$", re.IGNORECASE)
_SIZE = re.compile(r"(?=.*[1-9])[0-9]+(\.[0-9]+)? ?[KMGT]i?B", re.IGNORECASE)
# DuckLake's own tables may be asked, but not what else a PostgreSQL database holds, such as its passwords.
_CATALOG = re.compile(r"__ducklake_metadata_.*", re.IGNORECASE)
_OF_DUCKLAKE = re.compile(r"ducklake_\w+", re.IGNORECASE)
_COMMENTS = re.compile(r"\A(\s+|--[^\n]*(\n|\Z)|/\*.*?\*/)+", re.DOTALL)
_EXPLAIN = re.compile(r"\Aexplain\b(\s+analyze\b|\s*\(\s*(analyze|format)\b[\w\s,]*\))?", re.IGNORECASE)


@dataclass(frozen=True)
class Selection:
    """A query's answer. `names` keeps duplicate column names apart from the table's.

    Attributes:
        cut_off: whether there are more rows than were asked for.
    """

    names: list[str]
    table: pa.Table
    cut_off: bool = False


@dataclass(frozen=True)
class Limits:
    """What a query may take.

    Attributes:
        memory: as DuckDB writes sizes, such as 2GB; beyond it DuckDB goes to disk or gives up.
        max_rows: rows of the answer; the rest is not computed.
    """

    timeout_seconds: float | None = None
    memory: str | None = None
    max_rows: int | None = None

    def __post_init__(self) -> None:
        if self.memory is not None and not _SIZE.fullmatch(self.memory):
            raise QueryError(f"The memory limit `{self.memory}` is no size. Give one such as 500MB or 2GB.")


def reading_only(connection: duckdb.DuckDBPyConnection, sql: str) -> str:
    """The statement to run for `sql`, which is one statement that only reads.

    It is judged by its parse tree, not by its text: a read-only attachment alone would still allow
    `copy … to` and the table functions that open other database files.

    Raises:
        QueryError: it is no SQL, several statements, or does more than reading.
    """
    try:
        statements = connection.extract_statements(sql)
    except Exception as error:
        raise QueryError(f"The query is no SQL: {said(error)}. Mend it and ask again.") from error
    kinds = [statement.type.name for statement in statements]
    if kinds == ["CREATE", "SELECT"] and re.search(r"\bpivot\b", sql, re.IGNORECASE):
        raise QueryError("Name the values of the pivot: `pivot … on column in ('a', 'b') using …`.")
    if len(kinds) != 1:
        raise QueryError(f"The query holds {len(kinds)} statements. Give one `select`.")
    if kinds == ["EXPLAIN"]:
        return _explained(connection, sql)
    if kinds != ["SELECT"]:
        raise QueryError(
            f"`echomine sql` only reads, and this is a {kinds[0].lower()} statement. Give a `select`; "
            "nothing was changed."
        )
    row = connection.execute("select json_serialize_sql($sql)", {"sql": sql}).fetchone()
    assert row is not None
    tree = json.loads(row[0])
    if tree.get("error"):
        raise QueryError(
            f"The query is no plain `select`: {tree.get('error_message', 'not understood')}. Write it as one."
        )
    for name in _beyond_the_lake(tree):
        raise QueryError(
            f"`echomine sql` only reads this lake, and `{name}` goes beyond it. Leave it out; "
            "nothing was changed."
        )
    return sql


def _explained(connection: duckdb.DuckDBPyConnection, sql: str) -> str:
    """`explain` before a statement that passes on its own."""
    text = _COMMENTS.sub("", sql)
    head = _EXPLAIN.match(text)
    if head is None:
        raise QueryError("The query is no plain `explain`. Write `explain select …`; nothing was changed.")
    return f"{head[0]} {reading_only(connection, text[head.end() :])}"


def _beyond_the_lake(node: Any) -> Iterator[str]:
    """The functions and files of a serialized statement that lead out of the lake."""
    if isinstance(node, dict):
        kind = node.get("type")
        function, table = node.get("function_name"), node.get("table_name")
        if kind == "TABLE_FUNCTION":
            called = str(node["function"].get("function_name"))
            if not _TABLE_FUNCTIONS.fullmatch(called) and called.lower() not in table_macros():
                yield called
        elif isinstance(function, str) and _REFUSED.fullmatch(function):
            yield function
        elif kind in ("BASE_TABLE", "SHOW_REF") and isinstance(table, str):
            databases = (str(node.get(part)) for part in ("catalog_name", "schema_name"))
            in_catalog = any(_CATALOG.fullmatch(name) for name in databases)
            if _FILE.search(table) or (in_catalog and not _OF_DUCKLAKE.fullmatch(table)):
                yield table
        for child in node.values():
            yield from _beyond_the_lake(child)
    elif isinstance(node, list):
        for child in node:
            yield from _beyond_the_lake(child)
