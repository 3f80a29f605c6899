"""Every setting, with its default and its meaning; read from TOML, overridden by the command line.

Each section is what one stage takes, so a stage never sees another's settings. Unknown keys are
refused with the nearest valid name.
"""

from __future__ import annotations

import tomllib
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from pipeline.config_keys import nearest_key
from pipeline.config_section import Section
from pipeline.delimiters import written_delimiter
from pipeline.errors import ConfigError
from pipeline.objective_checks import idle_option, sampled_logprobs_known
from pipeline.objective_config import REFUSED, ObjectiveConfig, owner_hint

DEFAULT_LAKE = Path("data/lake")
ARITH_PROMPTS = "arith"


class SamplingConfig(Section):
    group_size: int = Field(8, ge=1, description="rollouts per prompt")
    temperature: float = Field(1.0, gt=0, description="sampling temperature")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus mass that is sampled from; 1 keeps all")
    top_k: int = Field(0, ge=0, description="most likely tokens that are sampled from; 0 keeps all")
    max_tokens: int = Field(256, ge=1, description="completion tokens at most")
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), description="strings that end a completion, which keeps them"
    )
    seed: int = Field(0, ge=0, description="decides, with group and sample, each sample's noise")


class VllmConfig(Section):
    max_num_seqs: int = Field(256, ge=1, description="rollouts that run at once")
    max_num_batched_tokens: int | None = Field(
        None, ge=1, description="tokens of one forward pass; none: vLLM's own"
    )
    max_model_len: int | None = Field(
        None, ge=2, description="prompt and completion tokens at most; none: the model's"
    )
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="share of a GPU's memory that an engine takes"
    )
    kv_cache_gib: float = Field(2.0, gt=0, description="size of the KV cache on a CPU")
    tensor_parallel: int = Field(1, ge=1, description="GPUs that share one model")
    data_parallel: int = Field(1, ge=1, description="engines side by side, each with GPUs of its own")
    enforce_eager: bool | None = Field(
        None, description="no compilation and no CUDA graphs: starts sooner; none: only on a CPU"
    )
    head_dtype: Literal["float32", "model"] = Field(
        "float32", description="of the output layer; float32 as trainers compute it, or the model's"
    )
    in_process: bool = Field(
        False, description="the engine core in this process, for debugging; slow on a CPU"
    )
    sampler: Literal["tap", "vllm"] = Field(
        "tap", description="who draws the tokens: the entropy tap, by seed, or vLLM's sampler"
    )
    max_restarts: int = Field(3, ge=0, description="restarts of an engine without a group finished between")


class ServerConfig(Section):
    endpoints: tuple[str, ...] = Field(
        (), description="base URLs of `vllm serve`, such as http://gpu1:8000/v1"
    )
    model: str | None = Field(None, description="the name it is served under; none: the only one there")
    api_key_env: str | None = Field(None, description="environment variable that holds the API key")
    concurrency: int = Field(32, ge=1, description="groups in flight at one endpoint")
    timeout_seconds: float = Field(
        600.0, gt=0, description="an answer that takes longer is asked for elsewhere"
    )
    max_attempts: int = Field(5, ge=1, description="attempts at one group, over all endpoints")
    patience_seconds: float = Field(
        300.0,
        ge=0,
        description="how long to wait for endpoints that were there and none of which can be reached now",
    )


class EngineConfig(Section):
    kind: Literal["auto", "vllm", "transformers", "server"] = Field(
        "auto", description="what samples the rollouts; auto: vLLM where it is installed, else transformers"
    )
    batch_rollouts: int = Field(
        512,
        ge=1,
        description="rollouts verified and committed together; transformers samples as many",
    )
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$", description="auto, cpu, cuda or cuda:N"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the weights; auto: bfloat16 on CUDA, float32 on CPU"
    )
    entropy_kind: Literal["full_vocab", "full_vocab_tempered"] = Field(
        "full_vocab", description="entropy at temperature 1, or of the tempered distribution"
    )
    entropy_bits: int = Field(
        10,
        ge=1,
        le=23,
        description="mantissa bits of stored entropies; 23 keeps all, 10 err by 0.05 %",
    )
    logprob_bits: int = Field(
        23, ge=1, le=23, description="mantissa bits of stored log-probs; ratios need them all"
    )
    vllm: VllmConfig = Field(default_factory=VllmConfig)
    server: ServerConfig = Field(default_factory=ServerConfig)


