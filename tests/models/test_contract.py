"""What every family promises: one suite, one row a family (tests/models/references.py).

Parity with a reference written by others, on random weights, fp32, 1e-5, forward and gradients; a packed sequence is
the same alone and in any company, to the bit; compiled equals eager; every number is initialised; names are frozen.
"""

import dataclasses
import hashlib

import numpy as np
import pytest
import torch
from references import ESM2_8M, REFERENCES, TINY

from moltron.checkpoint.weights import load_pretrained
from moltron.layers.losses import cross_entropy_sum
from moltron.models.batch import PackedBatch
from moltron.models.contacts import predict_contacts
from moltron.models.registry import FAMILIES, build_model, get_spec
from moltron.parallel.apply import compile_units, units

LENGTHS = [23, 9, 41, 23, 7]
FAMILY_ROWS = {
    "esm2": dict(family="esm2", architecture=TINY, names="944d8a66abd8"),
    "esm1 (ESM-1nv)": dict(family="esm1", architecture={**TINY, "max_positions": 128}, names="b983547cc061"),
    "esm1 (ESM-1b)": dict(
        family="esm1",
        architecture={**TINY, "max_positions": 128, "vocab_size": 33, "mask_id": 32, "gelu": "none",
                      "token_dropout": True, "embed_norm": True, "contact_head": True, "tokenizer": "esm2"},
        names="a2f28cf4ea33",
    ),
}  # fmt: skip


def random_sequences(vocab: int, mask_id: int, seed: int = 0) -> list[np.ndarray]:
    """Ids with specials at the ends and some <mask>."""
    rng = np.random.default_rng(seed)
    first, last = (0, 2) if vocab == 33 else (1, 2)
    sequences = []
    for length in LENGTHS:
        ids = rng.integers(5, vocab - 5, length)
        ids[rng.random(length) < 0.15] = mask_id
        ids[0], ids[-1] = first, last
        sequences.append(ids)
    return sequences


def packed(sequences: list[np.ndarray], tokens: int = 128) -> PackedBatch:
    lengths = np.array([len(s) for s in sequences])
    return PackedBatch.pack(np.concatenate(sequences), lengths, tokens=tokens, pad_id=1, max_length=64)


def by_sequence(x: torch.Tensor, sequences: list[np.ndarray]) -> list[torch.Tensor]:
    lengths = [len(s) for s in sequences]
    return list(x[: sum(lengths)].split(lengths))


@pytest.fixture(scope="module", params=REFERENCES)
def pair(request, tmp_path_factory):
    """A reference, our model loaded from what it saved, and sequences for both."""
    reference = REFERENCES[request.param]()
    loaded = load_pretrained(reference.save(tmp_path_factory.mktemp("reference") / "saved"))
    config = loaded.config
    return reference, loaded.model, random_sequences(config.vocab_size, config.mask_id)


def test_logits_and_all_hidden_states(pair):
    reference, model, sequences = pair
    layers = range(len(model.layers) + 1)
    batch = packed(sequences)
    with torch.no_grad():
        output = model(batch, hidden_layers=layers)
        logits = model.logits(output.hidden)
        for i, ids in enumerate(sequences):
            expected = reference.hiddens(torch.from_numpy(ids))
            assert len(expected) == len(layers)
            for layer in layers:
                got = by_sequence(output.hiddens[layer], sequences)[i]
                torch.testing.assert_close(got, expected[layer], rtol=1e-5, atol=1e-5)
            got = by_sequence(logits, sequences)[i]
            torch.testing.assert_close(got, reference.logits(torch.from_numpy(ids)), rtol=1e-5, atol=1e-5)


def test_gradients(pair):
    reference, model, sequences = pair
    batch = packed(sequences)
    rng = np.random.default_rng(1)
    batch.target_positions = torch.from_numpy(np.sort(rng.choice(batch.num_tokens, 20, replace=False)))
    batch.targets = torch.from_numpy(rng.integers(5, 25, 20))
    model.zero_grad()
    loss, count = cross_entropy_sum(model(batch).logits, batch.targets)
    (loss / count).backward()

    reference.module.zero_grad()
    every = torch.cat([reference.logits(torch.from_numpy(ids)) for ids in sequences])
    expected = torch.nn.functional.cross_entropy(every[batch.target_positions], batch.targets)
    expected.backward()
    torch.testing.assert_close(loss / count, expected, rtol=1e-5, atol=1e-5)
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in _named(reference.module)}
    translated = reference.ours(gradients)
    compared = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            compared += 1
            scale = translated[name].norm().clamp_min(1e-3)
            difference = (parameter.grad - translated[name]).norm() / scale
            assert difference < 1e-5, f"{name}: {difference:.1e}"
    assert compared == sum(p.requires_grad for p in model.parameters()) > 20


def _named(module):
    """Parameters under every name they have (the decoder is tied), as a state dict lists them."""
    return module.named_parameters(remove_duplicate=False)


