"""Writes the dumps of verifiers before 0.4 with verifiers' own code: `pip install verifiers==0.1.14`.

Run from this folder; the times are fixed, so that it writes the same bytes again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from verifiers.types import RolloutTiming, State, TimeSpan
from verifiers.utils.save_utils import save_outputs, state_to_output

NOON = 1780315200.0  # 2026-06-01 12:00 UTC
ASKED = [{"role": "user", "content": "2+2?"}]


def step(prompt_ids: list[int], completion_ids: list[int], **changes: Any) -> dict[str, Any]:
    tokens = {
        "prompt_ids": prompt_ids,
        "prompt_mask": [0] * len(prompt_ids),
        "completion_ids": completion_ids,
        "completion_mask": [1] * len(completion_ids),
        "completion_logprobs": [-0.125] * len(completion_ids),
        "overlong_prompt": False,
        "is_truncated": False,
        "routed_experts": None,
    }
    return {"prompt": ASKED, "completion": [], "tokens": tokens | changes, "is_truncated": False}


def output(answer: str | list, trajectory: list | None = None, **changes: Any) -> Any:
    state = State(
        input={"prompt": ASKED, "example_id": 7, "answer": "4"},
        completion=[{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer,
        reward=1.0,
        metrics={"correct": 1.0, "num_turns": 1.0},
        timing=RolloutTiming(start_time=NOON, generation=TimeSpan(start=NOON, end=NOON + 1)),
        is_completed=True,
        is_truncated=False,
        trajectory=trajectory or [],
    )
    state.update(changes)
    return state_to_output(state, ["trajectory"] if trajectory else None)


def main() -> None:
    call = {"id": "t", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    turns = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "t", "content": "4"},
        {"role": "assistant", "content": "4"},
    ]
    text = [
        output("4"),
        output("44444", is_truncated=True, reward=0.0, metrics={"correct": 0.0, "num_turns": 1.0}),
        output(turns),
        output("4", error=ValueError("no answer"), reward=0.0),
        output("4", is_completed=False, reward=0.0),
    ]
    tokens = [
        output("4", [step([1, 2, 3], [52, 128])]),
        output(turns, [step([1, 2, 3], [60]), step([1, 2, 3, 60, 70], [52, 128])]),
        output("4", [step([1, 2, 3], [52, 70, 128], completion_mask=[1, 0, 1])]),
        output("", [step([1, 2, 3], [], overlong_prompt=True)]),
    ]
    save_outputs(text, Path("verifiers_old"))
    save_outputs(tokens, Path("verifiers_old/with_tokens"))


if __name__ == "__main__":
    main()