class ScoreConfig(Section):
    batch_tokens: int | None = Field(
        None, ge=1, description="padded tokens in one forward pass of the scorer; none: what suits the device"
    )


class VerifyConfig(Section):
    verifier: str = Field("exact", description="exact, math, reasoning_gym, or module:function of your own")
    timeout_seconds: float = Field(10.0, gt=0, description="a verifier that takes longer is killed")
    workers: int = Field(2, ge=1, description="verifier processes")


class MiningConfig(Section):
    scope: Literal["zero_advantage", "any_success"] = Field(
        "zero_advantage", description="mine all_success groups only, or every group with a success"
    )
    clips_per_group: int = Field(1, ge=1, description="clips a group yields at most")
    min_step_tokens: int = Field(1, ge=1, description="shorter steps are no candidates")
    max_clip_tokens: int | None = Field(None, ge=1, description="a clip ends within so many tokens")
    min_step_entropy: float = Field(0.0, ge=0, description="nats; clips whose step is surer are dropped")
    allow_truncated: bool = Field(False, description="rollouts cut off by max_tokens count as successes")
    allow_partial: bool = Field(False, description="groups that lost rollouts are classed all the same")
    min_group_size: int = Field(2, ge=1, description="smaller groups are incomplete")
    max_policy_lag: int | None = Field(None, ge=0, description="optimizer steps a clip may be behind")
    policy_version: int | None = Field(
        None, ge=0, description="what lag counts from; default: the model's greatest in the snapshot"
    )
    max_clips: int | None = Field(None, ge=0, description="clips kept in all")
    max_clips_per_prompt: int | None = Field(None, ge=0, description="clips kept of one prompt")
    delimiter: Annotated[str | None, AfterValidator(written_delimiter)] = Field(
        None, description=r"white space that ends a step, as \n or \x20; none: the steps as stored"
    )
    success_reward: float = Field(1.0, description="the reward of a success")
    fail_reward: float = Field(0.0, description="the reward of a failure")
    reward_tolerance: float = Field(1e-6, ge=0, description="rewards this close are equal")
    entropy_kind: Literal["full_vocab", "full_vocab_tempered", "rescored"] | None = Field(
        None, description="which kind to rank, where the lake holds several"
    )


class ExportConfig(Section):
    exclude_prompts: Path | None = Field(
        None, description="prompt file (or prompt ids, one a line) whose clips are kept out"
    )
    max_tokens: int | None = Field(None, ge=1, description="longer prompt + clip is dropped")
    clips_per_shard: int = Field(4096, ge=1, description="clips in one Parquet file")


class TrainConfig(ObjectiveConfig):
    optim_steps: int = Field(4, ge=0, description="optimizer steps; 0 skips training")
    updates_per_batch: int = Field(1, ge=1, description="optimizer steps on each batch of rollouts")
    prompts_per_step: int = Field(8, ge=1, description="on-policy groups in a step")
    group_size: int = Field(8, ge=2, description="on-policy rollouts per prompt")
    echo_source: Literal["shards", "online", "both"] = Field(
        "shards", description="EchoClips mined before, of the groups that a step samples, or both"
    )
    clips_per_step: int = Field(16, ge=0, description="EchoClips of shards in a step")
    echo_weight: float = Field(1e-3, ge=0, description="λ, the weight of the EchoClip term")
    echo_weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        {}, description="λ of single models by their name; of others it is echo_weight"
    )
    echo_warmup_steps: int = Field(0, ge=0, description="optimizer steps in which λ grows to its value")
    max_clip_uses: int | None = Field(None, ge=1, description="steps that a clip is used in at most")
    retire_below_loss: float | None = Field(
        None, gt=0, description="nats per token; a clip of a smaller loss is not used again"
    )
    max_clip_lag: int | None = Field(
        None, ge=0, description="optimizer steps that a clip may be behind the policy"
    )
    lr: float = Field(2e-5, gt=0, description="AdamW learning rate")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    batch_tokens: int = Field(16384, ge=1, description="tokens in one forward pass, padding included")
    seed: int = Field(0, ge=0, description="order of prompts and clips, and on-policy noise")
    checkpoint_every: int = Field(
        10, ge=0, description="optimizer steps between states that a killed training goes on from; 0: none"
    )
    keep_checkpoints: int = Field(2, ge=1, description="so many of these states are kept, the last ones")

    grad_norms_every: int = Field(
        50,
        ge=0,
        description="optimizer steps between two measurements of both terms' gradient norms where they share "
        "a forward pass (clips online); each costs a second backward pass; 0: none",
    )
    tensorboard: bool = Field(True, description="write TensorBoard's event files beside metrics.jsonl")
    engine: Literal["model", "vllm"] = Field(
        "model", description="what samples: the model itself, or vLLM, given its weights after each step"
    )

    def of_steps(self) -> dict[str, Any]:
        """What decides the steps, as JSON values: not how they are kept, shown, and cut into passes.

        `batch_tokens` moves losses by rounding alone, and must change where memory ran out.
        """
        kept_or_cut = {"checkpoint_every", "keep_checkpoints", "tensorboard", "batch_tokens"}
        return self.model_dump(mode="json", exclude=kept_or_cut)

    def of_model(self, name: str) -> TrainConfig:
        """With the λ of the model of this name, if `echo_weights` has one."""
        return self.model_copy(update={"echo_weight": self.echo_weights.get(name, self.echo_weight)})


