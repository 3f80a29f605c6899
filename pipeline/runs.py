"""One night's run: what it is called, what is left of it to do, and its stages up to the lake.

A run is the hash of (night, weights, prompts, sampling). Killed at any point and started again, it goes on:
a batch is in the lake, staged in its folder, or not yet generated.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import NightlyConfig
from pipeline.hashing import content_id
from pipeline.ingest import Ingested, ingest
from pipeline.lake import Lake
from pipeline.models import model_folder, policy_of
from pipeline.prompts import read_prompts
from pipeline.records import Policy, Prompt, Run
from pipeline.rewards import VerifierPool
from pipeline.rollouts import Sampled, rollout_rows
from pipeline.run_notes import noted_runs, read_notes, write_notes
from pipeline.staging import is_judged, stage, staged
from pipeline.tokenization import completion_text, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class NightRun:
    """Ids and paths of a run; small enough to pass between tasks."""

    run_id: str
    night: date
    lake_folder: Path
    model_folder: Path
    policy: Policy
    config: NightlyConfig
    resumed: bool

    @property
    def folder(self) -> Path:
        return self.lake_folder / "runs" / self.run_id

    @property
    def record(self) -> Run:
        return Run(self.run_id, self.night)

    def prompts(self) -> list[Prompt]:
        return list(_prompts(self.config.prompts, self.config.max_prompts))

    def lake(self) -> Lake:
        return Lake.open(self.lake_folder)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return load_tokenizer(self.model_folder)


def open_run(config: NightlyConfig, lake_folder: Path, today: date | None = None) -> NightRun:
    """Tonight's run; or the one that was killed before it was done, under the night it began.

    Args:
        today: by default the date in UTC.

    Raises:
        EchoMineError: bad prompts, model or lake. Then nothing was written.
    """
    prompts = _prompts(config.prompts, config.max_prompts)
    folder = model_folder(config.model)
    policy = policy_of(folder, config.model, load_tokenizer(folder))
    recipe = content_id(
        policy.weights_hash,
        [prompt.prompt_id for prompt in prompts],
        config.sampling.model_dump(mode="json") | {"entropy_kind": config.engine.entropy_kind},
    )
    lake = Lake.create(lake_folder)
    unfinished = None if config.night else _unfinished(lake.folder, recipe)
    night = config.night or unfinished or today or datetime.now(UTC).date()
    run_id = f"{night.isoformat()}-{content_id(night.isoformat(), recipe)[:12]}"
    run = NightRun(run_id, night, lake.folder, folder, policy, config, resumed=False)
    known = bool(facts(run))
    if not known:
        run.folder.mkdir(parents=True, exist_ok=True)
        update_facts(
            run,
            recipe=recipe,
            night=night.isoformat(),
            model=config.model,
            model_folder=str(folder.absolute()),
            done=False,
        )
    return NightRun(run_id, night, lake.folder, folder, policy, config, resumed=known)


def _unfinished(lake_folder: Path, recipe: str) -> date | None:
    """The newest night of this recipe that was begun and not done."""
    nights = []
    for folder in noted_runs(lake_folder):
        facts = read_notes(folder)
        if facts.get("recipe") == recipe and not facts.get("done"):
            nights.append(date.fromisoformat(facts["night"]))
    return max(nights, default=None)


def facts(run: NightRun) -> dict[str, Any]:
    """What the run has noted of itself: its recipe, night, seconds spent, whether it is done."""
    return read_notes(run.folder)


def update_facts(run: NightRun, **new: Any) -> None:
    write_notes(run.folder, facts(run) | new)


def finish(run: NightRun) -> None:
    """Notes that the night is done; what was staged is in the lake by now."""
    shutil.rmtree(run.folder / "staging", ignore_errors=True)
    update_facts(run, done=True)


def verify(run: NightRun, path: Path) -> Path:
    """Judges a staged batch; a verifier that hangs or dies costs its own rollout."""
    if is_judged(path):
        return path
    groups, _ = staged(path, {prompt.prompt_id: prompt for prompt in run.prompts()})
    tokenizer = run.tokenizer()
    with VerifierPool(run.config.verify) as pool:
        texts = [[completion_text(tokenizer, s.completion_ids.tolist()) for s in g.samples] for g in groups]
        judgements = pool.judge(groups, texts)
        update_facts(run, verifier_version=pool.version)
    return stage(path, groups, judgements)


def commit(run: NightRun, path: Path) -> Ingested:
    """Puts a judged batch of whole groups into the lake, in one transaction."""
    prompts = {prompt.prompt_id: prompt for prompt in run.prompts()}
    groups, judgements = staged(path, prompts)
    noted = facts(run)
    sampled = Sampled(
        run.record,
        run.policy,
        run.config.sampling,
        noted["logprobs_kind"],
        noted["entropy_kind"],
        run.config.verify.verifier,
        noted["verifier_version"],
        run.config.engine.entropy_bits,
        run.config.engine.logprob_bits,
    )
    rows, refused = rollout_rows(sampled, groups, judgements, run.tokenizer())
    done = ingest(run.lake(), rows, [run.run_id] * len(rows), [group.prompt for group in groups], refused)
    update_facts(run, snapshot=None)
    path.unlink()
    return done


def sealed_snapshot(run: NightRun) -> int:
    """The snapshot that was the newest when the night's last group was in; mining starts from there.

    It is noted, so that a resumed night mines the same snapshot although training has written since.
    """
    noted = facts(run).get("snapshot")
    if noted is None:
        with run.lake().reader() as reader:
            noted = reader.snapshot
        update_facts(run, snapshot=noted)
    return int(noted)


@lru_cache(maxsize=4)
def _prompts(source: str, limit: int | None) -> tuple[Prompt, ...]:
    return tuple(read_prompts(source, limit))
