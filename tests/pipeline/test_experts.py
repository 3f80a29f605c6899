"""Expert solutions go from a dump through the lake to the prompts of a training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.cli import main
from pipeline.config import SamplingConfig, TrainConfig
from pipeline.errors import ConfigError
from pipeline.experts import experts_of
from pipeline.lake import Lake
from pipeline.prompts import read_prompts
from pipeline.tokenization import load_tokenizer

ARITH = Path(__file__).parents[2] / "data" / "arith" / "model"
PROMPTS = read_prompts("arith", 5)
LUFFY = TrainConfig(objective="luffy")
UFT = TrainConfig(objective="uft")
SAMPLING = SamplingConfig(max_tokens=40)


def solution(prompt):
    return f"so\n#{prompt.ground_truth}"


def luffy_row(prompt):
    return {
        "data_source": prompt.data_source,
        "prompt": [dict(message) for message in prompt.messages],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": prompt.ground_truth},
        "target": [{"role": "assistant", "content": solution(prompt)}],
    }


@pytest.fixture(scope="module")
def lake(tmp_path_factory):
    """A lake with LUFFY's rows of the first three prompts, the first of them twice."""
    folder = tmp_path_factory.mktemp("experts")
    dump = folder / "luffy.parquet"
    pq.write_table(pa.Table.from_pylist([luffy_row(prompt) for prompt in PROMPTS[:3]]), dump)
    arguments = ["import", "rollouts", str(dump), "--tokenizer", str(ARITH), "--lake", str(folder / "lake")]
    assert main(arguments) == 0
    return Lake.open(folder / "lake")


def test_a_prompts_experts_are_those_that_a_dump_has_of_its_content(lake):
    experts = experts_of(lake, PROMPTS, ARITH, LUFFY, SAMPLING)
    assert set(experts) == {prompt.prompt_id for prompt in PROMPTS[:3]}
    tokenizer = load_tokenizer(ARITH)
    for prompt in PROMPTS[:3]:
        (expert,) = experts[prompt.prompt_id]
        assert tokenizer.decode(expert.completion_ids) == solution(prompt)
        assert (expert.reward, expert.completion_ids.dtype) == (1.0, np.int32)


def test_an_objective_without_experts_gets_none_and_no_steps_need_none(lake):
    assert experts_of(lake, PROMPTS, ARITH, TrainConfig(), SAMPLING) == {}
    assert experts_of(lake, PROMPTS[3:], ARITH, LUFFY.model_copy(update={"optim_steps": 0}), SAMPLING) == {}


def test_prompts_that_no_expert_solved_are_one_line(lake):
    with pytest.raises(ConfigError, match=r"no expert's solution of any of the 2 prompts.*echomine import"):
        experts_of(lake, PROMPTS[3:], ARITH, LUFFY, SAMPLING)


def test_solutions_that_do_not_fit_are_left_out_and_none_left_is_one_line(lake):
    tokenizer = load_tokenizer(ARITH)
    lengths = [len(tokenizer(solution(prompt))["input_ids"]) for prompt in PROMPTS[:3]]
    room = SamplingConfig(max_tokens=max(lengths))
    assert len(experts_of(lake, PROMPTS, ARITH, LUFFY, room)) == 3
    with pytest.raises(ConfigError, match=r"None of the lake's 3 expert solutions has at most 2 tokens"):
        experts_of(lake, PROMPTS, ARITH, LUFFY, SamplingConfig(max_tokens=2))
    # behind a hint a whole completion must still fit
    wide = SamplingConfig(max_tokens=1000)
    with pytest.raises(ConfigError, match=r"fits the model's context"):
        experts_of(lake, PROMPTS, ARITH, UFT, wide)


def test_solutions_in_another_tokenizers_ids_are_refused(lake, tmp_path):
    for file in ARITH.iterdir():
        if file.suffix in (".json", ".jinja"):
            (tmp_path / file.name).write_text(file.read_text())
    words = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(words.replace('"7":', '"~":'))
    with pytest.raises(ConfigError, match=r"3 expert solutions are of another tokenizer"):
        experts_of(lake, PROMPTS, tmp_path, LUFFY, SAMPLING)
