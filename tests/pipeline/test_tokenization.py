"""Tokens are judged by the text they add, whatever the tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from pipeline.errors import ModelError
from pipeline.tokenization import (
    completion_step_ends,
    completion_text,
    load_tokenizer,
    token_texts,
    tokenizer_hash,
)

ARITH = Path(__file__).parents[2] / "data" / "arith" / "model"


@pytest.fixture(scope="module")
def arith() -> PreTrainedTokenizerFast:
    return load_tokenizer(ARITH)


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    """A byte-level BPE, trained where sentences end in a full stop and a blank line."""
    trained = ByteLevelBPETokenizer()
    # the pre-tokenizer must not part the full stop from its blank line
    trained.pre_tokenizer.use_regex = False
    text = [f"{word}.\n\n" for word in ("so", "then", "hence", "now", "add", "keep")] * 20
    trained.train_from_iterator(text, vocab_size=300, min_frequency=2, special_tokens=["<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<eos>")


def test_the_embedded_tokenizer_splits_lines(arith: PreTrainedTokenizerFast) -> None:
    text = "17+25\n10+20=30\n#42"
    ids = [*arith(text, add_special_tokens=False)["input_ids"], arith.eos_token_id]
    ends = completion_step_ends(arith, ids)
    assert [arith.decode(ids[a:b]) for a, b in zip([0, *ends[:2]], ends[:2], strict=False)][:2] == [
        "17+25\n",
        "10+20=30\n",
    ]
    assert ends[-1] == len(ids)
    assert completion_text(arith, ids) == text
    assert "".join(token_texts(arith, ids[:-1])) == text


def test_a_merged_full_stop_and_blank_line_ends_a_step(bpe: PreTrainedTokenizerFast) -> None:
    ids = bpe("add.\n\nkeep.\n\n")["input_ids"]
    texts = token_texts(bpe, ids)
    merged = [text for text in texts if text.endswith(".\n\n")]
    assert merged
    assert "\n" not in texts
    first = next(i for i, text in enumerate(texts) if text.endswith("\n\n"))
    assert completion_step_ends(bpe, ids) == [first + 1, len(ids)]


def test_a_character_of_several_tokens_is_added_by_the_last(bpe: PreTrainedTokenizerFast) -> None:
    ids = bpe("π\n🙂")["input_ids"]
    texts = token_texts(bpe, ids)
    assert texts == ["", "π", "\n", "", "", "", "🙂"]
    assert completion_step_ends(bpe, ids) == [3, 7]


def test_special_tokens_hold_no_delimiter_and_no_content(bpe: PreTrainedTokenizerFast) -> None:
    eos = bpe.eos_token_id
    (newline,) = bpe("\n")["input_ids"]
    (letter,) = bpe("z")["input_ids"]
    assert token_texts(bpe, [letter, eos]) == ["z", "<eos>"]
    assert completion_text(bpe, [letter, eos]) == "z"
    assert completion_step_ends(bpe, [letter, newline, eos, letter, eos]) == [2, 5]
    assert completion_step_ends(bpe, [letter, newline, eos]) == [3]
    assert completion_step_ends(bpe, [eos]) == [1]
    assert completion_step_ends(bpe, []) == []


def test_the_hash_names_what_ids_mean(bpe, arith, tmp_path: Path) -> None:
    bpe.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    again.padding_side = "left"
    assert tokenizer_hash(again) == tokenizer_hash(bpe) != tokenizer_hash(arith)
    again.add_tokens(["new"])
    assert tokenizer_hash(again) != tokenizer_hash(bpe)


def test_a_folder_without_a_readable_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="There is no folder"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        load_tokenizer(tmp_path)
