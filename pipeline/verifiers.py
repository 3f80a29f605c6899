"""The verifiers by name: what each says of one completion. They run in the processes of `rewards`."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from pipeline.errors import VerifierError, nearest
from pipeline.hashing import content_id
from pipeline.records import Prompt

# A number, or a dict of named numbers with the key "reward".
Verdict: TypeAlias = Any
VerifierFunction: TypeAlias = Callable[[str, Prompt], Verdict]

_INTEGER = re.compile(r"([-+]?)0*([0-9]+)")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@dataclass(frozen=True)
class Verifier:
    """A verifier ready to be called; `version` changes when what it says may change."""

    function: VerifierFunction
    version: str


def exact(completion: str, prompt: Prompt) -> float:
    """1 iff the last non-blank line is `#<integer>`, in ASCII digits, and equals the ground truth."""
    truth = _integer((prompt.ground_truth or "").strip())
    if truth is None:
        raise ValueError(f"the ground truth {prompt.ground_truth!r} is no integer, which `exact` needs")
    line = last_line(completion)
    return float(line.startswith("#") and _integer(line[1:]) == truth)


def math(completion: str, prompt: Prompt) -> float:
    """1 iff math-verify finds the ground truth (LaTeX or plain) and the completion's answer equal."""
    from math_verify import parse, verify

    truth = prompt.ground_truth or ""
    gold = _parsed_truth(truth)
    if not gold:
        raise ValueError(f"math-verify cannot read the ground truth {prompt.ground_truth!r}")
    # Its own timeouts are signals, for main threads only; the process is killed instead.
    return float(verify(gold, parse(completion, parsing_timeout=None), timeout_seconds=None))


def reasoning_gym(completion: str, prompt: Prompt) -> float:
    """The task's own score of what stands in the last <answer> tags, else of the last non-blank line."""
    from pipeline.gym_tasks import gym_score

    tagged = _ANSWER.findall(completion)
    return gym_score(prompt, tagged[-1].strip() if tagged else last_line(completion))


def last_line(text: str) -> str:
    """The last line that is not blank, without the white space around it; "" if there is none."""
    return text.rstrip().rpartition("\n")[2].strip()


@functools.lru_cache(maxsize=4096)
def _parsed_truth(truth: str) -> Any:
    from math_verify import parse

    # LaTeX is only looked for within $…$ or \boxed{…}
    marked = truth if "$" in truth or "\\boxed" in truth else f"\\boxed{{{truth}}}"
    return parse(marked, parsing_timeout=None)


def _integer(text: str) -> str | None:
    """The canonical digits; compared as text, since `int` refuses more than 4,300 digits."""
    match = _INTEGER.fullmatch(text)
    if match is None:
        return None
    sign, digits = match.groups()
    return f"-{digits}" if sign == "-" and digits != "0" else digits


BUILT_IN: dict[str, VerifierFunction] = {"exact": exact, "math": math, "reasoning_gym": reasoning_gym}
NEED_TRUTH = {"exact", "math"}  # they raise where a prompt has no ground truth
_PACKAGES = {"math": "math-verify", "reasoning_gym": "reasoning-gym"}


def check_name(name: str) -> None:
    """Raises VerifierError unless `name` is built in or looks like `module:function`."""
    module, colon, function = name.partition(":")
    if colon and all(part.isidentifier() for part in [*module.split("."), function]):
        return
    if name not in BUILT_IN:
        raise VerifierError(
            f"Unknown verifier `{name}`: {nearest(name, BUILT_IN)} Your own is named `module:function`."
        )


def load_verifier(name: str) -> Verifier:
    """Imports a verifier and what it needs.

    Raises:
        VerifierError: an unknown name, a module that cannot be imported, a function it does not have.
    """
    check_name(name)
    if name not in BUILT_IN:
        return _load_function(*name.split(":"))
    package = _PACKAGES.get(name)
    if package is not None:
        importlib.import_module(package.replace("-", "_"))
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that we do without its timeouts
    return Verifier(BUILT_IN[name], importlib.metadata.version(package) if package else "1")


def _load_function(module_name: str, name: str) -> Verifier:
    where = f"verifier `{module_name}:{name}`"
    try:
        module = importlib.import_module(module_name)
    # SystemExit: a script without a main guard
    except (Exception, SystemExit) as error:
        raise VerifierError(
            f"The module of {where} cannot be imported: {type(error).__name__}: {error}. "
            f"Install it, or run where it lies."
        ) from error
    functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    function = getattr(module, name, None)
    if function is None:
        raise VerifierError(f"There is no function `{name}` for {where}: {nearest(name, functions)}")
    if not callable(function):
        raise VerifierError(
            f"`{name}` of {where} is a {type(function).__name__}, not a function of (completion, prompt)."
        )
    return Verifier(function, _source_hash(function, module))


def _source_hash(function: Callable[..., Any], module: Any) -> str:
    try:
        path = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:  # a callable object, or one written in C: its module stands for it
        path = module.__file__
    if path is None:
        raise VerifierError(
            f"The verifier in `{module.__name__}` has no source file to tell its version by. Put it in one."
        )
    return content_id(Path(path).read_bytes())
