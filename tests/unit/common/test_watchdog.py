"""Who is to blame for a hang; that a thread sees one, and only one."""

import os
import threading
import time

import pytest

from moltron.common import watchdog
from moltron.common.watchdog import Place, Watchdog, doing, verdict


def places(*reports, beats=20):
    return [Place(f"node{r}", 100 + r, beats, n, 7, "computing", "step.py:9") for r, n in enumerate(reports)]


def test_the_rank_that_is_behind():
    now = places(31, 30, 31)
    assert verdict(places(31, 30, 31, beats=10), now, 10) == (
        "No progress for 10 minutes: rank 1 (process 101 on node1) at step 7, computing, step.py:9: the other 2 ranks "
        "wait for it. Every rank ends, for torchrun to start again (if nothing was wrong, raise train.hang_minutes=10)."
    )


def test_a_silent_rank_before_one_that_is_behind():
    before, now = places(31, 30, 31, beats=10), places(31, 30, 31)
    before[2] = now[2]
    line = verdict(before, now, 0.5)
    assert "0.5 minutes: rank 2 (process 102 on node2)" in line and "without a sign of life" in line
    assert "rank 1" not in line


def test_all_wait_at_one_place_and_a_lost_node_of_many_ranks():
    assert "all ranks wait at the same place: rank 0 (" in verdict(places(5, 5, beats=10), places(5, 5), 10)
    before, now = places(*[5] * 9, beats=10), places(*[5] * 9)
    before[1:] = now[1:]
    line = verdict(before, now, 10)
    assert "rank 4 (" in line and "rank 5 (" not in line and "4 more: without a sign of life" in line


def test_a_rank_that_never_wrote_is_silent():
    assert "rank 1 (process 0 on an unknown host)" in verdict([*places(5), Place()], [*places(5), Place()], 10)


@pytest.fixture
def ended(monkeypatch):
    """Threads that would have ended the process; they end themselves."""
    codes = []

    def end(code):
        codes.append(code)
        raise SystemExit

    monkeypatch.setattr(os, "_exit", end)
    return codes


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_hang_ends_the_process_and_reports_keep_it_alive(ended, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(watchdog.log, "propagate", True)
    with Watchdog(tmp_path / "ranks", 0, 1, 1 / 60):
        for step in range(12):  # longer than the limit
            doing("computing", step)
            time.sleep(0.15)
        assert ended == []
        deadline = time.monotonic() + 20
        while not ended and time.monotonic() < deadline:
            time.sleep(0.02)
    assert ended == [1]
    assert "step 11, computing" in caplog.text


def test_an_end_leaves_nothing(ended, tmp_path):
    with Watchdog(tmp_path / "ranks", 0, 1, 0.2):
        deadline = time.monotonic() + 20
        while not (tmp_path / "ranks").is_dir() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert (tmp_path / "ranks").is_dir()
    assert not (tmp_path / "ranks").exists() and ended == []
    assert all(thread.name != "watchdog" for thread in threading.enumerate())
