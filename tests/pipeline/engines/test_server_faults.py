"""The server engine among servers that fail: others take over, and what nobody can do ends in one line."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from reference import ids_by_prompt
from server_helpers import REQUESTS, SAMPLING, TOKENIZER, engine, spoiled, status
from vllm_server import Answer, Relay, Spoil, free_port
from waiting import wait_until

from pipeline.config import ServerConfig
from pipeline.engines import server_pool
from pipeline.engines.base import GroupRequest
from pipeline.engines.server_answers import EndpointFault
from pipeline.engines.server_endpoint import Endpoint
from pipeline.engines.server_posts import Post
from pipeline.errors import EngineError
from pipeline.records import Group

pytestmark = pytest.mark.usefixtures("quick_retries")


def _text(body: bytes) -> Spoil:
    return lambda sent, answer: setattr(answer, "body", body)


def _of_500(body: bytes) -> Spoil:
    def spoil(sent: dict[str, Any], answer: Answer) -> None:
        answer.status, answer.body = 500, body

    return spoil


def _first_logprob(value: Any) -> Spoil:
    return spoiled(lambda choice: choice["logprobs"]["token_logprobs"].__setitem__(0, value))


FAULTS: dict[str, tuple[Spoil, str]] = {
    "out of memory": (status(500, "out of memory"), "answers 500: out of memory"),
    "dead engine": (
        status(500, "EngineCore encountered an issue."),
        r"its engine died, see its log; .*--no-enable-chunked-prefill",
    ),
    "deep JSON": (_of_500(b"[" * 100_000), r"answers 500: \[\[\["),
    "no UTF-8": (_of_500(b"\xff\xfe out"), "answers 500: .* out"),
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
    arith_server: str, expected: dict[str, list[list[int]]], caplog: pytest.LogCaptureFixture
) -> None:
    dead = f"http://127.0.0.1:{free_port()}/v1"
    with caplog.at_level(logging.WARNING, "pipeline"):
        assert ids_by_prompt(engine(dead, arith_server).generate(REQUESTS, SAMPLING)) == expected
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


def test_the_only_server_may_start_again_which_takes_longer_than_its_attempts(
    relay: Callable[..., Relay], expected: dict[str, list[list[int]]], caplog: pytest.LogCaptureFixture
) -> None:
    stopped = threading.Event()

    def stop_third(sent: dict[str, Any], answer: Answer) -> None:
        if before.num_completions > 2:
            answer.status = 0
            before.stop()
            stopped.set()

    def start_again() -> None:
        assert stopped.wait(60)
        wait_until(lambda: "No endpoint can be reached; asking again for 60 s" in caplog.text)
        time.sleep(1.0)  # attempts at 0.02, 0.06, 0.14 … s: some more than the two that are allowed
        relay(port=before.server.server_port)

    before = relay(stop_third)
    only = engine(before.url, concurrency=1, max_attempts=2, patience_seconds=60)
    starter = threading.Thread(target=start_again)
    starter.start()
    with caplog.at_level(logging.WARNING, "pipeline"):
        assert ids_by_prompt(only.generate(REQUESTS, SAMPLING)) == expected
    starter.join()
    assert caplog.text.count("No endpoint can be reached") == 1


def test_a_server_that_fails_is_asked_ever_more_rarely_and_at_least_twice_a_minute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()  # of quick_retries
    post = Post(Endpoint("http://gpu1/v1", ServerConfig(), TOKENIZER, 100, httpx.AsyncClient()), 1.0)
    longest = [0.5, 1, 2, 4, 8, 16, 30, 30]
    for seconds in longest:
        post.goes_down(EndpointFault("it answers 500"), now=0.0)
        waits = [post.backoff_seconds() for _ in range(200)]
        assert seconds / 2 <= min(waits) < max(waits) <= seconds
        assert max(waits) - min(waits) > seconds / 4  # at random: nights that share a server spread
    post.sampled_one(1.0)
    post.goes_down(EndpointFault("it answers 500"), now=0.0)
    assert post.backoff_seconds() <= 0.5


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


@pytest.mark.parametrize("code", [400, 401, 403, 404, 422])
def test_a_server_that_sampled_and_then_refuses_leaves_the_rest_to_the_others(
    code: int, relay: Callable[..., Relay], expected: dict[str, list[list[int]]]
) -> None:
    def refuse_third(sent: dict[str, Any], answer: Answer) -> None:
        if changed.num_completions > 2:  # a group is two
            answer.status, answer.json = code, {"error": {"message": "no such model", "code": code}}
            changed.others["/v1/models"] = Answer(code, answer.body)

    changed = relay(refuse_third)
    other = relay(lambda sent, answer: wait_until(lambda: "/v1/models" in changed.others))
    groups = engine(changed.url, other.url, concurrency=1).generate(REQUESTS, SAMPLING)
    assert ids_by_prompt(groups) == expected
    again = relay(refuse_third)
    changed = again
    with pytest.raises(EngineError, match=f"it answers {code} to /v1/.*: no such model") as caught:
        list(engine(again.url, concurrency=1, max_attempts=2).generate(REQUESTS, SAMPLING))
    assert again.url in str(caught.value)


@pytest.mark.parametrize(
    ("card", "fault"),
    [
        ({"id": "arith", "max_model_len": 20}, r"exceeds the model's 20"),
        ({"id": "another"}, r"serves no model `arith`"),
        ({"id": "arith", "max_model_len": -1}, r"its answer is no Models"),
    ],
)
def test_a_server_that_comes_back_as_another_leaves_the_rest_to_the_others(
    card: dict[str, Any],
    fault: str,
    relay: Callable[..., Relay],
    expected: dict[str, list[list[int]]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def die_third(sent: dict[str, Any], answer: Answer) -> None:
        if changed.num_completions > 2:  # a group is two
            answer.status = 500
            changed.others["/v1/models"] = Answer(200, json.dumps({"data": [card]}).encode())

    changed = relay(die_third)
    other = relay(lambda sent, answer: wait_until(lambda: "/v1/models" in changed.others))
    groups = engine(changed.url, other.url, concurrency=1).generate(REQUESTS, SAMPLING)
    assert ids_by_prompt(groups) == expected
    alone = changed = relay(die_third)
    with pytest.raises(EngineError, match=rf"{alone.url}: .*{fault}"):
        list(engine(alone.url, concurrency=1, max_attempts=2).generate(REQUESTS, SAMPLING))


def test_no_more_groups_begin_while_many_wait_to_be_taken(
    arith_server: str, expected: dict[str, list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_pool, "BACKLOG_GROUPS", 1)
    begun: list[GroupRequest] = []
    group = Endpoint.group

    async def noted(self: Endpoint, request: GroupRequest, *rest: Any) -> Group:
        begun.append(request)
        return await group(self, request, *rest)

    monkeypatch.setattr(Endpoint, "group", noted)
    groups = engine(arith_server, concurrency=1).generate(REQUESTS, SAMPLING)
    first = next(groups)
    wait_until(lambda: len(begun) == 2)
    time.sleep(1.0)
    assert len(begun) == 2, "the second waits to be taken"
    assert ids_by_prompt([first, *groups]) == expected


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
    for code in (404, 405):
        gateway = relay()
        gateway.others["/tokenize"] = Answer(code, b"")
        assert len(list(engine(gateway.url).generate(REQUESTS, SAMPLING))) == len(REQUESTS)
    strange = relay()
    strange.others["/tokenize"] = Answer(200, b"<html>Welcome!</html>")
    with pytest.raises(EngineError, match=r"its answer is no Tokens: .*Invalid JSON"):
        list(engine(strange.url, max_attempts=2).generate(REQUESTS, SAMPLING))
    strict = relay()
    strict.others["/tokenize"] = Answer(400, b"no such field")
    assert "refuses a request (400): no such field" in _refused(strict)


def test_a_server_whose_log_probs_are_those_after_truncation_is_refused(relay: Callable[..., Relay]) -> None:
    def zeros(choice: dict[str, Any]) -> None:
        choice["logprobs"]["token_logprobs"] = [0.0] * len(choice["token_ids"])

    assert "or with raw_logprobs" in _refused(relay(spoiled(zeros), spoil_probe=True))
