"""The scorer fills in what the engine would have recorded, and a mining then counts it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows.cli import main
from pipeline import scoring
from pipeline.config import EngineConfig, MiningConfig, SamplingConfig
from pipeline.engines.base import GroupRequest
from pipeline.engines.transformers import TransformersEngine
from pipeline.errors import LakeError
from pipeline.formats.canonical import import_canonical
from pipeline.lake import Lake
from pipeline.mine import mine
from pipeline.models import load_model, model_folder
from pipeline.records import Prompt
from pipeline.tokenization import load_tokenizer, tokenizer_hash

MODEL = model_folder("arith")
QUESTIONS = ("46*3+14", "13*3-26", "24*9+49+23+34-8")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


@pytest.fixture(scope="module")
def model():
    return load_model(MODEL, "cpu", "float32")


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


def without_entropies(rows: list[dict[str, Any]], logprobs: bool = False) -> list[dict[str, Any]]:
    changes = {"completion_entropies": None} | ({} if logprobs else {"completion_logprobs": None})
    return [row | changes for row in rows]


def lake_of(folder: Path, rows: list[dict[str, Any]], tokenizer: Any) -> Lake:
    folder.mkdir(exist_ok=True)
    dump = folder / "dump.jsonl"
    dump.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lake = Lake.create(folder / "lake")
    assert import_canonical(lake, [dump], tokenizer).refused == 0
    return lake


def by_place(lake: Lake, snapshot: int | None = None) -> dict[tuple[str, int], dict[str, Any]]:
    with lake.reader(snapshot) as reader:
        rows = reader.rows("select * from rollouts")
    return {(row["group_id"], row["sample_index"]): row for row in rows}


def test_the_scorer_finds_the_entropies_and_logprobs_of_the_engine(tmp_path, sampled, model, tokenizer):
    lake = lake_of(tmp_path, without_entropies(sampled), tokenizer)
    done = scoring.score(lake, model, tokenizer_hash(tokenizer))
    assert done == scoring.Scored(scored=6, other_tokenizer=0, unreadable=0)
    scored = by_place(lake)
    assert len(scored) == 6
    for row in sampled:
        found = scored[row["group_id"], row["sample_index"]]
        np.testing.assert_allclose(found["completion_entropies"], row["completion_entropies"], atol=2e-5)
        np.testing.assert_allclose(found["completion_logprobs"], row["completion_logprobs"], atol=2e-5)
        assert (found["entropy_kind"], found["logprobs_kind"]) == ("rescored", "raw")


def test_nothing_but_what_was_missing_changes(tmp_path, sampled, model, tokenizer):
    lake = lake_of(tmp_path, without_entropies(sampled, logprobs=True), tokenizer)
    before = by_place(lake)
    scoring.score(lake, model, tokenizer_hash(tokenizer))
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


def test_scored_groups_are_mined_and_the_older_snapshot_still_awaits(tmp_path, sampled, model, tokenizer):
    lake = lake_of(tmp_path, without_entropies(sampled), tokenizer)
    waiting = mine(lake, MiningConfig())
    assert (waiting.clips, waiting.dropped) == (0, {"unscored": 3})
    scoring.score(lake, model, tokenizer_hash(tokenizer))
    scored = mine(lake, MiningConfig())
    assert (scored.clips, scored.dropped) == (3, {})
    assert scored.snapshot > waiting.snapshot
    assert mine(lake, MiningConfig(), snapshot=waiting.snapshot) == waiting
    touched = mine(lake, MiningConfig(), since_snapshot=waiting.snapshot)
    assert touched.groups == {"all_success": 3}


def test_a_scoring_that_fails_half_way_keeps_what_it_committed_and_goes_on(
    tmp_path, sampled, model, tokenizer, monkeypatch
):
    lake = lake_of(tmp_path, without_entropies(sampled), tokenizer)
    monkeypatch.setattr(scoring, "COMMIT_ROLLOUTS", 2)
    replace, calls = lake.replace_rollouts, []

    def replace_twice(rows):
        calls.append(rows.num_rows)
        if len(calls) == 3:
            raise LakeError("the disk is full")
        replace(rows)

    monkeypatch.setattr(lake, "replace_rollouts", replace_twice)
    with pytest.raises(LakeError, match="the disk is full"):
        scoring.score(lake, model, tokenizer_hash(tokenizer))
    assert sum(row["completion_entropies"] is not None for row in by_place(lake).values()) == 4
    done = scoring.score(Lake.open(lake.folder), model, tokenizer_hash(tokenizer))
    assert done.scored == 2
    assert all(row["completion_entropies"] is not None for row in by_place(lake).values())


def test_small_forward_passes_change_no_digit_that_matters(tmp_path, sampled, model, tokenizer, monkeypatch):
    one = lake_of(tmp_path / "one", without_entropies(sampled), tokenizer)
    each = lake_of(tmp_path / "each", without_entropies(sampled), tokenizer)
    scoring.score(one, model, tokenizer_hash(tokenizer))
    monkeypatch.setattr(scoring, "FORWARD_TOKENS", 1)
    scoring.score(each, model, tokenizer_hash(tokenizer))
    for place, row in by_place(one).items():
        np.testing.assert_allclose(
            row["completion_entropies"], by_place(each)[place]["completion_entropies"], atol=1e-5
        )


def test_what_the_model_cannot_read_is_counted_and_stays(tmp_path, sampled, model, tokenizer):
    too_long = sampled[0] | {"group_id": "long", "completion_ids": sampled[0]["completion_ids"][:1] * 600}
    lake = lake_of(tmp_path, without_entropies([too_long, sampled[1]]), tokenizer)
    assert scoring.score(lake, model, "another tokenizer").other_tokenizer == 2
    done = scoring.score(lake, model, tokenizer_hash(tokenizer))
    assert done == scoring.Scored(scored=1, other_tokenizer=0, unreadable=1)
    assert by_place(lake)["long", 0]["completion_entropies"] is None


def test_an_empty_completion_is_scored_with_nothing(tmp_path, sampled, model, tokenizer):
    lake = lake_of(tmp_path, without_entropies([sampled[0] | {"completion_ids": []}]), tokenizer)
    assert scoring.score(lake, model, tokenizer_hash(tokenizer)).scored == 1
    row = next(iter(by_place(lake).values()))
    assert (row["completion_entropies"], row["step_entropies"], row["entropy_kind"]) == ([], [], "rescored")


def test_a_lake_whose_rows_were_replaced_is_healthy(tmp_path, sampled, tokenizer, capfd):
    lake = lake_of(tmp_path, without_entropies(sampled), tokenizer)
    capfd.readouterr()
    assert main(["score", "--json", "--model", str(MODEL), "--lake", str(lake.folder)]) == 0
    output, errors = capfd.readouterr()
    assert json.loads(output) == {"scored": 6, "other_tokenizer": 0, "unreadable": 0}
    assert errors == ""
    assert main(["doctor", "--lake", str(lake.folder)]) == 0
    assert main(["import", "rollouts", str(tmp_path / "dump.jsonl"), "--tokenizer", str(MODEL), "--lake",
                 str(lake.folder)]) == 0  # fmt: skip
    assert "written 0, known 6" in capfd.readouterr().out
