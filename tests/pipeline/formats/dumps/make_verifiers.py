"""Writes the dumps of verifiers 0.4 and prime-rl with verifiers' own code: `pip install verifiers==0.4.0`.

prime-rl's file is what its monitor writes: `Episode.to_record()`, one JSON object a line. verifiers' own is
written by its trace store. Run from this folder; the names and times are fixed, so that it writes the same
bytes again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from verifiers.v1 import graph, types
from verifiers.v1.configs.agent import WireAgentConfig
from verifiers.v1.episode import (
    EnvInfo,
    Episode,
    EvalRunInfo,
    EvalWorkInfo,
    GroupInfo,
    PolicySpan,
    TrainRunInfo,
    TrainWorkInfo,
)
from verifiers.v1.task import WireTaskData
from verifiers.v1.trace import AgentInfo, Error, ModelCall, Timing, Trace, TraceTask, VersionInfo
from verifiers.v1.utils.trace_store import write_episode

NOON = 1780315200.0  # 2026-06-01 12:00 UTC
ASKED = [types.SystemMessage(content="Be brief."), types.UserMessage(content="2+2?")]


def trace(name: str, *, agent: str = "agent", trainable: bool = True, ok: bool = True, **more: Any) -> Trace:
    return Trace(
        id=name,
        verifiers=VersionInfo(version="0.4.0", commit="0123456789abcdef0123456789abcdef01234567"),
        task=TraceTask(
            type="Sum",
            data=WireTaskData(idx=7, name="sum", prompt="2+2?", answer="4"),
            key="sum-7",
            hash="c0ffee",
        ),
        agent=AgentInfo(config=WireAgentConfig(), name=agent, trainable=trainable),
        timing=Timing(start=NOON),
        ok=ok,
        is_completed=True,
        **more,
    )


def turn(
    to: Trace, asked: list, said: str, ids: tuple[list, list], finish: str = "stop", **spoken: Any
) -> None:
    """One model call: its prompt and completion, with one log-prob per sampled token."""
    prompt_ids, completion_ids = ids
    spans = None
    if prompt_ids and len(asked) == 2:
        spans = [(0, 2), (2, 4)]  # what is left of the prompt is the template's opening of the answer
    tokens = types.TurnTokens(
        prompt_ids=prompt_ids,
        completion_ids=completion_ids,
        completion_logprobs=[-0.125 * place for place in range(1, len(completion_ids) + 1)],
        message_spans=spans,
    )
    node = graph.prepare_turn(to, asked).commit(
        types.Response(
            id="r",
            created=int(NOON),
            model="small",
            message=types.AssistantMessage(content=said, **spoken),
            finish_reason=finish,
            tokens=tokens if prompt_ids else None,
        )
    )
    for message in to.nodes:
        message.timestamp = NOON
    to.calls.append(
        ModelCall(
            node=node,
            model="small",
            sampling=types.SamplingConfig(temperature=0.7, top_p=0.95, max_tokens=32),
            finish_reason=finish,
        )
    )


def episode(name: str, traces: list[Trace], *, group: str | None, run: Any) -> Episode:
    return Episode(
        id=name,
        env=EnvInfo(id="sums"),
        task=traces[0].task if traces else trace("x").task,
        group=GroupInfo(id=group) if group else None,
        run=run,
        ok=all(one.ok for one in traces),
        traces=traces,
    )


def solved(name: str, **more: Any) -> Trace:
    one = trace(name, **more)
    turn(one, ASKED, "4", ([1, 2, 3, 4, 5], [52, 128]))
    one.record_reward("correct", 1.0)
    one.record_reward("format", 0.5, weight=0.5)
    return one


def cut_off() -> Trace:
    one = trace("cut-off")
    turn(one, ASKED, "4444", ([1, 2, 3, 4, 5], [52, 52, 52]), "length")
    one.record_reward("correct", 0.0)
    return one


def two_turns() -> Trace:
    one = trace("two-turns")
    call = types.ToolCall(id="t", name="add", arguments="{}")
    turn(one, ASKED, "", ([1, 2, 3, 4, 5], [60, 61]), "tool_calls", tool_calls=[call])
    answered = [*one.messages, types.ToolMessage(tool_call_id="t", content="4")]
    turn(one, answered, "4", ([1, 2, 3, 4, 5, 60, 61, 70, 71], [52, 128]))
    one.record_reward("correct", 1.0)
    return one


def failed() -> Trace:
    one = trace("failed", ok=False, errors=[Error(type="ToolError", message="no such tool")])
    turn(one, ASKED, "4", ([1, 2, 3, 4, 5], [52, 128]))
    one.rewards["correct"] = None
    return one


def unscored() -> Trace:
    one = trace("unscored")
    turn(one, ASKED, "4", ([1, 2, 3, 4, 5], [52, 128]))
    one.rewards["correct"] = None
    return one


def relayed(**spoken: Any) -> Trace:
    """A call to an endpoint that returns no tokens."""
    one = trace("relayed")
    turn(one, ASKED, "4", ([], []), **spoken)
    one.record_reward("correct", 1.0)
    return one


def judge() -> Trace:
    one = trace("judge", agent="judge", trainable=False)
    turn(one, [types.UserMessage(content="Right?")], "Yes", ([8, 9], [89, 128]))
    return one


def main() -> None:
    training = TrainRunInfo(id="run-1", work=TrainWorkInfo(step=4, policy=PolicySpan(start=2, end=3)))
    evaluating = TrainRunInfo(id="run-1", work=EvalWorkInfo(step=4, policy=PolicySpan(start=3, end=3)))
    frozen = TrainRunInfo(id="run-1", work=TrainWorkInfo(step=4))
    prime_rl = [
        episode("e1", [solved("solved")], group="g1", run=training),
        episode("e2", [cut_off()], group="g1", run=training),
        episode("e3", [two_turns()], group="g1", run=training),
        episode("e4", [failed()], group="g2", run=training),
        episode("e5", [unscored()], group="g2", run=training),
        episode("e6", [solved("evaluated")], group="g3", run=evaluating),
        episode("e7", [solved("solver", agent="solver"), judge()], group="g4", run=frozen),
        episode("e8", [], group="g4", run=training),
    ]
    folder = Path("prime_rl/rollouts/step_4/train/all")
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(one.to_record()) + "\n" for one in prime_rl]
    (folder / "traces.jsonl").write_text("".join(lines))
    stream = Path("prime_rl/monitors/file/traces")
    stream.mkdir(parents=True, exist_ok=True)
    (stream / "stream.jsonl").write_text("".join(lines[:2]))
    own = Path("verifiers")
    own.mkdir(exist_ok=True)
    (own / "traces.jsonl").unlink(missing_ok=True)
    run = EvalRunInfo(id="eval-1")
    for one in (solved("a"), relayed(), relayed(reasoning_content="Two and two.")):
        write_episode(own, episode(one.id, [one], group=None, run=run))
    (own / "bare.jsonl").write_text(json.dumps(solved("bare").to_record()) + "\n")


if __name__ == "__main__":
    main()
