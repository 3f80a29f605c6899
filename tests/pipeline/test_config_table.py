"""The pages that list the config keys say what the config model says."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import NightlyConfig, validated
from pipeline.config_keys import config_keys, config_table

ROOT = Path(__file__).resolve().parents[2]
START, END = "<!-- config keys -->\n", "<!-- end of config keys -->"


@pytest.mark.parametrize("page", ["README.md", "docs/config.md"])
def test_a_page_holds_exactly_the_table_of_the_config_model(page):
    text = (ROOT / page).read_text()
    assert (
        text[text.index(START) + len(START) : text.index(END)].strip() == config_table(NightlyConfig).strip()
    )


def test_every_key_has_a_meaning_and_its_default_is_valid():
    values: dict[str, object] = {}
    for key, _, meaning in config_keys(NightlyConfig):
        assert meaning, key
        *sections, name = key.split(".")
        model, below = NightlyConfig(), values
        for section in sections:
            model, below = getattr(model, section), below.setdefault(section, {})
        below[name] = getattr(model, name)
    assert validated(NightlyConfig, values, "the defaults") == NightlyConfig()
