"""What single tokens add to decoded completions, remembered, so that millions of tokens are split at once.

For most tokenizers nearly every token adds the same text wherever it stands. Those that hold a part of a
character do not: they, and the token after them, are decoded in their place, as `token_texts` does it.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.steps import DELIMITER, step_ends_of_all, token_flags
from pipeline.tokenization import completion_text, token_texts

_KNOWN, _PART = 16, 32  # beside the bits of `token_flags`: met before; depends on its neighbours
_MAX_REMEMBERED = 100_000  # runs of parts


class TokenFacts:
    """The facts of one tokenizer's tokens; they are found out when an id is first met."""

    def __init__(self, tokenizer: Any, delimiter: str = DELIMITER) -> None:
        self._tokenizer = tokenizer
        self._delimiter = delimiter
        self._special = frozenset(tokenizer.all_special_ids)
        kind = _decoder_kind(tokenizer.backend_tokenizer)
        self._apart = kind is not None  # tokens add the same text wherever they stand
        self._joined = kind == "joined" and not tokenizer.clean_up_tokenization_spaces
        self._flags = np.zeros(len(tokenizer), dtype=np.uint8)
        self._texts = [""] * len(tokenizer)  # without special tokens
        self._dictionary: pa.Array | None = None
        self._runs: dict[tuple[int, ...], list[int]] = {}

    def completions(self, ids: NDArray[np.int32], offsets: NDArray[np.int64]) -> pa.Array:
        """The decoded texts of many completions, without special tokens. N = all tokens, R = completions.

        Args:
            ids: [N] valid token ids, completions one after the other.
            offsets: [R + 1] where in `ids` each completion begins.

        Returns:
            [R] strings, as `completion_text` gives them.
        """
        rows = np.arange(len(offsets) - 1)
        if not self._joined:
            return pa.array([self._text(ids, offsets, row) for row in rows.tolist()], pa.string())
        flags = self._flags_of(ids)
        if self._dictionary is None:
            self._dictionary = pa.array(self._texts, pa.string())
        pieces = pa.ListArray.from_arrays(offsets.astype(np.int32), self._dictionary.take(pa.array(ids)))
        texts = pc.binary_join(pieces, "")
        parts = np.flatnonzero(flags & _PART)
        if not len(parts):
            return texts
        odd = np.unique(np.searchsorted(offsets, parts, side="right") - 1)
        mask = np.zeros(len(rows), dtype=bool)
        mask[odd] = True
        own = pa.array([self._text(ids, offsets, row) for row in odd.tolist()], pa.string())
        return pc.replace_with_mask(texts, pa.array(mask), own)

    def step_ends(
        self, ids: NDArray[np.int32], offsets: NDArray[np.int64]
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """The ends of the reasoning steps of many completions; arguments and result as `step_ends_of_all`."""
        if self._apart:
            flags = self._flags_of(ids)
            self._decode_parts(flags, ids, offsets)
        else:
            flags = np.zeros(len(ids), dtype=np.uint8)
            for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
                flags[start:end] = self._run(tuple(ids[start:end].tolist()))
        return step_ends_of_all(flags, offsets)

    def _text(self, ids: NDArray[np.int32], offsets: NDArray[np.int64], row: int) -> str:
        return completion_text(self._tokenizer, ids[offsets[row] : offsets[row + 1]].tolist())

    def _flags_of(self, ids: NDArray[np.int32]) -> NDArray[np.uint8]:
        flags = self._flags[ids]
        if (flags == 0).any():
            for token in np.unique(ids[flags == 0]).tolist():
                self._learn(token)
            self._dictionary = None
            flags = self._flags[ids]
        return flags

    def _learn(self, token: int) -> None:
        decode = self._tokenizer.backend_tokenizer.decode
        self._texts[token] = decode([token], skip_special_tokens=True)
        first = decode([token], skip_special_tokens=False)
        if "\ufffd" in first:
            self._flags[token] = _KNOWN | _PART
            return
        # the first token may have lost a space, which a delimiter may be
        both = decode([token, token], skip_special_tokens=False)
        self._flags[token] = _KNOWN | self._bits(token, both[len(first) :])

    def _bits(self, token: int, text: str) -> int:
        return 0 if token in self._special else token_flags(text, self._delimiter)

    def _decode_parts(
        self, flags: NDArray[np.uint8], ids: NDArray[np.int32], offsets: NDArray[np.int64]
    ) -> None:
        """Sets the flags of tokens that hold parts of characters, and of the token after each run of them."""
        parts = np.flatnonzero(flags & _PART)
        if not len(parts):
            return
        ends = offsets[np.searchsorted(offsets, parts, side="right")]
        after = parts + 1
        runs = np.union1d(parts, after[after < ends])
        breaks = np.flatnonzero((np.diff(runs) > 1) | np.isin(runs[1:], offsets)) + 1
        for run in np.split(runs, breaks):
            start, end = int(run[0]), int(run[-1]) + 1
            flags[start:end] = self._run(tuple(ids[start:end].tolist()))

    def _run(self, ids: tuple[int, ...]) -> list[int]:
        """The flags of neighbouring tokens, decoded one by one in their place."""
        flags = self._runs.get(ids)
        if flags is None:
            texts = token_texts(self._tokenizer, ids)
            flags = [self._bits(token, text) for token, text in zip(ids, texts, strict=True)]
            if len(ids) < 16 and len(self._runs) < _MAX_REMEMBERED:
                self._runs[ids] = flags
        return flags


def _decoder_kind(backend: Any) -> str | None:
    """How a tokenizer puts its tokens' texts together.

    Returns:
        "joined" if the text is the tokens' texts one after the other; "stripped" if only a space at the
        start is lost, where nothing can be split; None if tokens may depend on any neighbour.
    """
    if backend.decoder is None:
        return None
    decoder = json.loads(backend.decoder.__getstate__())
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if kinds in (["ByteLevel"], ["Fuse"]):
        return "joined"
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and steps[3:] in ([], [strip]):
        return "stripped"
    return None
