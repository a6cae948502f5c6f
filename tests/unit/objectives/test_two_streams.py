"""Span corruption and denoising: what each stream holds, against plain loops and the published definitions."""

from collections import Counter
from math import exp, factorial

import numpy as np
import pytest
from scipy.stats import chisquare

from moltron.common import rng
from moltron.config.schema import ObjectiveConfig
from moltron.objectives import Limits, get_objective
from moltron.tokenizers import get_tokenizer

T5, V1 = ObjectiveConfig(name="span_corruption"), ObjectiveConfig(name="span_corruption", mean_span=1)
DENOISING = ObjectiveConfig(name="denoising")
LIMITS = Limits(512, 512)
CASES = [("prott5", T5), ("prott5", V1), ("prott5nv", V1), ("prott5nv", T5), ("megamolbart", DENOISING)]
IDS = ["prott5 T5", "prott5 v1", "prott5nv v1", "prott5nv T5", "megamolbart"]


def sequences(tokenizer, lengths, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.choice(tokenizer.residue_ids, n) for n in lengths]


def build(objective, parts, records=None, epoch=0, limits=LIMITS, targets=None):
    lengths = np.array([len(p) for p in parts])
    records = np.arange(len(parts)) if records is None else np.asarray(records)
    tokens = int(lengths.sum() * 1.3) + 600
    if targets is not None:
        targets = np.concatenate(targets), np.array([len(t) for t in targets])
    return objective.batch(
        np.concatenate(parts), lengths, records, epoch, tokens=(tokens, 2 * tokens), limits=limits, targets=targets
    )


def streams(batch):
    """[(encoder ids, decoder ids, labels)] of the real sequences."""
    n, result = batch.num_sequences, []
    encoder, decoder = (np.cumsum([0, *layout.lengths[:n]]) for layout in (batch.layout, batch.decoder_layout))
    for i in range(n):
        second = slice(decoder[i], decoder[i + 1])
        result.append(
            (
                batch.ids[encoder[i] : encoder[i + 1]].tolist(),
                batch.decoder_ids[second].tolist(),
                batch.targets[second].tolist(),
            )
        )
    assert batch.num_tokens == encoder[-1] and batch.num_decoder_tokens == decoder[-1]
    assert (batch.targets[batch.num_decoder_tokens :] == -100).all()
    assert batch.target_positions is None and len(batch.targets) == len(batch.decoder_ids)
    assert len(batch.layout.lengths) == len(batch.decoder_layout.lengths)
    return result


@pytest.fixture(params=CASES, ids=IDS)
def case(request):
    name, config = request.param
    tokenizer = get_tokenizer(name)
    return tokenizer, get_objective(config, tokenizer, seed=5)


def test_lengths_are_those_of_the_batch(case):
    tokenizer, objective = case
    parts = sequences(tokenizer, [1, 2, 3, 7, 20, 64, 65, 120, 300] * 3)
    records = np.arange(len(parts)) * 7 + 3
    for epoch in (0, 1):
        promised = objective.lengths(np.array([len(p) for p in parts]), records, epoch, LIMITS)
        batch = build(objective, parts, records, epoch)
        n = batch.num_sequences
        assert promised.tolist() == [list(batch.layout.lengths[:n]), list(batch.decoder_layout.lengths[:n])]


def test_a_record_is_the_same_in_any_company_and_differs_by_epoch_and_seed(case):
    tokenizer, objective = case
    parts = sequences(tokenizer, [40, 25, 90, 60])
    together = streams(build(objective, parts))
    backwards = streams(build(objective, parts[::-1], records=[3, 2, 1, 0]))[::-1]
    alone = [streams(build(objective, [part], records=[i]))[0] for i, part in enumerate(parts)]
    assert together == backwards == alone
    assert together != streams(build(objective, parts, epoch=1))
    other = get_objective(objective.config, tokenizer, seed=6)
    assert together != streams(build(other, parts))


def test_the_decoder_reads_its_labels_behind_the_beginning(case):
    tokenizer, objective = case
    for _, decoder, labels in streams(build(objective, sequences(tokenizer, [5, 30, 77]))):
        assert decoder[0] == tokenizer.bos_id and labels[-1] == tokenizer.eos_id
        assert decoder[1:] == labels[:-1]


def test_an_empty_pack_has_no_targets(case):
    _, objective = case
    nothing = np.zeros(0, dtype=np.int64)
    batch = objective.batch(nothing, nothing, nothing, 0, tokens=(64, 64), limits=Limits(32, 32))
    assert batch.num_sequences == batch.num_tokens == 0 and (batch.targets == -100).all()


