"""EchoClips one after the other in flat tensors, gathered from the list columns of shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from pipeline.logprobs import Row


@dataclass(frozen=True)
class PackedClips:
    """R clips without padding: N tokens, each row its prompt and then its clip.

    Attributes:
        ids: [N] int32.
        cu_seqlens: [R + 1] int32, where rows start and end, as variable-length attention takes it.
        prompt_lengths: [R] int64.
        clip_lengths: [R] int64.
        weights: [R] float32.
        policy_versions: [R] int64, of the weights that sampled them.
        clip_ids: names, as `clip_uses` notes them.
    """

    ids: Tensor
    cu_seqlens: Tensor
    prompt_lengths: Tensor
    clip_lengths: Tensor
    weights: Tensor
    policy_versions: Tensor
    clip_ids: list[str]

    def __len__(self) -> int:
        return len(self.clip_ids)

    def rows(self) -> list[Row]:
        """The clips one by one: views of `ids`."""
        ids, starts = self.ids.numpy(), self.cu_seqlens.tolist()
        bounds = zip(starts, self.prompt_lengths.tolist(), starts[1:], strict=False)
        return [(ids[start : start + prompt], ids[start + prompt : end]) for start, prompt, end in bounds]


class PackedWindow:
    """The chosen rows of a table of shards in their order, from which batches are gathered.

    Attributes:
        ends: [R] int64, tokens up to the end of each row.
    """

    def __init__(self, rows: pa.Table, chosen: NDArray[np.int64]) -> None:
        self._lists = pa.concat_arrays([*rows["prompt_ids"].chunks, *rows["clip_ids"].chunks])
        self._places = np.stack((chosen, chosen + rows.num_rows), axis=1)  # [R, 2] of prompt and clip
        lengths = self._lists.value_lengths().to_numpy().astype(np.int64)
        self._lengths = lengths[self._places]
        self.ends: NDArray[np.int64] = self._lengths.sum(1).cumsum()
        self._facts = (
            rows.select(["clip_id", "weight", "policy_version"]).take(pa.array(chosen)).combine_chunks()
        )

    def __len__(self) -> int:
        return len(self.ends)

    def batch(self, start: int, end: int) -> PackedClips:
        """The rows from `start` to `end`."""
        bounds = np.concatenate(([self.ends[start - 1] if start else 0], self.ends[start:end]))
        # The flat values of (prompt, clip, prompt, clip, …) are the packed rows: one take gathers them all.
        ids = self._lists.take(pa.array(self._places[start:end].ravel())).values
        facts = self._facts.slice(start, end - start)
        prompt_lengths, clip_lengths = torch.from_numpy(self._lengths[start:end].T.copy())
        return PackedClips(
            from_dlpack(ids),
            torch.from_numpy((bounds - bounds[0]).astype(np.int32)),
            prompt_lengths,
            clip_lengths,
            torch.tensor(facts["weight"].to_numpy()),
            torch.tensor(facts["policy_version"].to_numpy()),
            facts["clip_id"].to_pylist(),
        )

    def batch_ends(self, batch_tokens: int | None, batch_clips: int | None) -> Iterator[int]:
        """Where batches end that take as many rows as go into both limits, in order, one at least.

        The last one is left out, since the rows of another window may still go into it.
        """
        start = 0
        while True:
            limit = (self.ends[start - 1] if start else 0) + (batch_tokens or self.ends[-1])
            end = max(int(np.searchsorted(self.ends, limit, "right")), start + 1)
            end = min(end, start + (batch_clips or len(self)))
            if end >= len(self):
                return
            yield end
            start = end
