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
from pipeline.models import is_out_of_memory, load_model, more_room
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

    def remarks(self, model: str) -> list[str]:
        """What a user should know of a scoring by the model of this name, a line each; mostly nothing."""
        lines = []
        if self.other_tokenizer or self.unreadable:
            lines.append(
                f"{self.other_tokenizer + self.unreadable} rollouts still wait: {self.other_tokenizer} are "
                "of another tokenizer (give the model that sampled them), "
                f"{self.unreadable} have no prompt or do not fit the context of {model}."
            )
        if self.batch_tokens is not None:
            lines.append(
                f"Memory ran out, so passes were made smaller. Set score.batch_tokens to {self.batch_tokens}."
            )
        return lines


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
        return _num_waiting(reader, policy, selection)


def score_run(run: NightRun, progress: Callable[[int], None] | None = None) -> Scored:
    """Scores the rollouts of a night that came without entropies, by the model that sampled them.

    The others, too, if there are any: a night that servers began and an engine ended has two kinds of
    entropies, and a mining ranks one. Where none waits this costs two queries, and no model is loaded.
    """
    lake = run.lake()
    with lake.reader() as reader:
        selection = Selection(run.run_id, rescore=_has_two_kinds(reader, run.run_id))
        if not _num_waiting(reader, run.policy, selection):
            return Scored()
    started, noted = time.monotonic(), facts(run)
    model = load_model(run.model_folder, run.config.engine.device, run.config.engine.dtype)
    done = score(lake, model, run.policy, selection, run.config.score.batch_tokens, progress)
    update_facts(
        run,
        num_scored=noted.get("num_scored", 0) + done.scored,
        score_seconds=noted.get("score_seconds", 0.0) + time.monotonic() - started,
    )
    if done.scored:
        update_facts(run, snapshot=None)  # what was mined before lacks these
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


def _num_waiting(reader: Reader, policy: Policy, selection: Selection) -> int:
    waiting = sql_file("staging/waiting_rollouts")
    return int(reader.rows(f"select count(*) as n from ({waiting})", _params(policy, selection))[0]["n"])


def _has_two_kinds(reader: Reader, run_id: str) -> bool:
    """Whether a night's engines measured some of its entropies, and the scorer gave or shall give others."""
    query = """
        select count(distinct coalesce(entropy_kind, 'rescored')) > 1 as two
        from rollouts
        where run_id = $run_id and origin = 'policy'
    """
    return bool(reader.rows(query, {"run_id": run_id})[0]["two"])


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
        while waiting := chunk.unscored():
            if not self._score_within_memory(chunk, waiting):
                self._make_passes_smaller(chunk)

    def _score_within_memory(self, chunk: Chunk, waiting: list[int]) -> bool:
        """Scores and commits rollouts until all are or memory runs out; False if it did."""
        uncommitted, committed, memory_lasts = list[int](), time.monotonic(), True
        try:
            with torch.inference_mode(), OneDnnLinear():
                for part, stats in forward_passes(self.model, chunk.rows(waiting), self.batch_tokens):
                    indices = [waiting[i] for i in part]
                    self._set_scores(chunk, indices, stats)
                    uncommitted += indices
                    if time.monotonic() - committed > COMMIT_SECONDS:
                        self._commit(chunk, uncommitted)
                        uncommitted, committed = [], time.monotonic()
        except ModelError:  # of a pass that gave no numbers; those before it did
            self._commit(chunk, uncommitted)
            raise
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            memory_lasts = False
        self._commit(chunk, uncommitted)
        return memory_lasts

    def _set_scores(self, chunk: Chunk, indices: list[int], stats: TokenStats) -> None:
        entropies, logprobs = stats.entropies.cpu().numpy(), stats.logprobs.cpu().numpy()
        if not (np.isfinite(entropies).all() and np.isfinite(logprobs).all()):
            raise ModelError(
                f"{self.policy.model} gives NaN or infinite log-probs. Try engine.dtype = float32, or "
                "another copy of the model; what was scored before stays."
            )
        chunk.set_scores(indices, entropies, logprobs)

    def _make_passes_smaller(self, chunk: Chunk) -> None:
        """Halves `batch_tokens`; to less than the longest rollout only once that was scored alone."""
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        longest, num_tokens = chunk.longest(chunk.unscored())
        smaller = self.batch_tokens // 2
        if self.batch_tokens > num_tokens:
            smaller = max(smaller, num_tokens)
        elif not self._score_within_memory(chunk, [longest]):
            raise ModelError(
                f"A rollout of {num_tokens} tokens does not fit into the memory of {self.model.device} "
                f"beside {self.policy.model}, even alone. "
                f"{more_room(self.model.dtype, self.model.device.type)}. "
                "What was scored before stays."
            )
        self.batch_tokens = max(1, smaller)
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
