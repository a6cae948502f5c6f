"""Same bits in any company, order kept, and what the model itself says for one sequence."""

import threading
import time

import numpy as np
import pytest
import torch

from moltron.infer.engine import Encoder, Wanted, ahead
from moltron.infer.windows import merge
from moltron.models.batch import PackedBatch
from moltron.models.registry import build_model, get_spec

PAD = 1
FAMILIES = {
    "esm2": dict(hidden_size=80, num_layers=2, num_heads=5, ffn_size=160),
    "esm1": dict(hidden_size=64, num_layers=2, num_heads=4, ffn_size=128, vocab_size=33, mask_id=32, tokenizer="esm2"),
}


def make_encoder(family: str = "esm2", tokens: int | None = None) -> Encoder:
    model = build_model(family, FAMILIES[family], "cpu")
    model.init_weights(1)
    return Encoder(model, pad_id=PAD, tokens=tokens)


def make_ids(lengths, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.r_[0, rng.integers(4, 24, n), 2] for n in lengths]


EVERYTHING = Wanted(layers=(0, 1, 2), pooling="mean", hiddens=True, logits=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_sequence_has_the_same_bits_alone_and_in_any_company(family, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ids = make_ids([1, 2, 5, 5, 5, 37, 61, 62, 63, 64, 65, 130, 130, 300, 410])
        encoder = make_encoder(family)
        together = encoder.encode(ids, EVERYTHING)
        small_packs = make_encoder(family, tokens=448).encode(ids[::-1], EVERYTHING)
        for i, one in enumerate(ids):
            alone = encoder.encode([one], EVERYTHING)
            for layer in EVERYTHING.layers:
                assert np.array_equal(alone.pooled[layer][0], together.pooled[layer][i])
                assert np.array_equal(alone.hiddens[layer][0], together.hiddens[layer][i])
                assert np.array_equal(small_packs.pooled[layer][len(ids) - 1 - i], together.pooled[layer][i])
            assert np.array_equal(alone.logits[0], together.logits[i])
            assert np.array_equal(small_packs.logits[len(ids) - 1 - i], together.logits[i])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
def test_results_are_those_of_the_model_itself_without_specials(pooling):
    ids = make_ids([7, 3, 20], seed=3)
    encoder = make_encoder()
    encoded = encoder.encode(ids, Wanted((1, 2), pooling, hiddens=True, logits=True))
    for i, one in enumerate(ids):
        n = len(one)
        batch = PackedBatch.pack(one, np.array([n]), tokens=n, pad_id=PAD, max_length=n)
        with torch.inference_mode():
            output = encoder.model(batch, hidden_layers=(1, 2))
            logits = encoder.model.logits(output.hidden)
        for layer in (1, 2):
            rows = output.hiddens[layer].numpy()
            inner = rows[1:-1]
            expected = {"mean": inner.mean(0), "cls": rows[0], "max": inner.max(0)}[pooling]
            kept = np.array([n - 2])
            pooled = merge(encoded.pooled[layer][i : i + 1], kept, np.array([0]), pooling)[0]
            np.testing.assert_allclose(pooled, expected, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(encoded.hiddens[layer][i], inner, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(encoded.logits[i], logits.numpy()[1:-1], rtol=1e-4, atol=1e-5)
        assert encoded.logits[i].shape == (n - 2, 33)


def test_only_kept_rows_count():
    ids = make_ids([10, 6])
    keep = np.array([[3, 8], [1, 7]])
    encoder = make_encoder()
    whole = encoder.encode(ids, Wanted((2,), "max", hiddens=True))
    some = encoder.encode(ids, Wanted((2,), "max", hiddens=True), keep)
    assert np.array_equal(some.hiddens[2][0], whole.hiddens[2][0][2:7])
    assert np.array_equal(some.pooled[2][0], whole.hiddens[2][0][2:7].max(0))


def test_packs_hold_the_budget_and_multiples_of_64(monkeypatch):
    sizes = []
    encoder = make_encoder(tokens=1000)
    pack = PackedBatch.pack
    monkeypatch.setattr(PackedBatch, "pack", lambda *a, **k: sizes.append(k["tokens"]) or pack(*a, **k))
    encoder.encode(make_ids([1]), Wanted((2,)))
    assert sizes == [64]
    sizes.clear()
    encoder.encode(make_ids([100] * 30 + [1500]), Wanted((2,)))
    assert sizes[0] == 1536 and all(size % 64 == 0 and size <= 1024 for size in sizes[1:])
    assert encoder.encode([], Wanted((2,))).pooled[2].shape == (0, 80)


def test_half_precision_is_near():
    ids = make_ids([30, 12])
    model = build_model("esm2", FAMILIES["esm2"], "cpu")
    model.init_weights(1)
    exact = make_encoder().encode(ids, Wanted((2,), hiddens=True)).hiddens[2]
    near = Encoder(model, pad_id=PAD, precision="bf16").encode(ids, Wanted((2,), hiddens=True)).hiddens[2]
    assert near[0].dtype == np.float32
    for a, b in zip(exact, near, strict=True):
        assert 1e-4 < np.abs(a - b).max() < 0.1


def test_ahead_passes_items_errors_and_an_early_end():
    assert list(ahead(range(100), depth=2)) == list(range(100))

    def broken():
        yield 1
        raise ValueError("here")

    items = ahead(broken(), depth=2)
    assert next(items) == 1
    with pytest.raises(ValueError, match="here"):
        next(items)
    before = threading.active_count()
    items = ahead(iter(int, 1), depth=1)
    next(items)
    items.close()
    deadline = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_an_encoder_decoder_embeds_and_gives_no_logits_of_its_encoder():
    sizes = dict(hidden_size=64, num_layers=2, num_decoder_layers=1, num_heads=4, ffn_size=128)
    model = build_model("megamolbart", sizes, "cpu")
    model.init_weights(0)
    encoder = Encoder(model, pad_id=0, tokens=128)
    ids = [np.arange(3, 9), np.arange(20, 90)]
    together = encoder.encode(ids, Wanted((0, 2), hiddens=True))
    alone = encoder.encode(ids[:1], Wanted((0, 2), hiddens=True))
    assert together.pooled[2].shape == (2, 64) and np.array_equal(together.hiddens[2][0], alone.hiddens[2][0])
    with pytest.raises(ValueError, match="of its decoder's tokens"):
        encoder.encode(ids, Wanted((), None, logits=True))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("architecture", [{}, dict(architecture="t5", head_dim=16)], ids=["gelu", "relu"])
def test_a_fused_activation_is_the_encoders_alone_and_changes_nothing(architecture, precision):
    sizes = dict(hidden_size=64, num_layers=2, num_decoder_layers=1, num_heads=4, ffn_size=128)
    family = "prott5" if architecture else "megamolbart"
    model = build_model(family, sizes | architecture, "cpu")
    model.init_weights(1)
    plan = get_spec(family).plan
    encoder = Encoder(model, pad_id=0, device="cuda", precision=precision, tokens=2048, plan=plan)
    ids, wanted = make_ids(np.random.default_rng(0).integers(5, 90, 400)), Wanted((2,))
    launched = encoder.encode(ids, wanted).pooled[2]
    encoder.compile()
    found, scale = encoder.encode(ids, wanted).pooled[2], np.abs(launched).max()
    np.testing.assert_allclose(found / scale, launched / scale, atol=2e-2 if precision == "bf16" else 1e-4)
    fused = {name for name, module in model.named_modules() if getattr(module, "fused", False)}
    assert fused == ({"encoder.layers.0.mlp", "encoder.layers.1.mlp"} if precision == "bf16" else set())
    assert encoder._compiled == (precision == "bf16")


@pytest.mark.gpu
@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_packs_recorded_as_graphs_give_the_same_bits(pooling):
    model = build_model("esm2", FAMILIES["esm2"], "cpu")
    model.init_weights(1)
    encoder = Encoder(model, pad_id=PAD, device="cuda", tokens=2048, plan=get_spec("esm2").plan)
    ids = make_ids(np.random.default_rng(0).integers(5, 120, 400))
    wanted = Wanted(layers=(0, 2), pooling=pooling, hiddens=True, logits=True)
    launched = encoder.encode(ids, wanted)
    encoder.compile()
    first, again = encoder.encode(ids, wanted), encoder.encode(ids, wanted)
    graphs = encoder._forwards[wanted].recordings  # type: ignore[attr-defined]
    assert any(graphs.values())
    for layer in wanted.layers:
        assert np.array_equal(first.pooled[layer], again.pooled[layer])
        scale = np.abs(launched.pooled[layer]).max()
        np.testing.assert_allclose(first.pooled[layer] / scale, launched.pooled[layer] / scale, atol=2e-2)
    for found in ("hiddens", "logits"):
        one, two = ([*getattr(x, found).values()] if found == "hiddens" else [x.logits] for x in (first, again))
        assert all(np.array_equal(a, b) for x, y in zip(one, two) for a, b in zip(x, y, strict=True))
