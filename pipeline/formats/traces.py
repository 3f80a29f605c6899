"""Traces of verifiers 0.4, as prime-rl and verifiers write them: one Episode, or one Trace, a line.

A trace is a graph of messages. `mask` marks the tokens that the model sampled; `logprobs` and
`entropies` are compact: one value per marked token, not per token. The reward is not written: it is the
sum of score × weight. None is left out. A trace becomes a rollout only if one message of it was sampled:
its prompt is everything before, and no token of the environment enters the completion.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.errors import FormatError
from pipeline.formats.fields import (
    began,
    is_count,
    items,
    known_messages,
    member,
    messages,
    number,
    per_token,
    said,
    sampled_run,
    sampled_text,
    token_ids,
    truth,
)
from pipeline.formats.source_rows import SourceRow

# The writer's own list of what cuts a rollout short, beside a last call that ran into its length.
CUT_SHORT = ("max_turns", "max_input_tokens", "max_output_tokens", "max_total_tokens", "compaction_failed")


def is_episode(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("traces"), list) and isinstance(row.get("task"), dict)


def is_trace(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("nodes"), list) and isinstance(row.get("task"), dict)


def traces(lines: Iterator[SourceRow]) -> Iterator[SourceRow]:
    """Each trace alone, as {"episode": the rest of its line, "trace": …}; a line without one is refused."""
    for line in lines:
        if line.problem:
            yield line
            continue
        episode = {name: value for name, value in line.values.items() if name != "traces"}
        if is_trace(line.values):
            yield SourceRow(line.source, {"episode": {}, "trace": line.values})
        elif not is_episode(line.values):
            yield SourceRow(line.source, line.values, "neither an Episode nor a Trace of verifiers")
        elif not line.values["traces"]:
            yield SourceRow(line.source, line.values, f"the episode has no trace{_error(line.values)}")
        else:
            several = len(line.values["traces"]) > 1
            for number, trace in enumerate(line.values["traces"], start=1):
                source = f"{line.source} trace {number}" if several else line.source
                problem = None if isinstance(trace, dict) else "the trace is no JSON object"
                yield SourceRow(source, {"episode": episode, "trace": trace}, problem)


def trace_group(file: str, row: Mapping[str, Any]) -> str | None:
    """The group that the trainer named, or else the step and task, within its run; each agent has its own.

    Args:
        file: stands for the run where none is named.
    """
    episode, trace = row["episode"], row["trace"]
    run = _name(member(episode, "run")) or file
    agent = member(trace, "agent").get("name")
    named = member(episode, "group").get("id")
    if not named:
        named, step = _task(trace) or _task(episode), member(member(episode, "run"), "work").get("step")
        if named and is_count(step):  # every step may draw the task again
            named = f"step {step}/{named}"
    if not isinstance(named, str):
        return None
    env = _name(member(episode, "env"))
    return "/".join(name for name in (run, env, named, agent) if isinstance(name, str) and name != "agent")


def trace_id(row: Mapping[str, Any]) -> str | None:
    """The trace's own name, which it keeps in whatever file it is."""
    found = row["trace"].get("id")
    return found if isinstance(found, str) else None


def _task(row: Mapping[str, Any]) -> str | None:
    task = member(row, "task")
    index = member(task, "data").get("idx")
    named = task.get("key") or task.get("hash") or (str(index) if is_count(index) else None)
    return named if isinstance(named, str) else None


def trace_values(row: Mapping[str, Any]) -> dict[str, Any]:
    """One trace in the words of `rollouts`.

    Raises:
        FormatError: it failed, was never scored, is not the policy's, or has several sampled turns.
    """
    episode, trace = row["episode"], row["trace"]
    _refuse(episode, trace)
    nodes = items(trace, "nodes")
    path = _path_to_sampled(nodes)
    calls = [call for call in items(trace, "calls") if isinstance(call, dict) and not call.get("error")]
    cut = trace.get("stop_condition") in CUT_SHORT or (calls and calls[-1].get("finish_reason") == "length")
    reward, parts = _reward(member(trace, "rewards"))
    data = member(member(trace, "task"), "data")
    policy = member(member(member(episode, "run"), "work"), "policy")
    call = calls[-1] if calls else {}
    return said(
        _tokens_or_text(path)
        | {
            "reward": reward,
            "reward_parts": parts,
            "finish_reason": "length" if cut else "stop",
            # the oldest weights that any of its tokens came from
            "policy_version": policy.get("start"),
            "model": call.get("model"),
            **_sampling(member(call, "sampling")),
            "ground_truth": truth(data.get("answer")),
            "data_source": _name(member(episode, "env")),
            "verifier": _name(member(episode, "env")),
            "verifier_version": _build(member(trace, "verifiers")),
            **began(member(trace, "timing").get("start")),
        }
    )


