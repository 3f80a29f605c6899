"""Lakes of any size from a seed, as real ones look to a query: lengths, classes, entropies, steps.

    python tests/benchmarks/synthetic_lake.py /tmp/lake --tokens 100_000_000

Lengths are log-normal around 600 tokens, groups have 8 rollouts, steps end about every 25 tokens, prompts
come back night after night, entropies are heavy-tailed (half below 0.04 nats, a twentieth above 1.5). Tokens
are those of `tokenizer`: words with a space before them, lines that end in one token with the full stop, a
half character now and then, so that splitting again at newlines finds the steps that are stored. The text of
completions is left out: no query that is measured reads it. Every night is one commit through the lake's own
writer.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipeline import schema
from pipeline.lake import Lake
from pipeline.steps import SPLITTER, mean_step_entropies

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GROUP_SIZE = 8
NIGHT_ROLLOUTS = 16_384
MEDIAN_TOKENS, MAX_TOKENS = 500, 4096  # a log-normal of this median and sigma 0.6 has a mean of 600
STEP_TOKENS = 25
NUM_PROMPTS = 8192
VOCABULARY = 32_768
# As byte-level tokenizers write a space, a newline, and the first two of the three bytes of a root sign.
SPACE, NEWLINE, HALF = "\u0120", "\u010a", "\u00e2\u012a"
LINE_ENDS = (f".{NEWLINE}", f".{NEWLINE}{NEWLINE}", f"){NEWLINE}")
NUM_WORDS = VOCABULARY - len(LINE_ENDS) - 1
HALVES = range(1000, 1004)  # ranks that make them one token in 2,600
FIRST_NIGHT = datetime(2026, 1, 1, tzinfo=UTC)
# Shares of groups: all_success, all_fail, mixed.
CLASS_SHARES = (0.3, 0.25, 0.45)


def build(folder: Path, num_tokens: int, seed: int = 0) -> Lake:
    """A lake of at least `num_tokens` completion tokens, a night's commit after the other."""
    lake = Lake.create(folder)
    for rows in nights(num_tokens, seed):
        lake.commit({"rollouts": rows})
    return lake


