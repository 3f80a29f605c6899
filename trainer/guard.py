"""A step whose loss or gradient is no number is skipped and kept for a look; three in a row are the end."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file

from pipeline.errors import ModelError
from pipeline.logprobs import Row
from trainer.rollout_batch import RolloutBatch

if TYPE_CHECKING:
    from pipeline.shards import Clip

MAX_SKIPPED_IN_A_ROW = 3


class Guard:
    """Watches over the steps of one training, whose folder gets `skipped/`."""

    def __init__(self, folder: Path, training_id: str) -> None:
        self._folder, self._training_id = folder / "skipped", training_id
        self._in_a_row = 0

    def begin(self, optim_step: int, in_a_row: int = 0) -> None:
        """Begin or go on at a step: what a training that was cut off skipped from there on is removed."""
        self._in_a_row = in_a_row
        for path in self._folder.glob("step-*"):
            if path.stem >= _name(optim_step):
                path.unlink(missing_ok=True)

    def state(self) -> dict[str, int]:
        """What must be kept to go on: arguments of `begin`."""
        return {"in_a_row": self._in_a_row}

    def refuses(
        self, optim_step: int, losses: dict[str, float], batch: RolloutBatch, clips: Sequence[Clip]
    ) -> bool:
        """Whether the step must be skipped, as one of its `losses` (or norms) is not finite.

        What it learned from is then in `skipped/step-<n>.safetensors` and `.json` (`_tensors`).

        Raises:
            ModelError: it is the third in a row, or the folder cannot be written.
        """
        if all(math.isfinite(value) for value in losses.values()):
            self._in_a_row = 0
            return False
        self._in_a_row += 1
        path = self._save(optim_step, losses, batch, clips)
        if self._in_a_row == MAX_SKIPPED_IN_A_ROW:
            first = next(name for name, value in losses.items() if not math.isfinite(value))
            raise ModelError(
                f"Training {self._training_id} stopped at optim_step {optim_step}: {self._in_a_row} steps in "
                f"a row were skipped, the last as its {first} is {losses[first]}. Lower train.lr, or look at "
                f"what they learned from in {path.parent}."
            )
        return True

    def _save(
        self, optim_step: int, losses: dict[str, float], batch: RolloutBatch, clips: Sequence[Clip]
    ) -> Path:
        path = self._folder / f"{_name(optim_step)}.safetensors"
        facts = {
            "training_id": self._training_id,
            "optim_step": optim_step,
            **{name: str(value) for name, value in losses.items()},  # JSON has no NaN
            "clip_ids": [clip.clip_id for clip in clips],
        }
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file(_tensors(batch, clips), path)
            path.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"Cannot write {path}, the batch of a step whose loss is not finite: {error}. "
                "Free space or permit writing there, and train again."
            ) from None
        return path


def _name(optim_step: int) -> str:
    return f"step-{optim_step:06d}"


def _tensors(batch: RolloutBatch, clips: Sequence[Clip]) -> dict[str, NDArray[np.generic]]:
    """The batch as flat arrays: ids of R rollouts and C clips, one after the other, with their lengths."""
    tensors: dict[str, NDArray[np.generic]] = {
        **_flat("rollouts", batch.rows),
        **_flat("clips", [(clip.prompt_ids, clip.clip_ids) for clip in clips]),
        "rollouts.advantages": batch.advantages.numpy(),
    }
    for name in ("engine_logprobs", "trainer_logprobs"):
        known = getattr(batch, name)
        if known:
            tensors[f"rollouts.{name}"] = np.concatenate(known)
    for name in ("is_expert", "hint_lengths"):
        per_row = getattr(batch, name)
        if per_row is not None:
            tensors[f"rollouts.{name}"] = per_row.numpy()
    return tensors


def _flat(name: str, rows: Sequence[Row]) -> dict[str, NDArray[np.generic]]:
    flat: dict[str, NDArray[np.generic]] = {}
    for place, part in enumerate(("prompt", "completion")):
        ids = [row[place] for row in rows]
        flat[f"{name}.{part}_ids"] = np.concatenate([np.zeros(0, dtype=np.int32), *ids])
        flat[f"{name}.{part}_lengths"] = np.array([len(of_row) for of_row in ids], dtype=np.int64)
    return flat
