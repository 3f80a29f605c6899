"""Who holds a snapshot is seen by upkeep until the session ends, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

from pipeline.holds import held, hold


def test_a_hold_is_seen_until_its_last_holder_is_done(tmp_path: Path) -> None:
    with hold(tmp_path, 3), hold(tmp_path, 5):
        with hold(tmp_path, 3):
            assert held(tmp_path) == {3, 5}
        assert held(tmp_path) == {3, 5}
    assert held(tmp_path) == set()
    assert list((tmp_path / "held").iterdir()) == []


def test_what_a_killed_holder_left_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "7").write_text("")
    assert held(tmp_path) == set()
    assert not (tmp_path / "held" / "7").exists()


def test_a_lake_that_cannot_be_written_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "held").write_text("no folder")
    with hold(tmp_path, 3):
        pass
