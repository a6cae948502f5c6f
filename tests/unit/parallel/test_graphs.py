"""CUDA graphs of packs: the same numbers as launches, whatever comes between, and few shapes to record."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from moltron.config.schema import ObjectiveConfig, OptimConfig, ParallelConfig
from moltron.data.loader import BatchLoader
from moltron.data.plan import BatchPlan
from moltron.data.store import Store, StoreWriter
from moltron.models.registry import build_model, get_spec
from moltron.objectives import Limits, get_objective
from moltron.parallel import collectives
from moltron.parallel.apply import assign_full, parallelize
from moltron.parallel.tensor import local
from moltron.tokenizers import get_tokenizer
from moltron.train.optim import Optimizer
from moltron.train.step import LossScaler, TrainStep

SIZES = dict(hidden_size=64, num_layers=2, num_heads=4, ffn_size=128)
TOKENS = 2048


@pytest.fixture
def loader(tmp_path):
    return loader_in(tmp_path)


def loader_in(folder):
    rng = np.random.default_rng(0)
    letters = np.frombuffer(b"LAGVSERTIDPKQNFYMHWC", dtype=np.uint8)
    texts = [letters[rng.integers(0, 20, n)].tobytes() for n in rng.lognormal(4.6, 0.6, 400).astype(int).clip(20, 500)]
    with StoreWriter(folder / "train.arrow") as writer:
        writer.add([str(i) for i in range(len(texts))], texts)
    store, tokenizer = Store.open(folder / "train.arrow"), get_tokenizer("esm2")
    objective = get_objective(ObjectiveConfig(), tokenizer, 0)
    plan = BatchPlan(store, objective, (TOKENS,), Limits(1024), seed=0)
    return BatchLoader(plan, store, tokenizer, packs=3)


def test_few_shapes_occur(loader):
    steps = [step for step, _ in zip(loader.steps(), range(16))]
    shapes = {tuple(x.shape for x in batch.tensors()) for step in steps for batch in step.batches}
    counts = {batch.num_sequences for step in steps for batch in step.batches}
    assert len(counts) > len(shapes) == 1


@pytest.mark.gpu
@pytest.mark.parametrize(
    "precision, name, state",
    [("bf16", "adamw", "fp32"), ("bf16", "muon", "fp32"), ("fp16", "adamw", "fp32"), ("bf16", "adamw", "fp8")],
)
def test_recorded_is_launched_bit_for_bit(loader, precision, name, state):
    compare(loader, collectives.init("cuda"), precision, name, state)


@pytest.mark.multi_gpu
def test_so_is_tensor_parallelism(ranks_of, tmp_path):
    folders = tmp_path / "0", tmp_path / "1"
    with ranks_of(__file__, *map(str, folders)) as outputs:
        pass
    assert all("equal" in output for output in outputs)


def compare(loader, device, precision, name, state, layout=None):
    steps = [step for step, _ in zip(loader.steps(), range(8))]
    found, spec = [], get_spec("esm2")
    loader.objective.compile()
    torch._dynamo.reset()
    # one model: another compilation may choose other kernels, which add up in another order
    settings = dict(precision=precision, compile=True, config=layout)
    model = parallelize(build_model("esm2", SIZES), spec.plan, device, **settings)
    for graphs in (True, False):
        model.init_weights(0, assign_full)
        model.zero_grad(set_to_none=True)
        optimizer = Optimizer(model, spec.plan, OptimConfig(name=name, state=state, lr=1e-3), 1e-3)
        scaler = LossScaler() if precision == "fp16" else None
        settings = dict(clip=1.0, scaler=scaler, skip_nonfinite=False, sync_each=False, graphs=graphs)
        train = TrainStep(model, loader.objective.loss, optimizer, device, **settings)
        losses = []
        for i, step in enumerate(steps):
            losses.append(train(i, step.batches, step.count, 1e-3).read().packs)
            with torch.no_grad():  # an evaluation in between
                model(step.batches[0].to(device))
        assert not graphs or len([r for r in train.graphed.recordings.values() if r is not None]) >= 1
        train.close()
        found.append((losses, {n: local(p).detach().clone() for n, p in model.named_parameters()}))
    (losses, weights), (expected, others) = found
    assert losses == expected and losses[0] != losses[-1]
    assert all(torch.equal(weights[n], others[n]) for n in weights)


if __name__ == "__main__":  # one of two ranks
    on = collectives.init("cuda")
    own = Path(sys.argv[1 + collectives.rank()])
    own.mkdir()
    collectives.share_packs(2)
    compare(loader_in(own), on, "bf16", "adamw", "fp32", ParallelConfig(tp=2))
    print("equal")
    collectives.shutdown()
