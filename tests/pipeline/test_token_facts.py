"""Whole batches are split and decoded as completions are one by one, whatever the tokenizer."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from sample_lake import character_tokenizer
from tokenizers import AddedToken, ByteLevelBPETokenizer, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from pipeline.imports.token_facts import TokenFacts
from pipeline.models import model_folder
from pipeline.tokenization import completion_step_ends, completion_text, load_tokenizer


def byte_level() -> PreTrainedTokenizerFast:
    """Every byte a token, and a few merged ones."""
    trained = ByteLevelBPETokenizer()
    trained.pre_tokenizer.use_regex = False
    text = ["add.\n\n", "keep \n x", "é π 🙂\n", "  \n\n"] * 20
    trained.train_from_iterator(text, vocab_size=330, min_frequency=2, special_tokens=["<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<eos>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2 has it: a mark for spaces, bytes for what is no token, the first space stripped."""
    pieces = [
        "▁a",
        "b",
        "▁",
        "\n",
        "▁\n",
        ".\n\n",
        "x▁\n",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "<eos>",
    ]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=AddedToken("<eos>", special=True))


def word_pieces() -> PreTrainedTokenizerFast:
    """A decoder that puts spaces between words: every token depends on its neighbours."""
    pieces = ["a", "##b", "\n", ".", "[UNK]", "<eos>"]
    backend = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


TOKENIZERS = {
    "arith": lambda: load_tokenizer(model_folder("arith")),
    "characters": character_tokenizer,
    "byte level": byte_level,
    "word pieces": word_pieces,
}


def completions(size: int, seed: int) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, size, random.integers(0, 25)).tolist() for _ in range(300)]


def flat(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(list(chain.from_iterable(rows)), dtype=np.int32), np.cumsum([0, *map(len, rows)])


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(("seed", "delimiter"), [(0, "\n"), (1, "\n"), (2, "\n"), (0, " "), (1, "\t")])
def test_random_tokens_are_split_and_decoded_as_one_by_one(name: str, seed: int, delimiter: str) -> None:
    tokenizer = TOKENIZERS[name]()
    rows = [*completions(len(tokenizer), seed), [], [tokenizer.eos_token_id]]
    facts = TokenFacts(tokenizer, delimiter)
    for _ in range(2):  # the second time everything is remembered
        ends, counts = facts.step_ends(*flat(rows))
        found = [part.tolist() for part in np.split(ends, np.cumsum(counts)[:-1])]
        assert found == [completion_step_ends(tokenizer, row, delimiter) for row in rows]
        texts = facts.completions(*flat(rows)).to_pylist()
        assert texts == [completion_text(tokenizer, row) for row in rows]


@pytest.mark.parametrize(("seed", "delimiter"), [(0, "\n"), (1, "\n"), (2, "\n"), (0, " "), (1, " ")])
def test_characters_of_several_byte_tokens_are_put_together(seed: int, delimiter: str) -> None:
    tokenizer = byte_fallback()
    random = np.random.default_rng(seed)
    whole = [[tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in c.encode()] for c in "π🙂\né "]
    plain = [[token] for token in (*range(7), tokenizer.eos_token_id)]
    pieces = whole + plain
    drawn = random.integers(0, len(pieces), (300, 12))
    rows = [[token for piece in row for token in pieces[piece]] for row in drawn]
    facts = TokenFacts(tokenizer, delimiter)
    ends, counts = facts.step_ends(*flat(rows))
    found = [part.tolist() for part in np.split(ends, np.cumsum(counts)[:-1])]
    assert found == [completion_step_ends(tokenizer, row, delimiter) for row in rows]
    assert facts.completions(*flat(rows)).to_pylist() == [completion_text(tokenizer, row) for row in rows]
