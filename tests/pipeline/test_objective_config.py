from __future__ import annotations

import pytest

from pipeline.config import NightlyConfig, load_config, validated
from pipeline.errors import ConfigError


def train(**values):
    return validated(NightlyConfig, {"train": values}, "night.toml").train


REFUSED = {
    "an option where all objectives' options once were": (
        {"clip_low": 0.1},
        r"Unknown config key `train\.clip_low` in night\.toml: it belongs to grpo, dapo, .*uft\. Give it as "
        r"`train\.grpo\.clip_low` with train\.objective = \"grpo\" or another of them\.$",
    ),
    "an option in another objective's section": (
        {"grpo": {"overlong_penalty": 0.5}},
        r"Unknown config key `train\.grpo\.overlong_penalty` .*: it belongs to dapo\. Give it as "
        r"`train\.dapo\.overlong_penalty` with train\.objective = \"dapo\"\.$",
    ),
    "an option of an objective that is not trained with": (
        {"dapo": {"clip_high": 0.3}},
        r"^In night\.toml, `train\.dapo\.clip_high` belongs to the objective dapo, and train\.objective is "
        r"grpo\. Set train\.objective = \"dapo\", or leave the option out\.$",
    ),
    "a cap without a correction": (
        {"correction_cap": 2.0},
        r"`train\.correction_cap` belongs to a correction, and train\.correction is none\.",
    ),
    "a floor without a correction": ({"correction_floor": 0.5}, r"`train\.correction_floor` belongs to"),
    "a misspelt option": ({"grpo": {"clip_lw": 0.1}}, r"Unknown .*`train\.grpo\.clip_lw`.*`clip_low`"),
    "a negative weight of the clips": ({"echo_weight": -1.0}, r"`train\.echo_weight` in night\.toml is -1"),
    "an unknown objective": ({"objective": "ppo"}, r"`train\.objective` in night\.toml is 'ppo'"),
    "a γ of 0": ({"objective": "luffy", "luffy": {"shaping_gamma": 0}}, r"`train\.luffy\.shaping_gamma`"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_nothing_would_read_is_refused_by_its_owners_name(case):
    values, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message) as refused:
        train(**values)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("objective", ["grpo", "dapo", "dr_grpo", "gspo", "luffy", "uft"])
def test_an_objective_reads_its_own_section(objective):
    config = train(objective=objective, **{objective: {"clip_low": 0.125}})
    assert config.options.clip_low == 0.125
    assert config.options is getattr(config, objective)


def test_another_objective_on_the_command_line_does_not_drop_the_files_options_in_silence(tmp_path):
    file = tmp_path / "night.toml"
    file.write_text(
        '[train]\nobjective = "dapo"\ncorrection = "truncated"\nupdates_per_batch = 2\n'
        "[train.dapo]\nclip_high = 0.3\n"
    )
    config = load_config(file, {"train": {"correction_cap": 2.0}}).train
    assert (config.options.clip_high, config.correction_cap) == (0.3, 2.0)
    with pytest.raises(ConfigError, match=r"In the options, `train\.dapo\.clip_high` belongs to"):
        load_config(file, {"train": {"objective": "grpo"}})


IDLE = {
    "a correction of tempered rollouts": (
        {"sampling": {"temperature": 0.7}, "train": {"correction": "truncated"}},
        r"^In night\.toml, train\.correction is truncated, but .* or set it to none\.$",
    ),
    "an epsilon of a deviation that nothing is divided by": (
        {"train": {"grpo": {"scale_rewards": False, "advantage_epsilon": 1e-4}}},
        r"^In night\.toml, `train\.grpo\.advantage_epsilon` has no effect, as train\.grpo\.scale_rewards is "
        r"false\. Change that, or leave the option out\.$",
    ),
    "refills without dynamic sampling": (
        {"train": {"objective": "dapo", "dapo": {"dynamic_sampling": False, "max_refills": 3}}},
        r"`train\.dapo\.max_refills` has no effect, as train\.dapo\.dynamic_sampling is false",
    ),
    "a penalty without a buffer": (
        {"train": {"objective": "dapo", "dapo": {"overlong_buffer_tokens": 0, "overlong_penalty": 0.5}}},
        r"`train\.dapo\.overlong_\w+` has no effect, as train\.dapo\.overlong_\w+ is 0",
    ),
    "a buffer of more tokens than a completion has": (
        {
            "sampling": {"max_tokens": 8},
            "train": {"objective": "dapo", "dapo": {"overlong_buffer_tokens": 9}},
        },
        r"`train\.dapo\.overlong_buffer_tokens` is 9, more than the 8 tokens of a completion\. Lower it, or",
    ),
    "a clip of ratios that are 1": (
        {"sampling": {"top_p": 0.9}, "train": {"objective": "gspo", "gspo": {"clip_low": 0.1}}},
        r"`train\.gspo\.clip_low` has no effect: in the one update on each batch every ratio is 1\.",
    ),
}


@pytest.mark.parametrize("case", IDLE)
def test_an_option_that_another_one_keeps_from_having_an_effect_is_refused(case):
    values, message = IDLE[case]
    with pytest.raises(ConfigError, match=message) as refused:
        validated(NightlyConfig, values, "night.toml")
    assert "\n" not in str(refused.value)


def test_the_same_options_are_taken_where_they_have_an_effect():
    clipped = {"train": {"objective": "gspo", "gspo": {"clip_low": 0.1}}}
    assert validated(NightlyConfig, clipped, "night.toml").train.options.clip_low == 0.1
    again = {"sampling": {"top_p": 0.9}, "train": clipped["train"] | {"updates_per_batch": 2}}
    assert validated(NightlyConfig, again, "night.toml").train.updates_per_batch == 2
