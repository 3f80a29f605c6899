from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.objective_config import UftConfig
from trainer.hints import draw_hint_tokens, hint_probability


def test_the_probability_falls_on_a_cosine_and_then_to_zero():
    options = UftConfig()
    assert hint_probability(0, options) == pytest.approx(0.95)
    assert hint_probability(100, options) == pytest.approx(0.05 + 0.45 * (1 + math.cos(math.pi / 3)))
    assert hint_probability(150, options) == pytest.approx(0.5)
    assert hint_probability(300, options) == pytest.approx(0.05)
    assert hint_probability(301, options) == 0.0
    assert hint_probability(1, UftConfig(hint_steps=0)) == 0.0


def test_a_hint_is_whole_chunks_as_often_as_the_binomial_says():
    options, rng = UftConfig(hint_start=0.3, hint_end=0.3), np.random.default_rng(0)
    drawn = [draw_hint_tokens(22, 7, options, rng) for _ in range(4000)]
    assert set(drawn) <= {0, 4, 8, 13, 17, 22}
    for chunks, tokens in ((0, 0), (1, 4), (2, 8)):
        share = math.comb(5, chunks) * 0.3**chunks * 0.7 ** (5 - chunks)
        assert drawn.count(tokens) / 4000 == pytest.approx(share, abs=0.03)


def test_the_same_generator_draws_the_same_hints():
    first, second = (
        [draw_hint_tokens(50, 9, UftConfig(), rng) for _ in range(20)]
        for rng in map(np.random.default_rng, (3, 3))
    )
    assert first == second


def test_short_solutions_have_as_many_chunks_as_tokens_and_late_steps_no_hint():
    whole = UftConfig(hint_start=1.0, hint_end=1.0)
    rng = np.random.default_rng(0)
    assert [draw_hint_tokens(n, 0, whole, rng) for n in (0, 1, 3, 12)] == [0, 1, 3, 12]
    assert [draw_hint_tokens(n, 301, whole, rng) for n in (0, 1, 3, 12)] == [0, 0, 0, 0]
