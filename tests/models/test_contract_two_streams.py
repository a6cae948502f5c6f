"""What every encoder–decoder promises: the suite of test_contract.py for two streams, and decoding with a cache."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import test_contract
import torch
from references_two_streams import REFERENCES, TINY
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moltron.checkpoint.weights import load_pretrained
from moltron.layers.layout import Layout
from moltron.layers.losses import cross_entropy_sum
from moltron.models.batch import PackedBatch
from moltron.models.registry import FAMILIES, build_model, get_spec
from moltron.parallel.apply import compile_units, units

LENGTHS, DECODER_LENGTHS = [5, 5, 23, 170, 7], [3, 3, 31, 140, 1]
T5 = {**TINY, "architecture": "t5", "head_dim": 16, "relative_buckets": 12, "relative_reach": 50, "tokenizer": "prott5"}
FAMILY_ROWS = {
    "prott5 (ProtT5nv)": dict(family="prott5", architecture={**TINY, "max_positions": 192}, names="64ac6230e505"),
    "prott5 (ProtT5-XL)": dict(family="prott5", architecture=T5, names="b340b377bba9"),
    "prott5 (T5, head of its own)": dict(
        family="prott5", architecture={**T5, "tied_head": False}, names="2fa4ed170167"
    ),
    "prott5 (ProtT5-XL, encoder alone)": dict(
        family="prott5", architecture={**T5, "num_decoder_layers": 0}, names="4ebb6a7889c7"
    ),
    "megamolbart": dict(family="megamolbart", architecture={**TINY, "max_positions": 192}, names="e62cf0a0de26"),
}
DECODERS = [name for name, row in FAMILY_ROWS.items() if row["architecture"]["num_decoder_layers"]]


def random_pairs(vocab, seed=0):
    """Sequences of both streams."""
    rng = np.random.default_rng(seed)
    return tuple([rng.integers(0, vocab, n) for n in lengths] for lengths in (LENGTHS, DECODER_LENGTHS))


def packed(sequences, decoder=None, tokens=256, decoder_tokens=192):
    """Sequence i of the decoder's stream belongs to sequence i of the encoder's."""
    lengths = np.array([len(s) for s in sequences])
    second = None
    if decoder is not None:
        second = (np.concatenate(decoder), np.array([len(s) for s in decoder]), decoder_tokens)
    flat = np.concatenate(sequences)
    return PackedBatch.pack(flat, lengths, tokens=tokens, pad_id=3, max_length=180, decoder=second)


def by_sequence(x, sequences):
    lengths = [len(s) for s in sequences]
    return list(x[: sum(lengths)].split(lengths))


@pytest.fixture(scope="module", params=REFERENCES)
def pair(request, tmp_path_factory):
    """A reference, our model loaded from what it saved, and sequences for both."""
    reference = REFERENCES[request.param]()
    loaded = load_pretrained(reference.save(tmp_path_factory.mktemp("reference") / "saved"))
    return reference, loaded.model, *random_pairs(loaded.config.vocab_size)


def test_logits_and_all_hidden_states_of_the_encoder(pair):
    reference, model, sequences, decoder = pair
    layers = range(len(model.encoder.layers) + 1)
    with torch.no_grad():
        logits, hiddens = reference.run(sequences, decoder)
        output = model(packed(sequences, decoder if logits else None), hidden_layers=layers)
        assert len(hiddens) == len(layers)
        for layer in layers:
            for got, want in zip(by_sequence(output.hiddens[layer], sequences), hiddens[layer], strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        if not logits:
            assert torch.equal(output.hidden, output.hiddens[layers[-1]])
            with pytest.raises(ValueError, match=r"encoder alone.*no logits"):
                model.logits(output.hidden)
            return
        for got, want in zip(by_sequence(model.logits(output.hidden), decoder), logits, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_gradients(pair):
    reference, model, sequences, decoder = pair
    if model.decoder is None:
        pytest.skip("an encoder alone is not trained")
    batch = packed(sequences, decoder)
    rng = np.random.default_rng(1)
    batch.target_positions = torch.from_numpy(np.sort(rng.choice(batch.num_decoder_tokens, 40, replace=False)))
    batch.targets = torch.from_numpy(rng.integers(5, 100, 40))
    model.zero_grad()
    loss, count = cross_entropy_sum(model(batch).logits, batch.targets)
    (loss / count).backward()

    reference.module.zero_grad()
    every = torch.cat(reference.run(sequences, decoder)[0])
    expected = torch.nn.functional.cross_entropy(every[batch.target_positions], batch.targets)
    expected.backward()
    torch.testing.assert_close(loss / count, expected, rtol=1e-5, atol=1e-5)
    named = reference.module.named_parameters(remove_duplicate=False)
    translated = reference.ours({name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named})
    for name, parameter in model.named_parameters():
        want = translated.pop(name)
        difference = (parameter.grad - want).norm() / want.norm().clamp_min(1e-3)
        assert difference < 1e-5, f"{name}: {difference:.1e}"
    assert not translated


# --------------------------------------------------------------------------------------- by family, without reference


@pytest.fixture(params=FAMILY_ROWS)
def row(request):
    return FAMILY_ROWS[request.param]


@pytest.fixture(params=DECODERS)
def decoding(request):
    """A model with a decoder and its configuration's row."""
    return FAMILY_ROWS[request.param]


