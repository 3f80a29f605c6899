"""What a mining would find with other settings, beside what it found. Nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import MiningConfig, validated
from pipeline.errors import ConfigError, NothingToMine
from pipeline.lake import Lake
from pipeline.lake_reader import Reader
from pipeline.mine import decide, recorded_settings, resplitter
from pipeline.mining_refusals import undamaged


@dataclass(frozen=True)
class Yield:
    """What a mining gives.

    Attributes:
        groups: number of groups by class.
        dropped: number of clips (for `unscored`: groups) dropped by each reason that occurred.
        mean_step_entropy: nats, over the clips; None without clips.
    """

    clips: int
    groups_with_clips: int
    clip_tokens: int
    mean_step_entropy: float | None
    groups: Mapping[str, int]
    dropped: Mapping[str, int]


@dataclass(frozen=True)
class Overlap:
    """Clips that both found, and those that one of them found. A clip is a rollout cut at a token."""

    both: int
    only_what_if: int
    only_last: int


@dataclass(frozen=True)
class Simulation:
    """A mining beside what it would have been.

    Attributes:
        mining_id: the mining that was compared with.
        snapshot: of the rollouts that were mined in the simulation.
        changes: the settings that differ.
    """

    mining_id: str
    snapshot: int
    changes: Mapping[str, Any]
    last: Yield
    what_if: Yield
    overlap: Overlap

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def parse_changes(text: str) -> dict[str, str | None]:
    """Settings written `scope=any_success,clips_per_group=4`; `none` takes a limit away.

    Raises:
        ConfigError: a part is no `name=value`, or a name comes twice.
    """
    changes: dict[str, str | None] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not (name and equals and value):
            raise ConfigError(
                f"`{part.strip()}` in --what-if is no setting. Write `name=value`, commas between several."
            )
        if name in changes:
            raise ConfigError(f"`{name}` comes twice in --what-if. Give it once.")
        changes[name] = None if value == "none" else value
    return changes


def simulate(
    lake: Lake,
    changes: Mapping[str, str | None],
    snapshot: int | None = None,
    run_id: str | None = None,
    tokenizer: Callable[[], Any] | None = None,
) -> Simulation:
    """Mines as the last mining did but for `changes`, and compares.

    Args:
        changes: texts by the names of `MiningConfig`.
        snapshot: of the rollouts; by default the one that the last mining mined.
        run_id: compares with the last mining of this run; by default with the last of all.
        tokenizer: gives the one that sampled the rollouts; called only if they are split again.

    Raises:
        ConfigError: no such setting, or no such value.
        NothingToMine: there is no mining to compare with, or what it mined has ended.
        MiningError: several entropy kinds would be ranked together, or successes to split again are
            of another tokenizer.
        LakeError: no such snapshot, or a data file that is met for the first time is damaged.
    """
    with lake.reader() as newest:
        last = _last_mining(newest, run_id)
        held = newest.table(
            "select clip_id, group_id, clip_tokens, step_entropy from echo_clips where mining_id = $id",
            {"id": last["mining_id"]},
        )
    recorded = json.loads(last["config"])
    config = validated(MiningConfig, recorded_settings(recorded) | dict(changes), where="--what-if")
    splitting = resplitter(config, tokenizer)
    if snapshot is None:
        snapshot = _still_there(lake, last)
    with lake.reader(snapshot) as reader, lake.reader() as current:
        with undamaged(lake, reader.verification(newest=current)):
            groups, dropped, clips = decide(
                reader, config, recorded["since_snapshot"], last["run_id"], splitting=splitting
            )
        mined_snapshot = reader.data_snapshot()
    return Simulation(
        last["mining_id"],
        mined_snapshot,
        {name: getattr(config, name) for name in changes},
        _yield(held, dict(last["groups"]), dict(last["dropped"])),
        _yield(clips, groups, dropped),
        _overlap(held, clips),
    )


def _last_mining(reader: Reader, run_id: str | None) -> dict[str, Any]:
    rows = reader.rows(
        "select * from mining_runs where $run_id is null or run_id = $run_id "
        "order by created_at desc limit 1",
        {"run_id": run_id},
    )
    if not rows:
        what = f"The lake in {reader.lake.folder}" if run_id is None else f"Run {run_id}"
        raise NothingToMine(
            f"{what} was never mined, so there is nothing to compare with. Run `echomine mine`."
        )
    return rows[0]


def _still_there(lake: Lake, mining: Mapping[str, Any]) -> int:
    with lake.reader() as reader:
        if reader.rows("from snapshots where snapshot = $snapshot", mining):
            return int(mining["snapshot"])
    raise NothingToMine(
        f"Mining {mining['mining_id'][:12]} mined snapshot {mining['snapshot']}, which has ended since. "
        "Mine again (`echomine mine`), or give one that is left with --snapshot."
    )


def _yield(clips: pa.Table, groups: Mapping[str, int], dropped: Mapping[str, int]) -> Yield:
    return Yield(
        clips.num_rows,
        pc.count_distinct(clips["group_id"]).as_py(),
        pc.sum(clips["clip_tokens"]).as_py() or 0,
        pc.mean(clips["step_entropy"]).as_py(),
        groups,
        dropped,
    )


def _overlap(last: pa.Table, what_if: pa.Table) -> Overlap:
    both = pc.sum(pc.is_in(what_if["clip_id"], last["clip_id"])).as_py() or 0
    return Overlap(both, what_if.num_rows - both, last.num_rows - both)
