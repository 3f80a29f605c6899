"""The embedded model is good but not perfect, so a night on it has every class of group."""

import importlib.util
import itertools
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
from safetensors import safe_open

from pipeline.config import SamplingConfig
from pipeline.engines.base import GroupRequest
from pipeline.engines.transformers import TransformersEngine
from pipeline.models import load_model, model_folder
from pipeline.prompts import read_prompts
from pipeline.records import sample_seed
from pipeline.tokenization import completion_step_ends, completion_text, load_tokenizer
from pipeline.verifiers import exact

ARITH = Path(__file__).parents[2] / "data" / "arith"


@pytest.fixture(scope="module")
def problems():
    spec = importlib.util.spec_from_file_location("arith_problems", ARITH / "problems.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def night():
    """8 seeded samples at temperature 1 on each committed prompt, with their rewards."""
    folder = model_folder("arith")
    tokenizer = load_tokenizer(folder)
    engine = TransformersEngine(load_model(folder, "cpu", "float32"), tokenizer)
    prompts = read_prompts(str(ARITH / "prompts.jsonl"))
    requests = [GroupRequest(p, tuple(sample_seed(0, p.prompt_id, k) for k in range(8))) for p in prompts]
    groups = list(engine.generate(requests, SamplingConfig(max_tokens=256)))
    texts = [[completion_text(tokenizer, s.completion_ids.tolist()) for s in g.samples] for g in groups]
    rewards = [[exact(text, g.prompt) for text in group] for g, group in zip(groups, texts, strict=True)]
    steps = [
        len(completion_step_ends(tokenizer, s.completion_ids.tolist())) for g in groups for s in g.samples
    ]
    return texts, rewards, steps


def test_there_are_128_different_prompts(night):
    texts, _, _ = night
    assert len(texts) == 128


def test_a_fifth_of_the_groups_is_solved_a_fifth_mixed_and_some_fail(night):
    _, rewards, _ = night
    shares = Counter(
        "all_success" if min(group) == 1 else "all_fail" if max(group) == 0 else "mixed" for group in rewards
    )
    assert shares["all_success"] >= 0.20 * 128
    assert shares["mixed"] >= 0.20 * 128
    assert shares["all_fail"] >= 0.03 * 128


def test_completions_have_three_steps_and_more(night):
    _, _, steps = night
    assert sum(steps) / len(steps) >= 3


def test_solved_groups_are_solved_in_more_than_one_way(night):
    texts, rewards, _ = night
    solved = [group for group, judged in zip(texts, rewards, strict=True) if min(judged) == 1]
    assert sum(len(set(group)) > 1 for group in solved) >= 0.8 * len(solved)


def test_every_line_of_a_solution_has_the_value_of_the_problem(problems):
    rng = random.Random(3)
    for terms in itertools.islice(problems.problems(7), 500):
        value = sum(term.value for term in terms)
        *lines, last = problems.solution(terms, rng).split("\n")
        assert last == f"#{value}"
        assert {value_of(line.removeprefix("=")) for line in lines} == {value}


def test_the_prompts_are_those_that_the_script_writes(problems, tmp_path):
    problems.write_prompts(tmp_path / "prompts.jsonl", 20260531, 128, wide_share=0.06, drill_share=0.4)
    assert (tmp_path / "prompts.jsonl").read_text() == (ARITH / "prompts.jsonl").read_text()


def test_no_prompt_can_be_among_the_training_problems(problems):
    prompts = frozenset(json.loads(line)["prompt"] for line in (ARITH / "prompts.jsonl").open())
    without = itertools.islice(problems.problems(20260531, prompts), 500)
    assert not {problems.written(terms) for terms in without} & prompts
    anything = itertools.islice(problems.problems(20260531, drill_share=0.4), 500)
    assert {problems.written(terms) for terms in anything} & prompts


def test_the_committed_weights_are_small_and_of_one_to_four_million_parameters():
    path = ARITH / "model" / "model.safetensors"
    assert path.stat().st_size <= 8_000_000
    with safe_open(path, "pt") as weights:
        sizes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
    parameters = sum(rows * (columns[0] if columns else 1) for rows, *columns in sizes)
    assert 1_000_000 <= parameters <= 4_000_000
    assert json.loads((ARITH / "model" / "config.json").read_text())["head_dim"] == 64


def value_of(expression: str) -> int:
    """Sums and products of integers, worked out without `eval`."""
    total = 0
    for sign, left, right in re.findall(r"([+-]?)(\d+)(?:\*(\d+))?", expression):
        total += (-1 if sign == "-" else 1) * int(left) * int(right or 1)
    return total
