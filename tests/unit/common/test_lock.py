"""A lock keeps out other processes, and ends with its own, however that ends."""

import os
import signal
import subprocess
import sys
from contextlib import suppress

import pytest

from moltron.common.lock import _lock, locked

HOLD = """
import os, sys, time
from pathlib import Path
from moltron.common.lock import locked
with locked(Path(sys.argv[1]), 0, lambda x: x):
    if os.fork() == 0:  # as a data worker that outlives its parent
        time.sleep(60)
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_is_told_and_kill_9_releases(tmp_path):
    path = tmp_path / "run" / ".lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, start_new_session=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        told = rf"run/.lock is held by process {holder.pid} on .*: wait for its end"
        with pytest.raises(ValueError, match=told), locked(path, 0, lambda x: x):
            pass
        holder.kill()
        holder.wait()
        with locked(path, 0, lambda x: x):
            assert path.read_text().startswith(f"process {os.getpid()} on ")
        with suppress(ProcessLookupError):
            os.killpg(holder.pid, signal.SIGKILL)  # the child


def test_nothing_is_left_but_what_was_there(tmp_path):
    with locked(tmp_path / "new" / ".lock", 0, lambda x: x):
        pass
    assert not (tmp_path / "new").exists()
    with locked(tmp_path / ".lock", 0, lambda x: x):
        (tmp_path / "result").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_a_lock_that_its_holder_has_removed_is_none(tmp_path):
    with open(tmp_path / ".lock", "a+") as file:
        (tmp_path / ".lock").unlink()
        assert _lock(file, tmp_path / ".lock") == "a process that is just ending"
        (tmp_path / ".lock").touch()
        assert _lock(file, tmp_path / ".lock") == "a process that is just ending"


def test_rank_0_locks_and_all_are_told(tmp_path):
    with locked(tmp_path / "x" / ".lock", 1, lambda x: x):
        assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match="held by process 7"), locked(tmp_path / ".lock", 1, lambda _: "process 7"):
        pass
