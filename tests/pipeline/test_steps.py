"""Where steps end and how uncertain they are; the golden splitting cases are in test_golden.py."""

from __future__ import annotations

import os
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.steps import mean_step_entropies, step_ends

# White space that Python knows and SQL's \\s may not, and what may stand around it in one token.
TEXTS = st.one_of(
    st.sampled_from(["\n", "\n\n", ".\n", "a\nb", "\nx", "<s>", ""]),
    st.text("ab. \n\t\r\u00a0\u2028\x1c", max_size=4),
)


def ends_by_the_rules(texts: list[str], special: set[int]) -> list[int]:
    """DESIGN.md's rule, gap by gap."""

    def content(i: int) -> bool:
        return i not in special and not (texts[i] == "" or texts[i].isspace())

    contents, ends = [i for i in range(len(texts)) if content(i)], []
    for i, k in pairwise(contents):
        tail = texts[i][len(texts[i].rstrip()) :]
        in_gap = {i: tail} | {j: "" if j in special else texts[j] for j in range(i + 1, k)}
        holders = [j for j, text in in_gap.items() if "\n" in text]
        if holders:
            ends.append(max(holders) + 1)
        elif "\n" in texts[k][: len(texts[k]) - len(texts[k].lstrip())]:
            ends.append(k)
    return [*ends, len(texts)] if texts else []


@settings(deadline=None, derandomize=bool(os.environ.get("CI")), max_examples=500)
@given(texts=st.lists(TEXTS, max_size=15), special=st.sets(st.integers(0, 14), max_size=2))
def test_steps_end_where_the_rules_say(texts: list[str], special: set[int]) -> None:
    special = {i for i, text in enumerate(texts) if text == "<s>" or i in special}
    ends = step_ends(texts, special)
    assert ends == ends_by_the_rules(texts, special)
    assert all(a < b for a, b in pairwise(ends))
    assert ends[-1:] == ([len(texts)] if texts else [])


def test_another_delimiter_splits_instead_of_the_newline() -> None:
    assert step_ends(["a ", "b\n", "; ", "c"], delimiter=";") == [4]
    assert step_ends(["a ", "b\n", " ", "c"], delimiter=" ") == [1, 3, 4]


def test_mean_step_entropies_are_those_of_a_plain_loop() -> None:
    draw = np.random.default_rng(5)
    entropies, ends, rows, expected, start = [], [], [], [], 0
    for _ in range(200):
        num_tokens = int(draw.integers(0, 30))
        values = draw.gamma(0.4, 0.5, num_tokens).astype(np.float32)
        cuts = sorted({*draw.integers(1, num_tokens + 1, 3).tolist(), num_tokens}) if num_tokens else []
        begin = 0
        for end in cuts:
            expected.append(np.float32(sum(float(v) for v in values[begin:end]) / (end - begin)))
            begin = end
        entropies.append(values)
        ends += cuts
        rows += [start] * len(cuts)
        start += num_tokens
    found = mean_step_entropies(np.concatenate(entropies), np.int32(ends), np.int64(rows))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_long_steps_lose_no_digits() -> None:
    entropies = np.full(2**24 + 100, 0.1, dtype=np.float32)
    (mean,) = mean_step_entropies(entropies, np.int32([len(entropies)]), np.int64([0]))
    assert mean == np.float32(0.1)


def test_no_steps_have_no_entropies() -> None:
    assert (
        len(mean_step_entropies(np.empty(0, np.float32), np.empty(0, np.int32), np.empty(0, np.int64))) == 0
    )
