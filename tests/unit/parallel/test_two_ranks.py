"""FSDP2 on two gloo ranks is one process: loss, gradients and decoding of an encoder–decoder. One spawn."""

import json
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

from moltron.layers.losses import cross_entropy_sum
from moltron.models.batch import PackedBatch
from moltron.models.registry import build_model, get_spec
from moltron.parallel import collectives
from moltron.parallel.apply import assign_full, parallelize, set_gradient_sync

SIZES = dict(hidden_size=48, num_layers=2, num_decoder_layers=3, num_heads=4, ffn_size=96, max_positions=64)
MODELS = {
    "megamolbart": ("megamolbart", SIZES),
    "prott5nv": ("prott5", SIZES),
    "prott5-xl": ("prott5", {**SIZES, "architecture": "t5", "head_dim": 16, "tokenizer": "prott5"}),
}


def batch_of(rank):
    """Different lengths on each rank, and another number of targets."""
    rng = np.random.default_rng(rank)
    lengths, seconds = np.array([12, 30, 5 + rank]), np.array([7, 20 + rank, 9])
    ids, decoder_ids = (rng.integers(0, 100, n.sum()) for n in (lengths, seconds))
    decoder = (decoder_ids, seconds, 64)
    batch = PackedBatch.pack(ids, lengths, tokens=64, pad_id=0, max_length=64, decoder=decoder)
    batch.target_positions = torch.arange(10 + 8 * rank)
    batch.targets = torch.from_numpy(rng.integers(0, 100, 10 + 8 * rank))
    return batch


def random_weights(family, architecture):
    model = build_model(family, architecture).to_empty(device="cpu")
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    return {n: p.detach() + 0.1 * torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}


def fill(model, weights):
    for name, parameter in model.named_parameters():
        assign_full(parameter, weights[name])


def loss_and_gradients(model, batches, factor=1.0):
    sums = [cross_entropy_sum(model(batch).logits, batch.targets)[0] for batch in batches]
    (sum(sums) * factor / 28).backward()
    return sum(sums).detach() / 28


@torch.no_grad()
def decoded(model, batch):
    """Logits of three steps, by the methods that are not forward."""
    cache = model.start(model.encode(batch), batch.layout, capacity=3)
    return torch.stack([model.step(torch.full((len(batch.layout.lengths),), token), cache) for token in (2, 40, 41)])


def gathers(model, batch):
    """Of weights, in a step of three packs."""
    with patch.object(_fsdp_param_group, "foreach_all_gather", wraps=_fsdp_param_group.foreach_all_gather) as seen:
        for last in (False, False, True):
            set_gradient_sync(model, last)
            loss_and_gradients(model, [batch])
    return seen.call_count


def one_rank():
    """What a spawned process does: prints, on rank 0, the largest differences from one process, by model."""
    device = collectives.init("cpu")
    rank, differences = collectives.rank(), {}
    for name, (family, architecture) in MODELS.items():
        weights = random_weights(family, architecture)
        one = build_model(family, architecture).to_empty(device="cpu")
        fill(one, weights)
        loss = loss_and_gradients(one, [batch_of(0), batch_of(1)])
        two = parallelize(
            build_model(family, architecture), get_spec(family).plan, device, precision="fp32", compile=False
        )
        fill(two, weights)
        got = loss_and_gradients(two, [batch_of(rank)], factor=2.0)  # FSDP takes the mean over ranks
        collectives.all_reduce_sum(got)
        worst = {"loss": ((got - loss) / loss).abs().item()}
        for (parameter_name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
            worst[parameter_name] = ((q.grad.full_tensor() - p.grad).norm() / p.grad.norm().clamp_min(1e-3)).item()
        worst["gathers too many"] = gathers(two, batch_of(rank)) - sum(isinstance(m, FSDPModule) for m in two.modules())
        worst["decoded"] = (decoded(two, batch_of(rank)) - decoded(one, batch_of(rank))).abs().max().item()
        differences[name] = worst
    if rank == 0:
        print(json.dumps(differences))
    collectives.shutdown()


@pytest.fixture(scope="module")
def outputs(ranks_of):
    with ranks_of(__file__) as outputs:
        pass
    return outputs


@pytest.fixture(scope="module")
def differences(outputs):
    return json.loads(next(line for line in outputs[0].splitlines() if line.startswith("{")))


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_are_one_process(differences, name):
    worst = differences[name]
    assert len(worst) > 30 and worst.pop("gathers too many") == 0
    assert {what: value for what, value in worst.items() if not value < 1e-5} == {}


def test_torch_does_not_warn_of_logits_that_are_views(outputs):
    assert "view tensor" not in "".join(outputs)


@pytest.mark.parametrize("name", MODELS)
def test_both_stacks_compute_in_the_precision_and_reduce_in_fp32(name):
    family, architecture = MODELS[name]
    model = build_model(family, architecture)
    ours = not torch.distributed.is_initialized()
    parallelize(model, get_spec(family).plan, collectives.init("cpu"), precision="bf16", compile=False)
    model.init_weights(0, assign_full)
    seen = set()
    for block in (*model.encoder.layers.values(), *model.decoder.layers.values()):
        block.mlp.register_forward_pre_hook(lambda mlp, inputs: seen.update((inputs[0].dtype, mlp.up.weight.dtype)))
    output = model(batch_of(0))
    output.logits.float().sum().backward()
    assert seen == {output.hidden.dtype, output.logits.dtype} == {torch.bfloat16}
    assert {(p.dtype, p.grad.dtype) for p in model.parameters()} == {(torch.float32, torch.float32)}
    if ours:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    one_rank()
