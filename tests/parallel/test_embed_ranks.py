"""Two ranks share the shards of one input; the file is the one that a single process writes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

from moltron.checkpoint.weights import save_pretrained
from moltron.cli.main import main
from moltron.models.registry import build_model, get_spec


def test_two_ranks_write_what_one_writes(tmp_path):
    model = build_model("esm2", dict(hidden_size=32, num_layers=1, num_heads=2, ffn_size=64, max_positions=66), "cpu")
    model.init_weights(0)
    save_pretrained(model, get_spec("esm2"), model.config, tmp_path / "model")
    rng = np.random.default_rng(0)
    letters = np.array(list("ACDEFGHIKLMNPQRSTVWY"))
    records = [f">P{i}\n{''.join(rng.choice(letters, rng.integers(1, 70)))}\n" for i in range(40)]
    (tmp_path / "in.fasta").write_text("".join(records))

    def command(output: str) -> list[str]:
        keys = [f"model={tmp_path}/model", f"input={tmp_path}/in.fasta", f"output={tmp_path}/{output}"]
        keys += ["shard_size=7", "outputs=[embeddings,logits]", "device=cpu"]
        return [sys.executable, "-m", "moltron", "embed", *keys]

    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(command("two.npz"), env=environment | address | {"RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(2)
    ]
    codes = [process.wait(timeout=300) for process in ranks]
    one = main(command("one.npz")[3:])
    rejected = any(len(record.split("\n")[1]) > 64 for record in records)
    assert codes == [3 if rejected else 0] * 2 and one == codes[0]
    assert Path(tmp_path / "two.npz").read_bytes() == Path(tmp_path / "one.npz").read_bytes()
    assert (tmp_path / "two.npz.rejects.tsv").read_bytes() == (tmp_path / "one.npz.rejects.tsv").read_bytes()
    assert not (tmp_path / "two.npz.shards").exists()
