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

    def look(attention, inputs):  # inside of a block, after FSDP's own hooks
        x_TD, _, rotary = inputs
        hidden.add(x_TD.dtype)
        weights.add(attention.qkv.weight.dtype)
        tables.update(table.dtype for table in rotary or ())

    for block in model.layers.values():
        block.attention.register_forward_pre_hook(look)
    ids = np.array([0, 5, 6, architecture.get("mask_id", 32 if family == "esm2" else 4), 2])
    batch = PackedBatch.pack(ids, np.array([5]), tokens=8, pad_id=1, max_length=8)
    batch.target_positions = torch.tensor([3])
    output = model(batch)
    output.logits.float().sum().backward()
    assert hidden == weights == {dtype} and output.hidden.dtype == output.logits.dtype == dtype
    assert tables == ({torch.float32} if family == "esm2" else set())
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.dtype == torch.float32 for g in gradients)
