"""What the trainer minimizes on rollouts: the objective, each objective's own options, the correction.

Defaults are those of the paper or repository that an objective comes from. An option lies in its owner's
section, and one that the chosen objective would not read is refused.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias, cast

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from pipeline.config_section import Section

REFUSED = "refused"  # the type of an error whose message says all there is to say

ClipLow: TypeAlias = Annotated[float, Field(gt=0, lt=1, description="ratio clip below 1")]
ClipHigh: TypeAlias = Annotated[float, Field(gt=0, description="ratio clip above 1")]
ScaleRewards: TypeAlias = Annotated[bool, Field(description="divide advantages by the group's deviation")]
AdvantageEpsilon: TypeAlias = Annotated[
    float, Field(gt=0, description="added to that deviation; 1e-4 in TRL, 1e-6 in verl")
]
NormTokens: TypeAlias = Annotated[
    int | None,
    Field(ge=1, description="tokens that each rollout's sum is divided by; none: sampling.max_tokens"),
]
EntropyWeight: TypeAlias = Annotated[
    float, Field(ge=0, description="weight of the entropy bonus, the mean entropy per token")
]


class GrpoConfig(Section):
    clip_low: ClipLow = 0.2
    clip_high: ClipHigh = 0.2
    scale_rewards: ScaleRewards = True
    advantage_epsilon: AdvantageEpsilon = 1e-6


class DapoConfig(Section):
    clip_low: ClipLow = 0.2
    clip_high: ClipHigh = 0.28
    scale_rewards: ScaleRewards = True
    advantage_epsilon: AdvantageEpsilon = 1e-6
    dynamic_sampling: bool = Field(True, description="replace groups of equal task rewards by others")
    max_refills: int = Field(
        10, ge=0, description="batches of further prompts that a step samples at most, to replace those"
    )
    overlong_buffer_tokens: int | None = Field(
        None,
        ge=0,
        description="last tokens of sampling.max_tokens, where rewards fall; none: a fifth of all",
    )
    overlong_penalty: float = Field(1.0, ge=0, description="what a completion of sampling.max_tokens loses")


class DrGrpoConfig(Section):
    clip_low: ClipLow = 0.2
    clip_high: ClipHigh = 0.2
    scale_rewards: ScaleRewards = False
    advantage_epsilon: AdvantageEpsilon = 1e-6
    norm_tokens: NormTokens = None


class GspoConfig(Section):
    clip_low: ClipLow = 3e-4
    clip_high: ClipHigh = 4e-4
    scale_rewards: ScaleRewards = True
    advantage_epsilon: AdvantageEpsilon = 1e-6


class LuffyConfig(Section):
    shaping_gamma: float = Field(0.1, gt=0, description="γ of the shaping π / (π + γ) of expert tokens")
    experts_per_group: int = Field(1, ge=1, description="expert rollouts at most that join a group")
    experts_in_statistics: bool = Field(
        True, description="expert rewards count in a group's mean and deviation"
    )
    clip_low: float | None = Field(
        None, gt=0, lt=1, description="ratio clip below 1 of the policy's own tokens; none: no clip"
    )
    clip_high: float | None = Field(
        None, gt=0, description="ratio clip above 1 of the policy's own tokens; none: no clip"
    )
    scale_rewards: ScaleRewards = False
    advantage_epsilon: AdvantageEpsilon = 1e-6
    norm_tokens: NormTokens = None
    entropy_weight: EntropyWeight = 1e-3


class UftConfig(Section):
    clip_low: ClipLow = 0.2
    clip_high: ClipHigh = 0.2
    scale_rewards: ScaleRewards = True
    advantage_epsilon: AdvantageEpsilon = 1e-6
    entropy_weight: EntropyWeight = 1e-3
    sft_weight: float = Field(1e-3, ge=0, description="weight of the mean NLL of the hints' tokens")
    hint_chunks: int = Field(5, ge=1, description="chunks that an expert solution is cut into")
    hint_start: float = Field(0.95, ge=0, le=1, description="share of the chunks that is shown at first")
    hint_end: float = Field(0.05, ge=0, le=1, description="share of the chunks that is shown at last")
    hint_steps: int = Field(300, ge=0, description="optimizer steps from the first share to the last")


Options: TypeAlias = GrpoConfig | DapoConfig | DrGrpoConfig | GspoConfig | LuffyConfig | UftConfig
OWNERS: dict[str, type[Section]] = {
    "grpo": GrpoConfig,
    "dapo": DapoConfig,
    "dr_grpo": DrGrpoConfig,
    "gspo": GspoConfig,
    "luffy": LuffyConfig,
    "uft": UftConfig,
}

# An option, and the value of another one of its section under which nothing reads it.
IDLE: dict[str, tuple[str, object]] = {
    "advantage_epsilon": ("scale_rewards", False),
    "max_refills": ("dynamic_sampling", False),
    "overlong_penalty": ("overlong_buffer_tokens", 0),
    "overlong_buffer_tokens": ("overlong_penalty", 0),
    "hint_end": ("hint_steps", 0),
}


class ObjectiveConfig(Section):
    objective: Literal["grpo", "dapo", "dr_grpo", "gspo", "luffy", "uft"] = Field(
        "grpo", description="the loss of the rollouts; its options are in the section of its name"
    )
    correction: Literal["none", "truncated", "sequence_mask", "token_mask"] = Field(
        "none", description="weights against the mismatch of the sampler's and the trainer's log-probs"
    )
    correction_cap: float = Field(
        3.0, ge=1, description="trainer / sampler ratios above are cut (truncated) or masked"
    )
    correction_floor: float = Field(
        0.0, ge=0, le=1, description="trainer / sampler ratios below are raised (truncated) or masked"
    )
    grpo: GrpoConfig = Field(default_factory=GrpoConfig)
    dapo: DapoConfig = Field(default_factory=DapoConfig)
    dr_grpo: DrGrpoConfig = Field(default_factory=DrGrpoConfig)
    gspo: GspoConfig = Field(default_factory=GspoConfig)
    luffy: LuffyConfig = Field(default_factory=LuffyConfig)
    uft: UftConfig = Field(default_factory=UftConfig)

    @property
    def options(self) -> Options:
        """The chosen objective's own section."""
        return cast(Options, getattr(self, self.objective))

    @model_validator(mode="after")
    def _refuse_what_nothing_reads(self) -> ObjectiveConfig:
        for owner, section in OWNERS.items():
            changed = _changed(getattr(self, owner), section)
            if owner != self.objective and changed:
                raise PydanticCustomError(
                    REFUSED,
                    f"`train.{owner}.{changed[0]}` belongs to the objective {owner}, and train.objective is "
                    f'{self.objective}. Set train.objective = "{owner}", or leave the option out',
                )
        for key in _changed(self.options, OWNERS[self.objective]):
            other, value = IDLE.get(key, ("", None))
            if other and getattr(self.options, other) == value:
                raise PydanticCustomError(
                    REFUSED,
                    f"`train.{self.objective}.{key}` has no effect, as train.{self.objective}.{other} is "
                    f"{str(value).lower()}. Change that, or leave the option out",
                )
        for key in ("correction_cap", "correction_floor"):
            if self.correction == "none" and getattr(self, key) != type(self).model_fields[key].default:
                raise PydanticCustomError(
                    REFUSED,
                    f"`train.{key}` belongs to a correction, and train.correction is none. "
                    f"Set train.correction, or leave the option out",
                )
        return self


def owner_hint(location: tuple[int | str, ...]) -> str | None:
    """Of a key that its section does not have: which objectives do, if any, and what to write instead.

    Args:
        location: the key's path, such as ("train", "grpo", "overlong_penalty").
    """
    key = str(location[-1])
    owners = [owner for owner, section in OWNERS.items() if key in section.model_fields]
    if location[0] != "train" or not owners:
        return None
    others = " or another of them" if len(owners) > 1 else ""
    return (
        f"it belongs to {', '.join(owners)}. "
        f'Give it as `train.{owners[0]}.{key}` with train.objective = "{owners[0]}"{others}.'
    )


def _changed(values: Section, section: type[Section]) -> list[str]:
    return [key for key, info in section.model_fields.items() if getattr(values, key) != info.default]
