"""Members of an untrusted row, each as what it has to be, or a reason to refuse the row."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TypeGuard

from pipeline.errors import FormatError

_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2  # what nests within itself many times over has no end


def member(row: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object within the row; empty if it is left out or something else."""
    value = row.get(name)
    return value if isinstance(value, dict) else {}


def items(row: Mapping[str, Any], name: str) -> list[Any]:
    """A list within the row; empty if it is left out.

    Raises:
        FormatError: it is something else.
    """
    value = row.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise FormatError(f"`{name}` is {short(value)}, no list")
    return value


def text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise FormatError(f"`{name}` is {short(value)}, no text")
    return value


def number(row: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = row.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FormatError(f"`{name}` is {short(value)}, no number")
    return _as_float(value, name)


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The members that are numbers; flags count as 0 and 1."""
    return {name: _as_float(value, name) for name, value in row.items() if isinstance(value, int | float)}


def _as_float(value: float, name: str) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer beyond every float
        raise FormatError(f"`{name}` is {short(value)}, too large a number") from None


def is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def token_ids(values: Any, name: str) -> list[int]:
    """Token ids as they stand in a list.

    Raises:
        FormatError: they are no list, or one of them is no whole number from 0.
    """
    if not isinstance(values, list) or not all(map(is_count, values)):
        raise FormatError(f"`{name}` is no list of token ids")
    return values


def mask(values: Any, name: str, length: int) -> list[bool]:
    """Flags, one per token, spelled as booleans or as 0 and 1.

    Raises:
        FormatError: they are something else, or not `length` of them.
    """
    if not isinstance(values, list) or not all(value in (0, 1) for value in values):
        raise FormatError(f"`{name}` is no list of flags")
    if len(values) != length:
        raise FormatError(f"`{name}` has {len(values)} flags for {length} tokens")
    return [bool(value) for value in values]


def sampled_run(values: Any, name: str, length: int) -> tuple[int, int]:
    """Start and end of the only run that a `mask` marks as sampled; see `one_run`."""
    return one_run(mask(values, name, length), name)


def one_run(flags: list[bool], what: str) -> tuple[int, int]:
    """Start and end of the only run of sampled tokens.

    Raises:
        FormatError: nothing was sampled, or the environment spoke between two sampled segments.
    """
    if True not in flags:
        raise FormatError(f"`{what}` marks no sampled token")
    start, end = flags.index(True), len(flags) - flags[::-1].index(True)
    if not all(flags[start:end]):
        raise FormatError(f"several sampled turns: `{what}` has other tokens between sampled ones")
    return start, end


def per_token(values: Any, name: str, length: int) -> list[Any] | None:
    """One number per completion token; None if there are none.

    Raises:
        FormatError: there are more or fewer.
    """
    if values is None or values == []:
        return None
    if not isinstance(values, list) or len(values) != length:
        size = f"{len(values)} values" if isinstance(values, list) else "no list"
        raise FormatError(f"`{name}` has {size} for {length} sampled tokens")
    return values


def messages(values: Any, name: str) -> list[dict[str, str]]:
    """Chat messages with their role and text alone; text that comes in parts is joined.

    Raises:
        FormatError: a message holds what a chat template cannot be given as text, such as an image.
    """
    if not isinstance(values, list) or not values:
        raise FormatError(f"`{name}` is no list of messages")
    plain = []
    for message in values:
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str):
            raise FormatError(f"`{name}` holds {short(message)}, no message with a role")
        if message.get("tool_calls"):
            raise FormatError(f"`{name}` holds tool calls, which no plain message can show")
        plain.append({"role": role, "content": content_text(message.get("content"), name)})
    return plain


def known_messages(values: Any, name: str) -> list[dict[str, str]] | None:
    """The messages beside a prompt that is known by its tokens; None if plain text cannot show them."""
    try:
        return messages(values, name)
    except FormatError:
        return None


def content_text(content: Any, name: str) -> str:
    """A message's content as text; its parts, if it has parts, joined.

    Raises:
        FormatError: a part is no text.
    """
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    if not texts or not all(isinstance(one, str) for one in texts):
        raise FormatError(f"`{name}` holds a message that is not text alone")
    return "".join(str(one) for one in texts)


def sampled_text(message: Mapping[str, Any]) -> str:
    """What the model wrote, if the message says it all.

    Raises:
        FormatError: thoughts or tool calls were cut out of the text, so that its tokens are unknown.
    """
    for name in ("reasoning_content", "tool_calls"):
        if message.get(name):
            raise FormatError(f"the sampled message holds `{name}` apart, so its tokens are unknown")
    return content_text(message.get("content"), "completion")


def truth(value: Any) -> str | None:
    """A ground truth as text: texts as they stand, numbers as Python writes them, the rest not at all."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    return str(value)


def began(seconds: Any) -> dict[str, Any]:
    """`created_at` and `night` of what began so many seconds after 1970; empty if that is no time."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
        return {}
    try:
        time = datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):
        return {}
    return {"created_at": time, "night": time.date()}


def short(value: Any) -> str:
    """A value in a message: its start, however large or deep it is."""
    return _SHORT.repr(value)[:40]


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values and lists of plain values: what quarantine keeps of an object that may nest anyhow."""
    plain = str | int | float | None
    return {
        str(name): value
        for name, value in values.items()
        if isinstance(value, plain)
        or (isinstance(value, list) and all(isinstance(one, plain) for one in value))
    }


def said(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values without those that the dump does not say."""
    return {name: value for name, value in values.items() if value is not None}