def _refuse(episode: Mapping[str, Any], trace: Mapping[str, Any]) -> None:
    work = member(member(episode, "run"), "work")
    if work.get("type") == "eval":
        raise FormatError("sampled to evaluate a training run: clips of it would train on the test set")
    if member(trace, "agent").get("trainable") is False:
        raise FormatError("the agent is not trained: its tokens are not the policy's")
    if trace.get("ok") is False or trace.get("errors"):
        raise FormatError(f"the rollout failed{_error(trace)}")


def _path_to_sampled(nodes: Sequence[Any]) -> list[Mapping[str, Any]]:
    """The messages from the first to the only sampled one."""
    if not all(isinstance(node, dict) for node in nodes):
        raise FormatError("`nodes` holds something that is no message")
    sampled = [number for number, node in enumerate(nodes) if node.get("sampled") or _marks(node)]
    if len(sampled) != 1:
        raise FormatError("several sampled turns" if sampled else "no message of it was sampled")
    path: list[Mapping[str, Any]] = []
    number: int | None = sampled[0]
    while number is not None:
        path.append(nodes[number])
        parent = nodes[number].get("parent")
        if parent is not None and (not is_count(parent) or parent >= number):  # it could go round in circles
            raise FormatError("the `parent` of a message does not stand before it")
        number = parent
    return path[::-1]


def _marks(node: Mapping[str, Any]) -> bool:
    flags = node.get("mask")
    return isinstance(flags, list) and any(flags)


def _tokens_or_text(path: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    last = path[-1]
    if not last.get("token_ids"):
        message = member(last, "message")
        return {
            "messages": messages([node.get("message") for node in path[:-1]], "nodes"),
            "completion": sampled_text(message),
        }
    prompt_ids = [token for node in path[:-1] for token in token_ids(items(node, "token_ids"), "token_ids")]
    ids = token_ids(last["token_ids"], "token_ids")
    start, end = sampled_run(last.get("mask"), "mask", len(ids))
    entropies = per_token(last.get("entropies"), "entropies", end - start)
    return {
        "messages": known_messages([node.get("message") for node in path[:-1]], "nodes"),
        "prompt_ids": prompt_ids + ids[:start],
        "completion_ids": ids[start:end],
        "completion_logprobs": per_token(last.get("logprobs"), "logprobs", end - start),
        "completion_entropies": entropies,
        # the trainer's, of weights that may be younger than those that sampled
        "entropy_kind": "rescored" if entropies else None,
    }


def _reward(rewards: Mapping[str, Any]) -> tuple[float, dict[str, float]]:
    """Σ score × weight and its summands. That nothing was scored is not a reward of 0."""
    parts = {}
    for name, reward in rewards.items():
        if reward is None:
            continue
        score, weight = number(member(rewards, name), "score"), number(member(rewards, name), "weight", 1.0)
        parts[name] = score * weight
    if not parts:
        raise FormatError("it has no rewards: scoring did not run")
    return sum(parts.values()), parts


def _sampling(sampling: Mapping[str, Any]) -> dict[str, Any]:
    return {name: sampling.get(name) for name in ("temperature", "top_p", "top_k", "max_tokens", "seed")}


def _name(info: Mapping[str, Any]) -> str | None:
    name = info.get("id") or info.get("name")
    return name if isinstance(name, str) else None


def _build(info: Mapping[str, Any]) -> str | None:
    """What the writer calls its build; None if it is unknown."""
    version, commit = info.get("version"), info.get("commit")
    if not isinstance(version, str):
        return None
    return f"verifiers {version}+{commit[:12]}" if isinstance(commit, str) else f"verifiers {version}"


def _error(row: Mapping[str, Any]) -> str:
    """The last error's kind and words, if there is one."""
    errors = row.get("errors")
    last = errors[-1] if isinstance(errors, list) and errors else None
    if not isinstance(last, dict):
        return ""
    return f": {last.get('type')!s:.60}: {last.get('message')!s:.120}"
