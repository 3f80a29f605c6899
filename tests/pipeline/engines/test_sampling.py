"""Tokens are drawn as the distribution says, and it is measured to the accuracy of float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.engines.sampling import BLOCK, DrawRule, draw, measure, noise

VOCABULARIES = [2, 100, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 4999]


def logits_of(rows: int, vocabulary: int, scale: float, seed: int = 0) -> torch.Tensor:
    return scale * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_a_uniform_picks_the_token_whose_share_of_the_mass_it_falls_in(vocabulary: int) -> None:
    logits = logits_of(400, vocabulary, 2.0)
    uniforms = torch.rand(400, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tokens = draw(logits, uniforms, DrawRule()).tokens
    cumulative = torch.softmax(logits.double(), dim=-1).cumsum(dim=-1)
    here = cumulative.gather(1, tokens[:, None])[:, 0]
    before = torch.where(tokens > 0, cumulative.gather(1, (tokens - 1).clamp(min=0)[:, None])[:, 0], 0.0)
    assert (before - 1e-6 <= uniforms).all()
    assert (uniforms <= here + 1e-6).all()


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-53])
def test_the_ends_of_the_unit_interval_pick_tokens_that_can_be_drawn(vocabulary: int, uniform: float) -> None:
    logits = torch.full((1, vocabulary), -torch.inf)
    allowed = sorted({vocabulary // 3, vocabulary - 1 - vocabulary // 4})
    logits[0, allowed] = 0.0
    drawn = draw(logits, torch.tensor([uniform], dtype=torch.float64), DrawRule())
    assert drawn.tokens.tolist() == [allowed[0] if uniform == 0.0 else allowed[-1]]
    assert drawn.entropies.tolist() == pytest.approx([np.log(len(allowed))], abs=1e-6)


def test_tokens_come_as_often_as_they_are_likely() -> None:
    logits = logits_of(1, 700, 2.0)
    uniforms = torch.from_numpy(noise(7, 40_000))
    tokens = draw(logits.repeat(40_000, 1), uniforms, DrawRule()).tokens
    expected = torch.softmax(logits[0].double(), dim=-1) * 40_000
    counts = torch.bincount(tokens, minlength=700).double()
    common = expected > 20
    # each count is about normal: squared deviations over their means average to 1
    assert float(((counts - expected) ** 2 / expected)[common].mean()) < 1.3


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("offset", [-300.0, 0.0, 300.0])
def test_entropies_and_logprobs_are_those_of_float64(scale: float, offset: float) -> None:
    logits = logits_of(50, 5000, scale) + offset
    before = logits.double()
    drawn = draw(logits, torch.from_numpy(noise(3, 50)), DrawRule())
    exact = torch.log_softmax(before, dim=-1)
    entropies = -(exact.exp() * exact).sum(dim=-1)
    np.testing.assert_allclose(drawn.entropies, entropies, atol=1e-4)
    np.testing.assert_allclose(drawn.logprobs, exact.gather(1, drawn.tokens[:, None])[:, 0], atol=1e-4)
    assert (drawn.entropies >= 0).all()


def test_entropies_over_fifty_thousand_tokens_are_of_float32s_accuracy() -> None:
    logits = logits_of(32, 49_152, 3.0)
    exact = torch.log_softmax(logits.double(), dim=-1)
    entropies = -(exact.exp() * exact).sum(dim=-1)
    np.testing.assert_allclose(measure(logits)[2], entropies, atol=5e-6)  # a matrix product of MKL: 1.3e-4


def test_entropy_is_of_the_distribution_that_was_asked_for() -> None:
    logits, uniforms = logits_of(20, 500, 2.0), torch.from_numpy(noise(5, 20))
    plain = draw(logits, uniforms, DrawRule(temperature=2.0, top_k=5))
    tempered = draw(logits, uniforms, DrawRule(2.0, top_k=5, entropy_kind="full_vocab_tempered"))
    assert plain.tokens.tolist() == tempered.tokens.tolist()
    np.testing.assert_allclose(plain.entropies, measure(logits)[2])
    np.testing.assert_allclose(tempered.entropies, measure(logits / 2.0)[2])
    np.testing.assert_allclose(plain.logprobs, tempered.logprobs)


def test_noise_is_a_matter_of_the_seed_alone() -> None:
    assert noise(4, 8).tolist() == noise(4, 16)[:8].tolist()
    assert noise(4, 8).tolist() != noise(5, 8).tolist()
    assert noise(2**63 - 1, 4).shape == (4,)


@pytest.mark.parametrize("vocabulary", [100, 1000, 1024, 151_936])
@pytest.mark.parametrize("rule", [DrawRule(), DrawRule(top_p=0.9), DrawRule(temperature=0.7, top_k=5)])
def test_a_row_of_nan_costs_no_other_and_has_a_log_prob_that_shows_it(
    vocabulary: int, rule: DrawRule
) -> None:
    logits = torch.zeros(2, vocabulary)
    logits[0] = torch.nan
    drawn = draw(logits, torch.tensor([0.5, 0.5], dtype=torch.float64), rule)
    assert ((drawn.tokens >= 0) & (drawn.tokens < vocabulary)).all()
    assert drawn.logprobs.isnan().tolist() == [True, False]
