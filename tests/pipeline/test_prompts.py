import datetime
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline import prompts as prompts_module
from pipeline.errors import PromptError
from pipeline.prompts import prompt_messages_ids, read_prompts

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def verl_row(index: int, truth="18") -> dict:
    return {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "system", "content": "Think."}, user(f"Question {index}?")],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"split": "train", "index": index},
    }


def write_jsonl(path, *rows) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def write_parquet(path, rows, **options) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return str(path)


@pytest.fixture
def tokenizer():
    vocabulary = {"[UNK]": 0, "<user>": 1, "<assistant>": 2, "two": 3, "plus": 4}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")


def assert_refused(source, message, **options):
    with pytest.raises(PromptError, match=re.escape(message)) as caught:
        read_prompts(str(source), **options)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_verl_rows_are_the_same_prompts_in_parquet_and_jsonl(tmp_path):
    rows = [verl_row(1), verl_row(2, truth="7")]
    from_parquet = read_prompts(write_parquet(tmp_path / "train.parquet", rows))
    from_jsonl = read_prompts(write_jsonl(tmp_path / "train.jsonl", *rows))
    assert from_parquet == from_jsonl
    first = from_parquet[0]
    assert first.messages == ({"role": "system", "content": "Think."}, user("Question 1?"))
    assert [prompt.ground_truth for prompt in from_parquet] == ["18", "7"]
    assert first.data_source == "openai/gsm8k"
    assert first.extra_info == {
        "ability": "math",
        "reward_model": {"style": "rule"},
        "split": "train",
        "index": 1,
    }


def test_plain_jsonl_takes_text_or_messages_and_keeps_other_keys(tmp_path):
    source = write_jsonl(
        tmp_path / "sums.jsonl",
        {"prompt": "7+5?", "ground_truth": 12, "level": {"digits": [1, 1]}},
        "   ",
        {"prompt": [user("7+5?")], "ground_truth": "twelve"},
        {"prompt": "Say hello."},
    )
    first, second, third = read_prompts(source)
    assert first.messages == second.messages == (user("7+5?"),)
    assert (first.ground_truth, second.ground_truth, third.ground_truth) == ("12", "twelve", None)
    assert first.data_source == "sums"
    assert first.extra_info == {"level": {"digits": [1, 1]}}
    assert third.extra_info == {}


@pytest.mark.parametrize(
    ("truth", "text"),
    [
        (5, "5"),
        (2.5, "2.5"),
        (True, "true"),
        (["a", "é"], '["a", "é"]'),
        ({"x": [1, None]}, '{"x": [1, null]}'),
        ("05", "05"),
        (None, None),
    ],
)
def test_a_ground_truth_that_is_no_text_becomes_its_text_or_json(tmp_path, truth, text):
    plain = write_jsonl(tmp_path / "a.jsonl", {"prompt": "?", "ground_truth": truth})
    verl = write_jsonl(tmp_path / "b.jsonl", verl_row(1, truth=truth))
    assert read_prompts(plain)[0].ground_truth == read_prompts(verl)[0].ground_truth == text


def test_parquet_values_that_json_does_not_know_become_text_or_null(tmp_path):
    row = {"prompt": "?", "day": datetime.date(2026, 5, 1), "score": float("nan"), "__index_level_0__": 3}
    assert read_prompts(write_parquet(tmp_path / "a.parquet", [row]))[0].extra_info == {
        "day": "2026-05-01",
        "score": None,
    }


def test_equal_prompts_are_kept_once_in_order(tmp_path):
    rows = [
        {"prompt": "a", "ground_truth": "1"},
        {"prompt": "b", "ground_truth": "1"},
        {"prompt": [user("a")], "ground_truth": 1, "note": "again"},
        {"prompt": "a", "ground_truth": "2"},  # a corrected truth makes another prompt
    ]
    kept = read_prompts(write_jsonl(tmp_path / "a.jsonl", *rows))
    assert [(prompt.text, prompt.ground_truth) for prompt in kept] == [("a", "1"), ("b", "1"), ("a", "2")]


