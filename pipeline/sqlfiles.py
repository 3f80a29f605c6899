"""The SQL that EchoMine runs, read from the files of `sql/`."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

SQL_FOLDER = Path(__file__).resolve().parent.parent / "sql"


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
    """The statements of `sql/macros.sql`."""
    return tuple(part for part in sql_file("macros").split(";\n") if part.strip())


@cache
def views() -> tuple[str, ...]:
    """A `create temp view` for each file of `sql/views/`, in the order of their numbers."""
    files = sorted((SQL_FOLDER / "views").glob("*.sql"))
    return tuple(f'create or replace temp view "{_relation(f)}" as {f.read_text()}' for f in files)


def _relation(file: Path) -> str:
    return file.stem.split("_", 1)[1] if file.stem[0].isdigit() else file.stem
