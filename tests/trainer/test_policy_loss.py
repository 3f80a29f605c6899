"""Whole objectives against their formulas, written out as loops over plain numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.objective_config import ObjectiveConfig
from trainer.policy_loss import BatchCounts, PolicyTokens, needs_entropy_gradient, policy_loss

OBJECTIVES = ["grpo", "dapo", "dr_grpo", "gspo", "luffy", "uft"]
LENGTHS = [3, 2, 0, 4]
EXPERTS = [False, True, False, False]
HINTS = [1, 2, 0, 1]
ADVANTAGES = [0.75, -0.25, 1.5, -1.25]
MAX_TOKENS = 6


def tokens_of(**more):
    """Four rows of 3, 2, 0 and 4 random tokens; some ratios lie outside any clip range."""
    random = torch.Generator().manual_seed(0)
    count = sum(LENGTHS)
    drawn = -torch.rand(count, generator=random, dtype=torch.float64) - 0.2
    old = drawn + 0.4 * torch.randn(count, generator=random, dtype=torch.float64)
    sampler = old + 0.4 * torch.randn(count, generator=random, dtype=torch.float64)
    entropies = torch.rand(count, generator=random, dtype=torch.float64)
    given = {"sampler_logprobs": sampler} | more
    return PolicyTokens(
        drawn.requires_grad_(),
        old,
        entropies.requires_grad_(),
        torch.tensor(ADVANTAGES),
        torch.tensor(LENGTHS),
        **given,
    )


def rows_of(values):
    """[N] as a list of each row's values."""
    numbers, rows, start = values.tolist(), [], 0
    for length in LENGTHS:
        rows.append(numbers[start : start + length])
        start += length
    return rows


def counts_of(tokens):
    hints = 0 if tokens.hint_lengths is None else int(tokens.hint_lengths.sum())
    return BatchCounts(len(LENGTHS), sum(LENGTHS) - hints, MAX_TOKENS, hints)


def clipped_loss(ratio, advantage, low, high):
    return -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


def row_of(tokens, index):
    """The micro-batch that holds one row alone."""
    starts = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
    span = slice(starts[index], starts[index] + LENGTHS[index])
    values = {}
    for name in ("logprobs", "old_logprobs", "entropies", "sampler_logprobs"):
        values[name] = getattr(tokens, name)[span]
    for name in ("advantages", "lengths", "is_expert", "hint_lengths"):
        per_row = getattr(tokens, name)
        values[name] = None if per_row is None else per_row[index : index + 1]
    return replace(tokens, **values)


def gradients_of(loss, tokens):
    inputs = (tokens.logprobs, tokens.entropies)
    return [
        torch.zeros_like(given) if grad is None else grad
        for given, grad in zip(inputs, torch.autograd.grad(loss, inputs, allow_unused=True), strict=True)
    ]


def extras(objective):
    if objective == "luffy":
        return {"is_expert": torch.tensor(EXPERTS)}
    return {"hint_lengths": torch.tensor(HINTS)} if objective == "uft" else {}


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("norm_tokens", [None, 50])
def test_luffy_is_its_formula_with_and_without_a_clip_of_the_policys_own_tokens(clip, norm_tokens):
    tokens = tokens_of(is_expert=torch.tensor(EXPERTS))
    options = {"clip_low": clip, "clip_high": clip, "norm_tokens": norm_tokens, "shaping_gamma": 0.3}
    loss, _ = policy_loss(ObjectiveConfig(objective="luffy", luffy=options), tokens, counts_of(tokens))
    total = 0.0
    for new, old, advantage, expert in zip(
        rows_of(tokens.logprobs), rows_of(tokens.old_logprobs), ADVANTAGES, EXPERTS, strict=True
    ):
        for logprob, old_logprob in zip(new, old, strict=True):
            if expert:
                total += -math.exp(logprob) / (math.exp(logprob) + 0.3) * advantage
            elif clip is None:
                total += -math.exp(logprob - old_logprob) * advantage
            else:
                total += clipped_loss(math.exp(logprob - old_logprob), advantage, clip, clip)
    entropy = sum(tokens.entropies.tolist()) / 9
    assert loss.item() == pytest.approx(total / (4 * (norm_tokens or MAX_TOKENS)) - 0.001 * entropy, rel=1e-6)


def test_uft_is_its_formula():
    tokens = tokens_of(hint_lengths=torch.tensor(HINTS))
    options = {"sft_weight": 0.7, "entropy_weight": 0.3}
    loss, figures = policy_loss(ObjectiveConfig(objective="uft", uft=options), tokens, counts_of(tokens))
    policy = entropy = nll = 0.0
    for new, old, own, advantage, hint in zip(
        rows_of(tokens.logprobs),
        rows_of(tokens.old_logprobs),
        rows_of(tokens.entropies),
        ADVANTAGES,
        HINTS,
        strict=True,
    ):
        nll -= sum(new[:hint])
        entropy += sum(own[hint:])
        of_row = [
            clipped_loss(math.exp(a - b), advantage, 0.2, 0.2)
            for a, b in zip(new[hint:], old[hint:], strict=True)
        ]
        policy += sum(of_row) / len(of_row) if of_row else 0.0
    assert loss.item() == pytest.approx(policy / 4 - 0.3 * entropy / 5 + 0.7 * nll / 4, rel=1e-6)
    assert int(figures.num_tokens) == 5


