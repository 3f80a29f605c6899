"""DESIGN.md's rules of mining as a plain walk over rows: slow, and simple enough to be read as the rules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from pipeline.config import MiningConfig

Row = dict[str, Any]
CLIP = ("group_id", "group_rank", "sample_index", "step_index", "clip_tokens", "clip_rank")


class SeveralKinds(Exception):
    """Entropies that do not compare would be ranked together."""


def group_class(group: list[Row], config: MiningConfig) -> str:
    rewards, tolerance = [row["reward"] for row in group], config.reward_tolerance
    lost = len(group) < max(row["group_size"] for row in group)
    if len(group) < config.min_group_size or (lost and not config.allow_partial):
        return "incomplete"
    if max(rewards) - min(rewards) > tolerance:
        return "mixed"
    if min(rewards) >= config.success_reward - tolerance:
        return "all_success"
    return "all_fail" if max(rewards) <= config.fail_reward + tolerance else "all_equal"


def successes(group: list[Row], config: MiningConfig) -> list[Row]:
    """V of a group in scope: with a choice of kind, those of it and those that await the scorer."""
    return [
        row
        for row in group
        if row["reward"] >= config.success_reward - config.reward_tolerance
        and (row["finish_reason"] != "length" or config.allow_truncated)
        and config.entropy_kind in (None, row["entropy_kind"] or config.entropy_kind)
    ]


def steps(texts: Sequence[str], special: Collection[int], delimiter: str) -> list[int]:
    """Exclusive ends of the steps of a completion whose tokens add `texts`."""
    content = [i for i, text in enumerate(texts) if text.strip() and i not in special]
    ends = []
    for i, k in pairwise(content):
        gap = {j: texts[j] for j in range(i + 1, k) if j not in special}
        gap[i] = texts[i][len(texts[i].rstrip()) :]
        holders = [j for j, text in gap.items() if delimiter in text]
        if holders:
            ends.append(max(holders) + 1)
        elif delimiter in texts[k][: -len(texts[k].lstrip())]:
            ends.append(k)
    return [*ends, len(texts)] if texts else []


def best_step(row: Row, config: MiningConfig) -> tuple[float, int, int] | None:
    """(entropy, step_index, end) of the candidate of highest entropy, the earliest on ties."""
    best, start = None, 0
    for index, end in enumerate(row["step_ends"]):
        entropy = float(np.float32(np.mean(row["completion_entropies"][start:end])))
        allowed = end - start >= config.min_step_tokens and end <= (config.max_clip_tokens or end)
        if allowed and (best is None or entropy > best[0]):
            best = entropy, index, end
        start = end
    return best


def group_clips(members: list[Row], config: MiningConfig) -> list[Row]:
    """The clips of a group whose successes are `members`, with `group_rank` and `step`."""
    found = [(row, step) for row in members if (step := best_step(row, config)) is not None]
    found.sort(key=lambda pair: (-pair[1][0], pair[0]["sample_index"]))
    chosen = found[: config.clips_per_group]
    return [row | {"group_rank": rank, "step": step} for rank, (row, step) in enumerate(chosen)]


def walked(
    rows: list[Row], config: MiningConfig, lake: list[Row] | None = None
) -> tuple[Counter[str], Counter[str], list[Row]]:
    """Groups by class, drops by reason, and the kept clips in rank order.

    Args:
        rows: in the mining's reach, their rewards those that count.
        lake: all rows, which say what the newest policies are; by default the same.

    Raises:
        SeveralKinds: the mining is refused.
    """
    newest: dict[str, int] = {}
    for row in lake or rows:
        if row["origin"] != "expert":
            newest[row["model"]] = max(row["policy_version"], newest.get(row["model"], 0))
    rows = [row for row in rows if row["origin"] != "expert"]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["group_id"], []).append(row)
    classes = {name: group_class(group, config) for name, group in groups.items()}
    wanted = {"all_success"} if config.scope == "zero_advantage" else {*classes.values()} - {"incomplete"}
    candidates = [successes(group, config) for name, group in groups.items() if classes[name] in wanted]
    if len({row["entropy_kind"] for members in candidates for row in members} - {None}) > 1:
        raise SeveralKinds
    dropped, clips = Counter[str](), list[Row]()
    for members in candidates:
        if any(row["completion_entropies"] is None for row in members):
            dropped["unscored"] += 1
        else:
            clips += group_clips(members, config)
    return Counter(classes.values()), dropped, _kept(clips, newest, config, dropped)


def _kept(clips: list[Row], newest: dict[str, int], config: MiningConfig, dropped: Counter[str]) -> list[Row]:
    """Walks down all clips; `dropped` counts those that a rule takes out, each under the first."""
    kept, seen, of_prompt = list[Row](), set[Any](), Counter[str]()
    for clip in sorted(clips, key=lambda c: (-c["step"][0], c["group_id"], c["group_rank"])):
        entropy, step_index, end = clip["step"]
        prompt, content = clip["prompt_id"], (clip["prompt_id"], tuple(clip["completion_ids"][:end]))
        current = newest[clip["model"]] if config.policy_version is None else config.policy_version
        if entropy < config.min_step_entropy:
            dropped["step_entropy"] += 1
            continue
        if config.max_policy_lag is not None and current - clip["policy_version"] > config.max_policy_lag:
            dropped["policy_lag"] += 1
            continue
        if content in seen:
            dropped["duplicate"] += 1
        elif config.max_clips_per_prompt is not None and of_prompt[prompt] >= config.max_clips_per_prompt:
            dropped["max_clips_per_prompt"] += 1
        elif config.max_clips is not None and len(kept) >= config.max_clips:
            dropped["max_clips"] += 1
        else:
            of_prompt[prompt] += 1
            facts = {"step_index": step_index, "clip_tokens": end, "clip_rank": len(kept)}
            kept.append({name: (clip | facts)[name] for name in CLIP} | {"step_entropy": entropy})
        seen.add(content)
    return kept