def test_max_residues_is_the_most_that_fits(case):
    tokenizer, objective = case
    for limits in (Limits(512, 256), Limits(64, 64), Limits(128, 30)):
        most = objective.max_residues(limits)
        sizes = objective.lengths(np.arange(1, most + 2), np.arange(1, most + 2), 0, limits)
        assert (sizes[:, :most] <= np.array(limits)[:, None]).all()
        if len(tokenizer.sentinel_ids):
            fits = (sizes[:, most] <= np.array(limits)).all()
            assert not fits or objective.counts(np.array([most + 1]))[1][0] > len(tokenizer.sentinel_ids)


def restored(encoder, labels, tokenizer):
    """The sequence, sentinels replaced by what the decoder wrote for them."""
    sentinels = set(tokenizer.sentinel_ids.tolist())
    spans, current = {}, None
    for token in labels[:-1]:
        if token in sentinels:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    body = encoder[: len(encoder) - len(tokenizer.suffix)]
    assert tuple(encoder[len(body) :]) == tokenizer.suffix
    used = [token for token in body if token in sentinels]
    assert used == list(spans) == tokenizer.sentinel_ids[: len(used)].tolist()
    return [t for token in body for t in (spans[token] if token in sentinels else [token])], list(spans.values())


@pytest.mark.parametrize("name, config", CASES[:4], ids=IDS[:4])
def test_spans_put_back_give_the_sequence(name, config):
    tokenizer = get_tokenizer(name)
    objective = get_objective(config, tokenizer, seed=1)
    parts = sequences(tokenizer, [1, 2, 9, 33, 100, 255, 400])
    for part, (encoder, _, labels) in zip(parts, streams(build(objective, parts)), strict=True):
        whole, spans = restored(encoder, labels, tokenizer)
        assert whole == part.tolist()
        assert sum(map(len, spans)) == max(1, round(0.15 * len(part)))
        if config.mean_span == 1:
            assert all(len(span) == 1 for span in spans)
        else:
            assert len(spans) == max(1, round(sum(map(len, spans)) / 3))


def test_t5_counts_are_those_of_its_own_code():
    """num_noise_tokens and num_noise_spans of random_spans_noise_mask, for lengths where all its clips are idle."""
    objective = get_objective(T5, get_tokenizer("prott5"), 0)
    lengths = np.arange(2, 600)
    noise, spans = objective.counts(lengths)
    for length, n, s in zip(lengths.tolist(), noise.tolist(), spans.tolist(), strict=True):
        theirs = min(max(int(np.round(length * 0.15)), 1), length - 1)
        assert (n, s) == (theirs, max(int(np.round(theirs / 3.0)), 1))


def test_t5_spans_never_touch_and_never_begin():
    tokenizer = get_tokenizer("prott5")
    objective = get_objective(T5, tokenizer, seed=2)
    sentinels = set(tokenizer.sentinel_ids.tolist())
    for encoder, _, _ in streams(build(objective, sequences(tokenizer, [50] * 200))):
        places = [i for i, token in enumerate(encoder) if token in sentinels]
        assert places[0] > 0 and min(np.diff(places)) > 1


def test_all_cuts_are_equally_likely():
    """20 residues, 3 taken out in 1 span: it begins anywhere from 1 … 17; with v1 each residue alike."""
    tokenizer = get_tokenizer("prott5")
    parts = sequences(tokenizer, [40] * 6000)
    objective = get_objective(T5, tokenizer, seed=3)  # 6 tokens in 2 spans: sizes 1+5, 2+4 … 5+1
    sizes = Counter(len(restored(e, ls, tokenizer)[1][0]) for e, _, ls in streams(build(objective, parts)))
    assert set(sizes) == {1, 2, 3, 4, 5} and chisquare(list(sizes.values())).pvalue > 1e-3
    v1 = get_objective(V1, tokenizer, seed=3)
    sentinels = set(tokenizer.sentinel_ids.tolist())
    seen = Counter(i for e, _, _ in streams(build(v1, parts)) for i, token in enumerate(e[:40]) if token in sentinels)
    assert len(seen) == 40 and chisquare(list(seen.values())).pvalue > 1e-3


