"""The prompt of `echomine sql`, typed into through a terminal of its own."""

from __future__ import annotations

import fcntl
import os
import re
import select
import stat
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from attempts import EXTENSIONS, FILES, NETWORK, WRITES
from folder_contents import contents
from nights import ECHOMINE

PROMPT = "lake>"
CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"
ENDLESS = "select sum(a.range * b.range) from range(10000000) as a, range(10000000) as b;"
_ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[ -/]*[@-~]|[=>78])|\r|\x07")


class Terminal:
    """A process on a pseudo-terminal of 160 columns."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self._raw, self._read = b"", 0
        self._master, ours = os.openpty()
        fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 160, 0, 0))
        self.process = subprocess.Popen(
            [ECHOMINE, *arguments],
            stdin=ours,
            stdout=ours,
            stderr=ours,
            env={
                **os.environ,
                "TERM": "xterm",
                "COLUMNS": "160",
                "PROMPT_TOOLKIT_NO_CPR": "1",
                **environment,
            },
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C is a signal
        )
        os.close(ours)

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def until(self, text: str) -> str:
        """What is shown up to and with `text`, from where the last call ended; no colours, no movements."""
        deadline = time.monotonic() + 600
        while text not in (shown := _ESCAPES.sub("", self._raw.decode(errors="replace"))[self._read :]):
            assert time.monotonic() < deadline, f"no {text!r} in {shown!r}"
            if select.select([self._master], [], [], 0.2)[0]:
                self._raw += os.read(self._master, 65536)
        end = shown.index(text) + len(text)
        self._read += end
        return shown[:end]

    def ask(self, query: str, answer: str) -> str:
        """Types a query, and waits for `answer` and then for the next prompt."""
        self.type(f"{query}\r")
        return self.until(answer) + self.until(PROMPT)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def terminal(lake: Path, state: Path) -> Iterator[Terminal]:
    terminal = Terminal("sql", "--lake", str(lake), XDG_STATE_HOME=str(state))
    try:
        assert "reading only" in terminal.until(PROMPT)
        yield terminal
    finally:
        terminal.close()


def test_a_query_of_several_lines_is_answered_after_its_semicolon(terminal):
    terminal.type("select 40 +\r")
    terminal.until("…")
    assert "│ 42 " in terminal.ask("2 as n;", "└")
    terminal.type(CTRL_D)
    assert terminal.process.wait(30) == 0


def test_a_wrong_query_costs_a_line_and_not_the_prompt(terminal):
    shown = terminal.ask("selec 1;", "Mend it and ask again.")
    assert "echomine: The query is no SQL" in shown
    assert "Traceback" not in shown
    assert "did you mean `.example`?" in terminal.ask(".exampel x", "did you mean")
    assert "│ 1 " in terminal.ask("select 1 as n;", "└")


def test_ctrl_c_stops_the_query_and_the_next_is_answered(terminal):
    terminal.type(f"{ENDLESS}\r")
    time.sleep(1)  # the query runs by now; if it did not yet, Ctrl-C would clear the line
    terminal.type(CTRL_C)
    terminal.until("The query was stopped.")
    terminal.until(PROMPT)
    assert "│ 1 " in terminal.ask("select 1 as n;", "└")
    terminal.type(f"select {CTRL_C}")
    terminal.until(PROMPT)
    assert terminal.process.poll() is None


@pytest.mark.parametrize(
    ("start", "whole"), [("zero_adv", "zero_advantage_groups"), ("variance_t", "variance_top_p")]
)
def test_tab_completes_what_the_lake_has(terminal, start, whole):
    terminal.type(f"from {start}\t")
    terminal.until(whole)


def test_what_was_asked_is_remembered_for_the_user_alone(lake, state, terminal):
    terminal.ask("select 'remembered' as word;", "└")
    terminal.type(".quit\r")
    assert terminal.process.wait(30) == 0
    history = state / "echomine" / "sql_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    again = Terminal("sql", "--lake", str(lake), XDG_STATE_HOME=str(state))
    try:
        again.until(PROMPT)
        again.type(f"{UP}{UP}")
        again.until("'remembered'")
    finally:
        again.close()


def test_examples_run_and_long_answers_are_cut_off(terminal):
    assert "wasted_share" in terminal.ask(".example wasted_tokens", "└")
    assert "│ 199 " in terminal.ask("from range(1000000000);", "More than 200 rows")


def test_the_prompt_reads_the_lake_and_nothing_else(terminal, lake, tmp_path):
    (tmp_path / "secret.csv").write_text("a\nsecret\n")
    before = contents(tmp_path / "secret.csv", lake)
    for query in [*WRITES, *EXTENSIONS, *NETWORK, *FILES]:
        query = query.replace("{outside}", str(tmp_path)).replace("{lake}", str(lake / "files"))
        shown = terminal.ask(f"{query};", "echomine: ")
        assert "└" not in shown, query
    assert contents(tmp_path / "secret.csv", lake) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret.csv", "state"]


def test_without_a_terminal_the_query_is_read_from_standard_input(lake):
    done = subprocess.run(
        [ECHOMINE, "sql", "--lake", lake, "--format", "csv"],
        input="select group_class, num_rollouts as n\nfrom groups order by all;\n",
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "group_class,n\nall_fail,2\nall_success,2\nmixed,2\n"