def test_contacts(pair):
    reference, model, sequences = pair
    if reference.contacts is None:
        pytest.skip("this family has no contact head")
    for ids in sequences[:3]:
        with torch.no_grad():
            got = predict_contacts(model, packed([ids], tokens=64))
            expected = reference.contacts(torch.from_numpy(ids))
        assert got.std() > 1e-4
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------- by family, without reference


@pytest.fixture(params=FAMILY_ROWS)
def row(request):
    return FAMILY_ROWS[request.param]


def make(row) -> torch.nn.Module:
    model = build_model(row["family"], row["architecture"]).to_empty(device="cpu")
    for p in model.parameters():
        torch.nn.init.constant_(p, float("nan"))
    model.init_weights(seed=7)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.02)
    return model.eval()


def test_a_sequence_is_the_same_alone_and_in_any_company(row):
    model = make(row)
    sequences = random_sequences(model.config.vocab_size, model.config.mask_id)
    with torch.no_grad():
        together = model(packed(sequences)).hidden
        reversed_ = model(packed(sequences[::-1], tokens=192)).hidden
        alone = [model(packed([ids], tokens=64)).hidden[: len(ids)] for ids in sequences]
    for got, want in zip(by_sequence(together, sequences), alone, strict=True):
        assert torch.equal(got, want)
    for got, want in zip(by_sequence(reversed_, sequences[::-1]), alone[::-1], strict=True):
        assert torch.equal(got, want)


def test_logits_only_at_the_targets(row):
    model = make(row)
    batch = packed(random_sequences(model.config.vocab_size, model.config.mask_id))
    batch.target_positions = torch.tensor([0, 5, 90])
    with torch.no_grad():
        output = model(batch)
        everywhere = model.logits(output.hidden)
    assert output.logits.shape == (3, model.config.vocab_size)
    torch.testing.assert_close(output.logits, everywhere[batch.target_positions], rtol=1e-6, atol=1e-6)


def test_compiled_equals_eager(row):
    torch._dynamo.reset()
    model = make(row)
    batch = packed(random_sequences(model.config.vocab_size, model.config.mask_id))
    expected = model(batch).hidden
    gradient = torch.autograd.grad(expected.square().sum(), model.layers["0"].mlp.up.weight)[0]
    compile_units(model, get_spec(row["family"]).plan)
    got = model(batch).hidden
    compiled_gradient = torch.autograd.grad(got.square().sum(), model.layers["0"].mlp.up.weight)[0]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(compiled_gradient, gradient, rtol=1e-4, atol=1e-4)


def test_every_number_is_initialised_and_by_seed_and_name_alone(row):
    first = build_model(row["family"], row["architecture"]).to_empty(device="cpu")
    for p in first.parameters():
        torch.nn.init.constant_(p, float("nan"))
    first.init_weights(seed=3)
    second = build_model(row["family"], {**row["architecture"], "num_layers": 5}).to_empty(device="cpu")
    second.init_weights(seed=3)
    other = build_model(row["family"], row["architecture"]).to_empty(device="cpu")
    other.init_weights(seed=4)
    deeper = dict(second.named_parameters())
    for (name, p), (_, q) in zip(first.named_parameters(), other.named_parameters(), strict=True):
        assert torch.isfinite(p).all(), name
        if p.dim() == 2 and not name.startswith("contact_head"):
            assert not torch.equal(p, q), name
            if not name.endswith(("out.weight", "down.weight")):
                assert torch.equal(p, deeper[name]), name
    vocab, config = first.embed.weight, first.config
    assert vocab.shape[0] == 64 and not vocab[config.vocab_size :].any()
    std = first.layers["1"].mlp.up.weight.std().item()
    assert abs(std - 0.02) < 0.001
    assert abs(first.layers["1"].mlp.down.weight.std().item() - 0.02 / (2 * config.num_layers) ** 0.5) < 0.001


def test_the_plan_covers_the_blocks(row):
    model = build_model(row["family"], row["architecture"])
    assert units(model, get_spec(row["family"]).plan) == list(model.layers.values())


def test_parameter_names_are_frozen(row, request):
    """Checkpoints live longer than code: whoever renames a parameter changes this table, and writes a migration."""
    model = build_model(row["family"], row["architecture"])
    names = "\n".join(sorted(f"{name} {tuple(p.shape)}" for name, p in model.named_parameters()))
    assert hashlib.sha256(names.encode()).hexdigest()[:12] == row["names"], names


def test_configurations_are_plain_values():
    for spec in FAMILIES.values():
        for field in dataclasses.fields(spec.config):
            assert field.type in ("int", "float", "bool", "str")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_cuda_agrees_with_the_cpu(dtype, tolerance):
    model = build_model("esm2", ESM2_8M).to_empty(device="cpu")
    model.init_weights(0)
    batch = packed(random_sequences(33, 32))
    with torch.no_grad():
        expected = model(batch).hidden
        got = model.to("cuda", dtype)(batch.to("cuda")).hidden.float().cpu()
    real = slice(0, batch.num_tokens)
    assert ((got[real] - expected[real]).norm() / expected[real].norm()).item() < tolerance
