"""A rank that hangs is named, and the job goes on without a trace of it: a stopped process, a loader that is stuck.

Every day one process that has imported all forks the ranks of each life; in the slow test torchrun starts them.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

KEYS = ("train.log_every=1", "train.eval_every=10", "checkpoint.every=5", "train.hang_minutes=0.3")
LAUNCHER = """
import json, os, signal, socket, sys, threading, time
from pathlib import Path
import matplotlib.pyplot, moltron.train.loop
from moltron.cli.main import main
from moltron.data.loader import BatchLoader

def life(run, before=lambda rank: None):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = dict(WORLD_SIZE="3", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(probe.getsockname()[1]))
    ranks = []
    for rank in range(3):
        ranks.append(os.fork())
        if not ranks[-1]:
            os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank))
            before(rank)
            sys.exit(main(["train", *runs[run]]))
    return ranks

def ends(ranks):
    return [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]

def get_stuck(rank):
    real = BatchLoader._step
    def step(self, bins, after):
        if self.rank == 1 and self.epochs is None and after.epoch == 2:
            threading.Event().wait()
        return real(self, bins, after)
    BatchLoader._step = step

runs, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
for name in sys.argv[3:]:
    if name == "stopped":
        ranks = life(name)
        while not any((folder / name).glob("checkpoints/step-*")):
            time.sleep(0.01)
        os.kill(ranks[2], signal.SIGSTOP)
        assert 1 in ends(ranks[:2])
        os.kill(ranks[2], signal.SIGKILL)
        assert ends(ranks[2:]) == [-9]
        print("rank 2 was", ranks[2])
    elif name == "stuck":
        assert 1 in ends(life(name, get_stuck))
    else:
        assert ends(life(name)) == [0, 0, 0]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hang")


@pytest.fixture(scope="module")
def live(arguments, folder):
    """(names of runs, one life each) → what they wrote."""

    def live(*names):
        runs = json.dumps({name: arguments(folder / name, *KEYS) for name in names})
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", LAUNCHER, runs, str(folder), *names]
        pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
        job = subprocess.Popen(command, env=environment, **pipe)
        try:
            text, _ = job.communicate(timeout=300)
            assert job.returncode == 0, text[-3000:]
            return text
        finally:
            with suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)

    return live


WHERE = rf"on {socket.gethostname()}\), "


def test_a_stopped_rank_is_named(live):
    text = live("stopped")
    ((pid,), (line,)) = re.findall("rank 2 was (.*)", text), re.findall("No progress for 0.3 minutes: (.*)", text)
    place = r"(step \d+: .*|starting)"  # as of its last beat: a quick machine is at step 5 before the second one
    assert re.match(rf"rank 2 \(process {pid} {WHERE}{place}: without a sign of life", line)


@pytest.mark.slow
def test_a_loader_that_is_stuck_is_named(live):
    (line,) = re.findall("No progress for 0.3 minutes: (.*)", live("stuck"))
    culprit = rf"rank 1 \(process \d+ {WHERE}step \d+: loading data"
    assert re.match(rf"{culprit}: the other ranks wait for it", line)


@pytest.mark.slow
def test_torchrun_kills_a_stopped_process_and_goes_on_without_a_trace(
    live, folder, arguments, read_lines, read_state, tmp_path
):
    live("calm")
    path = tmp_path / "log"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", "--max-restarts=1"]
    command += ["-m", "moltron", "train", *arguments(tmp_path / "run", *KEYS)]
    with open(path, "w") as log:
        job = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)
        while not any((tmp_path / "run").glob("checkpoints/step-*")):
            time.sleep(0.02)
        (victim,) = (p for p in psutil.Process(job.pid).children() if p.environ().get("RANK") == "2")
        victim.send_signal(signal.SIGSTOP)
        while "No progress" not in path.read_text():
            time.sleep(0.02)
        named = time.monotonic()
        victim.wait(60)
        print(f"the stopped process ended {time.monotonic() - named:.1f} s after it was named")
        assert job.wait(timeout=120) == 0, path.read_text()[-3000:]
    (line,) = re.findall("No progress.*", path.read_text())
    assert f"rank 2 (process {victim.pid} " in line and "without a sign of life" in line
    run, calm = tmp_path / "run", folder / "calm"
    assert read_lines(run) == read_lines(calm) and len(read_lines(calm)) == 20
    (_, meta, expected), (_, meta_run, state) = (read_state(path) for path in (calm, run))
    assert meta["position"] == meta_run["position"] and state.keys() == expected.keys()
    assert all((state[name] == expected[name]).all() for name in expected)
    assert not (run / ".ranks").exists()
