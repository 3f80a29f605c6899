"""What a `vllm serve` endpoint may answer, and how much of it is believed."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

import httpx
from pydantic import BaseModel, Field, ValidationError

from pipeline.errors import EngineError

MAX_DETAIL_CHARS = 200  # of what an endpoint says, within a message of ours
ASK_AGAIN = frozenset((408, 425, 429))  # client errors that time heals
STARTING = frozenset((502, 503, 504))  # what a gateway says for a server that is not there


class EndpointFault(Exception):
    """An endpoint did not answer, or answered what cannot be true; another one may do better."""


class Unreachable(EndpointFault):
    """Nobody answers, or a gateway alone: the server may be starting, which takes minutes."""


class Refusal(EngineError):
    """An endpoint refuses what it is asked, and will until someone acts.

    Attributes:
        code: the HTTP status.
        fault: what it said, for where the endpoint is named anyway.
    """

    def __init__(self, message: str, code: int, fault: str) -> None:
        super().__init__(message)
        self.code, self.fault = code, fault


class Card(BaseModel):
    id: str
    max_model_len: Annotated[int, Field(ge=1)] | None = None


class Models(BaseModel):
    data: Annotated[list[Card], Field(min_length=1)]


class Tokens(BaseModel):
    tokens: list[int]


class Logprobs(BaseModel):
    # vLLM writes -9999 for minus infinity, which no sampled token has
    token_logprobs: list[Annotated[float, Field(gt=-9999.0, le=1e-4, allow_inf_nan=False)]]


class Choice(BaseModel):
    """One completion of T tokens after a prompt of P."""

    prompt_token_ids: list[int]
    token_ids: list[Annotated[int, Field(ge=0)]]
    logprobs: Logprobs
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    choices: Annotated[list[Choice], Field(min_length=1, max_length=1)]


AnswerT = TypeVar("AnswerT", bound=BaseModel)


def parsed(shape: type[AnswerT], body: bytes) -> AnswerT:
    """An answer's JSON, each value of the very type and range that `shape` states.

    Raises:
        EndpointFault: it is something else.
    """
    try:
        return shape.model_validate_json(body, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise EndpointFault(
            f"its answer is no {shape.__name__}: {where}: {first['msg']}, got {_shown(first['input'])}"
        ) from None


def believed(body: bytes, prompt_ids: list[int], max_tokens: int, vocabulary: int) -> Choice:
    """The completion in an answer, if it can be one of this prompt.

    Args:
        prompt_ids: [P], as they were sent.
        vocabulary: one more than the greatest token id of our tokenizer.

    Raises:
        EndpointFault: it is not.
    """
    choice = parsed(Completion, body).choices[0]
    tokens, logprobs = len(choice.token_ids), len(choice.logprobs.token_logprobs)
    if choice.prompt_token_ids != prompt_ids:
        raise EndpointFault(f"it continued another prompt, of {len(choice.prompt_token_ids)} tokens")
    if logprobs != tokens:
        raise EndpointFault(f"it gave {logprobs} log-probs for {tokens} tokens")
    if not 1 <= tokens <= max_tokens:
        raise EndpointFault(f"it gave {tokens} tokens where 1 to {max_tokens} were asked for")
    if max(choice.token_ids) >= vocabulary:
        raise EndpointFault(
            f"it gave token id {max(choice.token_ids)}, and the tokenizer knows 0 to {vocabulary - 1}"
        )
    if choice.finish_reason == "length" and tokens < max_tokens:
        raise EndpointFault(
            f"it cut a completion at {tokens} of {max_tokens} tokens; a server with a max_new_tokens of its "
            f"own does (--generation-config, --override-generation-config)"
        )
    return choice


def refuse_status(url: str, path: str, response: httpx.Response) -> None:
    """Sorts the answers that are no 200 into what time or another server heals, and what the user must.

    Raises:
        EndpointFault: the server's trouble; Unreachable where it is not there.
        Refusal: ours: the key, the model's name, a setting.
    """
    code = response.status_code
    if code == 200:
        return
    detail = _detail(response)
    # vLLM answers 400 where its own log-probs are NaN
    if not 400 <= code < 500 or code in ASK_AGAIN or "not JSON compliant" in detail:
        kind = Unreachable if code in STARTING else EndpointFault
        raise kind(f"it answers {code}: {detail}{_hint(detail)}")
    if code in (401, 403):
        line = (
            f"{url} refuses the API key ({code}). Put the key into an environment variable, and that "
            f"variable's name into engine.server.api_key_env."
        )
    elif code == 404:
        line = (
            f"{url} answers 404 to {path}: {detail}. Check engine.server.endpoints (the server's /v1) and "
            f"engine.server.model."
        )
    else:
        line = (
            f"{url} refuses a request ({code}): {detail}. Change the setting that it names, or start the "
            f"server with one that takes it."
        )
    raise Refusal(line, code, f"it answers {code} to {path}: {detail}")


def _detail(response: httpx.Response) -> str:
    """What the body says: vLLM's own message where there is one."""
    body = response.content.decode("utf-8", "replace")  # whatever its headers say of it
    try:
        said: Any = json.loads(body)["error"]
        text = said["message"] if isinstance(said, dict) else str(said)
    except (ValueError, KeyError, TypeError, RecursionError):
        text = body
    return _shown(" ".join(str(text).split()).rstrip("."))


def _hint(detail: str) -> str:
    """A server whose engine died tells its own log why; the known cause on a CPU can be told here."""
    if "EngineCore" not in detail and "does not use offset" not in detail:
        return ""
    return " (its engine died, see its log; on a CPU, seeds need --no-enable-chunked-prefill)"


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= MAX_DETAIL_CHARS else f"{text[:MAX_DETAIL_CHARS]} …"