def make(row) -> torch.nn.Module:
    model = test_contract.make(row)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3 if p.dim() == 2 else 1)  # so that attention is not nearly uniform
    return model


def test_a_sequence_is_the_same_alone_and_in_any_company(row):
    model = make(row)
    sequences, decoder = random_pairs(model.config.vocab_size)
    streams = (sequences, decoder) if model.decoder else (sequences,)

    def run(*streams, tokens=256, decoder_tokens=192):
        return by_sequence(model(packed(*streams, tokens=tokens, decoder_tokens=decoder_tokens)).hidden, streams[-1])

    with torch.no_grad():
        together = run(*streams)
        backwards = run(*(s[::-1] for s in streams), tokens=320, decoder_tokens=256)[::-1]
        alone = [run(*([s] for s in each))[0] for each in zip(*streams)]
    for here, there, want in zip(together, backwards, alone, strict=True):
        assert torch.equal(here, want) and torch.equal(there, want)


def test_one_stream_is_the_encoder_alone(decoding):
    model = make(decoding)
    sequences, decoder = random_pairs(model.config.vocab_size)
    with torch.no_grad():
        alone = model(packed(sequences), hidden_layers=[3])
        assert torch.equal(model.encode(packed(sequences, decoder)), alone.hidden)
        both = model(packed(sequences, decoder), hidden_layers=[3])
    assert alone.logits is None and torch.equal(alone.hiddens[3], alone.hidden)
    assert torch.equal(both.hiddens[3], alone.hidden) and both.hidden.shape == (192, 48)


def test_padding_rows_of_the_vocabulary_take_no_part(decoding):
    changed = {**decoding["architecture"], "vocab_size": 100}
    model = make({**decoding, "architecture": changed})
    rng = np.random.default_rng(0)
    batch = packed([rng.integers(0, 100, 20)], [rng.integers(0, 100, 10)], tokens=64, decoder_tokens=64)
    batch.target_positions, batch.targets = torch.tensor([0, 3, 9]), torch.tensor([1, 99, 50])
    output = model(batch)
    assert output.logits.shape == (3, 100)
    with torch.no_grad():
        everywhere = model.logits(output.hidden)
    torch.testing.assert_close(output.logits, everywhere[batch.target_positions], rtol=1e-6, atol=1e-6)
    cross_entropy_sum(output.logits, batch.targets)[0].backward()
    for name in ("embed.weight", "head.weight", "head.bias"):
        parameter = dict(model.named_parameters()).get(name)
        if parameter is not None:
            assert parameter.shape[0] == 128 and parameter.grad[:100].any() and not parameter.grad[100:].any()


