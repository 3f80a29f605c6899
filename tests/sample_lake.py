"""Small lakes for tests: groups of written-out completions, committed and mined on the real path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline.config import MiningConfig
from pipeline.hashing import content_id
from pipeline.lake import Lake
from pipeline.mine import mine
from pipeline.records import Prompt
from pipeline.rollouts import Refused, prompt_table, quarantine_table, rollout_table
from pipeline.schema import CLIP_USES
from pipeline.steps import SPLITTER
from pipeline.tokenization import completion_step_ends, tokenizer_hash

# Every ASCII character, and a few that pages and scripts stumble over.
CHARACTERS = [*map(chr, range(128)), *"éπ🙂", "\u0085", "\u2028", "\u2029", "\u202e", "\ufeff"]
EOS_ID = len(CHARACTERS)


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each character, and <eos>."""
    vocabulary = {character: place for place, character in enumerate([*CHARACTERS, "<eos>", "<unk>"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")


class LakeBuilder:
    """Collects groups, then commits them to a new lake in `folder`."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.lake = Lake.create(folder)
        self.tokenizer = character_tokenizer()
        self.tokenizer_hash = tokenizer_hash(self.tokenizer)
        self.rows: list[dict[str, Any]] = []
        self.prompts: list[Prompt] = []
        self._random = np.random.default_rng(seed)

    def add_group(
        self,
        completions: Sequence[str],
        rewards: Sequence[float],
        *,
        question: str = "What is 17+25?",
        run_id: str = "run-1",
        night: date = date(2026, 3, 1),
        model: str = "small",
        policy_version: int = 0,
        group_size: int | None = None,
        **changes: Any,
    ) -> str:
        """One group, a rollout for each completion; `changes` replace columns. Returns its group_id."""
        prompt = Prompt(({"role": "user", "content": question},), None, "sums")
        self.prompts.append(prompt)
        name = content_id(run_id, prompt.prompt_id, policy_version, len(self.rows))
        for index, (text, reward) in enumerate(zip(completions, rewards, strict=True)):
            ids = [*self.tokenizer(text)["input_ids"], EOS_ID]
            entropies = np.float32(self._random.gamma(0.4, 0.5, len(ids)))
            row = {
                "group_id": name,
                "prompt_id": prompt.prompt_id,
                "run_id": run_id,
                "night": night,
                "origin": "policy",
                "model": model,
                "tokenizer_hash": self.tokenizer_hash,
                "policy_version": policy_version,
                "sample_index": index,
                "group_size": group_size or len(completions),
                "prompt_ids": self.tokenizer(question)["input_ids"],
                "completion_ids": ids,
                "completion": text,
                "completion_logprobs": -entropies - 0.01,
                "logprobs_kind": "raw",
                "completion_entropies": entropies,
                "entropy_kind": "full_vocab",
                "finish_reason": "stop",
                "reward": reward,
                "verifier": "exact",
                "step_ends": completion_step_ends(self.tokenizer, ids),
                "splitter": SPLITTER,
                "created_at": datetime(2026, 3, 1, tzinfo=UTC),
            }
            self.rows.append(row | changes)
        return name

    def commit(self, refused: Sequence[Refused] = ()) -> Lake:
        self.lake.commit(
            {
                "rollouts": rollout_table(self.rows),
                "prompts": prompt_table(self.prompts),
                "quarantine": quarantine_table(refused),
            }
        )
        return self.lake


@dataclass(frozen=True)
class SampleLake:
    """A mined lake: `run_id` is its newest run of the model `small`, `mining_id` mined every run."""

    lake: Lake
    run_id: str
    mining_id: str
    tokenizer: PreTrainedTokenizerFast


def sample_lake(folder: Path) -> SampleLake:
    """Two nights, two models, three policy versions, all five classes, expert rows, an unscored rollout."""
    builder = LakeBuilder(folder)
    runs = (
        ("run-1", date(2026, 3, 1), "small", 0),
        ("run-2", date(2026, 3, 2), "small", 8),
        ("run-3", date(2026, 3, 2), "other", 3),
    )
    for run_id, night, model, version in runs:
        facts = {"run_id": run_id, "night": night, "model": model, "policy_version": version}
        ways = ["17+25\n10+20=30\n7+5=12\n#42", "17+25\n17+20=37\n37+5=42\n#42"]
        builder.add_group(ways, [1.0, 1.0], **facts)
        builder.add_group(ways, [1.0, 0.0], question="What is 18+24?", **facts)
        builder.add_group(["#1", "#2"], [0.0, 0.0], question="What is 1+2+3?", **facts)
        builder.add_group(["half\n#4", "#4"], [0.5, 0.5], question="What is 2+2?", **facts)
        builder.add_group(ways, [1.0, 1.0], question="What is 42+0?", group_size=3, **facts)
        builder.add_group(ways, [1.0, 1.0], question="What is 40+2?", **facts)
        builder.add_group(ways[:1], [1.0], question="What is 41+1?", **facts, origin="expert")
    unscored = {"completion_entropies": None, "entropy_kind": None}
    builder.add_group(
        ["#3", "#3"], [1.0, 1.0], question="What is 1+2?", run_id="run-3", model="other", **unscored
    )
    builder.add_group(["#6", "#6"], [1.0, 0.0], policy_version=9, run_id="training-1", origin="trainer")
    lake = builder.commit([Refused("the verifier took longer than 10 s", "run-2", {"run_id": "run-2"})])
    mining = mine(lake, MiningConfig(clips_per_group=2, max_policy_lag=7))
    with lake.reader() as reader:
        best = reader.rows("select clip_id from echo_clips order by clip_rank limit 1")[0]["clip_id"]
    use = {"training_id": "training-1", "clip_id": best, "optim_step": 0, "clip_loss": 0.5}
    use["created_at"] = datetime(2026, 3, 2, tzinfo=UTC)
    lake.commit({"clip_uses": pa.Table.from_pylist([use], CLIP_USES)})
    return SampleLake(lake, "run-2", mining.mining_id, builder.tokenizer)
