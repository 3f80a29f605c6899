"""Verifiers of one's own, good and bad, that `test_rewards` names as `verifiers_for_tests:<function>`.

What most of them do is decided by the completion, so that one pool sees all of it.
"""

import os
import signal
import subprocess
import sys
import threading
import time


def length(completion, prompt):
    return len(completion) / int(prompt.ground_truth)


def in_parts(completion, prompt):
    return {"reward": 1, "format": 0.5, "task": float(prompt.extra_info["bonus"])}


def troubled(completion, prompt):
    """Does what the completion says, and gives 1 to every other completion."""
    deeds = {
        "hang": lambda: time.sleep(600),
        "hang deaf": hang_deaf,
        "exit 0": lambda: os._exit(0),
        "exit 3": lambda: os._exit(3),
        "sys.exit": lambda: sys.exit(4),
        "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
        "raise": lambda: int("two\nlines"),
        "nan": lambda: float("nan"),
        "infinite": lambda: float("inf"),
        "text": lambda: "1.0",
        "nothing": lambda: None,
        "no reward": lambda: {"score": 1.0},
        "nan part": lambda: {"reward": 1.0, "style": float("nan")},
        "print": lambda: print('{"reward": 5}') or 1.0,
        "read": lambda: float(sys.stdin.read() == ""),
        "die later": die_later,
        "child": child_that_stays,
        "torch": lambda: float("torch" in sys.modules),
    }
    return deeds[completion]() if completion in deeds else 1.0


def hang_deaf():
    """Ends at nothing less than SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while True:
        time.sleep(600)


def die_later():
    """Passes, and takes its process with it some time after that."""
    threading.Timer(0.2, os._exit, [9]).start()
    return 1.0


def child_that_stays():
    """Hangs, with a child process whose id it leaves in a file."""
    child = subprocess.Popen(["sleep", "600"])
    with open(os.environ["CHILD_FILE"], "w") as file:
        file.write(str(child.pid))
    time.sleep(600)


not_a_function = 5


def nothing_is_right(completion, prompt):
    return 0.0
