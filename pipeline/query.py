"""What a user's query may do: read this lake, and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline.errors import QueryError

if TYPE_CHECKING:
    import duckdb

# Functions that would leave the sandbox: other databases, maintenance of the lake, SQL in strings.
_REFUSED = re.compile(
    r"(sqlite_|postgres_|mysql_|query$|query_table$|duckdb_secrets|which_secret|read_|parquet_|glob$|sniff_csv|getenv|"
    r"ducklake_(add|clean|commit|delete|expire|flush|merge|rewrite|set))",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Selection:
    """A query's answer. `names` keeps duplicate column names apart from the table's."""

    names: list[str]
    table: pa.Table


def refuse_all_but_reading(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    """Raises QueryError unless `sql` is one statement that only reads.

    The statement is judged by its parse tree, not by its text: a read-only attachment alone would
    still allow `copy … to` and the table functions that open other database files.
    """
    try:
        statements = connection.extract_statements(sql)
    except Exception as error:
        raise QueryError(f"The query is no SQL: {error}") from error
    if len(statements) != 1:
        raise QueryError(f"The query holds {len(statements)} statements. Give one `select`.")
    kind = statements[0].type.name
    if kind == "EXPLAIN":
        sql = re.sub(r"^\s*explain(\s+analyze|\s*\([^)]*\))?", "", statements[0].query, flags=re.IGNORECASE)
        return refuse_all_but_reading(connection, sql)
    if kind != "SELECT":
        raise QueryError(
            f"`echomine sql` only reads, and this is a {kind.lower()} statement. Give a `select`; "
            "nothing was changed."
        )
    row = connection.execute("select json_serialize_sql($sql)", {"sql": statements[0].query}).fetchone()
    assert row is not None
    tree = json.loads(row[0])
    if tree.get("error"):
        raise QueryError(f"The query is no plain `select`: {tree.get('error_message', 'not understood')}.")
    for name in _functions(tree):
        if _REFUSED.match(name):
            raise QueryError(
                f"`echomine sql` only reads this lake, and `{name}` goes beyond it. Leave it out; "
                "nothing was changed."
            )
    return None


def _functions(node: Any) -> Iterator[str]:
    """The name of every function in a serialized statement."""
    if isinstance(node, dict):
        if isinstance(node.get("function_name"), str):
            yield node["function_name"]
        for child in node.values():
            yield from _functions(child)
    elif isinstance(node, list):
        for child in node:
            yield from _functions(child)
