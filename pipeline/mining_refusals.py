"""What is not mined: what would be ranked together does not compare, is not there, or is damaged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import LakeError, MiningError
from pipeline.lake import Lake
from pipeline.lake_reader import Reader
from pipeline.verified import Verification


def refuse_unknown_scope(reader: Reader, since_snapshot: int | None, run_id: str | None) -> None:
    """Raises MiningError for a snapshot to mine since, or a run, that the lake does not have."""
    if since_snapshot is not None and not 0 <= since_snapshot <= reader.snapshot:
        raise MiningError(
            f"There is no snapshot {since_snapshot} to mine since; the newest is {reader.snapshot}. "
            'See `echomine sql "from snapshots"`.'
        )
    runs = "select count(*) as n from rollouts where run_id = $run_id"
    if run_id is not None and not reader.rows(runs, {"run_id": run_id})[0]["n"]:
        raise MiningError(
            f"The lake has no run {run_id}. "
            'See `echomine sql "select distinct run_id from rollouts"` for those it has.'
        )


def refuse_mixed_entropies(reader: Reader) -> None:
    """Raises MiningError if the relation `successes` has entropies of several kinds, or of several judges."""
    kinds = [
        row["entropy_kind"]
        for row in reader.rows(
            "select distinct entropy_kind from successes where not awaits_scorer "
            "order by entropy_kind nulls first"
        )
    ]
    if len(kinds) > 1:
        raise MiningError(
            f"The successes to mine have several kinds of entropy ({', '.join(map(str, kinds))}), which do "
            "not compare. Choose one with --entropy-kind."
        )
    if kinds == ["rescored"]:
        _refuse_several_judges(reader)


def _refuse_several_judges(reader: Reader) -> None:
    """Rescored entropies compare if one policy gave them all, or each rollout's are its own policy's."""
    judges = reader.rows(
        """
        with
        judged as (
            select
                successes.rollout_id,
                max_by(scorings.model || ' at version ' || scorings.policy_version, scored_at) as judge,
                coalesce(max_by(scorings.weights_hash, scored_at), 'unknown') as weights_hash
            from successes
            left join scorings using (rollout_id)
            where not awaits_scorer
            group by successes.rollout_id
        )
        select
            coalesce(any_value(judged.judge), 'unknown weights') as name,
            count(*) as num_rollouts,
            bool_and(rollouts.weights_hash is not distinct from judged.weights_hash) as judged_their_own
        from judged
        join rollouts using (rollout_id)
        group by judged.weights_hash
        order by num_rollouts desc, judged.weights_hash
        """
    )
    if len(judges) > 1 and not all(judge["judged_their_own"] for judge in judges):
        named = ", ".join(f"{judge['num_rollouts']} by {judge['name']}" for judge in judges)
        raise MiningError(
            f"The successes to mine were scored by different weights ({named}), whose entropies do not "
            "compare. Have one model judge them all: `echomine score --rescore --model NAME_OR_FOLDER`."
        )


@contextmanager
def undamaged(lake: Lake, verification: Verification) -> Iterator[None]:
    """Reads files while they are verified.

    Raises:
        LakeError: one is damaged, which says more than what a query makes of it.
    """
    try:
        yield
    finally:
        damaged = verification.damaged()
        if damaged:
            raise LakeError(
                f"{damaged[0].path} in {lake.folder} {damaged[0].problem} ({len(damaged)} such files). "
                "Restore it from a backup, or set it aside with `echomine doctor --set-aside`, then mine "
                "again; nothing was mined."
            )