def test_masked_molecules_are_a_walk_over_their_tokens():
    tokenizer = get_tokenizer("megamolbart")
    objective = get_objective(DENOISING, tokenizer, seed=4)
    parts = [np.arange(272, 272 + 100) for _ in range(4000)]  # the token says where it stood
    lengths, kept, masks, zero = Counter(), 0, 0, 0
    for encoder, _, labels in streams(build(objective, parts)):
        assert labels[:-1] == parts[0].tolist()
        assert encoder == [t for t in encoder if t == 4 or t >= 272]
        last, pending = 271, 0
        for token in [*encoder, 372]:
            if token == 4:
                pending += 1
                continue
            gap = token - last - 1
            if pending == 1 and token < 372:
                lengths[gap] += 1
            zero += pending and gap == 0
            last, pending = token, 0
        kept += sum(t != 4 for t in encoder)
        masks += encoder.count(4)
    assert zero == 0, "a mask always replaces something: a length of 0 draws again"
    # spans alone: Poisson(3) without 0, but longer ones also arise of two spans side by side, so the short ones count
    total = lengths[1] + lengths[2]
    poisson = [3**k * exp(-3) / factorial(k) for k in (1, 2)]
    assert abs(lengths[1] / total - poisson[0] / sum(poisson)) < 4 * (0.24 / total) ** 0.5
    # renewal: a token is met with probability 1 / (.9 + .1 · E[length | length > 0]), then kept with .9
    mean = 3 / (1 - exp(-3))
    assert kept / 400_000 == pytest.approx(0.9 / (0.9 + 0.1 * mean), abs=0.01)
    starts = 0.1 / (0.9 + 0.1 * mean)
    assert masks / 400_000 == pytest.approx(starts / (1 - exp(-3)), abs=0.005)


def walk(ids, state, start, bounds, mask_id):
    """MegaMolBART's loop, token by token, with the objective's own random bits."""
    seen, i = [], 0
    while i < len(ids):
        bits = rng.fold(state, i)
        if bits[0] >= start:
            seen.append(int(ids[i]))
            i += 1
            continue
        length, draw = 0, 1
        while length == 0:  # the start is not drawn again, and the token does not move on
            seen.append(mask_id)
            length = int(np.searchsorted(bounds, rng.fold(bits, draw), side="right")[0])
            draw += 1
        i += length
    return seen


def test_the_vectorised_walk_is_the_loop():
    tokenizer = get_tokenizer("megamolbart")
    for settings in ({}, {"mask_prob": 0.7, "mean_span": 0.5}, {"mask_prob": 0.0}):
        objective = get_objective(ObjectiveConfig(name="denoising", **settings), tokenizer, seed=11)
        parts = sequences(tokenizer, [1, 2, 3, 10, 45, 90] * 8)
        states = rng.hash_u64(11, rng.MASK, 2, np.arange(len(parts)))
        start, bounds = rng.threshold(objective.config.mask_prob), objective._bounds
        expected = [walk(part, states[i : i + 1], start, bounds, 4) for i, part in enumerate(parts)]
        assert [encoder for encoder, _, _ in streams(build(objective, parts, epoch=2))] == expected


def test_long_inputs_are_cut_and_the_decoder_may_write_another_smiles():
    tokenizer = get_tokenizer("megamolbart")
    objective = get_objective(ObjectiveConfig(name="denoising", mean_span=0.01, mask_prob=0.9), tokenizer, seed=0)
    parts = sequences(tokenizer, [30] * 5)
    limits = Limits(40, 64)
    promised = objective.lengths(np.full(5, 30), np.arange(5), 0, limits)
    assert promised[0].tolist() == [40] * 5, "nearly every length is 0: masks without end, cut at the limit"
    others = sequences(tokenizer, [11, 12, 13, 14, 15], seed=9)
    for (encoder, _, labels), other in zip(
        streams(build(objective, parts, limits=limits, targets=others)), others, strict=True
    ):
        assert len(encoder) == 40 and labels == [*other.tolist(), 3]


@pytest.mark.parametrize(
    "tokenizer, config, message",
    [
        ("esm2", T5, "esm2 has no sentinels"),
        ("prott5", DENOISING, "prott5 has no mask"),
        ("prott5", ObjectiveConfig(), "prott5 has no mask"),
        ("prott5", ObjectiveConfig(name="span_corruption", density=1.5, mean_span=0.5), "density=1.5.*mean_span=0.5"),
        (
            "megamolbart",
            ObjectiveConfig(name="denoising", mask_prob=1.0, decoder_smiles="x"),
            "decoder_smiles=x.*mask_prob",
        ),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said(tokenizer, config, message):
    with pytest.raises(ValueError, match=message):
        get_objective(config, get_tokenizer(tokenizer), 0)
