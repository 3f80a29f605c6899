"""The transformers engine samples what the model says, and measures it exactly."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from float64_reference import entropies, next_token_logprobs, sampled_tokens_logprobs
from reference import differences
from transformers import PreTrainedModel

from pipeline.config import SamplingConfig
from pipeline.engines.base import GroupRequest, UpdatableEngine, check_sample
from pipeline.engines.transformers import TransformersEngine
from pipeline.errors import EngineError, PromptError
from pipeline.models import load_model
from pipeline.prompts import prompt_messages_ids, read_prompts
from pipeline.records import Group, Prompt, Sample
from pipeline.tokenization import load_tokenizer

ARITH = Path(__file__).parents[3] / "data" / "arith"
SAMPLING = SamplingConfig(max_tokens=24)


@dataclass(frozen=True)
class Arith:
    engine: TransformersEngine
    prompts: list[Prompt]
    exact: PreTrainedModel

    def sampled(self, *requests: GroupRequest, sampling: SamplingConfig = SAMPLING) -> list[Group]:
        """The groups in the order of their requests."""
        groups = list(self.engine.generate(requests, sampling))
        assert len(groups) == len(requests)
        return [next(g for g in groups if g.prompt is request.prompt) for request in requests]

    def reference(self, group: Group, sample: Sample, temperature: float = 1.0) -> torch.Tensor:
        """[T, V] float64 log-probs of the next token at each of the completion's positions."""
        return next_token_logprobs(self.exact, group.prompt_ids, sample.completion_ids, temperature)


@pytest.fixture(scope="module")
def arith(exact: PreTrainedModel) -> Iterator[Arith]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(ARITH / "model")
    engine = TransformersEngine(load_model(ARITH / "model", "cpu"), tokenizer)
    yield Arith(engine, read_prompts(str(ARITH / "prompts.jsonl"), 8), exact)
    torch.set_num_threads(threads)


def ids_of(group: Group) -> list[list[int]]:
    return [sample.completion_ids.tolist() for sample in group.samples]


def test_entropies_and_logprobs_are_those_of_the_whole_vocabulary(arith: Arith) -> None:
    # prompts of different lengths: padding must not be seen
    requests = [
        GroupRequest(prompt, (1, 2, 3)) for prompt in sorted(arith.prompts, key=lambda p: len(p.text))
    ]
    groups = arith.sampled(requests[0], requests[-1])
    for group in groups:
        assert (
            group.prompt_ids.tolist()
            == prompt_messages_ids(arith.engine.tokenizer, group.prompt.messages).tolist()
        )
        for sample in group.samples:
            expected = arith.reference(group, sample)
            chosen = sampled_tokens_logprobs(expected, sample.completion_ids)
            np.testing.assert_allclose(sample.entropies, entropies(expected), atol=1e-4)
            np.testing.assert_allclose(sample.logprobs, chosen, atol=1e-4)


def test_every_token_has_a_finite_entropy_within_its_bounds(arith: Arith) -> None:
    (group,) = arith.sampled(GroupRequest(arith.prompts[0], tuple(range(16))))
    limit = math.log(arith.engine.model.config.vocab_size) + 1e-5
    assert [sample.sample_index for sample in group.samples] == list(range(16))
    assert [sample.seed for sample in group.samples] == list(range(16))
    for sample in group.samples:
        assert len(sample.completion_ids) == len(sample.entropies) == len(sample.logprobs)
        assert 1 <= len(sample.completion_ids) <= SAMPLING.max_tokens
        assert ((sample.entropies >= 0) & (sample.entropies <= limit)).all()
        assert (np.isfinite(sample.logprobs) & (sample.logprobs <= 0)).all()


