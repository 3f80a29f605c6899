"""Prompts that must not come back: recognized by hashes, since their text is not kept anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import FormatError, LakeError
from pipeline.formats.fields import content_text
from pipeline.hashing import DIGEST_CHARS, content_id, ids_array
from pipeline.lake import Lake
from pipeline.lake_reader import Reader
from pipeline.lake_writer import Writer
from pipeline.quarantine import Refused
from pipeline.records import Prompt

# All that quarantine keeps of a refused row of a forgotten prompt.
FORGOTTEN = "the prompt was forgotten"
PLACE = ("run_id", "group_id", "sample_index", "prompt_id")
_ALL = "select distinct fingerprint from forgotten_prompts"


@dataclass(frozen=True)
class Forgotten:
    """The fingerprints of forgotten prompts: their prompt_id, their messages and their token ids."""

    fingerprints: frozenset[str]

    @classmethod
    def of(cls, lake: Lake) -> Forgotten:
        with lake.reader() as reader:
            return cls.as_of(reader)

    @classmethod
    def as_of(cls, reader: Reader) -> Forgotten:
        return cls(frozenset(row["fingerprint"] for row in reader.rows(_ALL)))

    @classmethod
    def in_turn(cls, writer: Writer) -> Forgotten:
        """As of the commit that is under way: no prompt is forgotten before it is done."""
        return cls(frozenset(fingerprint for (fingerprint,) in writer.connection.execute(_ALL).fetchall()))

    def commit(self, lake: Lake, tables: Mapping[str, pa.Table]) -> None:
        """`Lake.commit` of what was made of rows that were read when these were all.

        Raises:
            LakeError: more prompts were forgotten meanwhile, or the lake cannot be written.
        """

        def change(writer: Writer) -> None:
            if Forgotten.in_turn(writer) != self:
                raise LakeError(
                    f"Prompts of the lake in {lake.folder} were forgotten meanwhile. "
                    "Nothing was recorded; run the command again."
                )
            writer.append(tables)

        lake.changed(change)

    def without(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Those that may be used. The same question with another ground truth is forgotten too."""
        return [
            prompt
            for prompt in prompts
            if not self.fingerprints & {prompt.prompt_id, messages_fingerprint(prompt.messages)}
        ]

    def holds(self, row: Any) -> bool:
        """Whether a row, of the lake or of a dump, is of a forgotten prompt. It may hold anything."""
        return any(fingerprint in self.fingerprints for fingerprint in _fingerprints(row))

    def emptied(self, refused: Sequence[Refused]) -> list[Refused]:
        """Refused rows; those of forgotten prompts without their text."""
        if not self.fingerprints:
            return list(refused)
        return [emptied(item) if self.holds(item.row) else item for item in refused]

    def rows(self, rollouts: pa.Table, prompts: pa.Table | None) -> frozenset[int]:
        """The numbers of the rollouts that are of a forgotten prompt.

        Args:
            prompts: what is known of them in words, of the schema of `prompts`.
        """
        if not self.fingerprints:
            return frozenset()
        known = self.fingerprints | self._asked(prompts)
        ids = rollouts["prompt_id"].to_pylist()
        return frozenset(
            number
            for number, (prompt_id, tokens) in enumerate(zip(ids, rollouts["prompt_ids"], strict=True))
            if prompt_id in known or tokens_fingerprint(tokens.values.to_numpy()) in self.fingerprints
        )

    def prompts(self, prompts: pa.Table, left_out: frozenset[str]) -> pa.Table:
        """Rows of `prompts` that may enter.

        Args:
            left_out: ids of prompts that are known by their tokens as forgotten.
        """
        gone = self.fingerprints | self._asked(prompts) | left_out
        return prompts.filter(
            pa.array([prompt_id not in gone for prompt_id in prompts["prompt_id"].to_pylist()])
        )

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

    def _asked(self, prompts: pa.Table | None) -> frozenset[str]:
        """The ids of prompts that ask what a forgotten one asked."""
        asked = [] if prompts is None else prompts.select(["prompt_id", "messages"]).to_pylist()
        return frozenset(
            prompt["prompt_id"]
            for prompt in asked
            if prompt["messages"]
            and messages_fingerprint(json.loads(prompt["messages"])) in self.fingerprints
        )


def messages_fingerprint(messages: Sequence[Mapping[str, str]]) -> str:
    return content_id("messages", [dict(message) for message in messages])


def tokens_fingerprint(prompt_ids: Any) -> str:
    """Of token ids; rollouts whose prompt is known by its tokens only bear it as their prompt_id."""
    return content_id("tokens", ids_array(prompt_ids))


def _fingerprints(row: Any) -> Iterator[str]:
    """Of every text, list of messages and list of token ids in a row, under whatever name and however deep.

    Readers of other trainers' dumps name the prompt as these do, and a row they refuse is kept as it came.
    """
    left = [row]
    while left:
        value = left.pop()
        if isinstance(value, str):
            if len(value) == DIGEST_CHARS:
                yield value  # a prompt_id of ours, under whatever name
            yield messages_fingerprint([{"role": "user", "content": value}])
            left += _parsed(value)
        elif isinstance(value, dict):
            if isinstance(value.get("prompt_id"), str):
                yield value["prompt_id"]  # a dump's own, of any form
            left += value.values()
        elif _are_ids(value):
            yield tokens_fingerprint(value)
        elif isinstance(value, list | tuple):
            yield from _beginnings(value)
            left += value


def _parsed(text: str) -> list[Any]:
    """The list or object that a text may spell."""
    if not text.startswith(("[", "{")):
        return []
    try:
        return [json.loads(text)]
    except (ValueError, RecursionError):  # it spells none
        return []


def _are_ids(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "iu"
    return isinstance(value, list | tuple) and all(type(one) is int and abs(one) < 2**31 for one in value)


def _beginnings(messages: Sequence[Any]) -> Iterator[str]:
    """Of the first messages of a conversation, of the first two, and so on: any may be the prompt."""
    plain = []
    for message in messages:
        try:
            content = content_text(message["content"], "messages")
        except (TypeError, KeyError, FormatError):  # no message: then it tells nothing
            return
        plain.append({"role": message.get("role") or "user", "content": content})
        yield messages_fingerprint(plain)


def emptied(refused: Refused) -> Refused:
    """A refused row of a forgotten prompt, without its text."""
    return Refused(FORGOTTEN, refused.source, {name: refused.row.get(name) for name in PLACE})
