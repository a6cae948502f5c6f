"""The loss scale, the one division by the global count, clipping."""

import numpy as np
import pytest
import torch

from moltron.config.schema import ObjectiveConfig, OptimConfig
from moltron.models.batch import PackedBatch
from moltron.models.registry import build_model, get_spec
from moltron.objectives import get_objective
from moltron.tokenizers import get_tokenizer
from moltron.train.optim import Optimizer
from moltron.train.step import LossScaler, TrainStep


def test_scaler_halves_and_doubles():
    scaler = LossScaler(scale=8.0, interval=2)
    scaler.update(finite=False)
    assert (scaler.scale, scaler.good) == (4.0, 0)
    scaler.update(finite=True)
    scaler.update(finite=True)
    assert (scaler.scale, scaler.good) == (8.0, 0)
    for _ in range(20):
        scaler.update(finite=False)
    assert scaler.scale == scaler.lowest


@pytest.fixture
def parts():
    tokenizer = get_tokenizer("esm2")
    model = build_model("esm2", dict(hidden_size=16, num_layers=1, num_heads=2, ffn_size=32), "cpu")
    model.init_weights(3)
    objective = get_objective(ObjectiveConfig(select=0.3), tokenizer, 0)
    batches = []
    for pack, lengths in enumerate(([20, 7, 12], [40], [5])):
        ids = np.concatenate([tokenizer.encode((b"ACDEFGHIKL" * 4)[: n - 2]) for n in lengths])
        size = dict(tokens=48, pad_id=tokenizer.pad_id, max_length=40)
        batch = PackedBatch.pack(ids, np.array(lengths), **size, records=np.arange(len(lengths)) + 10 * pack)
        batches.append(objective.corrupt(batch, 0))
    return model, objective, batches


def make(parts, clip=None, scaler=None):
    model, objective, _ = parts
    optimizer = Optimizer(model, get_spec("esm2").plan, OptimConfig(lr=1.0), peak=1.0)
    options = dict(clip=clip, scaler=scaler, skip_nonfinite=False, sync_each=False)
    return TrainStep(model, objective.loss, optimizer, torch.device("cpu"), **options)


@pytest.mark.parametrize("scaler", [None, LossScaler(2.0**10)])
def test_micro_batches_weigh_by_their_targets(parts, scaler, monkeypatch):
    """Gradient of the mean over all targets, not of a mean of the packs' means."""
    model, objective, batches = parts
    sums = [objective.loss(model(batch), batch) for batch in batches]
    count = sum(int(n) for _, n in sums)
    assert len({int(n) for _, n in sums}) > 1
    expected = torch.autograd.grad(sum(s for s, _ in sums) / count, model.layers["0"].mlp.up.weight)[0]

    step = make(parts, scaler=scaler)
    seen = {}
    monkeypatch.setattr(step.optimizer, "step", lambda lr: seen.update(g=model.layers["0"].mlp.up.weight.grad.clone()))
    reading = step(1, batches, count, lr=0.5).read()
    torch.testing.assert_close(seen["g"], expected)
    packs = [s.item() for s, _ in sums]
    assert reading.loss == pytest.approx(sum(packs) / count)
    assert reading.packs == pytest.approx(packs)
    assert (reading.tokens, reading.counts["padded_tokens"]) == (84, 144)
    squares = 20**2 + 7**2 + 12**2 + 40**2 + 5**2
    assert reading.flops == pytest.approx(3 * ((8 * 16**2 + 4 * 16 * 32) * 84 + 4 * 16 * squares))
    assert [r.tolist() for r in reading.records] == [[0, 1, 2], [10], [20]]
    assert model.layers["0"].mlp.up.weight.grad is None


def test_clipping_is_to_the_global_norm(parts, monkeypatch):
    _, _, batches = parts
    step = make(parts, clip=1e-3)
    norms = []
    monkeypatch.setattr(
        step.optimizer,
        "step",
        lambda lr: norms.append(torch.cat([p.grad.flatten() for p in step.optimizer.names]).norm().item()),
    )
    reading = step(1, batches, 20, lr=0.5).read()
    assert norms == [pytest.approx(1e-3, rel=1e-3)]
    assert reading.grad_norm > 0.1  # the one reported is from before


def test_a_step_asks_all_ranks_to_stop(parts):
    _, _, batches = parts
    assert make(parts)(1, batches, 20, lr=0.0, stop=True).read().stop
    assert not make(parts)(1, batches, 20, lr=0.0).read().stop