def test_the_same_seeds_draw_the_same_tokens_and_others_differ(arith: Arith) -> None:
    requests = [GroupRequest(prompt, (4, 5, 6, 7)) for prompt in arith.prompts[:3]]
    hot = SamplingConfig(max_tokens=24, temperature=2.0)
    first, again = arith.sampled(*requests, sampling=hot), arith.sampled(*requests, sampling=hot)
    assert [ids_of(group) for group in first] == [ids_of(group) for group in again]
    assert len({tuple(ids) for group in first for ids in ids_of(group)}) == 12
    (twins,) = arith.sampled(GroupRequest(arith.prompts[0], (9, 9, 8)), sampling=hot)
    assert ids_of(twins)[0] == ids_of(twins)[1] != ids_of(twins)[2]


def test_a_samples_noise_does_not_depend_on_who_else_is_in_the_batch(arith: Arith) -> None:
    requests = [GroupRequest(prompt, (11, 12)) for prompt in arith.prompts[:4]]
    together = arith.sampled(*requests)
    for request, group in zip(requests, together, strict=True):
        (alone,) = arith.sampled(request)
        assert ids_of(alone) == ids_of(group)


def test_top_k_of_one_is_greedy(arith: Arith) -> None:
    greedy = SamplingConfig(max_tokens=12, top_k=1, temperature=1.7)
    (group,) = arith.sampled(GroupRequest(arith.prompts[0], (1, 2, 3)), sampling=greedy)
    assert ids_of(group)[0] == ids_of(group)[1] == ids_of(group)[2]
    expected = arith.reference(group, group.samples[0]).argmax(-1).tolist()
    assert group.samples[0].completion_ids.tolist() == expected
    low = SamplingConfig(max_tokens=12, temperature=1e-4)
    assert ids_of(arith.sampled(GroupRequest(arith.prompts[0], (5,)), sampling=low)[0])[0] == expected


@pytest.mark.parametrize("mass", [0.5, 0.9])
def test_top_p_samples_from_the_smallest_set_of_that_mass(arith: Arith, mass: float) -> None:
    nucleus = SamplingConfig(max_tokens=12, top_p=mass, temperature=3.0)
    (group,) = arith.sampled(GroupRequest(arith.prompts[1], tuple(range(12))), sampling=nucleus)
    for sample in group.samples:
        tempered = arith.reference(group, sample, temperature=3.0).exp()
        for token, row in zip(sample.completion_ids.tolist(), tempered, strict=True):
            assert float(row[row > row[token]].sum()) < mass + 1e-5


def test_a_higher_temperature_flattens_what_is_sampled_and_not_what_is_measured(arith: Arith) -> None:
    hot = SamplingConfig(max_tokens=12, temperature=2.5)
    request = GroupRequest(arith.prompts[0], tuple(range(4)))
    (group,) = arith.sampled(request, sampling=hot)
    raw = arith.reference(group, group.samples[0])
    np.testing.assert_allclose(group.samples[0].entropies, entropies(raw), atol=1e-4)
    tempered_engine = TransformersEngine(arith.engine.model, arith.engine.tokenizer, "full_vocab_tempered")
    (same,) = list(tempered_engine.generate([request], hot))
    assert ids_of(same) == ids_of(group)
    tempered = arith.reference(group, group.samples[0], temperature=2.5)
    np.testing.assert_allclose(same.samples[0].entropies, entropies(tempered), atol=1e-4)
    np.testing.assert_allclose(same.samples[0].logprobs, group.samples[0].logprobs, atol=1e-6)


def test_a_completion_stops_with_its_end_token_or_is_cut_off(arith: Arith) -> None:
    long = SamplingConfig(max_tokens=128)
    end = arith.engine.tokenizer.eos_token_id
    (group,) = arith.sampled(GroupRequest(arith.prompts[0], tuple(range(8))), sampling=long)
    (cut,) = arith.sampled(GroupRequest(arith.prompts[0], (1, 2)), sampling=SamplingConfig(max_tokens=2))
    assert {sample.finish_reason for sample in cut.samples} == {"length"}
    assert {sample.finish_reason for sample in group.samples} >= {"stop"}
    for sample in (*group.samples, *cut.samples):
        assert (sample.completion_ids[-1] == end) == (sample.finish_reason == "stop")
        assert end not in sample.completion_ids[:-1]