class MaintainConfig(Section):
    retention_days: int = Field(
        90, ge=0, description="snapshots that a mining or training of so many days names are kept"
    )
    merge_below_mib: int = Field(64, ge=1, description="data files smaller than this are merged")
    grace_hours: float = Field(
        24.0, ge=0, description="what merging or expiring replaced stays so long for whoever reads it"
    )


class NightlyConfig(Section):
    model: str = Field("arith", description="arith, smollm2, or a Hugging Face model folder")
    prompts: str = Field(
        ARITH_PROMPTS, description="arith, Parquet or JSONL file, or reasoning_gym:<task>?size=N&…"
    )
    max_prompts: int | None = Field(None, ge=1, description="only the first N prompts")
    night: date | None = Field(None, description="the night's date; default: today in UTC")
    on_overlap: Literal["wait", "refuse"] = Field(
        "wait", description="what a night does while another one runs on the same lake"
    )
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    score: ScoreConfig = Field(default_factory=ScoreConfig)
    verify: VerifyConfig = Field(default_factory=VerifyConfig)
    mining: MiningConfig = Field(default_factory=MiningConfig)
    export: ExportConfig = Field(default_factory=ExportConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    maintain: MaintainConfig = Field(default_factory=MaintainConfig)

    @model_validator(mode="after")
    def _refuse_what_nothing_reads(self) -> NightlyConfig:
        known = sampled_logprobs_known("raw", self.sampling)  # the engine that a training samples with
        why = idle_option(self.train, self.sampling.max_tokens, self.sampling.temperature, known)
        if why is not None:
            raise PydanticCustomError(REFUSED, why)
        return self


ConfigT = TypeVar("ConfigT", bound=Section)


def load_config(path: Path | None, overrides: dict[str, Any] | None = None) -> NightlyConfig:
    """The configuration of a TOML file (or the defaults), with overrides on top.

    Args:
        overrides: nested like the file; the command line's options. None values are left out.

    Raises:
        ConfigError: no such file, not TOML, an unknown key, or a value out of range.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"There is no config file {path}. Check --config.") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
            raise ConfigError(f"{path} is no readable TOML: {error}. Mend it there.") from None
        # alone first, so that the file is blamed for its own mistakes only
        validated(NightlyConfig, values, where=str(path))
    return validated(NightlyConfig, _merged(values, overrides or {}), where="the options")


def validated(model: type[ConfigT], values: dict[str, Any], where: str) -> ConfigT:
    """`values` as a section, or a ConfigError that names the first bad key and the cure."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            meant = owner_hint(first["loc"]) or nearest_key(model, first["loc"])
            raise ConfigError(f"Unknown config key `{key}` in {where}: {meant}") from None
        if first["type"] == REFUSED:
            raise ConfigError(f"In {where}, {first['msg']}.") from None
        why = first["msg"].removeprefix("Value error, ")
        raise ConfigError(
            f"Config key `{key}` in {where} is {first['input']!r:.80}: {why}. Give a valid value."
        ) from None


def _merged(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        if isinstance(value, dict):
            below = merged.get(key, {})
            merged[key] = _merged(below if isinstance(below, dict) else {}, value)
        elif value is not None:
            merged[key] = value
    return merged
