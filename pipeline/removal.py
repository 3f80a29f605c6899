"""Rows that must leave no trace: out of the data files, the older snapshots and the catalog's own pages."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import pyarrow as pa

from pipeline import schema
from pipeline.catalog import BUSY_TIMEOUT_MS, SqliteCatalog
from pipeline.errors import LakeError
from pipeline.lake import Lake
from pipeline.lake_upkeep import end_older_snapshots
from pipeline.lake_writer import Writer


def remove_rows(
    writer: Writer, keys: Mapping[str, tuple[str, set[str]]], remembered: pa.Table
) -> dict[str, int]:
    """In one transaction: deletes rows, and writes the data files that held them again without them.

    Args:
        keys: by table, a column and its values; rows with one of them go.
        remembered: rows of `forgotten_prompts` to add.

    Returns:
        the number of deleted rows by table.
    """
    connection = writer.connection
    writer.begin()
    deleted: dict[str, int] = {}
    for name, (column, values) in keys.items():
        connection.register("gone", pa.table({"key": pa.array(sorted(values), pa.string())}))
        going = f'"{column}" in (select gone.key from gone)'
        row = connection.execute(f'select count(*) from "{name}" where {going}').fetchone()
        assert row is not None
        deleted[name] = row[0]
        for filename in _files_to_rewrite(writer, name, going):
            _rewrite(writer, name, filename, going)
        connection.execute(f'delete from "{name}" where {going}')
        connection.unregister("gone")
    connection.register("incoming", remembered)
    connection.execute(
        "insert into forgotten_prompts by name "
        "from incoming anti join forgotten_prompts using (fingerprint, prompt_id)"
    )
    connection.unregister("incoming")
    return deleted


def recount_minings(writer: Writer, num_lost: Mapping[str, int]) -> None:
    """In the transaction of `remove_rows`: lets minings say that they have fewer clips, and why.

    Args:
        num_lost: clips that went, by mining.
    """
    lost = pa.table(
        [pa.array(list(num_lost), pa.string()), pa.array(list(num_lost.values()), pa.int64())],
        ["mining_id", "num_clips"],
    )
    writer.connection.register("lost", lost)
    writer.connection.execute(
        """
        update mining_runs set
            num_clips = mining_runs.num_clips - lost.num_clips,
            dropped = map_concat(
                dropped,
                map {'forgotten': coalesce(map_extract_value(dropped, 'forgotten'), 0) + lost.num_clips}
            )
        from lost
        where lost.mining_id = mining_runs.mining_id
        """
    )
    writer.connection.unregister("lost")


def _files_to_rewrite(writer: Writer, name: str, going: str) -> list[str]:
    """Data files with rows that go, or that were deleted before: their bytes are still in the file."""
    rows = writer.connection.execute(
        f"""
        with held as (
            select filename, count(*) as num_rows, count(*) filter (where {going}) as num_going
            from "{name}"
            group by filename
        )

        select held.filename
        from held
        join __ducklake_metadata_lake.ducklake_data_file as data
            on parse_filename(data.path) = parse_filename(held.filename)
        where data.end_snapshot is null and (held.num_going > 0 or held.num_rows < data.record_count)
        """
    ).fetchall()
    return [filename for (filename,) in rows]


def _rewrite(writer: Writer, name: str, filename: str, going: str) -> None:
    """Puts another data file in the place of one, without the rows that are `going`."""
    columns, connection = schema.TABLES[name], writer.connection
    kept = connection.execute(
        f'select * from "{name}" where filename = ? and not ({going})', [filename]
    ).to_arrow_table()
    connection.execute(f'delete from "{name}" where filename = ?', [filename])
    connection.execute("delete from files where path = ?", [str(Path(filename).relative_to(writer.folder))])
    if kept.num_rows:
        writer.add_file(name, kept.select(columns.names).cast(columns))


def refuse_other_catalogs(lake: Lake) -> None:
    """Raises LakeError for a catalog whose pages cannot be cleared from here: nothing would be gone."""
    if not isinstance(lake.catalog, SqliteCatalog):
        raise LakeError(
            f"The catalog of {lake.folder} is in {lake.catalog.where}, which keeps old rows and logs of its "
            "own, so a prompt cannot be forgotten there. Import its dumps into a new lake, "
            "whose catalog is a file, and forget it there."
        )


def purge_catalog(lake: Lake) -> None:
    """Ends all snapshots but the newest, deletes the files that only they named, and clears the catalog.

    The catalog keeps deleted rows of small tables, the smallest and greatest value of each column, and
    SQLite's pages what they held before; none of these is reached by ending a snapshot.

    Raises:
        LakeError: another process holds the catalog, or a file cannot be deleted. Run it again then.
    """
    assert isinstance(lake.catalog, SqliteCatalog)
    end_older_snapshots(lake)
    bounds = _text_bounds(lake)
    try:
        with closing(sqlite3.connect(lake.catalog.path, timeout=BUSY_TIMEOUT_MS / 1000)) as catalog:
            with catalog:
                _clear_inlined(catalog)
                _clear_bounds(catalog, bounds)
            catalog.execute("pragma wal_checkpoint(truncate)")
            catalog.execute("vacuum")
            (busy, *_) = catalog.execute("pragma wal_checkpoint(truncate)").fetchone()
    except sqlite3.Error as error:
        raise LakeError(_unfinished(lake, str(error))) from error
    if busy:
        raise LakeError(_unfinished(lake, "another process reads it"))


def _text_bounds(lake: Lake) -> dict[tuple[str, str], tuple[str, str]]:
    """Smallest and greatest value of each text column that holds any, by (table, column)."""
    bounds = {}
    with lake.reader() as reader:
        for name, columns in schema.TABLES.items():
            for column in (field.name for field in columns if field.type == pa.string()):
                row = reader.rows(f'select min("{column}") as a, max("{column}") as z from lake."{name}"')[0]
                bounds[name, column] = row["a"], row["z"]
    return bounds


def _unfinished(lake: Lake, why: str) -> str:
    return (
        f"The rows are gone from the lake in {lake.folder}, and the catalog still holds their "
        f"bytes: {why}. End what uses it, then run the command again."
    )


def _clear_inlined(catalog: sqlite3.Connection) -> None:
    """Rows of small tables that no snapshot sees any more."""
    (oldest,) = catalog.execute("select min(snapshot_id) from ducklake_snapshot").fetchone()
    for (table,) in catalog.execute("select table_name from ducklake_inlined_data_tables").fetchall():
        catalog.execute(f'delete from "{table}" where end_snapshot <= ?', [oldest])


def _clear_bounds(catalog: sqlite3.Connection, bounds: Mapping[tuple[str, str], tuple[str, str]]) -> None:
    for (table, column), (least, greatest) in bounds.items():
        catalog.execute(
            """
            update ducklake_table_column_stats set min_value = ?, max_value = ?
            where (table_id, column_id) in (
                select columns.table_id, columns.column_id
                from ducklake_column as columns
                join ducklake_table as tables using (table_id)
                where tables.table_name = ? and columns.column_name = ?
                    and columns.parent_column is null and columns.end_snapshot is null
            )
            """,
            [least, greatest, table, column],
        )