def test_a_prompt_that_leaves_no_room_is_refused_by_name(arith: Arith) -> None:
    room = arith.engine.model.config.max_position_embeddings
    with pytest.raises(PromptError, match=rf"exceeds the model's {room}.*Lower max_tokens"):
        arith.sampled(GroupRequest(arith.prompts[0], (1,)), sampling=SamplingConfig(max_tokens=room))


def test_a_group_is_handed_out_before_the_last_one_is_finished(arith: Arith) -> None:
    calls: list[int] = []
    hook = arith.engine.model.register_forward_hook(lambda *_: calls.append(1))
    requests = [GroupRequest(prompt, (1, 2)) for prompt in arith.prompts]
    seen = [len(calls) for _ in arith.engine.generate(requests, SamplingConfig(max_tokens=128))]
    hook.remove()
    assert len(seen) == len(requests)
    assert seen[0] < seen[-1]


def test_it_samples_from_the_model_that_it_was_given_as_it_stands() -> None:
    model = load_model(ARITH / "model", "cpu")
    engine = TransformersEngine(model, load_tokenizer(ARITH / "model"))
    assert not isinstance(engine, UpdatableEngine)  # a trainer has nothing to hand it
    request = GroupRequest(read_prompts(str(ARITH / "prompts.jsonl"), 1)[0], (1, 2))
    (before,) = engine.generate([request], SAMPLING)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    (after,) = engine.generate([request], SAMPLING)
    assert differences(model, [after])[1].max() <= 1e-4
    assert differences(model, [before])[1].max() > 0.01


def test_no_requests_are_no_groups(arith: Arith) -> None:
    assert list(arith.engine.generate([], SAMPLING)) == []


def test_a_model_whose_logits_are_nan_gives_one_line_and_no_group(arith: Arith) -> None:
    model = load_model(ARITH / "model", "cpu")
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    engine = TransformersEngine(model, arith.engine.tokenizer)
    with pytest.raises(EngineError, match=r"logits are not finite.*try engine\.dtype = float32"):
        next(engine.generate([GroupRequest(arith.prompts[0], (1, 2))], SAMPLING))


def test_memory_that_is_short_names_the_settings_to_lower(arith: Arith) -> None:
    model = load_model(ARITH / "model", "cpu", "float32")
    model.register_forward_hook(lambda *_: torch.empty(2**60, dtype=torch.uint8) and None)
    engine = TransformersEngine(model, arith.engine.tokenizer, batch_rollouts=4)
    with pytest.raises(
        EngineError,
        match=r"out of memory on cpu\. Lower engine\.batch_rollouts \(now 4\) or sampling\.max_tokens "
        r"\(now 24\), or set engine\.dtype = bfloat16; finished groups are kept\.$",
    ):
        next(engine.generate([GroupRequest(arith.prompts[0], (1, 2))], SAMPLING))
    model.register_forward_hook(lambda *_: torch.zeros(2) @ torch.zeros(3), prepend=True)
    with pytest.raises(RuntimeError, match="size"):  # a fault of ours keeps its traceback
        next(engine.generate([GroupRequest(arith.prompts[0], (1, 2))], SAMPLING))


@pytest.mark.parametrize(
    "entropies", [[0.5], [0.5, 4.7], [-0.1, 0.5]], ids=["too few", "too great", "negative"]
)
def test_entropies_that_no_distribution_over_the_vocabulary_has_are_refused(entropies: list[float]) -> None:
    def sample(values: list[float]) -> Sample:
        ids, logprobs = np.array([1, 2], np.int32), np.array([-1.0, -2.0], np.float32)
        return Sample(0, 0, ids, logprobs, np.array(values, np.float32), "stop")

    check_sample(sample([0.0, math.log(100)]), 100)
    with pytest.raises(EngineError, match=r"of at most 4\.606 nats, and 2 log-probs for 2 tokens") as error:
        check_sample(sample(entropies), 100)
    assert error.value.exit_code == 1  # a fault of ours
