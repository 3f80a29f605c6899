"""The server engine beside a real `vllm serve` on the CPU: what it asks for, and what it gives."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from reference import ids_by_prompt
from server_helpers import REQUESTS, SAMPLING, TOKENIZER, engine
from vllm_server import MODEL, Answer, Relay, free_port

from pipeline.config import SamplingConfig, ServerConfig
from pipeline.engines.base import GroupRequest, UpdatableEngine
from pipeline.engines.server import ServerEngine
from pipeline.errors import ConfigError, EngineError, PromptError
from pipeline.logprobs import completion_logprobs
from pipeline.models import load_model
from pipeline.prompts import prompt_messages_ids

pytestmark = pytest.mark.usefixtures("quick_retries")


def test_log_probs_are_those_of_the_model_before_temperature(arith_server: str) -> None:
    request = GroupRequest(REQUESTS[0].prompt, tuple(range(8)))
    (group,) = engine(arith_server).generate(
        [request], SamplingConfig(max_tokens=48, temperature=1.5, top_p=0.95)
    )
    assert group.prompt_ids.tolist() == prompt_messages_ids(TOKENIZER, request.prompt.messages).tolist()
    rows = [(group.prompt_ids, sample.completion_ids) for sample in group.samples]
    reference = completion_logprobs(load_model(MODEL, "cpu", "float32"), rows).logprobs.detach().numpy()
    sampled = np.concatenate([sample.logprobs for sample in group.samples])
    np.testing.assert_allclose(sampled, reference, atol=1e-3)
    assert ServerEngine.logprobs_kind == "raw"


def test_a_group_has_its_samples_in_order_with_seeds_and_no_entropies(arith_server: str) -> None:
    request = GroupRequest(REQUESTS[0].prompt, tuple(range(8)))
    sampler = engine(arith_server)
    (group,) = sampler.generate([request], SamplingConfig(max_tokens=24))
    assert sampler.entropy_kind is None
    assert not isinstance(sampler, UpdatableEngine)
    assert [sample.sample_index for sample in group.samples] == list(range(8))
    assert [sample.seed for sample in group.samples] == list(range(8))
    for sample in group.samples:
        assert sample.entropies is None
        assert len(sample.logprobs) == len(sample.completion_ids) <= 24
        ended = sample.completion_ids[-1] == TOKENIZER.eos_token_id
        assert sample.finish_reason == ("stop" if ended else "length")


def test_the_same_seeds_draw_the_same_tokens_and_others_differ(
    arith_server: str, expected: dict[str, list[list[int]]]
) -> None:
    assert ids_by_prompt(engine(arith_server, concurrency=1).generate(REQUESTS, SAMPLING)) == expected
    hot = SamplingConfig(max_tokens=24, temperature=2.0)
    (twins,) = engine(arith_server).generate([GroupRequest(REQUESTS[0].prompt, (9, 9, 8))], hot)
    nine, again, eight = (sample.completion_ids.tolist() for sample in twins.samples)
    assert nine == again != eight


def test_a_stop_string_ends_a_completion_and_is_kept(arith_server: str) -> None:
    request = GroupRequest(REQUESTS[0].prompt, tuple(range(8)))
    (group,) = engine(arith_server).generate([request], SamplingConfig(max_tokens=48, stop=("\n",)))
    texts = [TOKENIZER.decode(sample.completion_ids) for sample in group.samples]
    assert {sample.finish_reason for sample in group.samples} == {"stop"}
    assert any(text.endswith("\n") for text in texts)
    assert not any("\n" in text[:-1] for text in texts)


def test_a_group_is_handed_out_while_another_is_still_sampled(relay: Callable[..., Relay]) -> None:
    release = threading.Event()

    def hold_last(sent: dict[str, Any], answer: Answer) -> None:
        if sent["seed"] == REQUESTS[-1].seeds[0]:
            assert release.wait(60)

    groups = engine(relay(hold_last).url).generate(REQUESTS, SAMPLING)
    early = [next(groups) for _ in REQUESTS[:-1]]
    release.set()
    assert {group.prompt.prompt_id for group in early} == {one.prompt.prompt_id for one in REQUESTS[:-1]}
    assert [group.prompt for group in groups] == [REQUESTS[-1].prompt]


def test_closing_the_iterator_cancels_its_requests_and_leaves_no_thread(relay: Callable[..., Relay]) -> None:
    release = threading.Event()

    def hold_but_first(sent: dict[str, Any], answer: Answer) -> None:
        if sent["seed"] not in REQUESTS[0].seeds:
            release.wait(60)

    sampler = engine(relay(hold_but_first).url)
    groups = sampler.generate(REQUESTS, SAMPLING)
    assert next(groups).prompt == REQUESTS[0].prompt
    assert "server-engine" in {thread.name for thread in threading.enumerate()}
    groups.close()
    assert "server-engine" not in {thread.name for thread in threading.enumerate()}
    with closing(sampler), pytest.raises(EngineError, match="was closed while it sampled"):  # noqa: PT012
        again = sampler.generate(REQUESTS, SAMPLING)
        next(again)
        sampler.close()
        list(again)
    release.set()


def test_a_prompt_that_leaves_no_room_is_refused_by_name(
    arith_server: str, relay: Callable[..., Relay]
) -> None:
    dead = f"http://127.0.0.1:{free_port()}/v1"
    short = ServerEngine(TOKENIZER, ServerConfig(endpoints=(dead,)), context=20)
    with pytest.raises(PromptError, match=r"exceeds the model's 20\. Lower max_tokens"):
        list(short.generate(REQUESTS, SAMPLING))
    with pytest.raises(PromptError, match=f"^{arith_server}: Prompt .* exceeds the model's 512"):
        list(engine(arith_server).generate(REQUESTS, SamplingConfig(max_tokens=512)))


def test_endpoints_are_urls_and_the_key_is_sent(
    relay: Callable[..., Relay], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"no endpoints\. Set engine\.server\.endpoints"):
        engine()
    for url in ("gpu1:8000", "gpu1", "ftp://gpu1/v1", "http://", "http://gpu1:port/v1"):
        with pytest.raises(ConfigError, match="no URL of a server"):
            engine(url)
    with pytest.raises(ConfigError, match="variable SERVER_KEY, which is not set"):
        engine("http://gpu1:8000/v1", api_key_env="SERVER_KEY")
    monkeypatch.setenv("SERVER_KEY", "s3cret\n")
    asked = relay()
    root = asked.url.removesuffix("/v1") + "/"
    assert list(engine(root, api_key_env="SERVER_KEY").generate(REQUESTS[:1], SAMPLING))
    assert asked.keys == {"Bearer s3cret"}


def test_no_requests_are_no_groups() -> None:
    assert list(engine("http://127.0.0.1:1/v1").generate([], SAMPLING)) == []
