"""Mining: from groups of rollouts to ranked EchoClips. The rules are the SQL files in `sql/mining/`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline import schema
from pipeline.config import MiningConfig
from pipeline.errors import MiningError
from pipeline.forgotten import Forgotten
from pipeline.hashing import content_id
from pipeline.lake import MERGED_FILE, Lake
from pipeline.lake_reader import Reader
from pipeline.mining_refusals import refuse_mixed_entropies, refuse_unknown_scope, undamaged
from pipeline.news import News, news_since
from pipeline.sqlfiles import macros, relations, sql_file

if TYPE_CHECKING:
    from pipeline.resplit import Resplitter

STAGES = (
    "group_classes",
    "successes",
    "group_clips",
    "twin_clips",
    "twin_contents",
    "clip_decisions",
)
# What stages are bound to where every group of the lake is asked for.
NO_GROUPS = pa.schema([("group_id", pa.string())]).empty_table()
WHOLE_LAKE = {"run_id": None, "incremental": False, "first_run": None, "last_run": None}
FEW_TWINS = 256  # more are found faster by a join, although it reads everybody's tokens


@dataclass(frozen=True)
class Mining:
    """What a mining found.

    Attributes:
        snapshot: of the rollouts that were mined.
        groups: number of groups by class.
        clips: number of clips kept.
        dropped: number of clips (for `unscored`: groups) dropped by each reason that occurred.
    """

    mining_id: str
    snapshot: int
    groups: Mapping[str, int]
    clips: int
    dropped: Mapping[str, int]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def mine(
    lake: Lake,
    config: MiningConfig,
    snapshot: int | None = None,
    since_snapshot: int | None = None,
    run_id: str | None = None,
    tokenizer: Callable[[], Any] | None = None,
) -> Mining:
    """Mines a snapshot and records the clips. The same mining of the same rollouts is done once.

    Args:
        snapshot: of the lake, by default the newest.
        since_snapshot: only groups that got rollouts after it, or whose rewards a verdict changed, with
            all their rollouts.
        run_id: only rollouts of this run; of a group that lies in several, what this one holds.
        tokenizer: gives the one that sampled the rollouts; called only if they are split again.

    Raises:
        MiningError: entropies of several kinds, or by several judges, would be ranked together, or successes
            to split again are of another tokenizer, or the lake's history begins after `since_snapshot`.
        LakeError: a data file that is met for the first time is damaged, or prompts were forgotten meanwhile.
    """
    started = time.monotonic()
    splitting = resplitter(config, tokenizer)
    with lake.reader(snapshot) as reader, _newest(lake, reader, snapshot) as newest:
        data_snapshot, forgotten = reader.data_snapshot(), Forgotten.as_of(reader)
        stages = STAGES if splitting is None else (*STAGES, *splitting.stages)
        texts = (sql_file(f"mining/{stage}") for stage in stages)
        verdicts = (relations()[name] for name in ("current_verdicts", "judged_rollouts"))
        sql_hash = content_id(*macros(), *verdicts, *texts)
        settings = config.model_dump(mode="json") | {"since_snapshot": since_snapshot, "run_id": run_id}
        settings |= {} if splitting is None else splitting.settings
        # The files' content, so that minings of two lakes never share a name; as they were committed, so
        # that merging them makes no other mining of it.
        files = reader.rows(
            "select sha256 from files where table_name in ('rollouts', 'verdicts') "
            "and not starts_with(parse_filename(path), $merged) order by all",
            {"merged": MERGED_FILE},
        )
        mining_id = content_id(data_snapshot, [file["sha256"] for file in files], settings, sql_hash)
        known = _recorded(newest, mining_id)
        if known is not None:
            lake.touch_mining(mining_id)
            return known
        refuse_unknown_scope(reader, since_snapshot, run_id)
        news = None if since_snapshot is None else news_since(reader, since_snapshot)
        with undamaged(lake, reader.verification(news.runs if news else None, newest=newest)):
            groups, dropped, clips = decide(reader, config, news, run_id, splitting)

    mining = Mining(mining_id, data_snapshot, groups, clips.num_rows, dropped)
    record = {
        "mining_id": mining_id,
        "snapshot": data_snapshot,
        "run_id": run_id,
        "config": json.dumps(settings, sort_keys=True),
        "config_hash": content_id(settings),
        "sql_hash": sql_hash,
        "groups": list(groups.items()),
        "num_clips": clips.num_rows,
        "dropped": list(dropped.items()),
        "seconds": time.monotonic() - started,
        "created_at": datetime.now(UTC),
    }
    clips = clips.append_column("mining_id", pa.array([mining_id] * clips.num_rows, pa.string()))
    forgotten.commit(
        lake,
        {
            "echo_clips": clips.select(schema.ECHO_CLIPS.names).cast(schema.ECHO_CLIPS),
            "mining_runs": pa.Table.from_pylist([record], schema.MINING_RUNS),
        },
    )
    return mining


def decide(
    reader: Reader,
    config: MiningConfig,
    news: News | None,
    run_id: str | None,
    splitting: Resplitter | None = None,
) -> tuple[dict[str, int], dict[str, int], pa.Table]:
    """Runs the stages one after the other; writes nothing. The arguments are those of `mine`.

    Args:
        news: only groups of these; None: all.
        splitting: splits the successes again.

    Returns:
        groups by class, drops by reason, and the kept clips in rank order.
    """
    params = config.model_dump() | WHOLE_LAKE | {"run_id": run_id}
    if news is not None:
        first_run, last_run = news.runs or (None, None)
        params |= {"incremental": True, "first_run": first_run, "last_run": last_run}
    reader.materialize_rows("touched_groups", NO_GROUPS if news is None else news.groups)
    for stage in STAGES:
        reader.materialize(stage, sql_file(f"mining/{stage}"), params)
        if stage == "successes":
            refuse_mixed_entropies(reader)
            if splitting is not None:
                splitting.resplit(reader, params)
        if stage == "twin_clips":
            twins = [row["rollout_id"] for row in reader.rows("select rollout_id from twin_clips")]
            params["few_twins"] = twins if len(twins) <= FEW_TWINS else None
    groups = _counts(reader, "select group_class as name, count(*) as n from group_classes group by all")
    dropped = _counts(
        reader,
        """
        select dropped_by as name, count(*) as n from clip_decisions where dropped_by is not null group by all
        union all
        select 'unscored', count(distinct group_id) from successes where awaits_scorer having count(*) > 0
        """,
    )
    clips = reader.table(
        "select md5(rollout_id || ':' || clip_tokens) as clip_id, * from clip_decisions "
        "where dropped_by is null order by clip_rank"
    )
    return groups, dropped, clips


def recorded_settings(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Of what a mining's column `config` says the settings, by the names that `MiningConfig` still has."""
    return {key: recorded[key] for key in MiningConfig.model_fields if key in recorded}


