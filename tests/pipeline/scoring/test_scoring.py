"""The scorer fills in what the engine would have recorded, and a mining then counts it."""

from __future__ import annotations

import numpy as np
import pytest
from scoring_helpers import ALL, by_place, select, unscored, without

from pipeline import scoring
from pipeline.config import MiningConfig, NightlyConfig
from pipeline.errors import MiningError
from pipeline.mine import mine
from pipeline.runs import facts, open_run, sealed_snapshot
from pipeline.scoring import Scored, Selection


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
    unseen = sealed_snapshot(run)
    assert scoring.score_run(run) == Scored(scored=2)
    assert sealed_snapshot(run) > unseen, "the night is mined as it was scored"
    assert scoring.score_run(run) == Scored()
    assert facts(run)["num_scored"] == 2
    scored = select(
        lake, "select group_id, sample_index from rollouts where completion_entropies is not null"
    )
    assert {row["group_id"] for row in scored} == {"tonight"}


def test_a_night_whose_rollouts_were_all_refused_has_nothing_to_score(put, sampled):
    lake = put(unscored(sampled))
    assert scoring.score_run(open_run(NightlyConfig(max_prompts=1), lake.folder)) == Scored()


def test_an_experts_rollouts_get_the_entropies_that_the_policy_has_on_them(put, sampled, model, policy):
    lake = put([row | {"origin": "expert"} for row in without(sampled, "completion_entropies")])
    assert scoring.score(lake, model, policy).scored == 6
    scored = by_place(lake)
    for row in sampled:
        found = scored[row["group_id"], row["sample_index"]]
        assert (found["origin"], found["entropy_kind"]) == ("expert", "rescored")
        np.testing.assert_allclose(found["completion_entropies"], row["completion_entropies"], atol=1e-4)


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


def test_successes_that_different_weights_judged_are_mined_once_one_has_judged_them_all(
    put, sampled, model, policy, newer
):
    lake = put([row | {"run_id": f"night {row['sample_index']}"} for row in unscored(sampled)])
    scoring.score(lake, model, policy, Selection("night 0"))
    scoring.score(lake, *newer)
    with pytest.raises(MiningError, match=r"\(3 by arith at version \d, 3 by arith .*score --rescore"):
        mine(lake, MiningConfig())
    scoring.score(lake, *newer, ALL)
    assert mine(lake, MiningConfig()).clips == 3


def test_rollouts_that_were_each_judged_by_the_weights_that_sampled_them_are_mined_together(
    put, sampled, model, policy, newer
):
    older, later = unscored(sampled[:2]), unscored(sampled[2:])
    by_newer = {"weights_hash": newer[1].weights_hash, "run_id": "later"}
    lake = put([row | {"weights_hash": policy.weights_hash, "run_id": "older"} for row in older])
    lake = put([row | by_newer for row in later])
    scoring.score(lake, model, policy, Selection("older"))
    scoring.score(lake, *newer, Selection("later"))
    assert len(select(lake, "select distinct weights_hash from scorings")) == 2
    assert mine(lake, MiningConfig()).clips == 3


def test_entropies_of_unknown_weights_are_not_ranked_beside_those_of_known_ones(put, sampled, model, policy):
    lake = put([row | {"entropy_kind": "rescored"} for row in sampled[:2]])
    assert mine(lake, MiningConfig()).clips == 1
    lake = put(unscored(sampled[2:]))
    scoring.score(lake, model, policy)
    with pytest.raises(MiningError, match=r"\(4 by arith at version 0, 2 by unknown weights\)"):
        mine(lake, MiningConfig())
