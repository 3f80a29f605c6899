"""What is new in a lake since a snapshot: the groups that a mining of the news looks at."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from pipeline.errors import MiningError
from pipeline.lake_reader import SPANNING_GROUP, Reader
from pipeline.sqlfiles import sql_file

# It opens the data files that came since, and no others; a file that was set aside it would open too.
_INSERTED = """
    select distinct group_id, run_id
    from ducklake_table_insertions('lake', 'main', 'rollouts', $first, $last)
    where snapshot_id > $since
"""

# The same rows, but for those that were replaced or lost since; every data file is opened.
_STANDING = "select distinct group_id, run_id from rollouts where snapshot_id > $since"

# Of files that came since, those that are gone again: replaced, merged away or set aside.
_ENDED = """
    select 'files/main/rollouts/' || parse_filename(path) as path
    from __ducklake_metadata_lake.ducklake_data_file
    where end_snapshot <= $last and coalesce(partial_max, begin_snapshot) > $since
"""
_SET_ASIDE = "select 1 from quarantine where list_contains($paths, source) limit 1"


@dataclass(frozen=True)
class News:
    """What came into a lake since a snapshot.

    Attributes:
        groups: [group_id] of those with rollouts, or rewards changed by a verdict.
        runs: the first and last run, by name, of all rollouts of these groups; None: any run. A night's run
            has only files of its own, so this spares a mining the others.
    """

    groups: pa.Table
    runs: tuple[str, str] | None


def news_since(reader: Reader, snapshot: int) -> News:
    """What came after `snapshot`.

    Raises:
        MiningError: forgetting prompts has ended the snapshots that would tell.
    """
    news = _news(reader, snapshot)
    reader.materialize_rows("news", news)
    bounds = reader.rows(
        """
        with
        runs as (
            select run_id from news
            union all
            select meta.value from meta join news on meta.key = $spanning || news.group_id
        )
        select min(run_id) as first, max(run_id) as last, bool_or(run_id is null) as unknown from runs
        """,
        {"spanning": SPANNING_GROUP},
    )[0]
    unknown = bounds["unknown"] or bounds["first"] is None
    groups = news.select(["group_id"]).group_by("group_id").aggregate([])
    return News(groups, None if unknown else (bounds["first"], bounds["last"]))


def _news(reader: Reader, since: int) -> pa.Table:
    """[group_id, run_id]; of a group that was only judged again, every run."""
    if since >= reader.snapshot:
        return pa.schema([("group_id", pa.string()), ("run_id", pa.string())]).empty_table()
    # Changes are asked for from a snapshot on that is there; the one after may have expired.
    left = reader.rows(
        "select max(snapshot_id) filter (snapshot_id <= $since + 1) as first, min(snapshot_id) as oldest "
        "from ducklake_snapshots('lake')",
        {"since": since},
    )[0]
    if left["first"] is None:
        raise MiningError(
            f"What came after snapshot {since} cannot be told: the lake's history begins with "
            f"{left['oldest']}. Give a later --since-snapshot, or mine without it."
        )
    params = {"first": left["first"], "last": reader.snapshot, "since": since}
    ended = [row["path"] for row in reader.rows(_ENDED, params)]
    incomplete = ended and reader.rows(_SET_ASIDE, {"paths": ended})
    rollouts = reader.table(_STANDING if incomplete else _INSERTED, params)
    if not _has_verdicts(reader, since):  # the rollouts of all runs are compared only where there are any
        return rollouts
    return pa.concat_tables([rollouts, reader.table(sql_file("staging/rejudged_groups"), params)])


def _has_verdicts(reader: Reader, since: int) -> bool:
    """Whether rollouts were judged again after `since`."""
    judged = "select 1 from verdicts where reward is not null and snapshot_id > $since limit 1"
    return reader.has_verdicts and bool(reader.rows(judged, {"since": since}))
