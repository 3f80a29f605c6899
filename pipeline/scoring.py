"""The scorer: entropies for rollouts whose engine could not know them, by teacher forcing.

Waiting rollouts come from the lake as a stream, and go back a commit at a time. So memory holds one chunk
of them however many wait, and a scoring that was stopped goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch

from pipeline import schema
from pipeline.errors import LakeError, ModelError
from pipeline.lake import Lake
from pipeline.lake_reader import Reader
from pipeline.logprobs import NO_LIMIT, TokenStats, check_head, context_and_vocabulary
from pipeline.models import is_out_of_memory, load_model
from pipeline.onednn import OneDnnLinear
from pipeline.records import Policy
from pipeline.runs import NightRun, facts, update_facts
from pipeline.scored_chunk import Chunk
from pipeline.sqlfiles import sql_file
from pipeline.teacher_forcing import forward_passes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_ROLLOUTS = 4096  # read together; like lengths are sought among them
COMMIT_SECONDS = 60.0  # work that is not committed is lost when the process is killed
# Padded tokens of a forward pass, for each thread or on a GPU, where no size was measured;
# `bench_scorer.py --batch-tokens N` shows what others do.
CORE_TOKENS, GPU_TOKENS = 1024, 32_768


@dataclass(frozen=True)
class Scored:
    """Numbers of rollouts: scored now, and left waiting because the model cannot read them.

    Attributes:
        other_tokenizer: of another tokenizer than the model's.
        unreadable: longer than the model's context, or without a prompt.
        batch_tokens: what the padded tokens of a forward pass were lowered to, if memory ran out.
    """

    scored: int = 0
    other_tokenizer: int = 0
    unreadable: int = 0
    batch_tokens: int | None = None


@dataclass(frozen=True)
class Selection:
    """Which rollouts to score: those without entropies.

    Attributes:
        run_id: of this run only.
        rescore: also those that have entropies, unless an earlier scoring by the same weights gave them.
    """

    run_id: str | None = None
    rescore: bool = False


UNSCORED = Selection()


def check_run(lake: Lake, run_id: str) -> None:
    """Raises LakeError if the lake has no rollouts of a run."""
    with lake.reader() as reader:
        if not reader.rows("select 1 as n from rollouts where run_id = $run_id limit 1", {"run_id": run_id}):
            raise LakeError(
                f"The lake in {lake.folder} has no run {run_id}. "
                'See `echomine sql "select distinct run_id from rollouts"` for those it has.'
            )


def num_waiting(lake: Lake, policy: Policy, selection: Selection = UNSCORED) -> int:
    """How many rollouts are to be scored, those that the model cannot read included."""
    with lake.reader() as reader:
        waiting = sql_file("staging/waiting_rollouts")
        return int(reader.rows(f"select count(*) as n from ({waiting})", _params(policy, selection))[0]["n"])


def score_run(run: NightRun, progress: Callable[[int], None] | None = None) -> Scored:
    """Scores the rollouts of a night that its engine gave no entropies, by the model that sampled them."""
    lake, selection = run.lake(), Selection(run.run_id)
    if not num_waiting(lake, run.policy, selection):
        return Scored()
    started, noted = time.monotonic(), facts(run)
    model = load_model(run.model_folder, run.config.engine.device, run.config.engine.dtype)
    done = score(lake, model, run.policy, selection, run.config.score.batch_tokens, progress)
    update_facts(
        run,
        num_scored=noted.get("num_scored", 0) + done.scored,
        score_seconds=noted.get("score_seconds", 0.0) + time.monotonic() - started,
    )
    return done


def score(
    lake: Lake,
    model: PreTrainedModel,
    policy: Policy,
    selection: Selection = UNSCORED,
    batch_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Scored:
    """Gives rollouts the entropies that a model has at temperature 1, and log-probs where they are absent.

    A commit replaces the rows that were scored since the last, at least every minute; each rollout is noted
    in `scorings` with the weights that scored it, so no work that was committed is done again.

    Args:
        policy: who the model is.
        batch_tokens: padded tokens of a forward pass, by default what suits the device; halved whenever
            memory runs out.
        progress: called with the number of rollouts scored so far.

    Raises:
        ModelError: the model does more to its logits than its output embedding, knows fewer tokens than its
            tokenizer, gives no numbers, or has no room for a single rollout.
        LakeError: the lake cannot be written. What was committed before stays, here as with a ModelError.
    """
    check_head(model)
    if batch_tokens is None:
        on_gpu = model.device.type == "cuda"
        batch_tokens = GPU_TOKENS if on_gpu else CORE_TOKENS * torch.get_num_threads()
    with lake.reader() as reader:
        counts = _waiting(reader, model, policy, selection)
        scorer = _Scorer(lake, model, policy, counts, batch_tokens, progress)
        for rollouts in reader.batches(
            "select rollouts.* from rollouts join waiting_rollouts using (rollout_id) where obstacle is null",
            CHUNK_ROLLOUTS,
        ):
            scorer.score(Chunk(rollouts))
    return scorer.done


def _params(policy: Policy, selection: Selection, context: int = NO_LIMIT) -> dict[str, object]:
    return {
        "run_id": selection.run_id,
        "rescore": selection.rescore,
        "weights_hash": policy.weights_hash,
        "tokenizer_hash": policy.tokenizer_hash,
        "context": context,
    }


def _waiting(reader: Reader, model: PreTrainedModel, policy: Policy, selection: Selection) -> Scored:
    """Makes the relation `waiting_rollouts`, and counts those in it that the model cannot read."""
    context, vocabulary = context_and_vocabulary(model)
    params = _params(policy, selection, context)
    reader.materialize("waiting_rollouts", sql_file("staging/waiting_rollouts"), params)
    counts = reader.rows(
        """
        select
            count(*) filter (obstacle = 'other_tokenizer') as other_tokenizer,
            count(*) filter (obstacle = 'unreadable') as unreadable,
            max(max_token_id) filter (obstacle is null) as max_token_id
        from waiting_rollouts
        """
    )[0]
    if (counts["max_token_id"] or 0) >= vocabulary:
        raise ModelError(
            f"{policy.model} knows the token ids 0 to {vocabulary - 1}, and rollouts of its tokenizer hold "
            f"{counts['max_token_id']}: model and tokenizer do not fit. Give a folder with both of one model."
        )
    return Scored(0, counts["other_tokenizer"], counts["unreadable"])


class _Scorer:
    """Scores chunk after chunk; `done` counts what is in the lake."""

    def __init__(
        self,
        lake: Lake,
        model: PreTrainedModel,
        policy: Policy,
        counts: Scored,
        batch_tokens: int,
        progress: Callable[[int], None] | None,
    ) -> None:
        self.lake, self.model, self.policy = lake, model, policy
        self.done, self.batch_tokens, self.progress = counts, batch_tokens, progress

    def score(self, chunk: Chunk) -> None:
        waiting, uncommitted, committed = chunk.unscored(), list[int](), time.monotonic()
        while waiting:
            try:
                with torch.inference_mode(), OneDnnLinear():
                    for part, stats in forward_passes(self.model, chunk.rows(waiting), self.batch_tokens):
                        indices = [waiting[i] for i in part]
                        self._set_scores(chunk, indices, stats)
                        uncommitted += indices
                        if time.monotonic() - committed > COMMIT_SECONDS:
                            self._commit(chunk, uncommitted)
                            uncommitted, committed = [], time.monotonic()
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self._commit(chunk, uncommitted)
                uncommitted = []
                self._lower_batch_tokens(chunk.longest(chunk.unscored()))
            waiting = chunk.unscored()
            if waiting and self.model.device.type == "cuda":
                torch.cuda.empty_cache()
        self._commit(chunk, uncommitted)

    def _set_scores(self, chunk: Chunk, indices: list[int], stats: TokenStats) -> None:
        entropies, logprobs = stats.entropies.cpu().numpy(), stats.logprobs.cpu().numpy()
        if not (np.isfinite(entropies).all() and np.isfinite(logprobs).all()):
            raise ModelError(
                f"{self.policy.model} gives NaN or infinite log-probs. Try engine.dtype = float32, or "
                "another copy of the model; what was scored before stays."
            )
        chunk.set_scores(indices, entropies, logprobs)

    def _lower_batch_tokens(self, longest: int) -> None:
        if self.batch_tokens <= longest:
            raise ModelError(
                f"A rollout of {longest} tokens does not fit into the memory of {self.model.device} beside "
                f"{self.policy.model}, even alone. Set engine.dtype to bfloat16 or engine.device to cpu, or "
                "free memory; what was scored before stays."
            ) from None
        self.batch_tokens = max(longest, self.batch_tokens // 2)
        self.done = replace(self.done, batch_tokens=self.batch_tokens)

    def _commit(self, chunk: Chunk, indices: list[int]) -> None:
        if not indices:
            return
        rows = chunk.scored_rows(indices, self.policy.weights_hash)
        note = {
            "model": self.policy.model,
            "weights_hash": self.policy.weights_hash,
            "policy_version": self.policy.policy_version,
            "scored_at": datetime.now(UTC),
        }
        columns = {name: [value] * rows.num_rows for name, value in note.items()}
        scorings = pa.table({"rollout_id": rows["rollout_id"], **columns}, schema.SCORINGS)
        scored = self.lake.replace_rollouts(rows, scorings)
        self.done = replace(self.done, scored=self.done.scored + scored)
        if self.progress is not None:
            self.progress(self.done.scored)
