"""The scorer fills in what the engine would have recorded, and a mining then counts it."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flows.cli import main
from pipeline import scoring
from pipeline.config import EngineConfig, MiningConfig, NightlyConfig, SamplingConfig
from pipeline.engines.base import GroupRequest
from pipeline.engines.transformers import TransformersEngine
from pipeline.errors import LakeError, ModelError
from pipeline.formats.canonical import import_canonical
from pipeline.lake import Lake
from pipeline.mine import mine
from pipeline.models import load_model, model_folder, policy_of
from pipeline.records import Prompt
from pipeline.runs import open_run
from pipeline.scored_chunk import Chunk
from pipeline.scoring import Scored, Selection
from pipeline.tokenization import load_tokenizer

MODEL = model_folder("arith")
QUESTIONS = ("46*3+14", "13*3-26", "24*9+49+23+34-8")
ALL = Selection(rescore=True)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


@pytest.fixture(scope="module")
def model():
    return load_model(MODEL, "cpu", "float32")


@pytest.fixture(scope="module")
def policy(tokenizer):
    return policy_of(MODEL, "arith", tokenizer)


@pytest.fixture(scope="module")
def newer(model, policy):
    """The policy after more training: its weights are a little different."""
    other = load_model(MODEL, "cpu", "float32")
    with torch.no_grad():
        other.lm_head.weight.mul_(1.1)
    return other, replace(policy, weights_hash="of the newer weights", policy_version=8)


@pytest.fixture(scope="module")
def sampled(model, tokenizer) -> list[dict[str, Any]]:
    """Rows of three groups as the engine samples them, with its entropies; all rewards are 1."""
    engine = TransformersEngine(model, tokenizer, EngineConfig().entropy_kind)
    requests = [GroupRequest(Prompt(({"role": "user", "content": text},)), (1, 2)) for text in QUESTIONS]
    return [
        {
            "group_id": group.prompt.text,
            "sample_index": sample.sample_index,
            "prompt_ids": group.prompt_ids.tolist(),
            "completion_ids": sample.completion_ids.tolist(),
            "completion_logprobs": sample.logprobs.tolist(),
            "completion_entropies": sample.entropies.tolist(),
            "reward": 1.0,
        }
        for group in engine.generate(requests, SamplingConfig(group_size=2, max_tokens=48))
        for sample in group.samples
    ]


@pytest.fixture
def put(lake: Lake, tmp_path: Path, tokenizer: Any):
    """Imports rows into the test's lake."""

    def put(rows: list[dict[str, Any]]) -> Lake:
        dump = tmp_path / "dump.jsonl"
        dump.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert import_canonical(lake, [dump], tokenizer).refused == 0
        return lake

    return put


def without(rows: list[dict[str, Any]], *columns: str) -> list[dict[str, Any]]:
    return [row | dict.fromkeys(columns) for row in rows]


