"""Mining with a delimiter of its own: successes are split again, from their tokens and stored entropies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import schema
from pipeline.errors import MiningError
from pipeline.flat_lists import Lists, list_array
from pipeline.imports.token_facts import TokenFacts
from pipeline.lake_reader import Reader
from pipeline.sqlfiles import sql_file
from pipeline.steps import mean_step_entropies, splitter
from pipeline.tokenization import tokenizer_hash

_BATCH_ROWS = 512
_NEW_STEPS = pa.schema(map(schema.ROLLOUTS.field, ("rollout_id", "step_ends", "step_entropies")))


class Resplitter:
    """Splits the successes of a mining at one delimiter.

    Attributes:
        stages: the SQL files that it runs, of `sql/mining/`.
        settings: what its steps follow from, beside the tokens; recorded as settings of the mining.
    """

    stages = ("candidate_tokens", "resplit_successes")

    def __init__(self, tokenizer: Any, delimiter: str) -> None:
        self.settings = {"tokenizer_hash": tokenizer_hash(tokenizer), "splitter": splitter(delimiter)}
        self._facts = TokenFacts(tokenizer, delimiter)
        self._num_tokens = len(tokenizer)

    def resplit(self, reader: Reader, params: Mapping[str, Any]) -> None:
        """Gives the relation `successes` new steps; those that await the scorer keep theirs.

        Args:
            params: what the mining's stages are bound to.

        Raises:
            MiningError: a success is of another tokenizer.
        """
        self._refuse_other_tokenizers(reader)
        tokens = reader.batches(sql_file("mining/candidate_tokens"), _BATCH_ROWS, params)
        steps = pa.Table.from_batches([self._steps(batch) for batch in tokens], _NEW_STEPS)
        with reader.relation("new_steps", steps):
            reader.materialize(
                "successes", sql_file("mining/resplit_successes"), dict(params) | self.settings
            )

    def _steps(self, tokens: pa.Table) -> pa.RecordBatch:
        """The steps of some rollouts, their entropies as an import of the stored ones would have them."""
        ids, entropies = Lists(tokens["completion_ids"]), Lists(tokens["completion_entropies"])
        if len(ids.flat) and not 0 <= ids.flat.min() <= ids.flat.max() < self._num_tokens:
            raise MiningError(
                f"Successes to split again have token ids from {ids.flat.min()} to {ids.flat.max()}, and "
                f"the tokenizer has {self._num_tokens} tokens. Give --tokenizer the folder of the model "
                "that sampled them."
            )
        ends, counts = self._facts.step_ends(ids.flat, ids.offsets)
        means = mean_step_entropies(entropies.flat, ends, np.repeat(entropies.offsets[:-1], counts))
        return pa.record_batch(
            [
                tokens["rollout_id"].combine_chunks(),
                list_array(ends, counts, _NEW_STEPS.field("step_ends").type),
                list_array(means, counts, _NEW_STEPS.field("step_entropies").type),
            ],
            schema=_NEW_STEPS,
        )

    def _refuse_other_tokenizers(self, reader: Reader) -> None:
        others = reader.rows(
            """
            select tokenizer_hash as name, count(*) as num_rollouts
            from successes
            where not awaits_scorer and tokenizer_hash <> $tokenizer_hash
            group by tokenizer_hash
            order by num_rollouts desc, name
            """,
            self.settings,
        )
        if others:
            named = ", ".join(f"{other['num_rollouts']} by {other['name'][:12]}" for other in others)
            raise MiningError(
                f"Successes to split again are of another tokenizer ({named}) than the one given, "
                f"{self.settings['tokenizer_hash'][:12]}. Give --tokenizer the folder of the model that "
                "sampled them, or choose with --run what one tokenizer made."
            )