def nights(num_tokens: int, seed: int = 0) -> Iterator[pa.Table]:
    """Rows of `rollouts` night by night until there are `num_tokens`, in multiples of a group."""
    done = number = 0
    while done < num_tokens:
        groups = max(1, min(NIGHT_ROLLOUTS, (num_tokens - done) // 600) // GROUP_SIZE)
        rows = night(number, groups, seed)
        done += len(rows["completion_ids"].combine_chunks().values)
        number += 1
        yield rows


def night(number: int, num_groups: int, seed: int = 0) -> pa.Table:
    """One night's rows of `rollouts`."""
    random = np.random.default_rng([seed, number])
    count = num_groups * GROUP_SIZE
    lengths = np.clip(random.lognormal(np.log(MEDIAN_TOKENS), 0.6, count), 8, MAX_TOKENS).astype(np.int64)
    begins = np.concatenate([[0], np.cumsum(lengths)])
    total = int(begins[-1])
    entropies = np.minimum(0.1 * random.standard_exponential(total, np.float32) ** 2.5, np.log(VOCABULARY))
    entropies = entropies.astype(np.float32)
    ends, per_row = _steps(random, begins)
    rows = np.repeat(begins[:-1], per_row)
    rewards, prompts = _rewards(random, num_groups), random.integers(0, NUM_PROMPTS, num_groups)
    group_ids = _names(random, num_groups)
    of_group = np.repeat(np.arange(num_groups), GROUP_SIZE)
    columns = {
        "rollout_id": _names(random, count),
        "group_id": group_ids.take(pa.array(of_group)),
        "prompt_id": _names(np.random.default_rng(seed), NUM_PROMPTS).take(pa.array(prompts[of_group])),
        "run_id": f"night-{number}",
        "night": (FIRST_NIGHT + timedelta(days=number)).date(),
        "origin": "policy",
        "model": "synthetic",
        "tokenizer_hash": _tokenizer_hash(),
        "policy_version": 16 * number,
        "sample_index": np.tile(np.arange(GROUP_SIZE, dtype=np.int32), num_groups),
        "group_size": GROUP_SIZE,
        "temperature": 1.0,
        "max_tokens": MAX_TOKENS,
        "prompt_ids": _prompts(seed).take(pa.array(prompts[of_group])),
        "completion_ids": _lists(begins, _completion_ids(random, begins, rows + ends)),
        "completion_logprobs": _lists(begins, -entropies * random.standard_exponential(total, np.float32)),
        "logprobs_kind": "raw",
        "completion_entropies": _lists(begins, entropies),
        "entropy_kind": "full_vocab",
        "finish_reason": pa.array(np.where(lengths < MAX_TOKENS, "stop", "length")),
        "reward": rewards.ravel(),
        "verifier": "synthetic",
        "step_ends": _lists(np.concatenate([[0], np.cumsum(per_row)]), ends),
        "step_entropies": _lists(
            np.concatenate([[0], np.cumsum(per_row)]), mean_step_entropies(entropies, ends, rows)
        ),
        "splitter": SPLITTER,
        "created_at": FIRST_NIGHT + timedelta(days=number),
    }
    return pa.table({f.name: _column(columns.get(f.name), f.type, count) for f in schema.ROLLOUTS})


def _steps(random: np.random.Generator, begins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the steps within each completion, and how many each completion has."""
    is_end = random.random(begins[-1], np.float32) < 1 / STEP_TOKENS
    is_end[begins[1:] - 2] = False  # the end of the sequence is no step of its own
    is_end[begins[1:] - 1] = True
    ends = np.flatnonzero(is_end) + 1
    per_row = np.diff(np.searchsorted(ends, begins, side="right"))
    return (ends - np.repeat(begins[:-1], per_row)).astype(np.int32), per_row


def _rewards(random: np.random.Generator, num_groups: int) -> np.ndarray:
    """[num_groups, GROUP_SIZE] ones and zeros."""
    kinds = random.choice(len(CLASS_SHARES), num_groups, p=CLASS_SHARES)
    mixed = (random.random((num_groups, GROUP_SIZE)) < 0.5).astype(np.float64)
    mixed[:, 0], mixed[:, 1] = 1.0, 0.0
    return np.where((kinds == 2)[:, None], mixed, (kinds == 0)[:, None].astype(np.float64))


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Words by rank, then the ends of lines, then the end of the sequence."""
    # 300 MiB that a mining of stored steps must not be charged for
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    pieces = [HALF + str(rank) if rank in HALVES else f"{SPACE}w{rank}" for rank in range(NUM_WORDS)]
    pieces += [*LINE_ENDS, "<eos>"]
    backend = Tokenizer(models.BPE({piece: rank for rank, piece in enumerate(pieces)}, []))
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


@cache
def _tokenizer_hash() -> str:
    from pipeline.tokenization import tokenizer_hash

    return tokenizer_hash(tokenizer())


def _completion_ids(random: np.random.Generator, begins: np.ndarray, step_ends: np.ndarray) -> np.ndarray:
    """Words; the last token of each step ends a line, that of each completion the sequence."""
    ids = _token_ids(random, int(begins[-1]))
    ids[step_ends - 1] = NUM_WORDS + random.integers(0, len(LINE_ENDS), len(step_ends))
    ids[begins[1:] - 1] = VOCABULARY - 1
    return ids


def _token_ids(random: np.random.Generator, count: int) -> np.ndarray:
    """Ids of words, whose frequencies fall like 1 / rank."""
    return (NUM_WORDS ** random.random(count, np.float32)).astype(np.int32) - 1


def _prompts(seed: int) -> pa.Array:
    random = np.random.default_rng([seed, NUM_PROMPTS])
    begins = np.concatenate([[0], np.cumsum(random.integers(20, 120, NUM_PROMPTS))])
    return _lists(begins, _token_ids(random, int(begins[-1])))


def _names(random: np.random.Generator, count: int) -> pa.Array:
    """Ids like those of `pipeline.hashing`: 32 hexadecimal digits."""
    digits = random.bytes(16 * count).hex().encode()
    offsets = np.arange(0, 32 * count + 1, 32, dtype=np.int32)
    return pa.StringArray.from_buffers(count, pa.py_buffer(offsets), pa.py_buffer(digits))


def _lists(begins: np.ndarray, values: np.ndarray) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(begins.astype(np.int32)), pa.array(values))


def _column(values: object, kind: pa.DataType, count: int) -> pa.Array:
    if isinstance(values, np.ndarray | pa.Array):
        return pa.array(values).cast(kind)
    if values is None:
        return pa.nulls(count, kind)
    return pa.repeat(pa.scalar(values, kind), count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=100_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    build(options.folder, options.tokens, options.seed)


if __name__ == "__main__":
    main()
