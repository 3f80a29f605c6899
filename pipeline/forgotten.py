"""Prompts that must not come back: recognized by hashes, since their text is not kept anywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.hashing import content_id, ids_array
from pipeline.lake_reader import Reader
from pipeline.quarantine import Refused
from pipeline.records import Prompt

# All that quarantine keeps of a refused row of a forgotten prompt.
FORGOTTEN = "the prompt was forgotten"
PLACE = ("run_id", "group_id", "sample_index", "prompt_id")


@dataclass(frozen=True)
class Forgotten:
    """The fingerprints of forgotten prompts: their prompt_id, their messages and their token ids."""

    fingerprints: frozenset[str]

    @classmethod
    def of(cls, reader: Reader) -> Forgotten:
        rows = reader.rows("select distinct fingerprint from forgotten_prompts")
        return cls(frozenset(row["fingerprint"] for row in rows))

    def without(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Those that may be used. The same question with another ground truth is forgotten too."""
        return [
            prompt
            for prompt in prompts
            if not self.fingerprints & {prompt.prompt_id, messages_fingerprint(prompt.messages)}
        ]

    def holds(self, row: Mapping[str, Any]) -> bool:
        """Whether a row, of the lake or of a dump, is of a forgotten prompt."""
        return bool(self.fingerprints & _fingerprints(row))

    def kept_out(
        self, rows: Sequence[dict[str, Any]], sources: Sequence[str], refused: Sequence[Refused]
    ) -> tuple[list[dict[str, Any]], list[str], list[Refused]]:
        """The rows that may enter with their sources, and all that are refused, without their text."""
        good = [(row, source) for row, source in zip(rows, sources, strict=True) if not self.holds(row)]
        bad = [_refused(row, source) for row, source in zip(rows, sources, strict=True) if self.holds(row)]
        before = [_refused(item.row, item.source) if self.holds(item.row) else item for item in refused]
        return [row for row, _ in good], [source for _, source in good], [*before, *bad]

    def rows(self, part: pa.Table) -> frozenset[int]:
        """The numbers of the rows that are of a forgotten prompt; their `messages` are JSON."""
        if not self.fingerprints:
            return frozenset()
        prompts = part.select(["prompt_id", "messages", "prompt_ids"]).to_pylist()
        known: dict[str, bool] = {}
        for prompt in prompts:
            if prompt["prompt_id"] not in known:
                messages = json.loads(prompt["messages"]) if prompt["messages"] else None
                known[prompt["prompt_id"]] = self.holds(prompt | {"messages": messages})
        return frozenset(n for n, prompt in enumerate(prompts) if known[prompt["prompt_id"]])

    def cleaned(self, quarantine: pa.Table) -> pa.Table:
        """Rows of the table `quarantine`; of those of a forgotten prompt only their place."""
        if not self.fingerprints:
            return quarantine
        rows = quarantine.to_pylist()
        for row in rows:
            refused = json.loads(row["row"])
            if self.holds(refused):
                row["reason"] = FORGOTTEN
                row["row"] = json.dumps({name: refused.get(name) for name in PLACE})
        return pa.Table.from_pylist(rows, quarantine.schema)


def messages_fingerprint(messages: Sequence[Mapping[str, str]]) -> str:
    return content_id("messages", [dict(message) for message in messages])


def tokens_fingerprint(prompt_ids: Any) -> str:
    """Of token ids; rollouts whose prompt is known by its tokens only bear it as their prompt_id."""
    return content_id("tokens", ids_array(prompt_ids))


def _refused(row: Mapping[str, Any], source: str) -> Refused:
    return Refused(FORGOTTEN, source, {name: row.get(name) for name in PLACE})


def _fingerprints(row: Mapping[str, Any]) -> set[str]:
    """What of a row tells its prompt. A refused row may hold anything."""
    found = {row["prompt_id"]} if isinstance(row.get("prompt_id"), str) else set()
    prompt, ids = row.get("prompt", row.get("messages")), row.get("prompt_ids")
    if isinstance(prompt, str):
        found.add(messages_fingerprint([{"role": "user", "content": prompt}]))
    elif isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt):
        found.add(content_id("messages", json.loads(json.dumps(prompt, default=str))))
    if ids is not None:
        try:
            found.add(tokens_fingerprint(ids))
        except (TypeError, ValueError, OverflowError):  # no token ids: then they tell nothing
            return found
    return found
