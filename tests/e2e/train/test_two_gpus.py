"""Layouts of two GPUs, compiled and in bf16, train as one GPU does. (In float64, on CPUs: tests/unit/parallel.)"""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.multi_gpu
KEYS = ("train.device=cuda", "train.precision=bf16", "train.log_every=1", "model.hidden_size=128", "batch.tokens=256")
LAYOUTS = {
    "sharded": (),
    "gathered again": ("parallel.reshard_after_forward=true",),
    "recomputed": ("parallel.reshard_after_forward=true", "parallel.recompute=full"),
    "replicated": ("parallel.dp_replicate=2",),
    "tensor": ("parallel.tp=2",),
    "context": ("parallel.cp=2",),
    "pipeline": ("parallel.pp=2",),
}


def losses(folder):
    return [json.loads(line)["train_loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def expected(arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    command = [sys.executable, "-m", "moltron", "train", *arguments(folder, *KEYS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return losses(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_gpus_train_as_one(layout, arguments, ranks_of, expected, tmp_path):
    with ranks_of("-m", "moltron", "train", *arguments(tmp_path, *KEYS, *LAYOUTS[layout])):
        pass
    found = losses(tmp_path)
    assert len(found) == len(expected) == 20 and expected[-1] < 0.9 * expected[0]
    assert found == pytest.approx(expected, rel=2e-2)
