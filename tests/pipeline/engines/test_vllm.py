"""The vLLM engine in this process, one for all tests of this file: what it samples, and how it is used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path

import pytest
from reference import (
    ARITH,
    arith_prompts,
    check_whole,
    differences,
    float64_model,
    ids_by_prompt,
    requests_of,
)
from transformers import PreTrainedModel
from vllm_engines import (
    EXACT,
    TOKENIZER,
    agreement,
    incomplete_model,
    nan_model,
    narrow_model,
    opened,
    sampled,
    scaled_model,
)

from pipeline.config import SamplingConfig, TrainConfig
from pipeline.engines import tap
from pipeline.engines.base import Engine, UpdatableEngine
from pipeline.engines.vllm import VllmEngine
from pipeline.errors import EngineError, PromptError
from pipeline.models import load_model
from pipeline.prompts import prompt_messages_ids
from pipeline.records import Group, Judgement
from trainer.live_engine import LiveEngine
from trainer.loop import train


def test_a_batch_of_more_requests_than_run_at_once_gives_the_tokens_of_the_transformers_engine(
    plain: VllmEngine, exact: PreTrainedModel, transformers_engine: Engine
) -> None:
    sampling = SamplingConfig(max_tokens=64)
    requests = requests_of(arith_prompts(24), group_size=4)
    groups = sampled(plain, requests, sampling)
    of_logprobs, of_entropies = differences(exact, groups)
    assert len(of_entropies) >= 2_000
    assert max(of_entropies.max(), of_logprobs.max()) <= EXACT
    assert (
        agreement(groups, sampled(transformers_engine, requests, sampling)) > 0.95
    )  # a uniform between two tokens may fall to either by rounding


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingConfig(max_tokens=32, temperature=0.6),
        SamplingConfig(max_tokens=32, top_k=3, temperature=2.0),
        SamplingConfig(max_tokens=32, top_p=0.8, temperature=1.5),
    ],
    ids=["temperature", "top_k", "top_p"],
)
def test_truncation_and_temperature_draw_as_the_transformers_engine_does(
    plain: VllmEngine, exact: PreTrainedModel, transformers_engine: Engine, sampling: SamplingConfig
) -> None:
    requests = requests_of(arith_prompts(8), group_size=4)
    groups = list(plain.generate(requests, sampling))
    assert agreement(groups, sampled(transformers_engine, requests, sampling)) > 0.9
    of_logprobs, of_entropies = differences(exact, groups)
    assert max(of_entropies.max(), of_logprobs.max()) <= EXACT


def test_a_group_that_is_not_waited_for_leaves_nothing_behind(plain: VllmEngine) -> None:
    core = plain._cores[0]
    requests = requests_of(arith_prompts(24), group_size=4)
    stream = plain.generate(requests, SamplingConfig(max_tokens=64))
    next(stream)
    assert 0 < core.num_tapped() <= 2 * 16 + 4
    stream.close()
    assert core.num_tapped() == 0
    again = list(plain.generate(requests, SamplingConfig(max_tokens=64)))
    check_whole(again, requests, SamplingConfig(max_tokens=64))
    assert core.num_tapped() == 0


def test_weights_are_exchanged_in_the_running_engine(
    plain: VllmEngine, exact: PreTrainedModel, tmp_path: Path
) -> None:
    sampling, requests = SamplingConfig(max_tokens=64), requests_of(arith_prompts(24), group_size=4)
    before = sampled(plain, requests, sampling)
    assert isinstance(plain, UpdatableEngine)
    other = scaled_model(tmp_path / "model")
    try:
        plain.update_weights(other)
        groups = sampled(plain, requests, sampling)
    finally:
        plain.update_weights(ARITH / "model")
    of_logprobs, of_entropies = differences(float64_model(other), groups)
    assert len(of_entropies) >= 2_000
    assert max(of_entropies.max(), of_logprobs.max()) <= EXACT
    assert min(of.max() for of in differences(exact, groups)) > 0.01
    # and back, with nothing of the other weights left in the cache
    assert ids_by_prompt(sampled(plain, requests, sampling)) == ids_by_prompt(before)


def test_a_training_samples_each_step_from_the_weights_that_the_last_one_left(
    plain: VllmEngine, tmp_path: Path
) -> None:
    model = load_model(ARITH / "model", "cpu", "float32")
    engine, editions, rollouts = LiveEngine(plain, model, tmp_path / "weights"), [deepcopy(model)], []

    def judge(groups: Sequence[Group]) -> list[list[Judgement]]:
        return [[Judgement(float(i % 2)) for i in range(len(group.samples))] for group in groups]

    config = TrainConfig(
        optim_steps=3, prompts_per_step=4, group_size=4, clips_per_step=0, lr=1e-3, checkpoint_every=0
    )  # fmt: skip
    core = plain._cores[0]
    try:
        train(
            model, TOKENIZER, engine, arith_prompts(12), [], config, SamplingConfig(max_tokens=32), judge,
            lambda groups, *_: rollouts.append(list(groups)), lambda _: None, tmp_path / "run", "training", 0,
            progress=lambda _: editions.append(deepcopy(model)),
        )  # fmt: skip
    finally:
        plain.update_weights(ARITH / "model")
    assert (plain._cores[0], engine.num_updates) == (core, 2)
    for step in (1, 2):
        for told in differences(editions[step].double(), rollouts[step]):
            assert told.max() <= EXACT
        assert differences(editions[step - 1].double(), rollouts[step])[0].max() > 0.01
    engine_folders = list((tmp_path / "weights").iterdir())
    assert len(engine_folders) == 1, "what is no longer needed goes"


@pytest.mark.parametrize(
    "other",
    [narrow_model, incomplete_model, Path.mkdir],
    ids=["another hidden size", "a layer missing", "no weights"],
)
def test_weights_that_do_not_fit_are_refused_by_name_and_the_engine_keeps_its_own(
    plain: VllmEngine, tmp_path: Path, other: Callable[[Path], object]
) -> None:
    sampling, requests = SamplingConfig(max_tokens=32), requests_of(arith_prompts(8), group_size=4)
    before = sampled(plain, requests, sampling)
    other(tmp_path / "model")
    with pytest.raises(EngineError, match=f"{tmp_path}.*Give a checkpoint of the same model") as error:
        plain.update_weights(tmp_path / "model")
    assert "\n" not in str(error.value)
    assert ids_by_prompt(sampled(plain, requests, sampling)) == ids_by_prompt(before)


def test_weights_are_not_exchanged_under_groups_that_run(plain: VllmEngine) -> None:
    sampling, requests = SamplingConfig(max_tokens=32), requests_of(arith_prompts(8), group_size=4)
    groups = plain.generate(requests, sampling)
    first = next(groups)
    with pytest.raises(EngineError, match="cannot be exchanged while groups are sampled"):
        plain.update_weights(ARITH / "model")
    check_whole([first, *groups], requests, sampling)
    plain.update_weights(ARITH / "model")


def test_a_model_whose_logits_are_nan_gives_one_line_and_no_group(plain: VllmEngine, tmp_path: Path) -> None:
    sampling, requests = SamplingConfig(max_tokens=8), requests_of(arith_prompts(2), group_size=2)
    plain.update_weights(nan_model(tmp_path / "model"))
    try:
        with pytest.raises(EngineError, match=r"logits are not finite.*try engine\.dtype = float32") as error:
            next(plain.generate(requests, sampling))
    finally:
        plain.update_weights(ARITH / "model")
    assert "\n" not in str(error.value)
    assert plain._cores[0].num_tapped() == 0
    sampled(plain, requests, sampling)


def test_other_tokens_than_the_tap_drew_are_refused_and_their_group_stays_to_be_sampled(
    plain: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling, requests = SamplingConfig(max_tokens=8), requests_of(arith_prompts(2), group_size=2)
    line = deque((one, prompt_messages_ids(TOKENIZER, one.prompt.messages)) for one in requests)
    with monkeypatch.context() as patch:
        patch.setattr(tap, "_CERTAIN", -1e30)  # a drawn token that vLLM's sampler never takes
        with pytest.raises(EngineError, match="other tokens than the tap drew"):
            next(plain._cores[0].stream(line, sampling))
    assert len(line) == 2
    assert plain._cores[0].num_tapped() == 0
    check_whole(list(plain._cores[0].stream(line, sampling)), requests, sampling)


def test_a_prompt_that_leaves_no_room_is_refused_before_anything_runs(plain: VllmEngine) -> None:
    with pytest.raises(PromptError, match="Lower max_tokens or shorten the prompt"):
        next(plain.generate(requests_of(arith_prompts(1), 1), SamplingConfig(max_tokens=510)))


def test_one_engine_runs_in_this_process_at_a_time(plain: VllmEngine) -> None:
    with pytest.raises(EngineError, match="Only one engine at a time"), opened():
        pass
    assert list(plain.generate(requests_of(arith_prompts(1), 2), SamplingConfig(max_tokens=8)))
