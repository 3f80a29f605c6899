from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest

from trainer.batches import padded_batches, step_batches


def taken(num_items, per_step, steps, seed=0, stream=0):
    return list(islice(step_batches(num_items, per_step, seed, stream), steps))


@pytest.mark.parametrize(("num_items", "per_step"), [(10, 4), (7, 7), (5, 3), (9, 1), (3, 2)])
def test_every_item_comes_once_per_epoch_and_never_twice_in_a_step(num_items, per_step):
    batches = taken(num_items, per_step, steps=num_items * 3)
    assert all(len(set(batch)) == len(batch) == per_step for batch in batches)
    assert set(Counter(item for batch in batches for item in batch).values()) == {3 * per_step}


def test_the_order_depends_on_seed_and_stream_alone():
    assert taken(20, 6, 9) == taken(20, 6, 9)
    assert taken(20, 6, 9) != taken(20, 6, 9, seed=1)
    assert taken(20, 6, 9) != taken(20, 6, 9, stream=1)


def test_a_step_larger_than_the_stock_takes_all_of_it_once():
    assert [sorted(batch) for batch in taken(3, 16, 2)] == [[0, 1, 2], [0, 1, 2]]


def test_nothing_to_take_gives_empty_steps():
    assert taken(0, 4, 2) == taken(5, 0, 2) == [[], []]


def test_padded_batches_keep_every_row_once_within_the_padded_budget():
    lengths = [5, 30, 7, 7, 12, 1, 29, 3, 16]
    passes = padded_batches(lengths, batch_tokens=32)
    assert sorted(row for rows in passes for row in rows) == list(range(9))
    assert all(max(lengths[i] for i in rows) * len(rows) <= 32 for rows in passes)
    assert passes == [[1], [6], [8, 4], [2, 3, 0, 7], [5]]


def test_a_row_longer_than_the_budget_goes_alone():
    assert padded_batches([4, 100, 4], batch_tokens=8) == [[1], [0, 2]]


def test_no_rows_need_no_pass():
    assert padded_batches([], batch_tokens=8) == []
