"""Where a training goes on: what its parts keep over steps, put into a state and taken out again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from pipeline.config import MiningConfig, SamplingConfig, TrainConfig
from pipeline.experts import Expert
from pipeline.hashing import content_id
from pipeline.records import Prompt
from trainer.clip_schedule import ClipSchedule
from trainer.metrics import StepMetrics
from trainer.run_state import RunState, newest_state, save_state
from trainer.sampling import RolloutSource
from trainer.update import Updater

if TYPE_CHECKING:
    from pipeline.shards import Clip

NUM_PROBED = 1024  # first values of each parameter by which a model is known


@dataclass
class Resumption:
    """Saves a training's states to `folder` (`states/`), and sets its parts to the newest of them.

    Nothing draws from torch's random numbers, and what draws from numpy's does so by seed and step: the
    positions in the orders of prompts and clips are all that must be kept of chance.
    """

    folder: Path
    identity: Mapping[str, str]
    source: RolloutSource
    schedule: ClipSchedule
    updater: Updater
    _last_saved: int = field(default=0, init=False)

    def restore(self, policy_version: int) -> tuple[list[StepMetrics], int]:
        """The steps that are done, and the policy version they led to; none without a state.

        Raises:
            ConfigError: the newest whole state is of another training.
        """
        state = newest_state(self.folder, self.identity)
        if state is None:
            self.updater.guard.begin(0)
            return [], policy_version
        self.updater.optimizer.restore(state.tensors)
        self.source.restore(state.parts["rollouts"])
        self.schedule.restore(state.parts["clips"])
        self._last_saved = len(state.steps)
        self.updater.guard.begin(self._last_saved, **state.parts["guard"])
        return state.steps, state.policy_version

    def save_if_due(self, steps: Sequence[StepMetrics], policy_version: int) -> None:
        """Save every `checkpoint_every` steps. Call between two batches: half a batch is in no state.

        Raises:
            ModelError: the state cannot be written.
        """
        every = self.updater.config.checkpoint_every
        if not every or len(steps) - self._last_saved < every:
            return
        parts: dict[str, dict[str, Any]] = {
            "rollouts": self.source.state(),
            "clips": self.schedule.state(),
            "guard": self.updater.guard.state(),
        }
        state = RunState(policy_version, list(steps), parts, self.updater.optimizer.state())
        if self.updater.ranks.is_first:
            save_state(self.folder, self.identity, state, self.updater.config.keep_checkpoints)
        self._last_saved = len(steps)


def identity(
    model: nn.Module,
    tokenizer_hash: str,
    training_id: str,
    config: TrainConfig,
    sampling: SamplingConfig,
    rules: MiningConfig,
    prompts: Sequence[Prompt],
    clips: Sequence[Clip],
    experts: Mapping[str, Sequence[Expert]],
) -> dict[str, str]:
    """What decides a training's steps, by names that an error can say."""
    known = sorted(expert.rollout_id for of_prompt in experts.values() for expert in of_prompt)
    return {
        "training_id": training_id,
        "model": _model_id(model),
        "tokenizer": tokenizer_hash,
        "config": content_id(
            config.of_steps(), sampling.model_dump(mode="json"), rules.model_dump(mode="json")
        ),
        "list of prompts": content_id([prompt.prompt_id for prompt in prompts]),
        "list of clips": content_id([clip.clip_id for clip in clips]),
        "list of experts": content_id(known),
    }


def _model_id(model: nn.Module) -> str:
    probes = [
        content_id(name, str(param.dtype), list(param.shape), _probe(param))
        for name, param in model.named_parameters()
    ]
    return content_id(probes)


def _probe(param: nn.Parameter) -> Any:
    return param.detach().flatten()[:NUM_PROBED].float().cpu().numpy()
