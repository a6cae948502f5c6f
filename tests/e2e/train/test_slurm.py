"""deploy/slurm under a real Slurm: a controller and three node daemons on this machine (Debian: slurm-wlm, munge)."""

import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from moltron.checkpoint.manager import list_checkpoints

DEPLOY = Path(__file__).parents[3] / "deploy" / "slurm"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
PATH = f"{os.environ['PATH']}:/usr/sbin"
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={home}/munge.socket
CredType=cred/munge
JobAcctGatherType=jobacct_gather/none
JobRequeue=1
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool.%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd.%n.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
KillWait=5
GresTypes=gpu
NodeName=n[1-3] NodeHostName={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=2 Gres=gpu:1
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or any(shutil.which(p, path=PATH) is None for p in PROGRAMS),
        reason="needs root and Slurm: apt install slurm-wlm munge",
    ),
]


class Cluster:
    def __init__(self, home: Path):
        self.home, self.environment = home, {**os.environ, "PATH": PATH, "SLURM_CONF": str(home / "slurm.conf")}

    def start(self) -> None:
        home, port = self.home, 17000 + os.getpid() % 1000 * 4
        home.chmod(0o755)  # munge asks for it
        (home / "state").mkdir()
        (home / "munge.key").write_bytes(os.urandom(1024))
        (home / "munge.key").chmod(0o600)
        places = dict(home=home, host=socket.gethostname().split(".")[0], port=port, first=port + 1, last=port + 3)
        (home / "slurm.conf").write_text(CONFIG.format(**places))
        (home / "gres.conf").write_text("NodeName=n[1-3] Name=gpu File=/dev/null\n")
        files = [f"--{what}-file={home}/munge.{what}" for what in ("key", "pid", "log", "seed")]
        self("munged", "--force", f"--socket={home}/munge.socket", *files)
        self("slurmctld")
        for node in ("n1", "n2", "n3"):
            self("slurmd", "-N", node)
        self.wait_for(lambda: self("sinfo", "-h", "-o", "%D %t").strip() == "3 idle", 30)

    def __call__(self, *command: str, **more: str) -> str:
        environment = {**self.environment, **more}
        done = subprocess.run(command, env=environment, cwd=self.home, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stdout, done.stderr, self.log())
        return done.stdout

    def log(self) -> str:
        return "\n".join(f"{p}:\n{p.read_text()[-2500:]}" for p in [*self.home.glob("*.log"), *self.home.glob("log")])

    def wait_for(self, what, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.1)

    def job(self, number: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", self("scontrol", "show", "job", number)))

    def kill(self, node: str) -> None:
        """As if its power had failed: the daemon, and all that runs on it."""
        pid = int((self.home / f"slurmd.{node}.pid").read_text())
        steps = [
            p for p in psutil.process_iter(["environ"]) if (p.info["environ"] or {}).get("SLURMD_NODENAME") == node
        ]
        managers = [p.parent() for p in steps if (parent := p.parent()) is not None and "slurmstepd" in parent.name()]
        for process in [psutil.Process(pid), *managers, *steps]:
            if process is not None and process.is_running():
                process.kill()

    def close(self) -> None:
        subprocess.run(["scontrol", "shutdown"], env=self.environment)
        for process in psutil.process_iter(["cmdline", "environ"]):
            ours = str(self.home) in " ".join(process.info["cmdline"] or [])
            if ours or (process.info["environ"] or {}).get("SLURM_CONF") == str(self.home / "slurm.conf"):
                process.kill()


@pytest.fixture
def cluster():
    with tempfile.TemporaryDirectory(prefix="slurm", ignore_cleanup_errors=True) as home:  # short: it holds a socket
        one = Cluster(Path(home))
        try:
            one.start()
            yield one
        finally:
            one.close()


def steps(run_dir: Path) -> int:
    """The last one that has a checkpoint."""
    found = list_checkpoints(run_dir / "checkpoints")
    return int(found[-1].name.split("-")[-1]) if found else 0


def start_again(cluster: Cluster, job: str, restarts: str) -> None:
    """As soon as it is queued for so manieth time; Slurm would wait two minutes."""
    is_queued = lambda: (found := cluster.job(job))["Restarts"] == restarts and found["JobState"] == "PENDING"  # noqa: E731
    cluster.wait_for(is_queued, 600)
    time.sleep(5)  # at once it would be refused: "Job credential revoked"
    cluster("scontrol", "update", f"JobId={job}", "StartTime=now")


def submit(cluster: Cluster, *arguments: str) -> str:
    options = ["--nodes=2", "--gpus-per-node=1", f"--output={cluster.home}/log", "--parsable"]
    here = dict(MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")
    return cluster("sbatch", *options, str(DEPLOY / "train.sbatch"), *arguments, **here).strip()


def test_a_warned_job_and_one_that_loses_its_first_node_go_on_to_the_same_bits(
    cluster, arguments, read_lines, read_state, tmp_path
):
    keys = ("train.log_every=1", "checkpoint.every=5", "checkpoint.keep_last=3", "train.max_steps=200")
    run = tmp_path / "wild"
    calm = submit(cluster, *arguments(tmp_path / "calm", *keys))
    cluster.wait_for(lambda: cluster.job(calm)["JobState"] == "COMPLETED", 600)

    wild = submit(cluster, *arguments(run, *keys))
    cluster.wait_for(lambda: steps(run) >= 20, 600)
    cluster("scancel", "--batch", "--signal=USR1", wild)  # what --signal=B:USR1@300 sends five minutes before the end
    start_again(cluster, wild, "1")
    seen = steps(run)
    cluster.wait_for(lambda: steps(run) > seen, 600)
    lost = cluster.job(wild)["BatchHost"]
    cluster.kill(lost)
    start_again(cluster, wild, "2")
    cluster.wait_for(lambda: cluster.job(wild)["JobState"] == "COMPLETED", 600)
    assert cluster.job(wild)["BatchHost"] != lost

    first, second = (
        [{k: v for k, v in line.items() if not k.startswith("share_")} for line in read_lines(tmp_path / name)]
        for name in ("calm", "wild")
    )
    assert first == second and len(first) == 200
    (*_, expected), (*_, state) = (read_state(tmp_path / name) for name in ("calm", "wild"))
    assert all((state[name] == expected[name]).all() for name in expected)