def test_compiled_equals_eager(decoding):
    torch._dynamo.reset()
    model = make(decoding)
    batch = packed(*(stream[:3] for stream in random_pairs(model.config.vocab_size)), tokens=64, decoder_tokens=64)
    weights = [model.encoder.layers["0"].mlp.up.weight, model.decoder.layers["1"].cross_attention.kv.weight]
    expected = model(batch).hidden
    gradients = torch.autograd.grad(expected.square().sum(), weights)
    compile_units(model, get_spec(decoding["family"]).plan)
    got = model(batch).hidden
    compiled = torch.autograd.grad(got.square().sum(), weights)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(compiled, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


def test_every_number_is_initialised_and_by_seed_and_name_alone(row):
    def fresh(seed, **changes):
        model = build_model(row["family"], row["architecture"] | changes).to_empty(device="cpu")
        for p in model.parameters():
            torch.nn.init.constant_(p, float("nan"))
        model.init_weights(seed=seed)
        return model

    first, other = fresh(3), fresh(4)
    deeper = dict(fresh(3, num_layers=5, num_decoder_layers=4).named_parameters())
    for (name, p), (_, q) in zip(first.named_parameters(), other.named_parameters(), strict=True):
        assert torch.isfinite(p).all(), name
        if p.dim() == 2:
            assert not torch.equal(p, q), name
            if not name.endswith(("out.weight", "down.weight")):
                assert torch.equal(p, deeper[name]), name
        else:
            assert (p == (1 if name.endswith("norm.weight") else 0)).all(), name
    config = first.config
    for vocabulary in (first.embed.weight, getattr(first.head, "weight", None)):
        if vocabulary is not None:
            assert vocabulary.shape[0] % 64 == 0 and not vocabulary[config.vocab_size :].any()
    std = 0.02 if row["family"] == "megamolbart" else 0.015
    for stack, depth in ((first.encoder, config.num_layers), (first.decoder, config.num_decoder_layers)):
        if stack is not None:
            block = stack.layers["1"]
            residual = [block.attention.out, block.mlp.down]
            residual += [block.cross_attention.out] if stack is first.decoder else []
            assert block.mlp.up.weight.std().item() == pytest.approx(std, rel=0.05)
            for linear in residual:
                assert linear.weight.std().item() == pytest.approx(std / (2 * depth) ** 0.5, rel=0.07)


def test_the_plan_covers_the_blocks(decoding):
    model = build_model(decoding["family"], decoding["architecture"])
    blocks = [*model.encoder.layers.values(), *model.decoder.layers.values()]
    assert units(model, get_spec(decoding["family"]).plan) == blocks


def test_parameter_names_are_frozen(row):
    """As for the encoders: whoever renames a parameter changes this table, and writes a migration."""
    model = build_model(row["family"], row["architecture"])
    names = "\n".join(sorted(f"{name} {tuple(p.shape)}" for name, p in model.named_parameters()))
    assert hashlib.sha256(names.encode()).hexdigest()[:12] == row["names"], names


def test_every_family_has_a_row():
    rows = [*test_contract.FAMILY_ROWS.values(), *FAMILY_ROWS.values()]
    assert {row["family"] for row in rows} == set(FAMILIES)


def test_flops_are_those_of_the_matrix_products(decoding):
    """Against the products that one sequence makes, forward, as torch counts them; attention, causal too, in full."""
    model = make(decoding)
    batch = packed([np.arange(30)], [np.arange(20)], tokens=30, decoder_tokens=20)
    with (
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
    ):  # others go uncounted
        model.logits(model(batch).hidden)
    width = 64 if decoding["architecture"].get("head_dim") else 48
    causal = 2 * 4 * width * 20**2 / 2  # of 2 layers, the half that is not needed
    padding = 2 * 48 * 20 * (model.embed.weight.shape[0] - model.config.vocab_size)
    assert 3 * (counter.get_total_flops() - causal - padding) == model.flops(batch)


# ------------------------------------------------------------------------------------------------ decoding with a cache


def decode(model, cache, decoder):
    """Logits (B, U, V) of the padded sequences of `decoder`, a token at a time."""
    length = max(map(len, decoder))
    ids = torch.zeros(len(decoder), length, dtype=torch.int64)
    for row, sequence in zip(ids, decoder):
        row[: len(sequence)] = torch.from_numpy(sequence)
    return torch.stack([model.step(column, cache) for column in ids.T], dim=1)


def test_steps_equal_the_packed_forward(decoding):
    model = make(decoding)
    sequences, decoder = random_pairs(model.config.vocab_size)
    batch = packed(sequences, decoder)
    with torch.no_grad():
        expected = by_sequence(model.logits(model(batch).hidden), decoder)
        whole = model.start(model.encode(batch), batch.layout, capacity=140)
        real = model.start(model.encode(batch), batch.layout, 140, batch.num_sequences)
    assert whole.visible.shape[0] > real.visible.shape[0] == 5
    logits = decode(model, real, decoder)
    torch.testing.assert_close(logits, decode(model, whole.select(torch.arange(5)), decoder), rtol=1e-5, atol=1e-5)
    assert logits.shape == (5, 140, model.config.vocab_size)
    for got, want in zip(logits, expected, strict=True):
        torch.testing.assert_close(got[: len(want)], want, rtol=1e-5, atol=1e-5)


def test_select_reorders_repeats_and_drops(decoding):
    model = make(decoding)
    sequences, decoder = random_pairs(model.config.vocab_size)
    batch = packed(sequences)
    prefixes = [s[:1].repeat(9) for s in decoder]
    rows = torch.tensor([2, 2, 0, 4])
    ends = [np.array([7, 8, 9]), np.array([11, 3, 5]), np.array([1, 1, 2]), np.array([30, 31, 32])]
    chosen = [np.concatenate([prefixes[row], end]) for row, end in zip(rows, ends, strict=True)]
    with torch.no_grad():
        reference = packed([sequences[row] for row in rows], chosen, tokens=384)
        expected = by_sequence(model.logits(model(reference).hidden), chosen)
        cache = model.start(model.encode(batch), batch.layout, capacity=20)
    decode(model, cache.select(torch.arange(3)), prefixes[:3])  # writes into a copy
    cache = cache.select(torch.arange(5))
    decode(model, cache, prefixes)
    got = decode(model, cache.select(rows), ends)
    for logits, want in zip(got, expected, strict=True):
        torch.testing.assert_close(logits, want[-3:], rtol=1e-5, atol=1e-5)
    assert cache.length == 9


def test_an_empty_memory_is_seen_as_nothing(decoding):
    model = make(decoding)
    layout = Layout.of(np.array([4, 0, 60]))
    batch = packed([np.arange(4)], tokens=64)
    batch = replace(batch, layout=layout)
    batch.decoder_ids, batch.decoder_layout = torch.arange(64), Layout.of(np.array([3, 61, 0]))
    with torch.no_grad():
        expected = model.logits(model(batch).hidden)
        cache = model.start(model.encode(batch), layout, capacity=3)
    assert torch.isfinite(expected).all()
    got = decode(model, cache, [np.arange(3), np.arange(3, 6), np.arange(3)])
    torch.testing.assert_close(got[0], expected[:3], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1], expected[3:6], rtol=1e-5, atol=1e-5)


def test_a_full_cache_and_positions_that_end(decoding):
    model = make(decoding)
    batch = packed([np.arange(4)], tokens=64)
    with torch.no_grad():
        cache = model.start(model.encode(batch), batch.layout, capacity=1)
    model.step(torch.zeros(2, dtype=torch.int64), cache)
    with pytest.raises(ValueError, match="room for 1 tokens"):
        model.step(torch.zeros(2, dtype=torch.int64), cache)
    if model.config.positions_end:
        with pytest.raises(ValueError, match="193 tokens to decode, but the model has positions for 192"):
            model.start(model.encode(batch), batch.layout, capacity=193)


def test_an_encoder_alone_neither_trains_nor_decodes():
    model = make(FAMILY_ROWS["prott5 (ProtT5-XL, encoder alone)"])
    batch = packed([np.arange(4)], [np.arange(3)], tokens=64)
    for forbidden in (lambda: model(batch), lambda: model.start(model.encode(batch), batch.layout, 3)):
        with pytest.raises(ValueError, match="cannot be trained or decode"):
            forbidden()
