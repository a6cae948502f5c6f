"""CUDA graphs of packs: the same numbers as launches, whatever comes between, and few shapes to record."""

import numpy as np
import pytest
import torch

from moltron.config.schema import ObjectiveConfig, OptimConfig
from moltron.data.loader import BatchLoader
from moltron.data.plan import BatchPlan
from moltron.data.store import Store, StoreWriter
from moltron.models.registry import build_model, get_spec
from moltron.objectives import Limits, get_objective
from moltron.parallel import collectives
from moltron.parallel.apply import assign_full, parallelize
from moltron.tokenizers import get_tokenizer
from moltron.train.optim import Optimizer
from moltron.train.step import LossScaler, TrainStep

SIZES = dict(hidden_size=64, num_layers=2, num_heads=4, ffn_size=128)
TOKENS = 2048


@pytest.fixture
def loader(tmp_path):
    rng = np.random.default_rng(0)
    letters = np.frombuffer(b"LAGVSERTIDPKQNFYMHWC", dtype=np.uint8)
    texts = [letters[rng.integers(0, 20, n)].tobytes() for n in rng.lognormal(4.6, 0.6, 400).astype(int).clip(20, 500)]
    with StoreWriter(tmp_path / "train.arrow") as writer:
        writer.add([str(i) for i in range(len(texts))], texts)
    store, tokenizer = Store.open(tmp_path / "train.arrow"), get_tokenizer("esm2")
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
    device = collectives.init("cuda")
    steps = [step for step, _ in zip(loader.steps(), range(8))]
    found, spec = [], get_spec("esm2")
    loader.objective.compile()
    torch._dynamo.reset()
    # one model: another compilation may choose other kernels, which add up in another order
    model = parallelize(build_model("esm2", SIZES), spec.plan, device, precision=precision, compile=True)
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
        found.append((losses, {n: p.detach().clone() for n, p in model.named_parameters()}))
    (losses, weights), (expected, others) = found
    assert losses == expected
    assert all(torch.equal(weights[n], others[n]) for n in weights)
