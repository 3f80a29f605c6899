from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from pipeline.config import TrainConfig
from trainer.batches import step_batches
from trainer.clip_schedule import CLIP_STREAM, ClipSchedule, echo_weight


def schedule(clips, **options):
    return ClipSchedule(clips, TrainConfig(clips_per_step=4, seed=3, **options))


def names(clips):
    return [clip.clip_id for clip in clips]


def test_lambda_is_constant_or_grows_by_equal_parts_to_its_value():
    assert [echo_weight(TrainConfig(echo_weight=0.5), step) for step in (0, 7)] == [0.5, 0.5]
    growing = TrainConfig(echo_weight=0.5, echo_warmup_steps=4)
    assert [echo_weight(growing, step) for step in range(6)] == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]


def test_lambda_of_a_model_is_its_own_or_that_of_all():
    config = TrainConfig(echo_weight=0.5, echo_weights={"small": 0.25})
    assert (config.of_model("small").echo_weight, config.of_model("large").echo_weight) == (0.25, 0.5)


def test_while_nothing_retires_the_order_is_that_of_the_seeded_epochs(make):
    clips = make.clips(6)
    dealing = schedule(clips)
    order = step_batches(6, 4, 3, CLIP_STREAM)
    for _ in range(9):
        assert names(dealing.deal(0)) == [clips[i].clip_id for i in next(order)]


@pytest.mark.parametrize("num_clips", [3, 6, 11])
def test_a_clip_is_used_so_often_and_others_take_its_place(make, num_clips):
    dealing = schedule(make.clips(num_clips), max_clip_uses=2)
    uses: Counter[str] = Counter()
    sizes = []
    for _ in range(2 * num_clips):
        dealt = dealing.deal(0)
        assert len(set(names(dealt))) == len(dealt)
        dealing.used(dealt, [1.0] * len(dealt))
        uses.update(names(dealt))
        sizes.append(len(dealt))
    assert set(uses.values()) == {2}
    assert len(uses) == num_clips
    assert sizes[: (2 * num_clips - 4) // 4] == [min(4, num_clips)] * ((2 * num_clips - 4) // 4)
    assert (sizes[-1], dealing.num_retired(0), dealing.num_uses) == (0, num_clips, 2 * num_clips)


def test_a_clip_retires_once_its_loss_is_under_the_threshold(make):
    dealing = schedule(make.clips(4), retire_below_loss=0.5)
    dealt = dealing.deal(0)
    dealing.used(dealt, [0.4, 0.5, 0.6, 0.1])
    assert set(names(dealing.deal(0))) == {dealt[1].clip_id, dealt[2].clip_id}
    dealing.used(dealt[1:3], [0.3, 0.7])
    assert names(dealing.deal(0)) == [dealt[2].clip_id]
    assert dealing.num_retired(0) == 3


def test_a_clip_that_lags_too_far_behind_the_policy_is_not_due(make):
    clips = [dataclasses.replace(clip, policy_version=5 * i) for i, clip in enumerate(make.clips(4))]
    dealing = schedule(clips, max_clip_lag=7)
    assert set(names(dealing.deal(12))) == {"clip1", "clip2", "clip3"}
    assert set(names(dealing.deal(13))) == {"clip2", "clip3"}
    assert names(dealing.due(clips, 13)) == ["clip2", "clip3"]
    assert schedule(clips).num_retired(10**6) == 0
