"""A tiny store and a tiny run, shared by the tests of training."""

import json

import numpy as np
import pytest
import torch

from moltron.checkpoint.manager import list_checkpoints, load_tensors, read_manifest
from moltron.config.compose import load_config
from moltron.config.schema import TrainConfig
from moltron.data.store import StoreWriter

TINY = (
    *("model.family=esm2", "model.hidden_size=32", "model.num_layers=2", "model.num_heads=2", "model.ffn_size=64"),
    *("batch.tokens=192", "batch.packs=4", "data.max_length=48"),
    *("optim.lr=3e-3", "optim.schedule.warmup_steps=4", "optim.schedule.min_lr=3e-4"),
    *("train.max_steps=20", "train.log_every=2", "train.eval_every=8", "train.device=cpu", "checkpoint.every=5"),
    "logging.tensorboard=false",
)
RATES = (
    "tokens_per_second",
    "padded_tokens_per_second",
    "decoder_tokens_per_second",
    "padded_decoder_tokens_per_second",
)
TIMES = {"seconds", "data_wait", "mfu", "memory", *RATES}


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory):
    """90 + 12 sequences of a five-letter alphabet with a pattern to learn."""
    folder = tmp_path_factory.mktemp("store")
    rng = np.random.default_rng(0)
    for split, count in (("train", 90), ("val", 12)):
        with StoreWriter(folder / f"{split}.arrow") as writer:
            sequences = [
                "".join("ACDEF"[(start + i) % 5] for i in range(length))
                for start, length in zip(rng.integers(0, 5, count), rng.integers(8, 60, count), strict=True)
            ]
            writer.add([f"{split}|{i}" for i in range(count)], sequences)
    return folder


@pytest.fixture(autouse=True, scope="session")  # before the runs that tests share
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def arguments(tiny_store):
    """(run_dir, *overrides) → the command line of a tiny run."""
    return lambda run_dir, *overrides: [*TINY, f"data.path={tiny_store}", f"run_dir={run_dir}", *overrides]


@pytest.fixture(scope="session")
def tiny_config(arguments):
    return lambda run_dir, *overrides: load_config(TrainConfig, arguments(run_dir, *overrides))


@pytest.fixture(scope="session")
def read_lines():
    """The lines of a run's metrics without what depends on the clock."""

    def read(run_dir):
        lines = [json.loads(text) for text in (run_dir / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k not in TIMES and not k.startswith("share_")} for line in lines]

    return read


@pytest.fixture(scope="session")
def read_state():
    """(step, meta without its clock, {name: tensor}) of a run's last checkpoint."""

    def read(run_dir):
        path = list_checkpoints(run_dir / "checkpoints")[-1]
        manifest = read_manifest(path)
        tensors = {n: torch.empty(shape, dtype=getattr(torch, dtype)) for n, (dtype, shape) in manifest.tensors.items()}
        load_tensors(path, tensors)
        meta = {key: value for key, value in manifest.meta.items() if key != "seconds"}
        return manifest.step, meta, tensors

    return read
