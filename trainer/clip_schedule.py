"""Which EchoClips are still due, and how much they weigh at a step."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.config import TrainConfig
from trainer.batches import Cursor, step_batches

if TYPE_CHECKING:
    from pipeline.shards import Clip

CLIP_STREAM = 1


def echo_weight(config: TrainConfig, optim_step: int) -> float:
    """λ of a step: it grows by equal parts over the first `echo_warmup_steps`, then stays."""
    return config.echo_weight * min(1.0, (optim_step + 1) / max(config.echo_warmup_steps, 1))


class ClipSchedule:
    """Deals out the clips of shards in a seeded order, and lets clips of any source retire.

    A clip is due until it was used `max_clip_uses` times, had a loss under `retire_below_loss` at a use, or
    lags more than `max_clip_lag` optimizer steps behind the policy.
    """

    def __init__(self, clips: Sequence[Clip], config: TrainConfig) -> None:
        self._clips, self._config = clips, config
        self._order = Cursor(step_batches(len(clips), config.clips_per_step, config.seed, CLIP_STREAM))
        self._waiting: deque[int] = deque()
        self._uses: Counter[str] = Counter()
        self._learned: set[str] = set()
        self.num_uses = 0

    def deal(self, policy_version: int) -> list[Clip]:
        """The next `clips_per_step` clips that are due, each once; fewer where fewer are due.

        Args:
            policy_version: of the weights that learn from them.
        """
        due = {i for i, clip in enumerate(self._clips) if self._is_due(clip, policy_version)}
        wanted = min(self._config.clips_per_step, len(due))
        dealt: list[int] = []
        again: list[int] = []
        while len(dealt) < wanted:
            if not self._waiting:
                self._waiting.extend(self._order.take())
            index = self._waiting.popleft()
            if index in dealt:
                again.append(index)  # its next turn came within this step
            elif index in due:
                dealt.append(index)
        self._waiting.extendleft(reversed(again))
        return [self._clips[i] for i in dealt]

    def due(self, clips: Iterable[Clip], policy_version: int) -> list[Clip]:
        """Those of other clips that are due."""
        return [clip for clip in clips if self._is_due(clip, policy_version)]

    def used(self, clips: Sequence[Clip], losses: Sequence[float]) -> None:
        """Count a use of each, with its loss before the update."""
        threshold = self._config.retire_below_loss
        self._uses.update(clip.clip_id for clip in clips)
        self.num_uses += len(clips)
        if threshold is not None:
            learned = (clip for clip, loss in zip(clips, losses, strict=True) if loss < threshold)
            self._learned.update(clip.clip_id for clip in learned)

    def num_retired(self, policy_version: int) -> int:
        """How many of the shards' clips are not due."""
        return sum(not self._is_due(clip, policy_version) for clip in self._clips)

    def state(self) -> dict[str, Any]:
        """What must be kept to go on, as JSON values."""
        return {
            "position": self._order.position,
            "waiting": list(self._waiting),
            "uses": dict(self._uses),
            "learned": sorted(self._learned),
            "num_uses": self.num_uses,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where a schedule was, of the same clips and config."""
        self._order.go_to(state["position"])
        self._waiting = deque(state["waiting"])
        self._uses, self._learned = Counter(state["uses"]), set(state["learned"])
        self.num_uses = state["num_uses"]

    def _is_due(self, clip: Clip, policy_version: int) -> bool:
        config = self._config
        used_up = config.max_clip_uses is not None and self._uses[clip.clip_id] >= config.max_clip_uses
        lag = policy_version - clip.policy_version
        too_old = config.max_clip_lag is not None and lag > config.max_clip_lag
        return not (used_up or too_old or clip.clip_id in self._learned)
