"""Arithmetic problems and their solutions, written one rewriting a line.

A problem is a sum of terms (`37+48-6*9`). A solution rewrites the sum line by line until one
number is left, and names it behind `#`:

    37+48-25
    =70+15-25      tens and ones regrouped
    =70-10         the last two terms first
    =60
    #60

Most sums have many valid solutions: which pair comes first, whether a pair is regrouped or added
outright, and which factor of a product is split are all free. Those choices are where a model that
learned from many solutions is uncertain, so they are the steps that mining should find.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Term:
    """`sign * left * right`; `right` is 1 for a plain number."""

    sign: int
    left: int
    right: int = 1

    @property
    def value(self) -> int:
        return self.sign * self.left * self.right

    @property
    def is_product(self) -> bool:
        return self.right != 1


def number(value: int) -> Term:
    return Term(1 if value >= 0 else -1, abs(value))


def written(terms: list[Term]) -> str:
    text = ""
    for term in terms:
        sign = "-" if term.sign < 0 else ("+" if text else "")
        text += sign + (f"{term.left}*{term.right}" if term.is_product else str(term.left))
    return text


@dataclass(frozen=True)
class Range:
    """How large the numbers of a problem are.

    Attributes:
        ones: share of single-digit terms.
        largest: of a term that is no product.
        factor: the largest two-digit factor of a product.
        any_pair: whether any two terms may be merged, or only those in the order of a sum or difference.
    """

    ones: float
    largest: int
    factor: int
    any_pair: bool


WIDE = Range(ones=0.25, largest=99, factor=99, any_pair=True)
NARROW = Range(ones=0.45, largest=19, factor=19, any_pair=False)


def problem(rng: random.Random, numbers: Range = NARROW) -> list[Term]:
    """A sum of one to five terms, a few of them products; of NARROW numbers its value is not negative."""
    while True:
        kind = rng.random()
        if kind < 0.08:
            terms = [Term(1, rng.randint(11, numbers.factor + 10), rng.randint(11, numbers.factor + 10))]
        elif kind < 0.20:
            terms = [Term(1, rng.randint(11, numbers.factor), rng.randint(2, 9))]
        else:
            num_terms = rng.choices([2, 3, 4, 5], [3, 6, 3, 1])[0]
            terms = [_random_term(rng, numbers, product_share=0.06) for _ in range(num_terms)]
        if kind < 0.20 and rng.random() < 0.5:
            terms.append(_random_term(rng, numbers, product_share=0.0))
        terms = [Term(1, terms[0].left, terms[0].right), *terms[1:]]
        if numbers.any_pair or sum(term.value for term in terms) >= 0:
            return terms


def _random_term(rng: random.Random, numbers: Range, product_share: float) -> Term:
    sign = rng.choice([1, 1, -1])
    if rng.random() < product_share:
        return Term(sign, rng.randint(2, 9), rng.randint(2, 9))
    return Term(sign, rng.randint(2, 9) if rng.random() < numbers.ones else rng.randint(11, numbers.largest))


def drill(rng: random.Random) -> list[Term]:
    """A sum or difference of two numbers as they occur in the middle of solutions."""
    first, second = rng.randint(2, 90), rng.randint(2, 30)
    return [Term(1, first), Term(1 if rng.random() < 0.5 or second > first else -1, second)]


def solution(terms: list[Term], rng: random.Random, numbers: Range = NARROW) -> str:
    """One of the valid solutions, chosen at random, ending in a line `#<integer>`."""
    lines = []
    while len(terms) > 1 or terms[0].is_product:
        terms = _rewrite(terms, rng, numbers)
        lines.append("=" + written(terms))
    return "\n".join([*lines, f"#{terms[0].value}"])


def _rewrite(terms: list[Term], rng: random.Random, numbers: Range) -> list[Term]:
    products = [i for i, term in enumerate(terms) if term.is_product]
    plain = [i for i, term in enumerate(terms) if not term.is_product]
    # Products usually come first: a product that is not split stays in every later line.
    if products and (len(plain) < 2 or rng.random() < 0.8):
        i = rng.choice(products)
        return [*terms[:i], *_expand(terms[i], rng), *terms[i + 1 :]]
    first, second = _pair(terms, plain, rng, numbers)
    merged = _merge(terms[first], terms[second], rng)
    rest = [*terms[:first], *merged, *terms[first + 1 : second], *terms[second + 1 :]]
    return [term for term in rest if term.value != 0] or [number(0)]


def _pair(terms: list[Term], plain: list[int], rng: random.Random, numbers: Range) -> tuple[int, int]:
    """Which two numbers to merge: the first that fit half of the time, else any that fit.

    Those fit whose sum is not negative and that stand in the order of a sum or difference; only where
    none do, another pair is taken.
    """
    pairs = [(i, j) for n, i in enumerate(plain) for j in plain[n + 1 :]]
    fitting = [(i, j) for i, j in pairs if terms[i].sign > 0 and terms[i].value + terms[j].value >= 0]
    choices = pairs if numbers.any_pair else fitting or pairs
    return choices[0] if rng.random() < 0.5 else rng.choice(choices)


def _expand(term: Term, rng: random.Random) -> list[Term]:
    """A product becomes a number, or two products with one factor split into tens and ones."""
    small, large = sorted([term.left, term.right])
    if small < 10 and (large < 12 or large % 10 == 0):
        return [Term(term.sign, small * large)]
    if small < 10 and rng.random() < 0.3:
        return [Term(term.sign, small * large)]
    if small % 10 == 0 and large % 10 == 0:
        return [Term(term.sign, small * large)]
    split_left = (
        term.right < 10 or term.right % 10 == 0 or (term.left > 10 and term.left % 10 and rng.random() < 0.5)
    )
    if split_left:
        tens, ones = term.left // 10 * 10, term.left % 10
        return [Term(term.sign, tens, term.right), Term(term.sign, ones, term.right)]
    tens, ones = term.right // 10 * 10, term.right % 10
    return [Term(term.sign, term.left, tens), Term(term.sign, term.left, ones)]


def _merge(a: Term, b: Term, rng: random.Random) -> list[Term]:
    """Two numbers become their sum, or the sum of their tens and the sum of their ones."""
    if min(a.left, b.left) >= 10 and a.left % 10 and b.left % 10 and rng.random() < 0.5:
        tens = a.sign * (a.left // 10 * 10) + b.sign * (b.left // 10 * 10)
        ones = a.sign * (a.left % 10) + b.sign * (b.left % 10)
        parts = [number(part) for part in (tens, ones) if part]
        if len(parts) == 2:
            return parts
    return [number(a.value + b.value)]


def problems(
    seed: int,
    skip: frozenset[str] = frozenset(),
    numbers: Range = NARROW,
    drill_share: float = 0.0,
) -> Iterator[list[Term]]:
    """An endless stream of problems, or drills, whose text is not in `skip`."""
    rng = random.Random(seed)
    while True:
        terms = drill(rng) if rng.random() < drill_share else problem(rng, numbers)
        if written(terms) not in skip:
            yield terms


def has_choices(terms: list[Term]) -> bool:
    """Whether solutions of the problem really differ: of four random ones, two do."""
    return len({solution(terms, random.Random(seed)) for seed in range(4)}) > 1


def write_prompts(path: Path, seed: int, count: int, wide_share: float, drill_share: float) -> None:
    """`count` different problems whose solutions differ, as `{"prompt", "ground_truth"}` lines.

    Args:
        wide_share: of the problems, how many have wide numbers; the model is trained less on these.
        drill_share: of the others, how many are sums of two numbers alone.
    """
    rng = random.Random(seed)
    narrow = filter(has_choices, problems(seed, drill_share=drill_share))
    wide = filter(has_choices, problems(seed, numbers=WIDE))
    lines: dict[str, str] = {}
    while len(lines) < count:
        terms = next(wide if rng.random() < wide_share else narrow)
        answer = str(sum(term.value for term in terms))
        lines.setdefault(written(terms), json.dumps({"prompt": written(terms), "ground_truth": answer}))
    path.write_text("\n".join(lines.values()) + "\n")
