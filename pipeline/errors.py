"""Errors a user can act on. Each message says what is wrong, where, and what to do, on one line.

The command prints them without a traceback and exits with `exit_code`; anything else that is raised
is a fault of ours and keeps its traceback. So is an `EngineBug`, whose line says more than its traceback.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

MAX_MESSAGE_CHARS = 700
MAX_LISTED = 12  # valid names in one message


class EchoMineError(Exception):
    """A mistake in what the user gave us: exit code 2."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        text = " ".join(message.split())
        # a library's sentence within ours ends twice
        super().__init__(_shortened(re.sub(r"(?<!\.)\.\.(?= |$)", ".", text)))


class ConfigError(EchoMineError):
    """A configuration file, key, value or command-line option is wrong."""


class PromptError(EchoMineError):
    """A prompt file or task cannot be read."""


class ModelError(EchoMineError):
    """A model folder is missing, incomplete, or not the one that was asked for."""


class LakeError(EchoMineError):
    """The lake cannot be opened, read or written."""


class FormatError(EchoMineError):
    """A dump or shard is not what it claims to be."""


class VerifierError(EchoMineError):
    """A verifier is unknown or cannot be loaded. One that hangs or dies is no error: see `rewards`."""


class QueryError(EchoMineError):
    """A query is wrong, or asks for more than reading."""


class MiningError(EchoMineError):
    """The mining that was asked for makes no sense on this lake."""


class EngineError(EchoMineError):
    """The engine that samples cannot go on."""


class EngineBug(EngineError):
    """An engine contradicts itself: a fault of ours, exit code 1."""

    exit_code = 1


class BusyError(EchoMineError):
    """Something that only one process may do at a time is being done."""


class NothingToMine(EchoMineError):
    """Everything went well, and there is no clip: exit code 3."""

    exit_code = 3


def nearest(name: str, valid: Iterable[str]) -> str:
    """The end of an error message: the closest valid name; all of them, or a few, when none is close."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean `{close[0]}`?"
    if len(names) > MAX_LISTED:
        few = difflib.get_close_matches(name, names, n=3, cutoff=0.0)
        return f"of {len(names)} valid names the closest are {', '.join(few)}."
    return f"valid names: {', '.join(names)}."


def said(error: BaseException) -> str:
    """What a library's error says, on one line, without its final stop or DuckDB's pointer to a place."""
    text = " ".join(str(error).split("\n\nLINE ")[0].split())
    return _shortened(text or type(error).__name__, 300).rstrip(".")


def _shortened(text: str, limit: int = MAX_MESSAGE_CHARS) -> str:
    """Cut in the middle: what happened stands at the start, what to do at the end."""
    if len(text) <= limit:
        return text
    return f"{text[: 2 * limit // 3]} … {text[-limit // 3 :]}"
