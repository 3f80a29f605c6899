"""Is the lake sound? Each file of `sql/checks/` selects the rows that should not be."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipeline.lake_reader import Reader
from pipeline.sqlfiles import SQL_FOLDER, sql_file


@dataclass(frozen=True)
class CheckResult:
    """What one check found.

    Attributes:
        name: the check's file in `sql/checks/`, without its suffix.
        num_offending: rows that should not be; 0 in a sound lake.
        cure: what to do about them, from the check's header.
    """

    name: str
    num_offending: int
    cure: str


def run_checks(reader: Reader) -> list[CheckResult]:
    """Runs every check on the reader's snapshot, in the order of their names.

    To see the rows that offend, run the check's file: `echomine sql "$(cat sql/checks/<name>.sql)"`.
    """
    names = sorted(path.stem for path in (SQL_FOLDER / "checks").glob("*.sql"))
    return [_run(reader, name) for name in names]


def _run(reader: Reader, name: str) -> CheckResult:
    sql = sql_file(f"checks/{name}")
    cure = re.search(r"^-- cure: +(.+)$", sql, re.MULTILINE)
    if cure is None:
        raise ValueError(f"sql/checks/{name}.sql names no cure")
    return CheckResult(name, reader.table(sql).num_rows, cure[1])
