"""Launch files: what they call is a command that moltron understands. Slurm's run for real in train/test_slurm.py."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moltron.config.compose import load_config
from moltron.config.schema import TrainConfig

DEPLOY = Path(__file__).parents[2] / "deploy"


def test_kubernetes_job_starts_a_training_that_composes():
    job = yaml.safe_load((DEPLOY / "kubernetes" / "pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch"  # the operator looks for this name
    assert container["command"][-3:] == ["-m", "moltron", "train"]
    flag, name, *keys = container["args"]
    config = load_config(TrainConfig, keys, name)
    processes = int(job["spec"]["nprocPerNode"])
    assert flag == "--config-name" and container["resources"]["limits"]["nvidia.com/gpu"] == processes
    elastic = job["spec"]["elasticPolicy"]
    for workers in range(elastic["minReplicas"], elastic["maxReplicas"] + 1):
        assert config.batch.packs % (workers * processes) == 0
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert {volume["name"] for volume in pod["volumes"]} == mounted.keys()
    assert config.data.path.startswith(mounted["data"]) and config.run_dir.startswith(mounted["data"])


@pytest.mark.parametrize("file", sorted(path.name for path in (DEPLOY / "slurm").iterdir()))
def test_slurm_files_are_shell(file):
    assert subprocess.run(["bash", "-n", DEPLOY / "slurm" / file]).returncode == 0


def test_a_task_of_the_array_embeds_its_own_file(tmp_path):
    proteins = Path(__file__).parents[2] / "examples" / "data" / "proteins.fasta"
    for name, count in (("a", 2), ("b", 3)):
        (tmp_path / f"{name}.fasta").write_text(">" + ">".join(proteins.read_text().split(">")[1 : count + 1]))
    (tmp_path / "files.txt").write_text(f"{tmp_path}/a.fasta\n{tmp_path}/b.fasta\n")
    environment = os.environ | {
        "SLURM_ARRAY_TASK_ID": "2",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    model = f"model={DEPLOY.parent}/models/esm2_8M_moltron"
    command = [shutil.which("bash"), DEPLOY / "slurm" / "embed.sbatch", "files.txt", "out", model]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    import h5py

    with h5py.File(tmp_path / "out" / "2-b.fasta.h5") as file:
        assert len(file["ids"]) == 3
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["2-b.fasta.h5"]
    for task, code, said in (("2", 0, "is there already"), ("3", 2, "files.txt has no such line")):
        environment["SLURM_ARRAY_TASK_ID"] = task
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == code and said in done.stdout + done.stderr
