"""Errors a user can act on. Each message says what is wrong, where, and what to do, on one line.

The command prints them without a traceback and exits with `exit_code`; anything else that is raised
is a fault of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EchoMineError(Exception):
    """A mistake in what the user gave us: exit code 2."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


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


class BusyError(EchoMineError):
    """Something that only one process may do at a time is being done."""


class NothingToMine(EchoMineError):
    """Everything went well, and there is no clip: exit code 3."""

    exit_code = 3


def nearest(name: str, valid: Iterable[str]) -> str:
    """The end of an error message: the closest valid name, or all of them when none is close."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean `{close[0]}`?" if close else f"valid names: {', '.join(names)}"
