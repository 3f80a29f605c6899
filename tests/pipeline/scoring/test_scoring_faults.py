"""Scorings that are stopped, and models and rollouts that do not fit: nothing is lost, one line says why."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scoring_helpers import ALL, by_place, select, unscored

from flows.cli import main
from pipeline import scoring
from pipeline.errors import LakeError, ModelError
from pipeline.lake import Lake
from pipeline.models import load_model, model_folder
from pipeline.packing import can_pack
from pipeline.scored_chunk import Chunk

MODEL = model_folder("arith")

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
    killed = subprocess.run([sys.executable, "-c", KILLED, lake.folder], timeout=600)
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
        return plain(rows, scorings)

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


def test_rollouts_scored_before_a_pass_without_numbers_stay(put, sampled, model, policy, monkeypatch):
    lake, passes = put(unscored(sampled)), []
    assert can_pack(model)  # its passes, like those of `check_head`, are none of those counted here
    monkeypatch.setattr(scoring, "check_head", lambda _: None)

    def fail_third(_module, _given, output):
        passes.append(output)
        if len(passes) == 3:
            output.last_hidden_state.fill_(torch.nan)

    handle = model.get_decoder().register_forward_hook(fail_third)
    try:
        with pytest.raises(ModelError, match="what was scored before stays"):
            scoring.score(lake, model, policy, batch_tokens=1)
    finally:
        handle.remove()
    assert 0 < scoring.num_waiting(lake, policy) < 6


LARGE = 33 * 2**20  # bytes: glibc never grows its heap for as much


def address_space() -> int:
    """Bytes of this process's address space."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * os.sysconf("SC_PAGESIZE")


def limit_memory(model, spare_bytes: int):
    """From here on a forward pass has only so much memory beside what the process already has."""
    held = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    assert can_pack(model)  # tried while there is room: oneDNN never recovers if its first product has none
    filler: list[torch.Tensor] = []

    def limit(*_: object) -> None:
        # What the process has freed and kept is memory beside the limit: fill it until the kernel is asked.
        grown = 0
        while grown < LARGE:
            before = address_space()
            filler.append(torch.empty(LARGE, dtype=torch.uint8))
            grown = address_space() - before
        resource.setrlimit(resource.RLIMIT_AS, (address_space() + spare_bytes, held[1]))

    def lift(*_: object) -> None:
        resource.setrlimit(resource.RLIMIT_AS, held)
        filler.clear()

    model.get_decoder().register_forward_pre_hook(limit)
    model.get_decoder().register_forward_hook(lift, always_call=True)


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


@pytest.mark.parametrize(
    ("dtype", "cure"),
    [
        (torch.float32, "Set engine.dtype to bfloat16, which takes half of it; or free memory."),
        (torch.bfloat16, "Free memory."),
    ],
)
def test_a_rollout_that_memory_cannot_hold_alone_is_named_with_the_setting(
    put, sampled, policy, hungry, dtype, cure
):
    long = sampled[0] | {"completion_ids": sampled[0]["completion_ids"] * 12}
    num_tokens = len(long["prompt_ids"]) + len(long["completion_ids"])
    lake = put(unscored([long]))
    hungry = hungry.to(dtype)
    limit_memory(hungry, 2**20)
    with pytest.raises(ModelError) as caught:
        scoring.score(lake, hungry, policy)
    assert str(caught.value) == (
        f"A rollout of {num_tokens} tokens does not fit into the memory of cpu beside arith, even alone. "
        f"{cure} What was scored before stays."
    )
    assert scoring.num_waiting(lake, policy) == 1


def test_where_memory_holds_only_single_rollouts_they_are_scored_one_by_one(
    put, sampled, model, policy, hungry
):
    lake = put(unscored(sampled))
    longest = max(len(row["prompt_ids"]) + len(row["completion_ids"]) for row in sampled)

    def hold_one(_module, _args, given):
        if len(given["input_ids"]) > 1:
            raise torch.OutOfMemoryError

    hungry.get_decoder().register_forward_pre_hook(hold_one, with_kwargs=True)
    done = scoring.score(lake, hungry, policy, batch_tokens=longest)
    assert done.scored == 6
    assert done.batch_tokens < longest
