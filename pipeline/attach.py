"""The lines that open a lake, for reading, in other programs."""

from __future__ import annotations

from pipeline.lake import Lake


def attach_lines(lake: Lake, snapshot: int | None = None) -> dict[str, list[str]]:
    """What to type, by program: two lines each. DuckDB fetches the extensions it lacks by itself.

    Args:
        snapshot: the lake as of this snapshot; by default as it is whenever it is asked.
    """
    attach = lake.catalog.attach_sql("read_only", snapshot=snapshot)
    connect = f"import duckdb; lake = duckdb.connect(); lake.execute({attach + '; use lake'!r})"
    return {
        "the DuckDB command line": [f"{attach};", "use lake;"],
        "Python": [connect, 'print(lake.sql("from rollouts limit 5"))'],
        "polars": [connect, 'rollouts = lake.sql("from rollouts").pl()'],
    }
