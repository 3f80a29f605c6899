"""Canonical dumps of written-out completions in the embedded model's tokens, for tests of the command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.models import model_folder
from pipeline.tokenization import load_tokenizer

MODEL = model_folder("arith")
SOLVED = ("17+25\n10+20=30\n7+5=12\n#42", "17+25\n17+20=37\n37+5=42\n#42")


def group(name: str, rewards: Sequence[float], *, seed: int = 0, **columns: Any) -> list[dict[str, Any]]:
    """A group's rows, one for each reward, with entropies that depend on `seed`; `columns` are added."""
    tokenizer = load_tokenizer(MODEL)
    random = np.random.default_rng(seed)
    rows = []
    for index, reward in enumerate(rewards):
        ids = [*tokenizer.encode(SOLVED[index % 2], add_special_tokens=False), tokenizer.eos_token_id]
        row = {
            "group_id": name,
            "sample_index": index,
            "prompt": "17+25",
            "ground_truth": "42",
            "completion_ids": ids,
            "completion_entropies": np.float32(random.gamma(0.5, 0.4, len(ids))).tolist(),
            "reward": reward,
        }
        rows.append(row | columns)
    return rows


def night() -> list[dict[str, Any]]:
    """A solved group, a mixed one and a failed one, two rollouts each."""
    rewards = {"solved": [1.0, 1.0], "mixed": [1.0, 0.0], "failed": [0.0, 0.0]}
    return [
        row for seed, (name, given) in enumerate(rewards.items()) for row in group(name, given, seed=seed)
    ]


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def into(lake: Path) -> list[str]:
    """The options of an import of these rows into a lake."""
    return ["--tokenizer", str(MODEL), "--lake", str(lake)]
