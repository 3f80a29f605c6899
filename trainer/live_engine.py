"""An engine with a copy of the weights, which takes the trained model's before it samples again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from pipeline.config import SamplingConfig
from pipeline.engines.base import GroupRequest, UpdatableEngine
from pipeline.errors import EngineError, said
from pipeline.records import Group

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LiveEngine:
    """Samples from `model` as it stands, by an engine that was opened with the weights it has now.

    Attributes:
        num_updates: how often the running engine took new weights.
    """

    def __init__(self, engine: UpdatableEngine, model: PreTrainedModel, folder: Path) -> None:
        """
        Args:
            folder: where the weights go on their way; it is removed at the end.
        """
        self._engine, self._model, self._folder = engine, model, folder
        self.logprobs_kind, self.overlaps = engine.logprobs_kind, False
        self._handed_over = self._edition()
        self.num_updates = 0

    @property
    def entropy_kind(self) -> str | None:
        return self._engine.entropy_kind

    def generate(self, requests: Sequence[GroupRequest], sampling: SamplingConfig) -> Iterator[Group]:
        """See `Engine.generate`.

        Raises:
            EngineError: the weights cannot be written, or the engine refuses them.
        """
        if self._edition() != self._handed_over:
            self._hand_over()
        yield from self._engine.generate(requests, sampling)

    def close(self) -> None:
        self._engine.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _hand_over(self) -> None:
        edition = self._edition()
        # The engine starts again from its folder if it dies, so the one of before stays until the next is in.
        aside, before = (self._folder / str((self.num_updates + turn) % 2) for turn in (0, 1))
        shutil.rmtree(aside, ignore_errors=True)
        try:
            self._model.save_pretrained(aside)
        except (OSError, SafetensorError) as error:
            raise EngineError(
                f"Cannot hand the weights over in {aside}: {said(error)}. "
                "Free space or permit writing there, or set train.engine to model."
            ) from None
        self._engine.update_weights(aside)
        shutil.rmtree(before, ignore_errors=True)
        self._handed_over = edition
        self.num_updates += 1

    def _edition(self) -> int:
        """Grows with every change of a weight: torch counts those made in place, as an optimizer's are."""
        return sum(param._version for param in self._model.parameters())
