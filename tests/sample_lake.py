"""Small lakes for tests: groups of written-out completions, committed and mined on the real path."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from copy import copy, deepcopy
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
from pipeline.quarantine import Refused, quarantine_table
from pipeline.records import Prompt
from pipeline.rollouts import prompt_table, rollout_table
from pipeline.schema import CLIP_USES, VERDICTS
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

    def copied(self, folder: Path) -> LakeBuilder:
        """The same rows, and a copy of the lake in `folder`; what is added to one is not in the other."""
        twin = copy(self)
        shutil.copytree(self.lake.folder, folder)
        twin.lake = Lake.open(folder)
        twin.rows, twin.prompts = list(self.rows), list(self.prompts)
        twin._random = deepcopy(self._random)
        return twin

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
        entropies: Sequence[Sequence[float]] | None = None,
        **changes: Any,
    ) -> str:
        """One group, a rollout for each completion; `changes` replace columns. Returns its group_id.

        Args:
            entropies: those of each completion's tokens; by default random ones.
        """
        prompt = _prompt(question)
        self.prompts.append(prompt)
        name = content_id(run_id, prompt.prompt_id, policy_version, len(self.rows))
        for index, (text, reward) in enumerate(zip(completions, rewards, strict=True)):
            ids = [*self.tokenizer(text)["input_ids"], EOS_ID]
            drawn = self._random.gamma(0.4, 0.5, len(ids)) if entropies is None else entropies[index]
            nats = np.float32(drawn)
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
                "completion_logprobs": -nats - 0.01,
                "logprobs_kind": "raw",
                "completion_entropies": nats,
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


# The model `taught`: a run under each of three policy versions, each with a verifier version of its own. Its
# completions have ten tokens in two steps, of these entropies, which sums of floats hold exactly.
TAUGHT_RUNS = (
    ("run-4", date(2026, 3, 3), 0, "1"),
    ("run-5", date(2026, 3, 4), 10, "2"),
    ("run-6", date(2026, 3, 5), 20, "3"),
)
TAUGHT_TEXTS = {"right": "sum:\n#10.", "wrong": "sum:\n#11."}
TAUGHT_ENTROPIES = {"right": [0.125] * 5 + [0.25] * 5, "wrong": [0.5] * 5 + [0.75] * 5}
# Each prompt's rollouts, by run, and their rewards; verifier 1 failed the right answer to 5+5.
TAUGHT_GROUPS = {
    "What is 5+5?": [("right wrong", [0, 0]), ("right wrong", [1, 0]), ("right right", [1, 1])],
    "What is 6+7?": [("right right", [1, 1]), ("right wrong", [1, 0]), ("right wrong", [1, 0])],
    "What is 8+9?": [("wrong wrong", [0, 0]), ("wrong wrong", [0, 0]), ("wrong wrong", [0, 0])],
    "What is 9+9?": [("right wrong", [1, 0]), ("right right", [1, 1]), ("wrong wrong", [0, 0])],
    "What is 3+9?": [("right right", [1, 1]), ("right right", [1, 1]), ("right right", [1, 1])],
    "What is 7+7?": [("wrong wrong", [0, 0]), ("right right", [1, 1]), ("right right", [1, 1])],
    "What is 4+9?": [None, None, ("right right right right", [1, 1, 0.75, 0.75])],
}
EXPERT_ENTROPIES = [1.0] * 10


def prompt_id(question: str) -> str:
    """The id of a sample prompt."""
    return _prompt(question).prompt_id


def _prompt(question: str) -> Prompt:
    return Prompt(({"role": "user", "content": question},), None, "sums")


def _add_taught_model(builder: LakeBuilder) -> None:
    for number, (run_id, night, version, verifier_version) in enumerate(TAUGHT_RUNS):
        facts = {"run_id": run_id, "night": night, "model": "taught", "policy_version": version}
        facts["verifier_version"] = verifier_version
        for question, by_run in TAUGHT_GROUPS.items():
            if by_run[number] is None:
                continue
            words, rewards = by_run[number][0].split(), by_run[number][1]
            texts, entropies = [TAUGHT_TEXTS[w] for w in words], [TAUGHT_ENTROPIES[w] for w in words]
            builder.add_group(texts, rewards, question=question, entropies=entropies, **facts)
    for question in ("What is 5+5?", "What is 6+7?"):
        builder.add_group(
            [TAUGHT_TEXTS["right"]],
            [1],
            question=question,
            entropies=[EXPERT_ENTROPIES],
            origin="expert",
            **facts,
        )


@dataclass(frozen=True)
class SampleLake:
    """A mined lake: `run_id` is its newest run of the model `small`, `mining_id` mined every run."""

    lake: Lake
    run_id: str
    mining_id: str
    tokenizer: PreTrainedTokenizerFast


def sample_lake(folder: Path) -> SampleLake:
    """Five nights, three models, all five classes, expert rows, an unscored rollout."""
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
        builder.add_group(
            ways[:1], [1.0], question="What is 41+1?", **facts, origin="expert", verifier="math"
        )
    unscored = {"completion_entropies": None, "entropy_kind": None}
    builder.add_group(
        ["#3", "#3"], [1.0, 1.0], question="What is 1+2?", run_id="run-3", model="other", **unscored
    )
    builder.add_group(["#6", "#6"], [1.0, 0.0], policy_version=9, run_id="training-1", origin="trainer")
    _add_taught_model(builder)
    lake = builder.commit([Refused("the verifier took longer than 10 s", "run-2", {"run_id": "run-2"})])
    for run_id, *_ in TAUGHT_RUNS:
        mine(lake, MiningConfig(), run_id=run_id)
    mining = mine(lake, MiningConfig(clips_per_group=2, max_policy_lag=7))
    with lake.reader() as reader:
        clips = reader.rows("select distinct clip_id, prompt_id, policy_version from echo_clips")
        best = reader.rows(
            "select clip_id from echo_clips where mining_id = $id order by clip_rank limit 1",
            {"id": mining.mining_id},
        )
    newest = {clip["prompt_id"]: clip["clip_id"] for clip in clips if clip["policy_version"] == 20}
    uses = [
        ("training-1", best[0]["clip_id"], 0, 0.5),
        ("training-2", newest[prompt_id("What is 3+9?")], 0, 0.75),
        ("training-2", newest[prompt_id("What is 3+9?")], 1, 0.25),
        ("training-2", newest[prompt_id("What is 7+7?")], 0, 0.5),
    ]
    names = ("training_id", "clip_id", "optim_step", "clip_loss")
    used = {"created_at": datetime(2026, 3, 2, tzinfo=UTC)}
    rows = [dict(zip(names, use, strict=True)) | used for use in uses]
    lake.commit({"clip_uses": pa.Table.from_pylist(rows, CLIP_USES)})
    return SampleLake(lake, "run-2", mining.mining_id, builder.tokenizer)


def overturned(lake: Lake, num_clips: int = 1) -> list[str]:
    """A stricter verifier finds the rollouts of the best clips wrong, each in a version of its own.

    Returns:
        their rollout_ids, best clip first.
    """
    with lake.reader() as reader:
        best = "select rollout_id from echo_clips order by clip_rank limit $num_clips"
        rollout_ids = [row["rollout_id"] for row in reader.rows(best, {"num_clips": num_clips})]
    verdicts = [
        {
            "rollout_id": rollout_id,
            "verifier": "exact",
            "verifier_version": str(2 + place),
            "reward": 0.0,
            "judged_at": datetime(2026, 3, 4, tzinfo=UTC),
        }
        for place, rollout_id in enumerate(rollout_ids)
    ]
    lake.commit({"verdicts": pa.Table.from_pylist(verdicts, VERDICTS)})
    return rollout_ids
