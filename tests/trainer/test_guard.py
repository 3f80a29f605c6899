from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from loop_helpers import CONFIG, Training, even_sum
from safetensors.numpy import load_file

from pipeline.errors import ModelError
from pipeline.records import Judgement


def broken_at(*batches):
    """`even_sum`, but that in these batches (counted from 0) every second reward is infinite."""
    count = iter(range(100))

    def judge(groups):
        if next(count) not in batches:
            return even_sum(groups)
        return [[Judgement(math.inf if i % 2 else 0.0) for i, _ in enumerate(g.samples)] for g in groups]

    return judge


def test_a_step_whose_loss_is_not_finite_is_skipped_counted_and_its_batch_kept(make, tmp_path):
    clips = make.clips(6)
    stale = tmp_path / "skipped" / "step-000007.json"  # of the same training, killed before
    stale.parent.mkdir()
    stale.touch()
    training = Training(make, tmp_path, clips=clips, judge=broken_at(1))
    assert [line["skipped"] for line in training.metrics] == [False, True, False]
    assert training.result.num_skipped == 1
    assert not stale.exists()
    assert training.result.num_clip_uses == 8
    assert [uses[0][1] for uses in training.clip_uses] == [0, 2]
    bad = training.metrics[1]
    assert (bad["loss"], bad["rl_loss"], bad["grad_norm"], bad["reward_mean"]) == (None,) * 4
    # The weights of the third step are still those that sampled the second.
    assert [line["policy_version"] for line in training.metrics] == [10, 11, 11]
    marker = json.loads((training.result.checkpoint / "echomine.json").read_text())
    assert marker["policy_version"] == 12
    assert all(torch.isfinite(param).all() for param in training.model.parameters())

    kept = load_file(tmp_path / "skipped" / "step-000001.safetensors")
    sampled = [sample.completion_ids for group in training.rollouts[1][0] for sample in group.samples]
    assert kept["rollouts.completion_ids"].tolist() == np.concatenate(sampled).tolist()
    assert kept["rollouts.completion_lengths"].tolist() == [len(ids) for ids in sampled]
    assert np.isnan(kept["rollouts.advantages"]).any()
    assert len(kept["clips.completion_lengths"]) == 4
    facts = json.loads((tmp_path / "skipped" / "step-000001.json").read_text())
    assert (facts["optim_step"], facts["loss"]) == (1, "nan")
    assert set(facts["clip_ids"]) < {clip.clip_id for clip in clips}


def test_three_skipped_steps_in_a_row_end_the_training_with_the_reason(make, tmp_path):
    with pytest.raises(
        ModelError, match=r"stopped at optim_step 2: 3 steps in a row .* its loss is nan"
    ) as end:
        Training(make, tmp_path, judge=broken_at(0, 1, 2))
    assert "\n" not in str(end.value)
    assert len(list((tmp_path / "skipped").glob("*.safetensors"))) == 3
    assert not (tmp_path / "checkpoint").exists()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [True, True]


def test_two_and_two_skipped_steps_with_a_good_one_between_end_nothing(make, tmp_path):
    config = CONFIG.model_copy(update={"optim_steps": 5})
    training = Training(make, tmp_path, config=config, judge=broken_at(0, 1, 3, 4))
    assert [line["skipped"] for line in training.metrics] == [True, True, False, True, True]


def test_a_gradient_that_is_not_finite_is_skipped_too(make, tmp_path):
    model = make.model()
    hook = next(model.parameters()).register_hook(lambda grad: grad * math.inf)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ModelError, match=r"its (rl_)?grad_norm is"):
        Training(make, tmp_path, model=model)
    hook.remove()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_batch_that_cannot_be_kept_is_one_line(make, tmp_path):
    (tmp_path / "skipped").write_text("a file where the folder should be")
    with pytest.raises(ModelError, match=r"Cannot write .*step-000000\.safetensors"):
        Training(make, tmp_path, judge=broken_at(0))
