"""The process that runs one verifier: JSON lines in, JSON lines out, one reply a request.

Started by `rewards` as `python -m pipeline.verifier_worker`. The first line names the verifier and its
timeout; each further line is one completion and its prompt. A process of its own and no
`multiprocessing` one: that would import the caller's main module, with torch, into every worker.
"""

from __future__ import annotations

import faulthandler
import json
import math
import numbers
import os
import sys
from typing import Any

from pipeline.errors import VerifierError
from pipeline.records import Prompt
from pipeline.verifiers import BUILT_IN, VerifierFunction, load_verifier

MAX_ERROR_CHARS = 500
# The parent kills a verifier at its timeout; if the parent itself is dead, the worker ends this much later.
ORPHAN_SECONDS = 5.0

_READ_ONLY = {"os.listdir", "os.scandir", "os.walk"}
_REACHES_OUT = ("os.", "subprocess.", "socket.", "shutil.", "pty.", "ctypes.", "webbrowser.", "urllib.")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def main() -> None:
    # What a verifier or a library prints must not land among the replies, nor read the requests.
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(2, 1)

    def reply(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message).encode() + b"\n")
        replies.flush()

    setup = json.loads(requests.readline())
    try:
        verifier = load_verifier(setup["verifier"])
    except VerifierError as error:
        reply({"error": str(error)})
        return
    if setup["verifier"] in BUILT_IN:
        sys.addaudithook(refuse_reaching_out)
    reply({"version": verifier.version})
    for line in requests:
        request = json.loads(line)
        faulthandler.dump_traceback_later(setup["timeout_seconds"] + ORPHAN_SECONDS, exit=True, file=nowhere)
        facts = request["prompt"]
        prompt = Prompt(**{**facts, "messages": tuple(facts["messages"])})
        verdict = judged(verifier.function, request["completion"], prompt)
        faulthandler.cancel_dump_traceback_later()
        reply(verdict)
    os._exit(0)  # threads that a verifier left behind keep no process alive


def judged(function: VerifierFunction, completion: str, prompt: Prompt) -> dict[str, Any]:
    """One verification as `{"reward", "parts"}`, or `{"error"}` if it raised or gave no finite number."""
    try:
        verdict = function(completion, prompt)
        named = verdict if isinstance(verdict, dict) else {"reward": verdict}
        if "reward" not in named:
            return {"error": f"returned a dict without `reward`, with {sorted(map(str, named))}"}
        values = {str(name): _finite(str(name), value) for name, value in named.items()}
    except _NoNumber as error:
        return {"error": str(error)}
    except BaseException as error:  # sys.exit in a verifier is its failure, not the worker's
        said = " ".join(str(error).split())[:MAX_ERROR_CHARS]
        return {"error": f"raised {type(error).__name__}: {said}"}
    return {"reward": values.pop("reward"), "parts": values}


def refuse_reaching_out(event: str, args: tuple[Any, ...]) -> None:
    """An audit hook for the built-in verifiers, which only compute.

    Some scorers of reasoning_gym pass the model's answer to `eval` or to sympy's `parse_expr`. A
    completion that writes files, starts processes or opens connections there gets an error instead.
    """
    writes = event == "open" and isinstance(args[2], int) and args[2] & _WRITES
    if writes or (event.startswith(_REACHES_OUT) and event not in _READ_ONLY):
        raise PermissionError(f"a verifier only computes, and this one tried {event}")


class _NoNumber(Exception):
    pass


def _finite(name: str, value: object) -> float:
    if not isinstance(value, numbers.Real):
        raise _NoNumber(f"returned {type(value).__name__} as `{name}`, not a number")
    number = float(value)
    if not math.isfinite(number):
        raise _NoNumber(f"returned {number} as `{name}`")
    return number


if __name__ == "__main__":
    main()
