"""EchoClips from shards as a stream of packed batches: shuffled, split over ranks and workers, resumable."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from pipeline.errors import ConfigError, FormatError
from pipeline.shards import ShardFile, Shards, open_shards, read_shard
from trainer.packed_clips import PackedClips, PackedWindow

STREAM = 2  # apart from the loop's own orders of prompts and clips
BUFFER_TOKENS = 2**23  # 32 MiB of ids; windows of twice that cost more in page faults than in work


class ShardStream(IterableDataset[PackedClips]):
    """One epoch per iteration; the next iteration goes on with the next epoch, of the newest export then.

    An epoch's order comes from the seed, the epoch and the export alone: files are shuffled, and the clips of
    as many files as `buffer_tokens` holds are shuffled together. Of n parts (ranks × workers of a
    `torch.utils.data.DataLoader`) part p takes clips p, p + n, …: each clip goes to one part, and
    parts differ by one clip at most. Each part reads all files, which costs it little beside a model.

    `state_dict` and `load_state_dict` are what torchdata's `StatefulDataLoader` calls.

    Attributes:
        shards: the export of this epoch.
        epoch: from 0.
    """

    def __init__(
        self,
        folder: Path | str,
        tokenizer_hash: str,
        *,
        batch_tokens: int | None = None,
        batch_clips: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        buffer_tokens: int = BUFFER_TOKENS,
    ) -> None:
        """
        Args:
            folder: an export, or a folder of exports.
            batch_tokens: a batch holds no more, prompts included.
            batch_clips: a batch holds no more; an epoch is cut into batches of equal size.
            buffer_tokens: how many are shuffled together, one file at least; bounds the memory.

        Raises:
            ConfigError: no limit of a batch, or a number that makes no sense.
            FormatError: see `set_epoch`.
        """
        limits = [limit for limit in (batch_tokens, batch_clips) if limit is not None]
        if not limits or min(limits) < 1:
            raise ConfigError(
                f"A batch is to hold {batch_tokens} tokens and {batch_clips} clips. "
                "Give batch_tokens or batch_clips, 1 or more."
            )
        if not 0 <= rank < world_size:
            raise ConfigError(
                f"There is no rank {rank} of {world_size}. Give one from 0 to {world_size - 1}."
            )
        self._folder, self._tokenizer_hash = Path(folder), tokenizer_hash
        self._batch_tokens, self._batch_clips = batch_tokens, batch_clips
        self._rank, self._world_size = rank, world_size
        self._order = {"seed": seed, "buffer_tokens": buffer_tokens}
        self._was_iterated = False
        self.set_epoch(0)

    def set_epoch(self, epoch: int, export: Path | None = None) -> None:
        """Stand at the start of an epoch, of the newest export.

        Before each epoch of a `DataLoader` with workers, call this in the main process: workers are copies,
        and one decision for all of them keeps them disjoint.

        Args:
            export: that very one: give every rank the `shards.folder` that one of them found.

        Raises:
            FormatError: no shards there, of a newer format, another tokenizer's, or without a clip.
        """
        self.shards = self._opened(export or self._folder)
        self.epoch, self._position, self._is_over = epoch, 0, False

    def __iter__(self) -> Iterator[PackedClips]:
        """The rest of the epoch.

        Raises:
            FormatError: a file is missing or was changed, a clip is longer than `batch_tokens`, or see
                `set_epoch`.
            ConfigError: workers that outlive an epoch.
        """
        if self._is_over and get_worker_info() is None:
            self.set_epoch(self.epoch + 1)
        elif self._is_over and self._was_iterated:
            raise ConfigError(
                "Workers that outlive an epoch would each find a newer export at a time of their own. "
                "Set persistent_workers=False, and call set_epoch before each epoch."
            )
        self._was_iterated = True
        if not self._is_over:
            yield from self._batches(*self._part())
        self._is_over = True

    def state_dict(self) -> dict[str, Any]:
        """Where this part of the stream stands, as JSON values: behind the last batch that was taken."""
        part, num_parts = self._part()
        return {
            "export": self.shards.folder.name,
            "content": self.shards.content,
            "order": dict(self._order),
            "part": part,
            "num_parts": num_parts,
            "epoch": self.epoch,
            "position": self._position,
            "is_over": self._is_over,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a stream stood, in the export it stood in; at an epoch's border another one will do.

        Raises:
            ConfigError: the stream was shuffled or split in another way.
            FormatError: that export is no longer there, or another content lies in its place.
        """
        part = {"part": self._part()[0], "num_parts": self._part()[1]}
        ours = {"order": self._order, **part}
        theirs = {name: state[name] for name in ours}
        if theirs != ours:
            raise ConfigError(
                f"The stream that is to go on was {theirs}, and this one is {ours}. "
                "Give it the same seed, buffer_tokens, ranks and workers."
            )
        if not state["is_over"]:
            self.shards = self._export_of(state)
        self.epoch, self._position = state["epoch"], state["position"]
        self._is_over, self._was_iterated = state["is_over"], False

    def _export_of(self, state: Mapping[str, Any]) -> Shards:
        """The export a state stood in, also where it is not the newest any more."""
        beside = self._folder / Path(str(state["export"])).name
        found = self._opened(beside if (beside / "manifest.json").is_file() else self._folder)
        if state["position"] and found.content != state["content"]:
            raise FormatError(
                f"The stream stood at clip {state['position']} of epoch {state['epoch']} in export "
                f"{state['export']}, and {found.folder} is another. Put that export back, "
                "or begin an epoch anew."
            )
        return found

    def _opened(self, folder: Path) -> Shards:
        shards = open_shards(folder, self._tokenizer_hash)
        if not shards.num_clips:
            raise FormatError(f"The shards in {shards.folder} hold no clip. Mine and export again.")
        return shards

    def _part(self) -> tuple[int, int]:
        """Which part of how many this process reads."""
        worker = get_worker_info()
        number, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        # Neighbours are of different ranks, so that also these differ by one clip at most.
        return number * self._world_size + self._rank, self._world_size * num_workers

    def _batches(self, part: int, num_parts: int) -> Iterator[PackedClips]:
        batch_clips = self._equal_batches(part, num_parts)
        left: pa.Table | None = None  # of the window before: too few for a batch of their own
        for rows, chosen in self._windows(part, num_parts):
            if left is not None:
                rows = pa.concat_tables([left, rows])
                chosen = np.concatenate((np.arange(left.num_rows), chosen + left.num_rows))
            if not len(chosen):
                continue
            window, start = PackedWindow(rows, chosen), 0
            for end in window.batch_ends(self._batch_tokens, batch_clips):
                yield self._passed(rows, chosen[end - 1], window.batch(start, end))
                start = end
            left = rows.take(pa.array(chosen[start:]))
        if left is not None:
            window = PackedWindow(left, np.arange(left.num_rows))
            yield self._passed(left, left.num_rows - 1, window.batch(0, left.num_rows))

    def _passed(self, rows: pa.Table, last: int, batch: PackedClips) -> PackedClips:
        """A batch to be handed out, and the position set behind its last row."""
        longest = int(batch.cu_seqlens.diff().max())
        if self._batch_tokens is not None and longest > self._batch_tokens:
            raise FormatError(
                f"A clip of {self.shards.folder} has {longest} tokens with its prompt, and batch_tokens is "
                f"{self._batch_tokens}. Raise it, or export with --max-tokens {self._batch_tokens}."
            )
        self._position = rows["place"][last].as_py() + 1
        return batch

    def _equal_batches(self, part: int, num_parts: int) -> int | None:
        """Clips of a batch, such that the epoch's last one is no small rest."""
        num_clips = len(range(part, self.shards.num_clips, num_parts))
        if self._batch_clips is None or not num_clips:
            return self._batch_clips
        return math.ceil(num_clips / math.ceil(num_clips / self._batch_clips))

    def _windows(self, part: int, num_parts: int) -> Iterator[tuple[pa.Table, NDArray[np.int64]]]:
        """Rows that are shuffled together, with their `place` in this part, and which come next in it."""
        first = 0
        for number, files in enumerate(self._shuffled_files(), 1):
            num_rows = sum(file.num_clips for file in files)
            order = self._rng(number).permutation(num_rows)
            turns = np.arange(first, first + num_rows)  # of all parts
            first += num_rows
            is_next = (turns % num_parts == part) & (turns // num_parts >= self._position)
            if not is_next.any():
                continue
            rows = pa.concat_tables([read_shard(file) for file in files])
            places = np.empty(num_rows, np.int64)
            places[order] = turns // num_parts
            withdrawn = pc.is_in(rows["clip_id"], pa.array(self.shards.withdrawn, pa.string())).to_numpy()
            chosen = order[is_next]
            yield rows.append_column("place", pa.array(places)), chosen[~withdrawn[chosen]]

    def _shuffled_files(self) -> Iterator[list[ShardFile]]:
        """The epoch's files, as many at a time as the buffer holds, one at least."""
        held: list[ShardFile] = []
        for index in self._rng(0).permutation(len(self.shards.files)):
            file = self.shards.files[index]
            if held and sum(f.num_tokens for f in held) + file.num_tokens > self._order["buffer_tokens"]:
                yield held
                held = []
            held.append(file)
        yield held

    def _rng(self, window: int) -> np.random.Generator:
        return np.random.default_rng([self._order["seed"], STREAM, self.epoch, window])