@pytest.mark.parametrize("correction", ["none", "truncated", "sequence_mask", "token_mask"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_micro_batches_add_up_to_the_batchs_loss_gradient_and_figures(objective, correction):
    config = ObjectiveConfig(objective=objective, correction=correction)
    tokens = tokens_of(**extras(objective))
    counts = counts_of(tokens)
    loss, figures = policy_loss(config, tokens, counts)
    parts = [policy_loss(config, row_of(tokens, i), counts) for i in range(len(LENGTHS))]
    summed = sum(part for part, _ in parts)
    assert summed.item() == pytest.approx(loss.item(), rel=1e-12)
    for whole, cut in zip(gradients_of(loss, tokens), gradients_of(summed, tokens), strict=True):
        torch.testing.assert_close(cut, whole, rtol=1e-12, atol=1e-15)
    total = parts[0][1] + parts[1][1] + parts[2][1] + parts[3][1]
    assert total.ratio_mean == pytest.approx(figures.ratio_mean, rel=1e-12)
    assert total.mismatch_kl == pytest.approx(figures.mismatch_kl, rel=1e-12)
    assert total.clip_share == figures.clip_share


def test_what_stands_at_expert_tokens_as_old_or_sampler_reaches_neither_loss_nor_gradient():
    config = ObjectiveConfig(objective="luffy", correction="sequence_mask")
    results = []
    for filler in (0.0, -math.inf, math.nan):
        tokens = tokens_of(is_expert=torch.tensor(EXPERTS))
        tokens.old_logprobs[3:5] = filler
        tokens.sampler_logprobs[3:5] = filler
        loss, figures = policy_loss(config, tokens, counts_of(tokens))
        results.append((loss.item(), gradients_of(loss, tokens)[0].tolist(), figures.mismatch_kl))
    assert results[0] == results[1] == results[2]
    assert all(math.isfinite(value) for value in results[0][1])
    assert all(value != 0 for value in results[0][1][3:5])


def test_figures_by_hand():
    # Ratios 2, 1 and 0.5; the engine was twice as sure of the first token as the policy is.
    logprobs = torch.tensor([0.2, 0.5, 0.25], dtype=torch.float64).log()
    old = torch.tensor([0.1, 0.5, 0.5], dtype=torch.float64).log()
    sampler = torch.tensor([0.4, 0.5, 0.25], dtype=torch.float64).log()
    tokens = PolicyTokens(
        logprobs,
        old,
        torch.zeros(3),
        torch.tensor([1.0, 1.0]),
        torch.tensor([1, 2]),
        sampler_logprobs=sampler,
    )
    _, figures = policy_loss(ObjectiveConfig(), tokens, BatchCounts(2, 3, MAX_TOKENS))
    assert figures.clip_share == pytest.approx(1 / 3)
    assert figures.ratio_mean == pytest.approx(3.5 / 3)
    assert figures.mismatch_kl == pytest.approx((0.5 - 1 + math.log(2)) / 3)
    unknown = replace(tokens, sampler_logprobs=None)
    assert policy_loss(ObjectiveConfig(), unknown, BatchCounts(2, 3, MAX_TOKENS))[1].mismatch_kl is None


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_zero_advantages_give_exactly_no_gradient_but_those_of_bonus_and_hints(objective):
    tokens = tokens_of(**extras(objective))
    tokens = replace(tokens, advantages=torch.zeros(4))
    bonus = {"uft": {"entropy_weight": 0.0, "sft_weight": 0.0}, "luffy": {"entropy_weight": 0.0}}
    config = ObjectiveConfig(objective=objective, **{k: v for k, v in bonus.items() if k == objective})
    loss, _ = policy_loss(config, tokens, counts_of(tokens))
    assert loss.item() == 0.0
    assert all(torch.count_nonzero(gradient) == 0 for gradient in gradients_of(loss, tokens))
    assert not needs_entropy_gradient(config)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_entropy_bonus_is_differentiated_where_the_objective_has_one(objective):
    config, tokens = ObjectiveConfig(objective=objective), tokens_of()
    assert needs_entropy_gradient(config) == (objective in ("luffy", "uft"))
    loss, _ = policy_loss(config, tokens, counts_of(tokens))
    expected = -0.001 / 9 if needs_entropy_gradient(config) else 0.0
    assert gradients_of(loss, tokens)[1].tolist() == pytest.approx([expected] * 9)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_batch_without_tokens_has_a_loss_of_zero_and_no_figures(objective):
    empty = torch.zeros(0, requires_grad=True)
    rows = torch.zeros(2, dtype=torch.int64)
    tokens = PolicyTokens(empty, torch.zeros(0), empty, torch.ones(2), rows, sampler_logprobs=torch.zeros(0))
    config = ObjectiveConfig(objective=objective, correction="sequence_mask")
    loss, figures = policy_loss(config, tokens, BatchCounts(2, 0, MAX_TOKENS))
    assert loss.item() == 0.0
    assert (figures.clip_share, figures.ratio_mean, figures.mismatch_kl) == (None, None, None)


def test_a_correction_without_the_engines_log_probs_is_refused():
    config, tokens = ObjectiveConfig(correction="truncated"), tokens_of(sampler_logprobs=None)
    with pytest.raises(ConfigError, match=r"train\.correction is truncated, but the engine's log-probs"):
        policy_loss(config, tokens, counts_of(tokens))


@pytest.mark.parametrize(("objective", "owner"), [("grpo", "luffy"), ("luffy", "uft")])
def test_rows_of_another_objective_are_refused(objective, owner):
    tokens = tokens_of(**extras(owner))
    with pytest.raises(ValueError, match=f"the objective is {objective}"):
        policy_loss(ObjectiveConfig(objective=objective), tokens, counts_of(tokens))
