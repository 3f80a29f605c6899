"""What can be watched of a training: event files beside the lines, padding, and the norms of both terms."""

from __future__ import annotations

import numpy as np
import pytest
from loop_helpers import CONFIG, Training
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.logprobs import completion_logprobs
from pipeline.packing import can_pack
from pipeline.training_metrics import EVENTS
from trainer.padding import counted
from trainer.tracking import open_tracks, scalars


def test_tensorboard_shows_each_number_of_each_step_once_after_a_training_that_went_on(make, tmp_path):
    first = Training(make, tmp_path, clips=make.clips(6))
    with open_tracks(
        tmp_path, CONFIG, first.seen[:1]
    ) as tracks:  # as after a kill: from the first step's state
        for step in first.seen[1:]:
            tracks.write(step)
    events = EventAccumulator(str(tmp_path / EVENTS)).Reload()
    assert sorted(events.Tags()["scalars"]) == sorted(set().union(*map(scalars, first.seen)))
    assert {"classes/mixed", "reward_mean", "skipped"} <= set(events.Tags()["scalars"])
    for name in ("loss", "reward_mean", "padding_share"):
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        assert shown == [(i, pytest.approx(getattr(step, name))) for i, step in enumerate(first.seen)]


def test_without_tensorboard_only_the_lines_are_written(make, tmp_path):
    config = CONFIG.model_copy(update={"tensorboard": False})
    training = Training(make, tmp_path, clips=make.clips(6), config=config)
    assert len(training.metrics) == 3
    assert not (tmp_path / EVENTS).exists()


def test_padding_is_what_a_forward_pass_reads_and_no_row_needs(model):
    model.gradient_checkpointing_enable()  # with which rows are padded
    ids = np.arange(2, 12, dtype=np.int32)
    rows = [(ids[:3], ids[:6]), (ids[:2], ids[:1]), (ids[:4], ids[:0])]
    with counted(model) as reading:
        assert reading.padding_share([]) is None
        completion_logprobs(model, rows)
    assert reading.num_positions == 3 * 8  # the longest row without its last token, thrice
    assert reading.padding_share(rows) == pytest.approx(1 - (8 + 2) / 24)
    completion_logprobs(model, rows)
    assert reading.num_positions == 24
    model.gradient_checkpointing_disable()
    assert can_pack(model)
    with counted(model) as reading:
        completion_logprobs(model, rows)
    assert reading.num_positions == 8 + 2
    assert reading.padding_share(rows) == 0


def test_lags_count_from_the_policies_that_sampled_the_clips(make, tmp_path):
    training = Training(make, tmp_path, clips=make.clips(6))  # of policy version 0, trained from 10 on
    assert [(step["clip_lag_mean"], step["clip_lag_max"]) for step in training.metrics] == [
        (10.0, 10), (11.0, 11), (12.0, 12)
    ]  # fmt: skip