def resplitter(config: MiningConfig, tokenizer: Callable[[], Any] | None) -> Resplitter | None:
    """What splits successes again, if the settings ask for it; see `mine`."""
    if config.delimiter is None:
        return None
    if tokenizer is None:
        raise MiningError(
            "Steps are split again by the text of their tokens, and no tokenizer is given. "
            "Give the tokenizer that sampled the rollouts."
        )
    from pipeline.resplit import Resplitter  # with transformers, whose import takes longer than a mining

    return Resplitter(tokenizer(), config.delimiter)


def _counts(reader: Reader, sql: str) -> dict[str, int]:
    return {row["name"]: row["n"] for row in sorted(reader.rows(sql), key=lambda row: row["name"])}


def _newest(lake: Lake, reader: Reader, snapshot: int | None) -> AbstractContextManager[Reader]:
    """What is known by now of earlier minings; they may be newer than the snapshot that is mined."""
    return nullcontext(reader) if snapshot is None else lake.reader()


def _recorded(newest: Reader, mining_id: str) -> Mining | None:
    rows = newest.rows("select * from mining_runs where mining_id = $id", {"id": mining_id})
    if not rows:
        return None
    row = rows[0]
    held = newest.rows("select count(*) as n from echo_clips where mining_id = $id", {"id": mining_id})
    if held[0]["n"] < row["num_clips"]:  # lost with a data file; mined again they come back
        return None
    return Mining(mining_id, row["snapshot"], dict(row["groups"]), row["num_clips"], dict(row["dropped"]))
