"""Tokenizers: loading them safely, naming them by content, and reading tokens one by one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tokenizers.decoders import DecodeStream

from pipeline.errors import ModelError, said
from pipeline.hashing import content_id
from pipeline.steps import DELIMITER, step_ends

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer in a local folder. No remote code, no download.

    Raises:
        ModelError: no such folder, or no tokenizer in it.
    """
    if not folder.is_dir():
        raise ModelError(f"There is no folder {folder}. Give a Hugging Face model or tokenizer folder.")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ModelError(
            f"{folder} holds no tokenizer (no tokenizer.json). Copy the model's tokenizer files into it."
        )
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # takes seconds, which most need not wait

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for files that are damaged
        raise ModelError(
            f"The tokenizer in {folder} cannot be read: {said(error)}. Copy it there anew."
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError(f"{folder} holds a slow tokenizer. Save its fast form (tokenizer.json) there.")
    return tokenizer


def tokenizer_hash(tokenizer: Any) -> str:
    """A name for what token ids mean: the same after saving, loading and changing padding."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return content_id(vocabulary, sorted(tokenizer.all_special_ids))


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds when the completion is decoded token by token, special tokens kept.

    A character whose bytes span several tokens is added by the last of them.
    """
    stream = DecodeStream(ids=[], skip_special_tokens=False)
    backend = tokenizer.backend_tokenizer
    return [stream.step(backend, int(token)) or "" for token in ids]


def completion_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """The decoded completion without special tokens, as verifiers read it."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def completion_step_ends(tokenizer: Any, ids: Sequence[int], delimiter: str = DELIMITER) -> list[int]:
    """The ends of a completion's reasoning steps, exclusive; see `steps.step_ends`."""
    special = _special_ids(tokenizer)
    positions = [i for i, token in enumerate(ids) if int(token) in special]
    return step_ends(token_texts(tokenizer, ids), positions, delimiter)


def sampled_step_ends(tokenizer: Any, ids: NDArray[np.int32], delimiter: str = DELIMITER) -> list[int]:
    """`completion_step_ends` of what was just sampled: the lake's rows ask for it, and then the batch's own
    clips, most of whose cost to a step would be to decode once more.
    """
    return list(_step_ends(tokenizer, np.asarray(ids, dtype=np.int32).tobytes(), delimiter))


@lru_cache(maxsize=4096)  # rollouts: a step of most trainings; 8 MiB where they have 500 tokens
def _step_ends(tokenizer: Any, ids: bytes, delimiter: str) -> tuple[int, ...]:
    return tuple(completion_step_ends(tokenizer, np.frombuffer(ids, dtype=np.int32).tolist(), delimiter))


@lru_cache(maxsize=8)
def _special_ids(tokenizer: Any) -> frozenset[int]:
    return frozenset(tokenizer.all_special_ids)
