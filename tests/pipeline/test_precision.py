"""Rounding what is stored: as near as the bits allow, and never another sign."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.precision import rounded


@pytest.mark.parametrize("bits", [1, 7, 10, 22])
def test_no_float_moves_by_more_than_half_of_its_last_bit(bits: int) -> None:
    random = np.random.default_rng(0)
    values = np.exp(random.normal(-2, 6, 100_000)).astype(np.float32) * random.choice([-1, 1], 100_000)
    values = values.astype(np.float32)
    found = rounded(values, bits).astype(np.float64)
    assert (np.abs(found - values) <= 2.0 ** -(bits + 1) * np.abs(values)).all()
    mantissas = rounded(values, bits).view(np.uint32) & ((1 << 23) - 1)
    assert (mantissas % (1 << (23 - bits)) == 0).all()
    assert (np.abs(found - values) > 2.0 ** -(bits + 2) * np.abs(values)).any(), "and by no less than it must"


def test_ten_bits_are_those_of_half_precision() -> None:
    values = np.random.default_rng(1).uniform(0.01, 10, 100_000).astype(np.float32)
    assert (rounded(values, 10) == values.astype(np.float16).astype(np.float32)).all()


def test_zeros_and_all_bits_stay_as_they_are() -> None:
    values = np.array([0.0, -0.0, 1e-45, 0.1], np.float32)
    assert rounded(values[:2], 10).view(np.uint32).tolist() == values[:2].view(np.uint32).tolist()
    assert rounded(values, 23) is values
