"""parallel.cpu_offload: the same training, with what lasts on the host."""

import json
import subprocess
import sys

import pytest


@pytest.mark.gpu
@pytest.mark.parametrize("moments", [(), ("optim.state=fp8", "model.hidden_size=64")])
def test_offloaded_is_not_offloaded(arguments, read_lines, tmp_path, moments):
    lines, peaks = {}, {}
    for name, keys in {"here": (), "there": ("parallel.cpu_offload=true",)}.items():
        keys = ("train.device=cuda", "train.precision=bf16", "train.log_every=1", *moments, *keys)
        command = [sys.executable, "-m", "moltron", "train", *arguments(tmp_path / name, *keys)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        lines[name] = read_lines(tmp_path / name)
        peaks[name] = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])["memory"]
    assert len(lines["here"]) == len(lines["there"]) == 20
    for a, b in zip(lines["here"], lines["there"], strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=2e-2)
    assert peaks["there"] < peaks["here"]
