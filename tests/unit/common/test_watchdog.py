"""Who is to blame for a hang; that a thread sees one, and only one."""

import os
import threading
import time

import pytest

from moltron.common import watchdog
from moltron.common.manifest import write_json
from moltron.common.watchdog import doing, verdict, watched


@pytest.fixture
def blamed(tmp_path):
    """(reports of the ranks, seconds since each wrote) → the verdict after ten minutes."""

    def judge(reports, ages=None):
        for rank, count in enumerate(reports):
            write_json(
                tmp_path / f"{rank}.json", [count, f"rank {rank} (process {100 + rank} on n), step 7: computing"]
            )
            when = time.time() - (ages or [0] * len(reports))[rank]
            os.utime(tmp_path / f"{rank}.json", (when, when))
        return verdict(tmp_path, len(reports), 10)

    return judge


def test_the_rank_that_is_behind(blamed):
    assert blamed([31, 30, 31], [0, 100, 250]) == (
        "No progress for 10 minutes: rank 1 (process 101 on n), step 7: computing: the other ranks wait for it. Every "
        "rank ends, for torchrun to start again (if nothing was wrong, raise train.hang_minutes=10)."
    )


def test_a_silent_rank_before_one_that_is_behind(blamed):
    line = blamed([31, 30, 31], [0, 0, 400])
    assert "minutes: rank 2 (process 102 on n)" in line and "without a sign of life" in line and "rank 1" not in line


def test_all_wait_at_one_place_and_a_lost_node_of_many_ranks(blamed):
    assert "rank 0 (process 100 on n), step 7: computing and 1 more: all ranks wait" in blamed([5, 5])
    assert "minutes: rank 1 (" in (line := blamed([5] * 9, [0] + [500] * 8)) and "and 7 more: without a sign" in line


def test_a_rank_that_never_wrote_is_silent(blamed, tmp_path):
    blamed([5])
    assert "minutes: rank 1: without a sign of life" in verdict(tmp_path, 2, 10)


@pytest.fixture
def ended(monkeypatch):
    """Exit codes of what would have ended the process; the thread ends instead."""
    codes = []

    def end(code):
        codes.append(code)
        raise SystemExit

    monkeypatch.setattr(os, "_exit", end)
    return codes


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_hang_ends_the_process_and_reports_keep_it_alive(ended, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(watchdog.log.parent, "propagate", True)
    with watched(tmp_path / "ranks", 0, 1, 1 / 60):
        for step in range(12):  # longer than the limit
            doing(f"step {step}: computing")
            time.sleep(0.15)
        assert ended == []
        deadline = time.monotonic() + 20
        while not ended and time.monotonic() < deadline:
            time.sleep(0.02)
    assert ended == [1]
    assert "step 11: computing: all ranks wait" in caplog.text


def test_an_end_leaves_nothing(ended, tmp_path):
    with watched(tmp_path / "ranks", 0, 1, 0.2):
        deadline = time.monotonic() + 20
        while not (tmp_path / "ranks").is_dir() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert (tmp_path / "ranks").is_dir()
    assert not (tmp_path / "ranks").exists() and ended == []
    assert all("_watch" not in thread.name for thread in threading.enumerate())
