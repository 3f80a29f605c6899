"""Some rollouts of the lake as flat buffers, and their scores: Arrow in, Arrow out, no Python lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline import schema
from pipeline.logprobs import Row
from pipeline.records import Float32, Int32
from pipeline.steps import mean_step_entropies


class Chunk:
    """R rollouts with N completion tokens, and what is known so far of their scores.

    Attributes:
        entropies, logprobs: [N] nats, completions one after the other; 0 until they are known.
    """

    def __init__(self, rollouts: pa.Table) -> None:
        """Args: rollouts: rows of the table `rollouts`."""
        self.rollouts = rollouts.select(schema.ROLLOUTS.names).cast(schema.ROLLOUTS).combine_chunks()
        self._prompts, self._prompt_ends = _flat(self.rollouts["prompt_ids"])
        self._completions, self._ends = _flat(self.rollouts["completion_ids"])
        self._scored = np.zeros(self.rollouts.num_rows, bool)
        self.entropies: Float32 = np.zeros(len(self._completions), np.float32)
        self.logprobs: Float32 = np.zeros(len(self._completions), np.float32)

    def __len__(self) -> int:
        return int(self.rollouts.num_rows)

    def unscored(self) -> list[int]:
        """The rollouts whose scores are not known yet."""
        indices: list[int] = np.flatnonzero(~self._scored).tolist()
        return indices

    def longest(self, indices: Sequence[int]) -> tuple[int, int]:
        """The longest of some rollouts, and its prompt and completion tokens."""
        num_tokens = (np.diff(self._prompt_ends) + np.diff(self._ends))[indices]
        place = int(num_tokens.argmax())
        return indices[place], int(num_tokens[place])

    def rows(self, indices: Sequence[int]) -> list[Row]:
        """Prompt ids [P] and completion ids [T] of each; views, not copies."""
        prompts, completions = self._prompts, self._completions
        return [
            (prompts[slice(*self._prompt_ends[i : i + 2])], completions[slice(*self._ends[i : i + 2])])
            for i in indices
        ]

    def set_scores(self, indices: Sequence[int], entropies: Float32, logprobs: Float32) -> None:
        """Keeps the scores of some rollouts, their completions one after the other."""
        begin = 0
        for index in indices:
            here = slice(*self._ends[index : index + 2])
            end = begin + here.stop - here.start
            self.entropies[here], self.logprobs[here] = entropies[begin:end], logprobs[begin:end]
            begin = end
        self._scored[list(indices)] = True

    def scored_rows(self, indices: Sequence[int], weights_hash: str) -> pa.Table:
        """The rows of scored rollouts as the lake shall have them, in the lake's order.

        Entropies replace what was there. Log-probs that are there stay: importance ratios need those of the
        policy that sampled. Where they are absent ours take their place, unless other weights are known to
        have sampled the rollout.
        """
        rows = self.rollouts
        offsets = pa.array(self._ends, pa.int32())
        entropies = pa.ListArray.from_arrays(offsets, pa.array(self.entropies))
        logprobs = pa.ListArray.from_arrays(offsets, pa.array(self.logprobs))
        ours = pc.coalesce(pc.equal(rows["weights_hash"], weights_hash), True)
        lacks = pc.and_(pc.is_null(rows["completion_logprobs"]), ours)
        replaced = {
            "completion_entropies": entropies,
            "entropy_kind": pa.array(["rescored"] * rows.num_rows),
            "completion_logprobs": pc.if_else(lacks, logprobs, rows["completion_logprobs"]),
            "logprobs_kind": pc.if_else(lacks, "raw", rows["logprobs_kind"]),
            "step_entropies": self._step_entropies(),
        }
        for name, column in replaced.items():
            place = rows.schema.get_field_index(name)
            rows = rows.set_column(place, schema.ROLLOUTS.field(name), column)
        return rows.take(pa.array(sorted(indices), pa.int64()))

    def _step_entropies(self) -> pa.ListArray:
        step_ends, ends = _flat(self.rollouts["step_ends"])
        begins = np.repeat(self._ends[:-1], np.diff(ends))
        means = mean_step_entropies(self.entropies, step_ends, begins)
        return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(means))


def _flat(lists: pa.ChunkedArray) -> tuple[Int32, NDArray[np.int64]]:
    """A column of lists: all values, and the R + 1 places where lists begin and the last one ends."""
    array: Any = lists.combine_chunks()
    lengths = pc.list_value_length(array).to_numpy()
    return array.flatten().to_numpy(), np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
