"""The scorer on an NVIDIA GPU: `make test-gpu`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from scoring_helpers import ALL, arith_rollouts, by_place, differences, unscored

from pipeline import scoring
from pipeline.models import load_model, model_folder

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("dtype", "error", "limit"), [("float32", np.max, 1e-4), ("bfloat16", np.mean, 0.03)]
)
def test_two_thousand_tokens_in_the_lake_are_as_in_float64(put, policy, dtype, error, limit):
    lake, folder = put(arith_rollouts()), model_folder("arith")
    scoring.score(lake, load_model(folder, "cuda", dtype), policy)
    assert scoring.num_waiting(lake, policy) == 0
    of_logprobs, of_entropies = differences(load_model(folder, "cpu", "float32").double(), lake)
    assert len(of_entropies) >= 2000
    assert error(of_entropies) <= limit
    assert error(of_logprobs) <= limit


@pytest.fixture
def limit_memory() -> Iterator[Callable[[int], None]]:
    """Leaves so many bytes of the GPU's memory beside what torch has reserved when it is called."""

    def limit(spare_bytes: int) -> None:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + spare_bytes) / total)

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_passes_that_a_gpu_cannot_hold_are_halved_until_it_can(put, sampled, policy, hungry, limit_memory):
    lake, hungry = put(unscored(sampled)), hungry.to("cuda")
    expected = scoring.score(lake, hungry, policy)
    entropies = {place: row["completion_entropies"] for place, row in by_place(lake).items()}
    limit_memory(200 * 2**20)  # all at once take 400
    done = scoring.score(lake, hungry, replace(policy, weights_hash="again"), ALL, batch_tokens=1000)
    assert done.scored == expected.scored == 6
    assert done.batch_tokens in (500, 250, 125, 62)
    for place, row in by_place(lake).items():
        np.testing.assert_allclose(row["completion_entropies"], entropies[place], atol=1e-4)
