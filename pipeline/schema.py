"""The lake's tables. One place says what each column is called, holds and means.

Arrow schemas are the source: Parquet files are written with them, and `ddl` turns them into the SQL
that creates the tables. `docs/lake.md` explains the columns to users.
"""

from __future__ import annotations

import pyarrow as pa

SCHEMA_VERSION = 3  # 2: scorings; 3: verdicts, forgotten_prompts

_IDS = pa.list_(pa.int32())
_NATS = pa.list_(pa.float32())
_TIME = pa.timestamp("us", tz="UTC")
_COUNTS = pa.map_(pa.string(), pa.int64())

ROLLOUTS = pa.schema(
    [
        ("rollout_id", pa.string()),  # hash of (group_id, sample_index, prompt_ids, completion_ids)
        ("group_id", pa.string()),
        ("prompt_id", pa.string()),
        ("run_id", pa.string()),
        ("night", pa.date32()),
        ("origin", pa.string()),  # policy | trainer | expert
        ("model", pa.string()),
        ("weights_hash", pa.string()),
        ("tokenizer_hash", pa.string()),
        ("policy_version", pa.int64()),  # optimizer steps behind the sampling weights
        ("sample_index", pa.int32()),
        ("group_size", pa.int32()),  # how many rollouts were asked for
        ("seed", pa.int64()),
        ("temperature", pa.float64()),
        ("top_p", pa.float64()),
        ("top_k", pa.int32()),
        ("max_tokens", pa.int32()),
        ("prompt_ids", _IDS),
        ("completion_ids", _IDS),
        ("completion", pa.string()),
        ("completion_logprobs", _NATS),
        ("logprobs_kind", pa.string()),  # raw | processed, null if absent
        ("completion_entropies", _NATS),  # null while a rollout awaits the scorer
        ("entropy_kind", pa.string()),  # full_vocab | full_vocab_tempered | rescored
        ("finish_reason", pa.string()),  # stop | length
        ("reward", pa.float64()),  # the task reward alone, no shaping
        ("reward_parts", pa.map_(pa.string(), pa.float64())),
        ("verifier", pa.string()),
        ("verifier_version", pa.string()),
        ("step_ends", _IDS),  # exclusive; the last equals the number of completion tokens
        ("step_entropies", _NATS),  # mean over the step's tokens
        ("splitter", pa.string()),
        ("created_at", _TIME),
    ]
)

PROMPTS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("data_source", pa.string()),
        ("messages", pa.string()),  # JSON: [{"role", "content"}, …]
        ("ground_truth", pa.string()),
        ("extra_info", pa.string()),  # JSON: what the prompt's source said beside it
        ("created_at", _TIME),
    ]
)

QUARANTINE = pa.schema(
    [
        ("reason", pa.string()),
        ("source", pa.string()),  # the run, or the whole path of the file and the line
        ("run_id", pa.string()),
        ("group_id", pa.string()),
        ("sample_index", pa.int32()),
        ("row", pa.string()),  # JSON
        ("created_at", _TIME),
    ]
)

MINING_RUNS = pa.schema(
    [
        ("mining_id", pa.string()),
        ("snapshot", pa.int64()),
        ("run_id", pa.string()),  # null unless the mining was of one run
        ("config", pa.string()),  # JSON
        ("config_hash", pa.string()),
        ("sql_hash", pa.string()),
        ("groups", _COUNTS),
        ("num_clips", pa.int64()),
        ("dropped", _COUNTS),
        ("seconds", pa.float64()),
        ("created_at", _TIME),
    ]
)

ECHO_CLIPS = pa.schema(
    [
        ("clip_id", pa.string()),
        ("mining_id", pa.string()),
        ("clip_rank", pa.int64()),
        ("group_rank", pa.int64()),
        ("group_id", pa.string()),
        ("rollout_id", pa.string()),
        ("prompt_id", pa.string()),
        ("sample_index", pa.int32()),
        ("policy_version", pa.int64()),
        ("step_index", pa.int32()),
        ("num_steps", pa.int32()),
        ("clip_tokens", pa.int32()),
        ("step_entropy", pa.float32()),
    ]
)

