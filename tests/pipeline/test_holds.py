"""Who holds a snapshot is seen by upkeep until the session ends, and leaves nothing behind."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
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


def _hold_often(lake: Path, times: int) -> None:
    for _ in range(times):
        with hold(lake, 3):
            assert (lake / "held" / "3").exists(), "nobody would see this hold"


def test_holders_who_come_and_go_at_once_are_each_seen(tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        holders = [pool.submit(_hold_often, tmp_path, 2_000) for _ in range(2)]
        while not all(holder.done() for holder in holders):
            assert held(tmp_path) <= {3}
        for holder in holders:
            holder.result()
    assert held(tmp_path) == set()


def test_a_lake_that_cannot_be_written_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "held").write_text("no folder")
    with hold(tmp_path, 3):
        pass
