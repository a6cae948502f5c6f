"""What dtypes flow through a model under the mixed precision policy."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moltron.models.batch import PackedBatch
from moltron.models.registry import build_model, get_spec
from moltron.parallel import collectives
from moltron.parallel.apply import assign_full, parallelize

SIZES = dict(hidden_size=32, num_layers=2, num_heads=2, ffn_size=64)
MODELS = {
    "esm2": ("esm2", SIZES),
    "esm2 without token dropout": ("esm2", SIZES | dict(token_dropout=False)),
    "esm1nv": ("esm1", SIZES),
    "esm1b": ("esm1", SIZES | dict(vocab_size=33, token_dropout=True, embed_norm=True, contact_head=True, mask_id=32)),
}


@pytest.fixture
def one_process():
    ours = not dist.is_initialized()
    yield collectives.init("cpu")
    if ours:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_blocks_compute_in_the_precision_with_exact_rotary_tables(one_process, name, precision, dtype):
    family, architecture = MODELS[name]
    model = build_model(family, architecture)
    parallelize(model, get_spec(family).plan, one_process, precision=precision, compile=False)
    model.init_weights(0, assign_full)
    hidden, tables, weights = set(), set(), set()

    def look(qkv, inputs):
        hidden.add(inputs[0].dtype)
        weights.add(qkv.weight.dtype)

    for block in model.layers.values():
        block.register_forward_pre_hook(lambda _, inputs: tables.update(x.dtype for x in inputs[3] or ()))
        block.attention.qkv.register_forward_pre_hook(look)
    ids = np.array([0, 5, 6, architecture.get("mask_id", 32 if family == "esm2" else 4), 2])
    batch = PackedBatch.pack(ids, np.array([5]), tokens=8, pad_id=1, max_length=8)
    batch.target_positions = torch.tensor([3])
    output = model(batch)
    output.logits.float().sum().backward()
    assert hidden == weights == {dtype} and output.hidden.dtype == output.logits.dtype == dtype
    assert tables == ({torch.float32} if family == "esm2" else set())
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.dtype == torch.float32 for g in gradients)


def test_masters_are_back_after_every_call_and_gradients_add_up_in_fp32(one_process):
    model = build_model("esm2", SIZES)
    parallelize(model, get_spec("esm2").plan, one_process, precision="bf16", compile=False)
    model.init_weights(0, assign_full)
    masters = dict(model.named_parameters())
    batch = PackedBatch.pack(np.array([0, 5, 6, 32, 2]), np.array([5]), tokens=8, pad_id=1, max_length=8)
    batch.target_positions = torch.tensor([3])
    gradients = []
    for _ in range(3):
        model(batch).logits.float().sum().backward()
        gradients.append(model.embed.weight.grad.clone())
    assert torch.equal(gradients[1], 2 * gradients[0]) and torch.equal(gradients[2], gradients[1] + gradients[0])
    batch.target_positions = "broken"
    with pytest.raises(TypeError):
        model(batch)
    assert all(p is masters[name] and p.dtype == torch.float32 for name, p in model.named_parameters())


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_fp8_is_bf16_with_other_products_in_the_inner_blocks(one_process, recipe):
    """Hidden states and logits stay near bf16's and are not equal to them; gradients are those of fp32 masters."""
    ids = np.tile(np.array([0, *range(4, 24), 32, 7, 2]), 4)
    batch = PackedBatch.pack(ids, np.full(4, 24), tokens=96, pad_id=1, max_length=24)
    batch.target_positions = torch.tensor([21, 45, 69, 93])
    results = {}
    for precision in ("fp32", "bf16", "fp8"):
        model = build_model("esm2", SIZES | dict(num_layers=4))
        plan = get_spec("esm2").plan
        parallelize(model, plan, one_process, precision=precision, compile=False, fp8_recipe=recipe)
        model.init_weights(0, assign_full)
        output = model(batch)
        output.logits.float().square().sum().backward()
        gradients = [model.layers[i].mlp.up.weight.grad for i in "0123"]
        assert all(g.dtype == torch.float32 for g in gradients)
        results[precision] = [output.hidden.detach().float(), *gradients]
    apart = {
        precision: [
            ((x - y).norm() / y.norm()).item() for x, y in zip(results[precision], results["fp32"], strict=True)
        ]
        for precision in ("bf16", "fp8")
    }
    assert max(apart["bf16"]) < 0.02 and 0.002 < apart["fp8"][0] < 0.05
    assert all(0.02 < x < 0.2 for x in apart["fp8"][2:4])
