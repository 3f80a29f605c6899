"""Verifying again: what today's verifiers say of stored completions, beside what was said when they came.

Nothing is overwritten. A verdict is a row of `verdicts`; of several the newest with a reward counts, in
minings, in the class of a group, and in `withdrawn_clips`. A verifier that hangs or dies says nothing: what
it was asked stays as it is, and is asked again the next time; that it fails again alike is not written again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from typing import Any

import pyarrow as pa

from pipeline import schema
from pipeline.config import VerifyConfig
from pipeline.errors import LakeError, VerifierError
from pipeline.lake import Lake
from pipeline.records import Judgement
from pipeline.rewards import VerifierPool
from pipeline.rollouts import stored_prompt
from pipeline.sqlfiles import sql_file
from pipeline.verifiers import BUILT_IN, NEED_TRUTH
from pipeline.withdrawal import TouchedShard, notice_shards, withdrawn_clips

BATCH_ROLLOUTS = 64  # judged together
COMMIT_ROLLOUTS, COMMIT_SECONDS = 4096, 30.0  # work that is not committed is lost when the process is killed


@dataclass(frozen=True)
class Scope:
    """Which rollouts are verified again; None: all of them."""

    run_id: str | None = None
    night: date | None = None
    prompt_id: str | None = None

    def params(self) -> dict[str, Any]:
        return {"run_id": self.run_id, "night": self.night, "prompt_id": self.prompt_id}


@dataclass(frozen=True)
class Reverified:
    """Numbers of rollouts.

    Attributes:
        judged: with a new verdict.
        failed: whose verifier hung, died or raised; they keep what they had.
        known: judged by the same verifier version before.
        unknown_prompt: whose prompt the lake does not hold, so that there is no ground truth.
        no_ground_truth: whose prompt has none, and the verifier needs one; it is not asked.
        no_verifier: that do not name a built-in verifier, and none was given.
        withdrawn_clips: clips (of all minings) that may teach no more.
        shards: exported files that hold some of these.
    """

    judged: int = 0
    failed: int = 0
    known: int = 0
    unknown_prompt: int = 0
    no_ground_truth: int = 0
    no_verifier: int = 0
    withdrawn_clips: int = 0
    shards: list[TouchedShard] = field(default_factory=list)


def reverify(
    lake: Lake,
    config: VerifyConfig,
    scope: Scope,
    verifier: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Reverified:
    """Runs verifiers over stored completions, and marks the shards that hold clips they overturned.

    Args:
        config: time limit and number of verifier processes.
        verifier: judges every rollout of the scope. By default each rollout's own, if it is built in: the
            name may come from a dump, and a dump must not choose what code runs here.
        progress: called with the number of verdicts so far.

    Raises:
        LakeError: no such rollouts, or the lake cannot be written; the verdicts so far stay.
        VerifierError: an unknown verifier, or one that cannot be imported.
    """
    with lake.reader() as reader:
        stored = reader.rows(sql_file("staging/stored_verifiers"), scope.params())
    if not stored:
        raise LakeError(
            f"The lake in {lake.folder} has no rollout of that run, night and prompt. "
            'See `echomine sql "select distinct run_id, night from rollouts"` for what it has.'
        )
    done = Reverified()
    if verifier is not None:
        num_rollouts = sum(row["num_rollouts"] for row in stored)
        done = _Reverification(lake, config, scope, progress).run(done, verifier, None, num_rollouts)
    for row in stored if verifier is None else ():
        if row["verifier"] in BUILT_IN:
            own = _Reverification(lake, config, scope, progress)
            done = own.run(done, row["verifier"], row["verifier"], row["num_rollouts"])
        else:
            done = replace(done, no_verifier=done.no_verifier + row["num_rollouts"])
    if done.no_verifier == sum(row["num_rollouts"] for row in stored):
        raise VerifierError(
            f"None of the {done.no_verifier} rollouts names a built-in verifier. "
            "Say who judges them: --verifier NAME or module:function."
        )
    with lake.alone(), lake.reader() as reader:  # a notice is also written by who forgets
        withdrawn = withdrawn_clips(reader)
        shards = notice_shards(reader, withdrawn, "overturned")
    return replace(done, withdrawn_clips=sum(map(len, withdrawn.values())), shards=shards)


@dataclass
class _Reverification:
    """One verifier's pass over the rollouts that it has not judged."""

    lake: Lake
    config: VerifyConfig
    scope: Scope
    progress: Callable[[int], None] | None
    _rows: list[dict[str, Any]] = field(default_factory=list)

    def run(
        self, before: Reverified, verifier: str, stored_verifier: str | None, num_rollouts: int
    ) -> Reverified:
        """Adds to the counts `before`.

        Args:
            stored_verifier: only rollouts that it judged; None: all.
            num_rollouts: that are in the scope.
        """
        done = before
        pool_config = self.config.model_copy(update={"verifier": verifier})
        with VerifierPool(pool_config) as pool, self.lake.reader() as reader:
            params = {
                **self.scope.params(),
                "stored_verifier": stored_verifier,
                "verifier": pool.name,
                "verifier_version": pool.version,
            }
            seen, committed = 0, time.monotonic()
            for batch in reader.batches(sql_file("staging/unverified_rollouts"), BATCH_ROLLOUTS, params):
                rows = batch.to_pylist()
                seen += len(rows)
                known = [row for row in rows if row["messages"] is not None]
                asked = [row for row in known if verifier not in NEED_TRUTH or _has_truth(row)]
                judgements = pool.judge_each(
                    [stored_prompt(row) for row in asked], [row["completion"] or "" for row in asked]
                )
                self._keep(pool, asked, judgements)
                failed = sum(judgement.reward is None for judgement in judgements)
                done = replace(
                    done,
                    judged=done.judged + len(asked) - failed,
                    failed=done.failed + failed,
                    unknown_prompt=done.unknown_prompt + len(rows) - len(known),
                    no_ground_truth=done.no_ground_truth + len(known) - len(asked),
                )
                if len(self._rows) >= COMMIT_ROLLOUTS or time.monotonic() - committed > COMMIT_SECONDS:
                    self._commit()
                    committed = time.monotonic()
                if self.progress is not None:
                    self.progress(done.judged + done.failed)
            self._commit()
        return replace(done, known=done.known + num_rollouts - seen)

    def _keep(self, pool: VerifierPool, rows: list[dict[str, Any]], judgements: list[Judgement]) -> None:
        now = datetime.now(UTC)
        for row, judgement in zip(rows, judgements, strict=True):
            if judgement.reward is None and judgement.error == row["last_error"]:
                continue  # each verdict is a new snapshot to mine, and this one says nothing new
            self._rows.append(
                {
                    "rollout_id": row["rollout_id"],
                    "verifier": pool.name,
                    "verifier_version": pool.version,
                    "reward": judgement.reward,
                    "reward_parts": list(judgement.parts.items()) or None,
                    "error": judgement.error or None,
                    "judged_at": now,
                }
            )

    def _commit(self) -> None:
        if self._rows:
            verdicts = pa.Table.from_pylist(self._rows, schema.VERDICTS)
            self.lake.changed(lambda writer: writer.append({"verdicts": writer.still_held(verdicts)}))
            self._rows.clear()


def _has_truth(row: dict[str, Any]) -> bool:
    return bool((row["ground_truth"] or "").strip())
