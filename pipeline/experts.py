"""Expert solutions of a training's prompts, out of the lake: for LUFFY's groups and UFT's hints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.config import SamplingConfig, TrainConfig
from pipeline.errors import ConfigError
from pipeline.lake import Lake
from pipeline.models import config_facts
from pipeline.prompts import prompt_messages_ids
from pipeline.records import Int32, Prompt
from pipeline.sqlfiles import sql_file
from pipeline.tokenization import load_tokenizer, tokenizer_hash

TAUGHT_BY_EXPERTS = ("luffy", "uft")  # the objectives that learn from them


@dataclass(frozen=True)
class Expert:
    """One expert solution.

    Attributes:
        completion_ids: [T] token ids, T > 0.
        reward: as the lake has it; 1 where the dump named none.
    """

    rollout_id: str
    completion_ids: Int32
    reward: float


@dataclass(frozen=True)
class Room:
    """What a solution must fit into.

    Attributes:
        max_tokens: completion tokens at most, as sampled.
        context: tokens that the model reads at most; None if it does not say.
        sampled_after: whether a completion of `max_tokens` is sampled behind the solution, which is a hint.
    """

    max_tokens: int
    context: int | None
    sampled_after: bool

    def fits(self, prompt_tokens: int, solution_tokens: int) -> bool:
        total = prompt_tokens + solution_tokens + (self.max_tokens if self.sampled_after else 0)
        return solution_tokens <= self.max_tokens and (self.context is None or total <= self.context)


def experts_of(
    lake: Lake, prompts: Sequence[Prompt], model: Path, config: TrainConfig, sampling: SamplingConfig
) -> dict[str, list[Expert]]:
    """The expert solutions of each prompt that has some, by prompt_id, in the order of their rollout ids.

    Nothing where the configured training does not learn from experts. Solutions that are longer than
    `sampling.max_tokens`, or do not fit the model's context, are left out.

    Raises:
        ConfigError: no prompt has one that this model can read; says what the lake has instead.
    """
    if config.objective not in TAUGHT_BY_EXPERTS or not config.optim_steps or not prompts:
        return {}
    named = pa.table({"prompt_id": pa.array([prompt.prompt_id for prompt in prompts], pa.string())})
    with lake.reader() as reader, reader.relation("named", named):
        rows = reader.rows(sql_file("staging/expert_rollouts"))
    tokenizer = load_tokenizer(model)
    known = [row for row in rows if row["tokenizer_hash"] == tokenizer_hash(tokenizer)]
    room = Room(
        sampling.max_tokens,
        config_facts(model).get("max_position_embeddings"),
        sampled_after=config.objective == "uft",
    )
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    experts: dict[str, list[Expert]] = {}
    for row in known:
        messages = by_id[row["prompt_id"]].messages
        if room.fits(len(prompt_messages_ids(tokenizer, messages)), len(row["completion_ids"])):
            ids = np.array(row["completion_ids"], dtype=np.int32)
            experts.setdefault(row["prompt_id"], []).append(Expert(row["rollout_id"], ids, row["reward"]))
    if not experts:
        raise ConfigError(_why_none(len(prompts), len(rows), len(known), room))
    return experts


def check_experts(experts: Mapping[str, Sequence[Expert]], prompts: Sequence[Prompt], objective: str) -> None:
    """Raises ConfigError where the objective learns from experts and no prompt has one."""
    if objective in TAUGHT_BY_EXPERTS and not any(experts.get(prompt.prompt_id) for prompt in prompts):
        raise ConfigError(
            f"train.objective is {objective}, which learns from experts, and none of the {len(prompts)} "
            "prompts has an expert's solution. Import some, or choose another objective."
        )


def _why_none(num_prompts: int, num_rows: int, num_known: int, room: Room) -> str:
    if not num_rows:
        return (
            f"The lake has no expert's solution of any of the {num_prompts} prompts, and the objective "
            "learns from them. Import some (`echomine import rollouts`), or choose another train.objective."
        )
    if not num_known:
        return (
            f"The lake's {num_rows} expert solutions are of another tokenizer than this model's. "
            "Import them again with this model's."
        )
    return (
        f"None of the lake's {num_known} expert solutions has at most {room.max_tokens} tokens and fits the "
        "model's context. Raise sampling.max_tokens, or give a model of longer context."
    )