SHARDS = pa.schema(
    [
        ("path", pa.string()),
        ("mining_id", pa.string()),
        ("num_clips", pa.int64()),
        ("num_tokens", pa.int64()),
        ("sha256", pa.string()),
        ("created_at", _TIME),
    ]
)

FILES = pa.schema(
    [
        ("path", pa.string()),  # relative to the lake's folder
        ("table_name", pa.string()),
        ("sha256", pa.string()),
        ("num_rows", pa.int64()),
        ("created_at", _TIME),
    ]
)

CLIP_USES = pa.schema(
    [
        ("training_id", pa.string()),
        ("clip_id", pa.string()),
        ("optim_step", pa.int64()),
        ("clip_loss", pa.float64()),  # nats per clip token, before that step's update
        ("created_at", _TIME),
    ]
)

SCORINGS = pa.schema(
    [
        ("rollout_id", pa.string()),
        ("model", pa.string()),
        ("weights_hash", pa.string()),  # whose entropies the rollout has, if none of its scorings is newer
        ("policy_version", pa.int64()),  # optimizer steps behind those weights
        ("scored_at", _TIME),
    ]
)

VERDICTS = pa.schema(
    [
        ("rollout_id", pa.string()),
        ("verifier", pa.string()),
        ("verifier_version", pa.string()),
        ("reward", pa.float64()),  # null if it hung, died or raised
        ("reward_parts", pa.map_(pa.string(), pa.float64())),
        ("error", pa.string()),  # null if there is a reward
        ("judged_at", _TIME),  # of several verdicts with a reward, the newest counts
    ]
)

FORGOTTEN_PROMPTS = pa.schema(
    [
        ("fingerprint", pa.string()),  # hash of the prompt's content, by which a later one is recognized
        ("kind", pa.string()),  # prompt (its prompt_id) | messages | tokens (of prompt_ids)
        ("prompt_id", pa.string()),
        ("forgotten_at", _TIME),
    ]
)

META = pa.schema([("key", pa.string()), ("value", pa.string())])

TABLES: dict[str, pa.Schema] = {
    "rollouts": ROLLOUTS,
    "prompts": PROMPTS,
    "quarantine": QUARANTINE,
    "mining_runs": MINING_RUNS,
    "echo_clips": ECHO_CLIPS,
    "shards": SHARDS,
    "files": FILES,
    "clip_uses": CLIP_USES,
    "scorings": SCORINGS,
    "verdicts": VERDICTS,
    "forgotten_prompts": FORGOTTEN_PROMPTS,
    "meta": META,
}

# Which columns tell two rows apart; rows that are already there are not written again.
KEYS: dict[str, tuple[str, ...]] = {
    "rollouts": ("rollout_id",),
    "prompts": ("prompt_id",),
    "quarantine": ("source", "group_id", "sample_index", "reason", "row"),
    "mining_runs": ("mining_id",),
    "echo_clips": ("mining_id", "clip_id"),
    "shards": ("path", "sha256"),
    "files": ("path", "sha256"),
    "clip_uses": ("training_id", "clip_id", "optim_step"),
    "scorings": ("rollout_id", "weights_hash", "scored_at"),
    "verdicts": ("rollout_id", "verifier", "verifier_version", "judged_at"),
    "forgotten_prompts": ("fingerprint", "prompt_id"),
    "meta": ("key",),
}

_SQL_TYPES = {
    pa.string(): "varchar",
    pa.date32(): "date",
    pa.int32(): "integer",
    pa.int64(): "bigint",
    pa.float32(): "float",
    pa.float64(): "double",
    _TIME: "timestamptz",
    _IDS: "integer[]",
    _NATS: "float[]",
    _COUNTS: "map(varchar, bigint)",
    pa.map_(pa.string(), pa.float64()): "map(varchar, double)",
}


def ddl(table: str) -> str:
    """The statement that creates one table where it is missing; columns in schema order."""
    columns = ", ".join(f'"{field.name}" {_SQL_TYPES[field.type]}' for field in TABLES[table])
    return f'create table if not exists "{table}" ({columns})'
