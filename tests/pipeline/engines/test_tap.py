"""The tap keeps one measurement a position, whoever asks how often and in what order."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.engines.sampling import DrawRule, draw, measure, noise
from pipeline.engines.tap import EntropyTap, Measured, TapRequest

V = 300


def request(key: str, max_tokens: int = 8, draws: bool = True, **rule: float) -> TapRequest:
    return TapRequest(key, sum(key.encode()), max_tokens, DrawRule(**rule), draws)


def rows_of(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, V, generator=torch.Generator().manual_seed(seed)) * 2


def taken(tap: EntropyTap, key: str) -> Measured:
    return Measured.from_bytes(tap.take([key])[key])


def expected(one: TapRequest, logits: torch.Tensor) -> list[int]:
    """The tokens of a request alone whose logits at each position are these rows."""
    uniforms = torch.from_numpy(noise(one.seed, one.max_tokens))[: len(logits)]
    return draw(logits.clone(), uniforms, one.rule).tokens.tolist()


def test_what_a_request_says_travels_as_plain_values() -> None:
    one = request("a", temperature=0.7, top_p=0.9)
    assert TapRequest.of(one.as_arguments()) == one
    assert TapRequest.of(None) is TapRequest.of({}) is TapRequest.of({"other": 1}) is None


def test_tokens_logprobs_and_entropies_are_kept_by_position() -> None:
    tap, one = EntropyTap(), request("a")
    tapped, logits = tap.open(one), rows_of(3)
    for position in range(3):
        row = logits[position : position + 1].clone()
        tap.apply(row, [(0, tapped, position)])
        assert row.argmax().item() == expected(one, logits)[position]
    found = taken(tap, "a")
    assert found.tokens.tolist() == expected(one, logits)
    exact = torch.log_softmax(logits, dim=-1)
    np.testing.assert_allclose(found.logprobs, exact[range(3), found.tokens], atol=1e-5)
    np.testing.assert_allclose(found.entropies, measure(logits)[2], atol=1e-6)


@pytest.mark.parametrize("vocabulary", [100, 1000])
@pytest.mark.parametrize("rule", [{"top_k": 3}, {"top_p": 0.5}])
def test_noise_just_below_one_draws_a_token_that_may_be_drawn(
    vocabulary: int, rule: dict[str, float]
) -> None:
    tap, logits = EntropyTap(), torch.full((1, vocabulary), -1.0)
    logits[0, 3:6] = 5.0
    tapped = tap.open(request("a", **rule))
    tapped.noise[0] = 1 - 2**-40  # as float32 it would be 1
    tap.apply(logits, [(0, tapped, 0)])
    assert taken(tap, "a").tokens[0] in (3, 4, 5)


def test_a_row_computed_again_counts_once_and_the_last_one_stands() -> None:
    tap, one = EntropyTap(), request("a")
    tapped, logits = tap.open(one), rows_of(2)
    for position, row in [(0, rows_of(1, seed=9)), (0, logits[:1]), (1, rows_of(1, seed=8)), (1, logits[1:])]:
        tap.apply(row.clone(), [(0, tapped, position)])
    assert taken(tap, "a").tokens.tolist() == expected(one, logits)


def test_positions_that_no_token_stands_in_are_passed_over() -> None:
    tap, one = EntropyTap(), request("a", max_tokens=2)
    tapped, logits = tap.open(one), rows_of(4)
    before = logits.clone()
    tap.apply(logits, [(0, tapped, -3), (1, tapped, 0), (2, tapped, 1), (3, tapped, 2)])
    assert torch.equal(logits[[0, 3]], before[[0, 3]])
    assert not torch.equal(logits[[1, 2]], before[[1, 2]])
    assert len(taken(tap, "a").tokens) == 2


def test_rows_of_others_are_left_alone() -> None:
    tap, logits = EntropyTap(), rows_of(3)
    before = logits.clone()
    tap.apply(logits, [(1, tap.open(request("a")), 0)])
    assert torch.equal(logits[[0, 2]], before[[0, 2]])
    tap.apply(before, [])


def test_requests_of_different_rules_share_a_batch() -> None:
    tap = EntropyTap()
    ones = [request("a"), request("b", temperature=0.5), request("c", draws=False), request("d", top_k=1)]
    logits = rows_of(1).expand(4, -1).clone()
    before = logits.clone()
    tap.apply(logits, [(row, tap.open(one), 0) for row, one in enumerate(ones)])
    assert torch.equal(logits[2], before[2])  # only measured
    for row, one in enumerate(ones):
        found = taken(tap, one.key)
        assert found.entropies.tolist() == pytest.approx(measure(before[:1])[2].tolist(), abs=1e-6)
        assert found.tokens.tolist() == (expected(one, before[row : row + 1]) if one.draws else [-1])
        assert np.isnan(found.logprobs).all() == (not one.draws)


def test_a_request_that_comes_back_finds_what_it_had() -> None:
    tap, one = EntropyTap(), request("a")
    tap.apply(rows_of(1), [(0, tap.open(one), 0)])
    assert tap.open(one) is tap.open(one)
    tap.apply(rows_of(1, seed=2), [(0, tap.open(one), 1)])
    assert taken(tap, "a").tokens.tolist() == expected(one, torch.cat([rows_of(1), rows_of(1, seed=2)]))


def test_a_position_that_was_never_measured_shows_as_nan() -> None:
    tap = EntropyTap()
    tap.apply(rows_of(1), [(0, tap.open(request("a")), 2)])
    found = taken(tap, "a")
    assert np.isnan(found.entropies).tolist() == [True, True, False]


def test_what_was_taken_or_forgotten_is_not_held() -> None:
    tap = EntropyTap()
    for key in "abc":
        tap.apply(rows_of(1), [(0, tap.open(request(key)), 0)])
    assert len(tap) == 3
    assert set(tap.take(["a", "unknown"])) == {"a"}
    tap.forget(["b", "unknown"])
    assert len(tap) == 1
    assert tap.take(["a", "b"]) == {}


def test_one_value_a_row_waits_on_the_device_and_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.engines.tap.PENDING_ROWS", 16)
    tap = EntropyTap()
    tapped = tap.open(request("a", max_tokens=100))
    for position in range(100):
        tap.apply(rows_of(1, seed=position), [(0, tapped, position)])
        assert sum(values.numel() for values in tap._pending) < 3 * 16
    assert tapped.num_tokens == 96
    assert not np.isnan(tapped.rows["entropy"][:96]).any()
