"""A lock keeps out other processes, and ends with its own, however that ends."""

import os
import signal
import subprocess
import sys
from contextlib import suppress

import pytest

from moltron.common.lock import locked

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
        told = rf"run is in use by process {holder.pid} on .*: wait for its end"
        with pytest.raises(ValueError, match=told), locked(path, 0, lambda x: x):
            pass
        holder.kill()
        holder.wait()
        with locked(path, 0, lambda x: x):
            assert path.read_text().startswith(f"process {os.getpid()} on ")
        with suppress(ProcessLookupError):
            os.killpg(holder.pid, signal.SIGKILL)  # the child


def test_rank_0_locks_and_all_are_told(tmp_path):
    with locked(tmp_path / "x" / ".lock", 1, lambda x: x):
        assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match="in use by process 7"), locked(tmp_path / ".lock", 1, lambda _: "process 7"):
        pass