def test_a_limit_counts_distinct_prompts_and_reads_no_further(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", {"prompt": "a"}, {"prompt": "a"}, {"prompt": "b"}, "not JSON")
    assert [prompt.text for prompt in read_prompts(source, limit=2)] == ["a", "b"]
    assert_refused(source, "0 prompts of", limit=0)


def test_parquet_is_read_in_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(prompts_module, "PARQUET_BATCH_ROWS", 7)
    source = write_parquet(tmp_path / "a.parquet", [verl_row(i) for i in range(50)], row_group_size=20)
    assert [p.extra_info["index"] for p in read_prompts(source)] == list(range(50))
    assert len(read_prompts(source, limit=9)) == 9


BAD_LINES = [
    ('{"prompt": "a"', "is not JSON: "),
    ("[1, 2]", "is a list, not an object with a `prompt`"),
    ('{"question": "a"}', "it has no `prompt`"),
    ('{"prompt": null}', "it has no `prompt`"),
    ('{"prompt": " "}', "its `prompt` is empty"),
    ('{"prompt": []}', "its `prompt` is empty"),
    ('{"prompt": 5}', "`prompt` is 5, neither text nor a list of messages"),
    ('{"prompt": [{"role": "user"}]}', "has no text `role` and `content`"),
    ('{"prompt": [{"role": "user", "content": [{"type": "image"}]}]}', "has no text `role` and `content`"),
    ('{"prompt": [{"role": "user", "content": "a", "tool_calls": [1]}]}', "a message holds `tool_calls`"),
    ('{"prompt": "a", "reward_model": "rule"}', "`reward_model` is 'rule', not an object"),
    ('{"prompt": "a", "extra_info": [1]}', "`extra_info` is [1], not an object"),
    ('{"prompt": "a", "data_source": 3}', "`data_source` is 3, not text"),
    ('{"prompt": "a", "ground_truth": NaN}', "is not JSON: NaN is no JSON value"),
    ('{"prompt": "a\\ud800"}', "holds half a character"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_bad_line_is_named_with_its_file_and_number(tmp_path, line, message):
    source = write_jsonl(tmp_path / "a.jsonl", {"prompt": "fine"}, "", line)
    assert_refused(source, message)
    assert_refused(source, f"{source} line 3")


def test_bytes_that_are_no_utf8_are_named_with_their_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    assert_refused(tmp_path / "a.jsonl", "a.jsonl line 2 is not JSON: 'utf-8")


def test_a_bad_parquet_row_is_named_with_its_number(tmp_path):
    rows = [{"prompt": "a", "image": None}, {"prompt": "b", "image": b"\x89PNG"}]
    assert_refused(write_parquet(tmp_path / "a.parquet", rows), "a.parquet row 2: a column holds bytes")
    nan = [{"prompt": "a", "ground_truth": 1.0}, {"prompt": "b", "ground_truth": float("nan")}]
    assert_refused(write_parquet(tmp_path / "b.parquet", nan), "b.parquet row 2: its ground truth is nan")


def test_a_cut_off_or_damaged_parquet_file_is_refused(tmp_path):
    rows = [verl_row(i) for i in range(300)]
    whole = tmp_path / "whole.parquet"
    write_parquet(whole, rows, write_page_checksum=True, compression="none", use_dictionary=False)
    data = whole.read_bytes()
    assert len(read_prompts(str(whole))) == 300
    (tmp_path / "cut.parquet").write_bytes(data[: len(data) // 2])
    assert_refused(tmp_path / "cut.parquet", "is no whole Parquet file")
    flipped = bytearray(data)
    flipped[data.index(b"Question 7?")] ^= 1  # still text, only another one: the page checksum tells
    (tmp_path / "flipped.parquet").write_bytes(flipped)
    assert_refused(tmp_path / "flipped.parquet", "is no whole Parquet file")


def test_a_file_that_is_missing_empty_or_of_another_kind_is_refused(tmp_path):
    assert_refused(tmp_path / "none.jsonl", f"There is no prompt file {tmp_path / 'none.jsonl'}.")
    assert_refused(tmp_path, "There is no prompt file")
    for name in ("a.jsonl", "a.parquet"):
        (tmp_path / name).touch()
        assert_refused(tmp_path / name, f"Prompt file {tmp_path / name} is empty.")
    (tmp_path / "blank.jsonl").write_text("\n \n")
    assert_refused(tmp_path / "blank.jsonl", "holds no prompts")
    write_parquet(tmp_path / "rowless.parquet", [verl_row(1)])
    pq.write_table(pq.read_table(tmp_path / "rowless.parquet").slice(0, 0), tmp_path / "rowless.parquet")
    assert_refused(tmp_path / "rowless.parquet", "holds no prompts")
    (tmp_path / "a.csv").write_text("prompt\na\n")
    assert_refused(tmp_path / "a.csv", "ends in `.csv`. Give a .parquet or a .jsonl file")


def test_a_reasoning_gym_task_gives_its_questions_and_whole_entries():
    source = "reasoning_gym:chain_sum?size=20&seed=1&min_terms=2&max_terms=3"
    prompts = read_prompts(source)
    assert len(prompts) == 20
    assert all(prompt.extra_info["metadata"]["num_terms"] in (2, 3) for prompt in prompts)
    first = prompts[0]
    assert first.data_source == "reasoning_gym:chain_sum"
    assert [message["role"] for message in first.messages] == ["system", "user"]
    assert "<answer>" in first.messages[0]["content"]
    assert first.messages[1]["content"] == first.extra_info["question"]
    assert first.ground_truth == first.extra_info["answer"]
    assert first.extra_info["params"] == {"min_terms": 2, "max_terms": 3}
    # computed, not looked up: the sum of the expression is the truth
    assert sum(
        int(t) for t in re.findall(r"[+-]?\d+", first.extra_info["metadata"]["expression"].replace(" ", ""))
    ) == int(first.ground_truth)
    assert json.loads(json.dumps(first.extra_info, allow_nan=False)) == first.extra_info
    assert [p.prompt_id for p in read_prompts(source)] == [p.prompt_id for p in prompts]
    assert [p.prompt_id for p in read_prompts(source, limit=5)] == [p.prompt_id for p in prompts[:5]]


def test_reasoning_gym_defaults_to_a_hundred_of_seed_0():
    default, spelled = (read_prompts(f"reasoning_gym:{t}") for t in ("gcd", "gcd?size=100&seed=0"))
    assert [p.prompt_id for p in default] == [p.prompt_id for p in spelled]
    assert 90 < len(default) <= 100
    assert read_prompts("reasoning_gym:gcd?seed=1")[0].prompt_id != default[0].prompt_id


def test_a_composite_task_takes_its_parts_as_json():
    parts = '[{"name": "gcd", "weight": 1, "config": {}}, {"name": "lcm", "weight": 1, "config": {}}]'
    prompts = read_prompts(f"reasoning_gym:composite?size=12&datasets={parts}")
    assert {p.extra_info["metadata"]["source_dataset"] for p in prompts} == {"gcd", "lcm"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "chain_sums",
            "Unknown reasoning_gym task `chain_sums` in reasoning_gym:chain_sums: did you mean `chain_sum`?",
        ),
        ("chain_sum?max_term=3", "Unknown parameter `max_term` of reasoning_gym task `chain_sum`"),
        ("chain_sum?max_term=3", "did you mean `max_terms`?"),
        ("chain_sum?max_terms=1", "max_terms must be >= min_terms. Change the parameters of the task."),
        ("chain_sum?max_terms=many", "reasoning_gym refuses reasoning_gym:chain_sum?max_terms=many"),
        ("chain_sum?size=ten", "`size` of reasoning_gym:chain_sum?size=ten is 'ten'"),
        ("chain_sum?size=0", "size must be positive. Change the parameters of the task."),
        ("chain_sum?seed=1.5", "`seed` of reasoning_gym:chain_sum?seed=1.5 is 1.5"),
    ],
)
def test_a_wrong_task_or_parameter_is_said_in_one_line(source, message):
    assert_refused(f"reasoning_gym:{source}", message)


def test_ids_follow_the_chat_template_up_to_the_assistants_turn(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    ids = prompt_messages_ids(tokenizer, [user("two plus two")])
    assert ids.dtype == np.int32
    assert ids.tolist() == [1, 3, 4, 3, 2]


def test_ids_without_a_template_are_the_joined_contents(tokenizer):
    ids = prompt_messages_ids(tokenizer, [{"role": "system", "content": "plus"}, user("two plus")])
    assert ids.dtype == np.int32
    assert ids.tolist() == [4, 3, 4]


def test_a_prompt_the_tokenizer_cannot_take_is_refused_in_one_line(tokenizer):
    with pytest.raises(PromptError, match="has no tokens in this model's tokenizer"):
        prompt_messages_ids(tokenizer, [user(" ")])
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(PromptError, match="roles system, user: System role not supported"):
        prompt_messages_ids(tokenizer, [{"role": "system", "content": "a"}, user("b")])
