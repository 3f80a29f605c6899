"""What the rules of other trainers make of a dump's groups: what they miss, and what follows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from pipeline.audits.trainer_rules import RULES, Rule


@dataclass(frozen=True)
class RuleFigures:
    """What one trainer's rule makes of the complete groups of a dump.

    Attributes:
        missed: zero-advantage groups that it takes for signal; their rollouts are trained on.
        missed_tokens: their completion tokens; None where the dump does not tell.
        dropped: mixed groups that it takes for zero advantage; what they teach is lost.
        dropped_tokens: their completion tokens.
        largest_phantom: the largest |advantage| that the trainer's normalization gives a rollout of a missed
            group; None if its normalization was not read.
        mean_phantom: the mean over all rollouts of the missed groups.
        largest_unfiltered: the largest |advantage| over all zero-advantage groups: what is trained on where
            the trainer's filter is off.
    """

    trainer: str
    test: str
    normalization: str
    source: str
    missed: int
    missed_tokens: int | None
    dropped: int
    dropped_tokens: int | None
    largest_phantom: float | None
    mean_phantom: float | None
    largest_unfiltered: float | None


@dataclass
class _Tally:
    """What one rule made of the groups so far."""

    rule: Rule
    missed: int = 0
    missed_rollouts: int = 0
    missed_tokens: int | None = 0
    dropped: int = 0
    dropped_tokens: int | None = 0
    largest: float = 0.0
    total: float = 0.0
    largest_unfiltered: float = 0.0

    def add(self, group: Mapping[str, Any], mixed: bool) -> None:
        rewards = tuple(group["rewards"])
        if mixed:
            if not _keeps(self.rule, rewards):
                self.dropped += 1
                self.dropped_tokens = _plus(self.dropped_tokens, group["num_tokens"])
            return
        largest, total = _phantom(self.rule, rewards)
        self.largest_unfiltered = max(self.largest_unfiltered, largest)
        if _keeps(self.rule, rewards):
            self.missed += 1
            self.missed_rollouts += len(rewards)
            self.missed_tokens = _plus(self.missed_tokens, group["num_tokens"])
            self.largest = max(self.largest, largest)
            self.total += total

    def figures(self) -> RuleFigures:
        known = self.rule.advantages is not None
        mean = self.total / self.missed_rollouts if self.missed_rollouts else 0.0
        return RuleFigures(
            self.rule.trainer,
            self.rule.test,
            self.rule.normalization,
            self.rule.source,
            self.missed,
            self.missed_tokens,
            self.dropped,
            self.dropped_tokens,
            self.largest if known else None,
            mean if known else None,
            self.largest_unfiltered if known else None,
        )


def rule_figures(groups: Iterable[Mapping[str, Any]]) -> tuple[RuleFigures, ...]:
    """Judges rows of `sql/reports/dump_groups.sql` by every rule; incomplete groups are left out."""
    tallies = [_Tally(rule) for rule in RULES]
    for group in groups:
        if group["group_class"] != "incomplete" and group["num_rollouts"] > 1:
            for tally in tallies:
                tally.add(group, mixed=group["group_class"] == "mixed")
    return tuple(tally.figures() for tally in tallies)


@lru_cache(maxsize=65_536)  # most groups have the rewards of one before
def _keeps(rule: Rule, rewards: tuple[float, ...]) -> bool:
    return rule.keeps(np.array(rewards, np.float64))


@lru_cache(maxsize=65_536)
def _phantom(rule: Rule, rewards: tuple[float, ...]) -> tuple[float, float]:
    """The largest |advantage| of a group's rollouts, and the sum of all; 0 if they are not known."""
    if rule.advantages is None:
        return 0.0, 0.0
    sizes = np.abs(rule.advantages(np.array(rewards, np.float64)))
    return float(sizes.max()), float(sizes.sum())


def _plus(total: int | None, tokens: int | None) -> int | None:
    """None for good once a group's tokens are not known."""
    return None if total is None or tokens is None else total + tokens
