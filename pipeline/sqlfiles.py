"""The SQL that EchoMine runs, read from the files of `sql/`."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from pipeline.errors import QueryError, nearest

SQL_FOLDER = Path(__file__).resolve().parent.parent / "sql"
_TABLE_MACRO = re.compile(r"^create or replace temp macro (\w+)\([^)]*\) as table$", re.MULTILINE)


@cache
def sql_file(name: str) -> str:
    """The text of `sql/<name>.sql`; `name` is like `mining/group_classes`."""
    return (SQL_FOLDER / f"{name}.sql").read_text(encoding="utf-8")


@cache
def params_of(sql: str) -> tuple[str, ...]:
    """The names that `sql` binds (`$name`), outside comments."""
    code = re.sub(r"--[^\n]*", "", sql)
    return tuple(dict.fromkeys(re.findall(r"\$([a-z_][a-z0-9_]*)", code)))


@cache
def macros() -> tuple[str, ...]:
    """The statements of `sql/macros.sql` that make functions of values."""
    return tuple(part for part in _all_macros() if not _TABLE_MACRO.search(part))


@cache
def relations() -> dict[str, str]:
    """By name what makes each view of `sql/views/`, and each macro that stands where a relation does."""
    files = sorted((SQL_FOLDER / "views").glob("*.sql"))
    made = {_relation(f): f'create or replace temp view "{_relation(f)}" as {f.read_text()}' for f in files}
    tables = {found[1]: part for part in _all_macros() if (found := _TABLE_MACRO.search(part))}
    return made | tables


@cache
def relations_of(sql: str) -> frozenset[str]:
    """The names behind each `from` and `join` of `sql`, outside comments; common table expressions too."""
    code = re.sub(r"--[^\n]*", "", sql)
    return frozenset(re.findall(r'\b(?:from|join)\s+"?(\w+)', code, re.IGNORECASE))


@cache
def examples() -> dict[str, str]:
    """The questions of `sql/examples/`: each file's name and the sentence it starts with."""
    return {
        path.stem: " ".join(_summary(path.read_text(encoding="utf-8")).split())
        for path in sorted((SQL_FOLDER / "examples").glob("*.sql"))
    }


def example(name: str) -> str:
    """The query of an example.

    Raises:
        QueryError: there is none of this name.
    """
    if name not in examples():
        raise QueryError(f"There is no example `{name}`: {nearest(name, examples())}")
    return sql_file(f"examples/{name}")


@cache
def table_macros() -> frozenset[str]:
    """The names of the macros that stand where a relation does."""
    return frozenset(found[1] for part in _all_macros() if (found := _TABLE_MACRO.search(part)))


def _all_macros() -> list[str]:
    return [part for part in sql_file("macros").split(";\n") if part.strip()]


def _summary(sql: str) -> str:
    """The header's text up to its first field."""
    header = sql.split("\n-- grain:")[0]
    return re.sub(r"^-- ", "", header, flags=re.MULTILINE)


def _relation(file: Path) -> str:
    return file.stem.split("_", 1)[1] if file.stem[0].isdigit() else file.stem
