"""Recomputing activations changes memory and time, never a bit of the gradients."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moltron.config.schema import ParallelConfig
from moltron.models.batch import PackedBatch
from moltron.models.registry import build_model, get_spec
from moltron.parallel import collectives
from moltron.parallel.apply import assign_full, parallelize

SIZES = dict(hidden_size=32, num_layers=4, num_heads=2, ffn_size=64)


@pytest.fixture(autouse=True)
def one_process():
    ours = not dist.is_initialized()
    collectives.init("cpu")
    yield
    if ours:
        dist.destroy_process_group()


def gradients(recompute, precision, compile=False, every=1):
    """Of two packs; how often a feed-forward ran, and the bytes that autograd kept for the backward."""
    config = ParallelConfig(recompute=recompute, recompute_every=every)
    device, plan = torch.device("cpu"), get_spec("esm2").plan
    model = parallelize(build_model("esm2", SIZES), plan, device, precision=precision, compile=compile, config=config)
    model.init_weights(0, assign_full)
    runs, kept = [], []
    for block in model.layers.values() if not compile else ():
        block.mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    for seed in range(2):
        ids = np.random.default_rng(seed).integers(4, 24, 60)
        batch = PackedBatch.pack(ids, np.array([20, 10, 30]), tokens=64, pad_id=1, max_length=64)
        batch.target_positions = torch.arange(0, 60, 3)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel() * x.itemsize) or x, lambda x: x):
            loss = model(batch).logits.float().square().sum()
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, len(runs), sum(kept)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute, every, again", [("full", 1, 4), ("full", 2, 2), ("selective", 1, 4)])
def test_same_bits_from_less_memory(precision, recompute, every, again):
    expected, runs, kept = gradients("none", precision)
    got, more_runs, less = gradients(recompute, precision, every=every)
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in expected)
    assert (runs, more_runs) == (8, 8 + 2 * again)
    assert less < (0.8 if every == 2 else 0.6) * kept or recompute == "selective"


@pytest.mark.parametrize("recompute", ["full", pytest.param("selective", marks=pytest.mark.slow)])
def test_compiled_blocks_recompute_as_well(recompute):
    torch._dynamo.reset()  # what other tests compiled
    expected, *_ = gradients("none", "bf16", compile=True)
    got, *_ = gradients(recompute, "bf16", compile=True)
    for name in expected:
        assert ((got[name] - expected[name]).norm() / expected[name].norm().clamp_min(1e-6)).item() < 2e-2, name
