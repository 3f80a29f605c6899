"""What `echomine sql` prints, other programs and terminals can take."""

import json

import pytest

from flows.cli import main


@pytest.fixture
def answer(sample_lake, capsys):
    def ask(query, form="json"):
        assert main(["sql", query, "--format", form, "--lake", str(sample_lake.lake.folder)]) == 0
        return capsys.readouterr().out

    return ask


def test_json_has_objects_for_maps_and_null_for_what_it_cannot_say(answer):
    rows = json.loads(answer("select map {'format': 0.5} as parts, 'nan'::double as x, [1, 2] as ids"))
    assert rows == [{"parts": {"format": 0.5}, "x": None, "ids": [1, 2]}]


def test_a_column_name_that_comes_twice_loses_no_column(answer):
    assert json.loads(answer("select 1 as a, 2 as a")) == [{"a": 1, "a_2": 2}]


def test_a_models_text_does_not_reach_the_terminal_as_control_characters(answer):
    printed = answer("select chr(27) || '[31mred' as text", "table")
    assert "\x1b" not in printed
    assert "[31mred" in printed


def test_flags_can_be_turned_off(capsys):
    assert main(["mine", "--help"]) == 0
    assert "--allow-truncated / --no-allow-truncated" in capsys.readouterr().out
