"""vLLM engines with settings of their own, in this process: exact numbers in every awkward schedule."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import (
    arith_prompts,
    differences,
    requests_of,
)
from transformers import PreTrainedModel
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm_engines import EXACT, TOKENIZER, opened, preemptions, sampled

from pipeline.config import EngineConfig, SamplingConfig
from pipeline.engines import vllm_start
from pipeline.errors import EngineError
from pipeline.prompts import prompt_messages_ids
from pipeline.records import Group, Prompt


class NaiveTap(LogitsProcessor):
    """What one would write first: a number for each row that passes, kept with the request in that row."""

    def __init__(self, *_: Any) -> None:
        self.rows: dict[int, str] = {}
        self.counts: dict[str, int] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        if batch_update is not None:
            for slot, params, _, _ in batch_update.added:
                self.rows[slot] = params.extra_args["echomine"]["key"]
            self.rows = {slot: key for slot, key in self.rows.items() if slot not in batch_update.removed}
            for source, target, _ in batch_update.moved:
                if source in self.rows:
                    self.rows[target] = self.rows.pop(source)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for key in self.rows.values():
            self.counts[key] = self.counts.get(key, 0) + 1
        return logits


def long_prompts(count: int) -> list[Prompt]:
    """Sums so long that their completions soon need a second block of the cache."""
    return [
        Prompt(({"role": "user", "content": "+".join(["7"] * 50 + [str(i)])},)) for i in range(10, count + 10)
    ]


def test_entropies_are_exact_while_prompts_are_read_in_pieces_and_requests_preempted(
    exact: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = vllm_start._arguments

    def with_naive_tap(folder: Path, config: EngineConfig) -> dict[str, Any]:
        found = arguments(folder, config)
        return found | {"logits_processors": [*found["logits_processors"], NaiveTap], "max_model_len": 256}

    monkeypatch.setattr(vllm_start, "_arguments", with_naive_tap)
    sampling = SamplingConfig(max_tokens=96, temperature=1.5)
    few = requests_of(long_prompts(1), group_size=2)
    requests = requests_of([*long_prompts(8), *arith_prompts(8)], group_size=6)
    with opened(max_num_seqs=8, max_num_batched_tokens=24, kv_cache_gib=0.0075) as engine:
        core = engine._cores[0]._engine.engine_core.engine_core
        preempted = preemptions(engine, monkeypatch)
        processors = core.model_executor.driver_worker.worker.model_runner.input_batch.logitsprocs.all
        naive = next(one for one in processors if isinstance(one, NaiveTap))
        in_pieces = sampled(engine, few, sampling)
        counted_in_pieces, preempted_in_pieces = sum(naive.counts.values()), len(preempted)
        groups = sampled(engine, requests, sampling)
    of_logprobs, of_entropies = differences(exact, groups)
    assert len(of_entropies) >= 2_000
    assert of_entropies.max() <= EXACT
    assert of_logprobs.max() <= EXACT
    # the traps were there: prompts in pieces alone make the counting of rows wrong, and then requests were
    # preempted, too
    assert preempted_in_pieces == 0
    assert counted_in_pieces > num_tokens(in_pieces)
    assert len(preempted) >= 3
    assert sum(naive.counts.values()) - counted_in_pieces > num_tokens(groups)


def num_tokens(groups: Sequence[Group]) -> int:
    return sum(len(sample.completion_ids) for group in groups for sample in group.samples)


def test_tempered_entropies_are_those_of_the_tempered_distribution(exact: PreTrainedModel) -> None:
    sampling = SamplingConfig(max_tokens=32, temperature=0.5)
    requests = requests_of(arith_prompts(6), group_size=4)
    with opened(entropy_kind="full_vocab_tempered") as engine:
        assert engine.entropy_kind == "full_vocab_tempered"
        groups = sampled(engine, requests, sampling)
    assert differences(exact, groups, temperature=0.5)[1].max() <= EXACT


def test_with_vllms_own_sampler_the_tap_measures_and_vllm_tells_the_logprobs(exact: PreTrainedModel) -> None:
    sampling = SamplingConfig(max_tokens=48)
    requests = requests_of(arith_prompts(8), group_size=4)
    with opened(sampler="vllm", max_num_batched_tokens=24) as engine:
        groups = sampled(engine, requests, sampling)
    of_logprobs, of_entropies = differences(exact, groups)
    assert max(of_entropies.max(), of_logprobs.max()) <= EXACT


@pytest.mark.parametrize("head_dtype", ["float32", "model"])
def test_bfloat16_stays_near_and_the_output_layer_has_the_type_that_was_asked_for(
    exact: PreTrainedModel, head_dtype: str
) -> None:
    sampling = SamplingConfig(max_tokens=64)
    requests = requests_of(arith_prompts(24), group_size=4)
    with opened(dtype="bfloat16", head_dtype=head_dtype) as engine:
        core = engine._cores[0]._engine.engine_core.engine_core
        model = core.model_executor.driver_worker.worker.model_runner.get_model()
        hidden = torch.ones(1, exact.config.hidden_size, dtype=torch.bfloat16)
        logits = model.compute_logits(hidden).float()
        groups = sampled(engine, requests, sampling)
    of_entropies = differences(exact, groups)[1]
    assert len(of_entropies) >= 2_000
    assert of_entropies.mean() <= 0.03
    assert of_entropies.max() > EXACT  # it did run in bfloat16
    assert torch.equal(logits, logits.bfloat16().float()) == (head_dtype == "model")


def test_a_seed_of_vllms_own_with_prompts_in_pieces_kills_a_cpu_engine() -> None:
    """The trap that noise of our own avoids; if this fails, vLLM has mended it."""
    with opened(max_num_seqs=2, max_num_batched_tokens=4) as engine:
        llm = engine._cores[0]._engine
        ids = prompt_messages_ids(TOKENIZER, arith_prompts(1)[0].messages).tolist() * 3
        llm.add_request("a", {"type": "token", "prompt_token_ids": ids}, SamplingParams(seed=1, max_tokens=4))
        with pytest.raises(RuntimeError, match="does not use offset"):
            _run(llm)


def _run(llm: Any) -> None:
    while llm.has_unfinished_requests():
        llm.step()


def test_memory_that_is_not_there_names_the_setting_to_lower() -> None:
    with (
        pytest.raises(EngineError, match=r"lower engine\.vllm\.kv_cache_gib") as error,
        opened(kv_cache_gib=9e4),
    ):
        pass
    assert "\n" not in str(error.value)
    with pytest.raises(EngineError, match=r"engine\.vllm\.max_model_len"), opened(kv_cache_gib=1e-3):
        pass


@pytest.mark.parametrize(
    ("installed", "line"),
    [("0.99.0", r"vLLM 0\.99\.0 is outside .*0\.32.*Install one of these"), (None, "vLLM is not installed")],
)
def test_a_version_that_was_not_tested_is_named_with_the_range_and_starts_nothing(
    monkeypatch: pytest.MonkeyPatch, installed: str | None, line: str
) -> None:
    monkeypatch.setattr(vllm_start, "installed_version", lambda: installed)
    monkeypatch.setattr(vllm_start, "_environment", pytest.fail)
    with pytest.raises(EngineError, match=line), opened(in_process=False):
        pass
