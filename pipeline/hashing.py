"""Content addresses. The same content has the same name on every machine and in every year."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

DIGEST_CHARS = 32  # 128 bits: no collision among 2^50 names with probability above 2^-28


def content_id(*parts: Any) -> str:
    """A name for a tuple of JSON values, numpy arrays (dtype and values) and bytes, in this order.

    Returns:
        32 hexadecimal characters of a SHA-256.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            head, body = f"array {part.dtype.str} {part.shape}", np.ascontiguousarray(part).tobytes()
        elif isinstance(part, bytes):
            head, body = f"bytes {len(part)}", part
        else:
            text = json.dumps(part, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
            head, body = f"json {len(text)}", text.encode()
        # The lengths in the heads keep ("ab", "c") and ("a", "bc") apart.
        digest.update(head.encode() + b"\0" + body)
    return digest.hexdigest()[:DIGEST_CHARS]


def ids_array(ids: Any) -> np.ndarray:
    """Token ids in the one form that is hashed: little-endian int32."""
    return np.asarray(ids, dtype="<i4")


def rollout_id(group_id: str, sample_index: int, prompt_ids: Any, completion_ids: Any) -> str:
    """The name of a rollout: the same rollout written twice is one row."""
    return content_id(group_id, int(sample_index), ids_array(prompt_ids), ids_array(completion_ids))


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
