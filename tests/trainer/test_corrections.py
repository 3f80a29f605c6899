from __future__ import annotations

import math

import pytest
import torch

from pipeline.objective_config import ObjectiveConfig
from trainer.corrections import correction_weights, mismatch_kl

# trainer / engine ratios of three sequences: their products are 0.5, 4.5 and 2
RATIOS = [0.25, 2.0, 3.0, 1.5, 2.0]
LENGTHS = torch.tensor([2, 2, 1])
SAMPLED = torch.tensor([-1.0, -2.0, -3.0, -0.5, -0.1], dtype=torch.float64)
OLD = SAMPLED + torch.tensor(RATIOS, dtype=torch.float64).log()


def weights(**config):
    return correction_weights(ObjectiveConfig(**config), OLD, SAMPLED, LENGTHS).tolist()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, [1.0] * 5),
        ({"correction": "truncated"}, [0.25, 2.0, 3.0, 1.5, 2.0]),
        ({"correction": "truncated", "correction_cap": 1.75}, [0.25, 1.75, 1.75, 1.5, 1.75]),
        ({"correction": "truncated", "correction_floor": 0.5}, [0.5, 2.0, 3.0, 1.5, 2.0]),
        ({"correction": "token_mask", "correction_cap": 2.5}, [0.25, 2.0, 0.0, 1.5, 2.0]),
        (
            {"correction": "token_mask", "correction_cap": 2.5, "correction_floor": 0.5},
            [0.0, 2.0, 0.0, 1.5, 2.0],
        ),
        ({"correction": "sequence_mask"}, [0.5, 0.5, 0.0, 0.0, 2.0]),
        ({"correction": "sequence_mask", "correction_cap": 5.0}, [0.5, 0.5, 4.5, 4.5, 2.0]),
        ({"correction": "sequence_mask", "correction_floor": 0.6}, [0.0, 0.0, 0.0, 0.0, 2.0]),
    ],
)
def test_weights_by_hand(config, expected):
    assert weights(**config) == pytest.approx(expected)


@pytest.mark.parametrize("correction", ["none", "truncated", "token_mask", "sequence_mask"])
def test_weights_are_detached_and_of_as_many_tokens_as_there_are(correction):
    config = ObjectiveConfig(correction=correction)
    old = OLD.clone().requires_grad_()
    assert not correction_weights(config, old, SAMPLED, LENGTHS).requires_grad
    for lengths in (torch.zeros(0, dtype=torch.int64), torch.tensor([0, 0])):
        assert correction_weights(config, OLD[:0], SAMPLED[:0], lengths).tolist() == []
    with_empty = correction_weights(config, OLD, SAMPLED, torch.tensor([2, 0, 2, 1]))
    assert with_empty.tolist() == pytest.approx(weights(correction=correction))


@pytest.mark.parametrize("correction", ["truncated", "token_mask", "sequence_mask"])
def test_a_token_the_engine_thought_impossible_gives_a_finite_weight(correction):
    sampled, old = torch.tensor([-2000.0]), torch.tensor([-1.0])
    weight = correction_weights(ObjectiveConfig(correction=correction), old, sampled, torch.tensor([1]))
    assert weight.tolist() == [3.0 if correction == "truncated" else 0.0]


def test_the_estimated_kl_is_never_negative_and_right_in_the_mean():
    engine = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    trainer = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
    per_token = mismatch_kl(trainer.log(), engine.log())
    assert (per_token >= 0).all()
    exact = sum(p * math.log(p / q) for p, q in zip(engine.tolist(), trainer.tolist(), strict=True))
    assert float((engine * per_token).sum()) == pytest.approx(exact)
    assert mismatch_kl(OLD, OLD).tolist() == [0.0] * 5
