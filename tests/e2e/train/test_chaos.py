"""kill -9 of random ranks in one training under torchrun: the curve is that of an undisturbed one, to the bit."""

import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest

from moltron.checkpoint.manager import list_checkpoints

KEYS = ("train.log_every=1", "checkpoint.every=5", "checkpoint.keep_last=3", "checkpoint.keep_best=0")


def launch(arguments, log, restarts):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [f"--max-restarts={restarts}", "--monitor-interval=0.2", "-m", "moltron", "train", *arguments]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)


def ranks_of(job):
    """The processes of the trainers, not their data workers."""
    children = psutil.Process(job.pid).children()
    return [child for child in children if "moltron" in " ".join(child.cmdline())]


def newest(run_dir):
    found = list_checkpoints(run_dir / "checkpoints") if (run_dir / "checkpoints").is_dir() else []
    return found[-1].name if found else ""


@pytest.mark.parametrize(("wanted", "steps"), [(1, 60), pytest.param(20, 240, marks=pytest.mark.slow)])
def test_killed_ranks_leave_no_trace(arguments, read_lines, read_state, tmp_path, wanted, steps):
    keys = (*KEYS, f"train.max_steps={steps}", f"train.eval_every={steps // 2}")
    with open(tmp_path / "log", "w") as log:
        assert launch(arguments(tmp_path / "calm", *keys), log, 0).wait(timeout=300) == 0
        job, chance = launch(arguments(tmp_path / "wild", *keys), log, 2 * wanted), random.Random(0)
        kills, seen, deadline = 0, "", time.monotonic() + 540
        while job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
            if kills < wanted and newest(tmp_path / "wild") > seen:  # it has got somewhere since the last one
                seen = newest(tmp_path / "wild")
                time.sleep(chance.random() * 0.2)
                ranks = ranks_of(job)
                if len(ranks) == 2:
                    chance.choice(ranks).send_signal(signal.SIGKILL)
                    kills += 1
        assert job.wait(timeout=60) == 0 and kills == wanted, (tmp_path / "log").read_text()[-3000:]
    calm, wild = (
        [{k: v for k, v in line.items() if not k.startswith("share_")} for line in read_lines(tmp_path / name)]
        for name in ("calm", "wild")
    )
    assert wild == calm and len(calm) == steps
    (_, meta, expected), (_, meta_wild, state) = (read_state(tmp_path / name) for name in ("calm", "wild"))
    assert meta["position"] == meta_wild["position"] and state.keys() == expected.keys()
    assert all((state[name] == expected[name]).all() for name in expected)