def unscored(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return without(rows, "completion_entropies", "completion_logprobs")


def select(lake: Lake, query: str, snapshot: int | None = None) -> list[dict[str, Any]]:
    with lake.reader(snapshot) as reader:
        return reader.rows(query)


def by_place(lake: Lake, snapshot: int | None = None) -> dict[tuple[str, int], dict[str, Any]]:
    rows = select(lake, "select * from rollouts", snapshot)
    return {(row["group_id"], row["sample_index"]): row for row in rows}


# What is scored


def test_the_scorer_finds_the_entropies_and_logprobs_of_the_engine(put, sampled, model, policy):
    lake = put(unscored(sampled))
    assert scoring.score(lake, model, policy) == Scored(scored=6)
    scored = by_place(lake)
    assert len(scored) == 6
    for row in sampled:
        found = scored[row["group_id"], row["sample_index"]]
        np.testing.assert_allclose(found["completion_entropies"], row["completion_entropies"], atol=1e-4)
        np.testing.assert_allclose(found["completion_logprobs"], row["completion_logprobs"], atol=1e-4)
        assert (found["entropy_kind"], found["logprobs_kind"]) == ("rescored", "raw")


def test_nothing_but_what_was_missing_changes(put, sampled, model, policy):
    lake = put(without(sampled, "completion_entropies"))
    before = by_place(lake)
    scoring.score(lake, model, policy)
    filled = {"completion_entropies", "entropy_kind", "step_entropies"}
    for place, row in by_place(lake).items():
        changed = {name for name in row if row[name] != before[place][name]}
        assert changed == filled
        starts = [0, *row["step_ends"][:-1]]
        means = [
            np.mean(np.float32(row["completion_entropies"][start:end]), dtype=np.float64)
            for start, end in zip(starts, row["step_ends"], strict=True)
        ]
        assert row["step_entropies"] == np.float32(means).tolist()


def test_scored_groups_are_mined_and_the_older_snapshot_still_awaits(put, sampled, model, policy):
    lake = put(unscored(sampled))
    waiting = mine(lake, MiningConfig())
    assert (waiting.clips, waiting.dropped) == (0, {"unscored": 3})
    scoring.score(lake, model, policy)
    scored = mine(lake, MiningConfig())
    assert (scored.clips, scored.dropped) == (3, {})
    assert scored.snapshot > waiting.snapshot
    assert mine(lake, MiningConfig(), snapshot=waiting.snapshot) == waiting
    touched = mine(lake, MiningConfig(), since_snapshot=waiting.snapshot)
    assert touched.groups == {"all_success": 3}


@pytest.mark.parametrize("batch_tokens", [1, 60, None])
def test_no_digit_that_matters_depends_on_what_shares_a_forward_pass(
    put, sampled, model, policy, batch_tokens
):
    lake = put(unscored(sampled))
    scoring.score(lake, model, policy, batch_tokens=batch_tokens)
    scored = by_place(lake)
    for row in sampled:
        found = scored[row["group_id"], row["sample_index"]]
        np.testing.assert_allclose(found["completion_entropies"], row["completion_entropies"], atol=1e-4)


def test_an_empty_completion_is_scored_with_nothing(put, sampled, model, policy):
    lake = put(unscored([sampled[0] | {"completion_ids": []}, sampled[1]]))
    assert scoring.score(lake, model, policy).scored == 2
    row = by_place(lake)[sampled[0]["group_id"], 0]
    assert (row["completion_entropies"], row["step_entropies"], row["entropy_kind"]) == ([], [], "rescored")


def test_only_the_run_that_is_asked_for_is_scored(put, sampled, model, policy):
    lake = put([row | {"run_id": f"run {row['sample_index']}"} for row in unscored(sampled)])
    assert scoring.score(lake, model, policy, Selection("run 1")).scored == 3
    scored = select(lake, "select distinct run_id from rollouts where entropy_kind = 'rescored'")
    assert scored == [{"run_id": "run 1"}]


def test_a_night_scores_its_own_rollouts_by_its_own_model(put, sampled, policy):
    lake = put(unscored(sampled))
    run = open_run(NightlyConfig(max_prompts=1), lake.folder)
    lake = put([row | {"run_id": run.run_id, "group_id": "tonight"} for row in unscored(sampled[:2])])
    assert scoring.score_run(run) == Scored(scored=2)
    assert scoring.score_run(run) == Scored()
    scored = select(
        lake, "select group_id, sample_index from rollouts where completion_entropies is not null"
    )
    assert {row["group_id"] for row in scored} == {"tonight"}


# A newer policy judges


def test_a_newer_policy_replaces_entropies_and_never_the_logprobs_of_the_sampling(
    put, sampled, model, policy, newer
):
    lake = put(sampled)
    before = by_place(lake)
    assert scoring.score(lake, *newer) == Scored(scored=0)
    assert scoring.score(lake, *newer, ALL) == Scored(scored=6)
    for place, row in by_place(lake).items():
        changed = {name for name in row if row[name] != before[place][name]}
        assert changed == {"completion_entropies", "entropy_kind", "step_entropies"}
        assert row["entropy_kind"] == "rescored"
    notes = select(lake, "select distinct model, weights_hash, policy_version from scorings")
    assert notes == [{"model": "arith", "weights_hash": newer[1].weights_hash, "policy_version": 8}]
    assert mine(lake, MiningConfig()).clips == 3


def test_logprobs_of_other_weights_are_not_passed_off_as_those_of_the_sampling(put, sampled, model, policy):
    first, second = unscored(sampled[:2])
    lake = put([first | {"weights_hash": "of the weights that sampled"}, second])
    assert scoring.score(lake, model, policy).scored == 2
    first, second = (by_place(lake)[sampled[0]["group_id"], index] for index in (0, 1))
    assert (first["completion_logprobs"], first["logprobs_kind"]) == (None, None)
    assert first["completion_entropies"] is not None
    assert second["logprobs_kind"] == "raw"


def test_what_a_policy_has_judged_it_does_not_judge_again_until_another_has(
    put, sampled, model, policy, newer
):
    lake = put(unscored(sampled[:2]) + sampled[2:])
    assert scoring.score(lake, model, policy).scored == 2
    assert scoring.score(lake, model, policy, ALL).scored == 4
    assert scoring.score(lake, model, policy, ALL).scored == 0
    assert scoring.score(lake, *newer, ALL).scored == 6
    assert scoring.score(lake, model, policy, ALL).scored == 6


# Stopped and started again


KILLED = """
import os, signal, sys
from pathlib import Path
from pipeline import scoring
from pipeline.lake import Lake
from pipeline.models import load_model, model_folder, policy_of
from pipeline.tokenization import load_tokenizer

folder = model_folder("arith")
scoring.CHUNK_ROLLOUTS = 4
policy = policy_of(folder, "arith", load_tokenizer(folder))
lake, model = Lake.open(Path(sys.argv[1])), load_model(folder, "cpu")
scoring.score(lake, model, policy, scoring.Selection(rescore=True),
    progress=lambda done: os.kill(os.getpid(), signal.SIGKILL))
"""


def test_a_rescoring_that_is_killed_goes_on_with_what_it_had_not_committed(put, sampled, model, policy):
    lake = put(sampled)
    killed = subprocess.run([sys.executable, "-c", KILLED, lake.folder], timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert scoring.num_waiting(lake, policy, ALL) == 2
    assert scoring.score(lake, model, policy, ALL).scored == 2
    assert select(lake, "select count(*) as n, count(distinct rollout_id) as ids from rollouts") == [
        {"n": 6, "ids": 6}
    ]
    assert select(lake, "select count(*) as n from scorings") == [{"n": 6}]


def test_a_scoring_that_fails_half_way_keeps_what_it_committed_and_goes_on(
    put, sampled, model, policy, monkeypatch
):
    lake = put(unscored(sampled))
    monkeypatch.setattr(scoring, "CHUNK_ROLLOUTS", 2)
    plain, calls = lake.replace_rollouts, []

    def replace_twice(rows, scorings):
        calls.append(rows.num_rows)
        if len(calls) == 3:
            raise LakeError("the disk is full")
        plain(rows, scorings)

    monkeypatch.setattr(lake, "replace_rollouts", replace_twice)
    with pytest.raises(LakeError, match="the disk is full"):
        scoring.score(lake, model, policy)
    assert sum(row["completion_entropies"] is not None for row in by_place(lake).values()) == 4
    assert scoring.score(Lake.open(lake.folder), model, policy).scored == 2
    assert all(row["completion_entropies"] is not None for row in by_place(lake).values())


def test_a_slow_model_commits_within_a_chunk(put, sampled, model, policy, monkeypatch):
    lake = put(unscored(sampled))
    monkeypatch.setattr(scoring, "COMMIT_SECONDS", 0)
    counts: list[int] = []
    scoring.score(lake, model, policy, batch_tokens=1, progress=counts.append)
    assert counts == [1, 2, 3, 4, 5, 6]
    assert all(
        len(row["completion_entropies"]) == len(row["completion_ids"]) for row in by_place(lake).values()
    )


def test_no_more_than_a_chunk_of_rollouts_is_held_at_once(put, sampled, model, policy, monkeypatch):
    lake = put(unscored([row | {"group_id": str(n)} for n in range(20) for row in sampled[:1]]))
    monkeypatch.setattr(scoring, "CHUNK_ROLLOUTS", 8)
    sizes: list[int] = []
    monkeypatch.setattr(scoring, "Chunk", lambda rows: sizes.append(rows.num_rows) or Chunk(rows))
    assert scoring.score(lake, model, policy).scored == 20
    assert sizes == [8, 8, 4]


def test_a_lake_whose_rows_were_replaced_is_healthy(put, sampled, tmp_path, capfd):
    lake = put(unscored(sampled))
    capfd.readouterr()
    assert main(["score", "--json", "--model", str(MODEL), "--lake", str(lake.folder)]) == 0
    output, errors = capfd.readouterr()
    assert json.loads(output) == {"scored": 6, "other_tokenizer": 0, "unreadable": 0}
    assert errors == ""
    assert main(["doctor", "--lake", str(lake.folder)]) == 0
    assert main(["import", "rollouts", str(tmp_path / "dump.jsonl"), "--tokenizer", str(MODEL), "--lake",
                 str(lake.folder)]) == 0  # fmt: skip
    assert "written 0, known 6" in capfd.readouterr().out


# What does not fit


def test_what_the_model_cannot_read_is_counted_and_stays(put, sampled, model, policy, capfd):
    too_long = sampled[0] | {"group_id": "long", "completion_ids": sampled[0]["completion_ids"][:1] * 600}
    lake = put(unscored([too_long, sampled[1]]))
    assert scoring.score(lake, model, replace(policy, tokenizer_hash="another")).other_tokenizer == 2
    capfd.readouterr()
    assert main(["score", "--json", "--lake", str(lake.folder)]) == 0
    output, errors = capfd.readouterr()
    assert json.loads(output) == {"scored": 1, "other_tokenizer": 0, "unreadable": 1}
    assert errors.count("\n") == 1
    assert "1 rollouts still wait" in errors
    assert by_place(lake)["long", 0]["completion_entropies"] is None


def test_an_unknown_run_is_named(put, sampled, capfd):
    lake = put(sampled[:1])
    capfd.readouterr()
    assert main(["score", "--run", "no such run", "--lake", str(lake.folder)]) == 2
    assert "has no run no such run. See `echomine sql" in capfd.readouterr().err


def test_a_model_that_knows_fewer_tokens_than_its_tokenizer_scores_nothing(put, sampled, policy):
    lake = put(unscored(sampled))
    small = load_model(MODEL, "cpu", "float32")
    small.resize_token_embeddings(10)
    with pytest.raises(ModelError, match=r"token ids 0 to 9, .* model and tokenizer do not fit"):
        scoring.score(lake, small, policy)
    assert scoring.num_waiting(lake, policy) == 6


def test_a_model_that_gives_no_numbers_is_named_and_nothing_of_it_is_kept(put, sampled, policy):
    lake = put(unscored(sampled))
    broken = load_model(MODEL, "cpu", "float32")
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan
    with pytest.raises(ModelError, match=r"arith gives NaN.*engine\.dtype"):
        scoring.score(lake, broken, policy)
    assert scoring.num_waiting(lake, policy) == 6


def limit_memory(model, spare_bytes: int):
    """From here on a forward pass has only so much memory beside what the process already has."""
    held = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)

    def limit(*_: object) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGESIZE") + spare_bytes, held[1]))

    model.get_decoder().register_forward_pre_hook(limit)
    model.get_decoder().register_forward_hook(
        lambda *_: resource.setrlimit(resource.RLIMIT_AS, held), always_call=True
    )


@pytest.fixture
def hungry():
    """A model of one layer so wide that a token takes megabytes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 2**17, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes)).eval()


def test_passes_that_memory_cannot_hold_are_halved_until_it_can(put, sampled, policy, hungry):
    lake = put(unscored(sampled))
    expected = scoring.score(lake, hungry, policy)
    entropies = {place: row["completion_entropies"] for place, row in by_place(lake).items()}
    limit_memory(hungry, 200 * 2**20)  # all at once take 500
    done = scoring.score(lake, hungry, replace(policy, weights_hash="again"), ALL, batch_tokens=1000)
    assert done.scored == expected.scored == 6
    assert done.batch_tokens in (500, 250, 125, 62)
    for place, row in by_place(lake).items():
        np.testing.assert_allclose(row["completion_entropies"], entropies[place], atol=1e-5)


def test_a_rollout_that_memory_cannot_hold_alone_is_named_with_the_setting(put, sampled, policy, hungry):
    long = sampled[0] | {"completion_ids": sampled[0]["completion_ids"] * 12}
    lake = put(unscored([long]))
    limit_memory(hungry, 2**20)
    with pytest.raises(ModelError, match=r"A rollout of \d+ tokens does not fit .*engine\.dtype") as caught:
        scoring.score(lake, hungry, policy)
    assert "\n" not in str(caught.value)
    assert scoring.num_waiting(lake, policy) == 1
