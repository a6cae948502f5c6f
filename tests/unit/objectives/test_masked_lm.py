import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from moltron.config.schema import ObjectiveConfig
from moltron.models.batch import Output, PackedBatch
from moltron.objectives import get_objective
from moltron.objectives.masked_lm import MaskedLM
from moltron.tokenizers import get_tokenizer

TOKENIZERS = ["esm2", "esm1nv"]
V1 = ObjectiveConfig(select=0.1, mask=0.5, random=0.5, count="floor")


def sequences(tokenizer, lengths, letters=b"ACDEFGHIKLMNPQRSTVWYX", seed=0):
    generator = np.random.default_rng(seed)
    return [tokenizer.encode(generator.choice(list(letters), n).astype(np.uint8).tobytes()) for n in lengths]


def pack(sequences, tokens, tokenizer, first_record=0):
    lengths = np.array([len(s) for s in sequences])
    records = np.arange(first_record, first_record + len(lengths))
    sizes = dict(tokens=tokens, pad_id=tokenizer.pad_id, max_length=max(lengths))
    return PackedBatch.pack(np.concatenate(sequences), lengths, records=records, **sizes)


def packed(tokenizer, lengths, tokens=None, first_record=0, **kwargs):
    made = sequences(tokenizer, lengths, **kwargs)
    tokens = tokens or sum(map(len, made)) + 11  # some filler
    return pack(made, tokens, tokenizer, first_record)


def by_record(batch, corrupted):
    """{record: (ids seen, target positions in the sequence, targets)}"""
    starts = np.cumsum([0, *batch.layout.lengths])
    valid = corrupted.targets >= 0
    where, targets = corrupted.target_positions[valid].numpy(), corrupted.targets[valid].numpy()
    result = {}
    for i, record in enumerate(batch.records.tolist()):
        inside = (where >= starts[i]) & (where < starts[i + 1])
        seen = corrupted.ids[starts[i] : starts[i + 1]].tolist()
        result[record] = (seen, (where[inside] - starts[i]).tolist(), targets[inside].tolist())
    return result


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("config", [ObjectiveConfig(), V1, ObjectiveConfig(select=1.0)], ids=["default", "v1", "all"])
def test_specials_are_never_chosen_never_drawn_and_targets_are_true(name, config):
    tokenizer = get_tokenizer(name)
    batch = packed(tokenizer, [1, 2, 5, 40, 300] * 20)
    before = batch.ids.clone()
    out = MaskedLM(config, tokenizer, seed=1).corrupt(batch, epoch=0)
    assert torch.equal(batch.ids, before), "the input must stay as it is"
    valid = out.targets >= 0
    where, targets = out.target_positions[valid], out.targets[valid]
    assert torch.equal(batch.ids[where], targets)
    assert where.unique().numel() == where.numel()
    specials = torch.tensor(sorted(tokenizer.special_ids))
    assert not torch.isin(targets, specials).any()
    drawn = out.ids[where][(out.ids[where] != targets) & (out.ids[where] != tokenizer.mask_id)]
    assert torch.isin(drawn, torch.from_numpy(tokenizer.residue_ids)).all()
    untouched = torch.ones(len(before), dtype=torch.bool)
    untouched[where] = False
    assert torch.equal(out.ids[untouched], before[untouched])
    if config.select == 1.0:
        assert valid.sum() == sum([1, 2, 5, 40, 300]) * 20
    assert (out.target_positions[~valid] == 0).all() and (out.targets[~valid] == -100).all()


def within(successes, n, p):
    return abs(successes - n * p) <= 5 * np.sqrt(n * p * (1 - p)) + 1e-9


def test_rates_are_15_percent_and_80_10_10():
    tokenizer = get_tokenizer("esm2")
    batch = packed(tokenizer, [500] * 400, letters=b"ACDEFGHIKLMNPQRSTVWY")
    out = MaskedLM(ObjectiveConfig(), tokenizer, seed=1).corrupt(batch, epoch=0)
    valid = out.targets >= 0
    seen, true = out.ids[out.target_positions[valid]].numpy(), out.targets[valid].numpy()
    chosen = len(true)
    masked, kept = int((seen == tokenizer.mask_id).sum()), int((seen == true).sum())
    assert within(chosen, 200_000, 0.15)
    assert within(masked, chosen, 0.8) and within(kept, chosen, 0.1) and within(chosen - masked - kept, chosen, 0.1)
    positions = np.concatenate([where for _, where, _ in by_record(batch, out).values()])
    assert chisquare(np.bincount(positions, minlength=502)[1:-1]).pvalue > 1e-4, "all positions alike"
    rank = {residue: i for i, residue in enumerate(tokenizer.residue_ids.tolist())}
    random = (seen != true) & (seen != tokenizer.mask_id)
    steps = np.array([(rank[s] - rank[t]) % 20 for s, t in zip(seen[random].tolist(), true[random].tolist())])
    assert chisquare(np.bincount(steps, minlength=20)[1:]).pvalue > 1e-4, "all other residues alike"


def test_every_sequence_has_a_target():
    tokenizer = get_tokenizer("esm2")
    lengths = [1, 2, 3, 4, 5] * 60
    batch = packed(tokenizer, lengths)
    found = by_record(batch, MaskedLM(ObjectiveConfig(), tokenizer, seed=1).corrupt(batch, 0))
    assert all(len(where) >= 1 for _, where, _ in found.values())
    firsts = [where[0] for (_, where, _), n in zip(found.values(), sorted(lengths, reverse=True)) if n == 5]
    assert set(firsts) == {1, 2, 3, 4, 5}, "a forced target may be anywhere"


def test_a_sequence_of_specials_only_has_none():
    tokenizer = get_tokenizer("esm2")
    batch = packed(tokenizer, [3, 40], letters=b"1")  # <unk> throughout
    for config in (ObjectiveConfig(), V1):
        out = MaskedLM(config, tokenizer, seed=1).corrupt(batch, 0)
        assert (out.targets == -100).all() and torch.equal(out.ids, batch.ids)


def test_unknown_residues_may_be_chosen_and_become_any_of_the_20():
    tokenizer = get_tokenizer("esm2")
    batch = packed(tokenizer, [4000], letters=b"X")
    out = MaskedLM(ObjectiveConfig(select=1.0, mask=0.0, random=1.0), tokenizer, seed=1).corrupt(batch, 0)
    counts = np.bincount(out.ids[1:4001].numpy(), minlength=33)[tokenizer.residue_ids]
    assert counts.sum() == 4000 and chisquare(counts).pvalue > 1e-4


def test_v1_counts_are_exact_and_random_is_different():
    tokenizer = get_tokenizer("esm1nv")
    lengths = [5, 9, 10, 19, 20, 30, 99, 100, 510]
    batch = packed(tokenizer, lengths)
    objective = MaskedLM(V1, tokenizer, seed=1)
    seen_masks = chosen = 0
    for epoch in range(40):
        found = by_record(batch, objective.corrupt(batch, epoch))
        for record, n in enumerate(lengths):
            seen, where, targets = found[record]
            assert len(where) == n // 10
            assert all(seen[w] != t for w, t in zip(where, targets)), "none is kept"
            seen_masks += sum(seen[w] == tokenizer.mask_id for w in where)
            chosen += len(where)
    assert within(seen_masks, chosen, 0.5)
    other = MaskedLM(ObjectiveConfig(select=0.29, count="floor"), tokenizer, seed=1)
    assert len(by_record(batch, other.corrupt(batch, 0))[7][1]) == 29, "though 0.29 * 100 is 28.999…"


def test_floor_chooses_all_positions_alike():
    tokenizer = get_tokenizer("esm2")
    batch = packed(tokenizer, [20] * 3000)
    found = by_record(batch, MaskedLM(V1, tokenizer, seed=3).corrupt(batch, 0))
    positions = np.concatenate([where for _, where, _ in found.values()])
    assert len(positions) == 6000 and chisquare(np.bincount(positions, minlength=21)[1:]).pvalue > 1e-4


@pytest.mark.parametrize("config", [ObjectiveConfig(), V1], ids=["default", "v1"])
def test_masks_depend_on_record_not_on_the_pack(config):
    tokenizer = get_tokenizer("esm2")
    lengths = [3, 50, 50, 7, 120, 1, 33]
    made = sequences(tokenizer, lengths)
    objective = MaskedLM(config, tokenizer, seed=4)
    together = packed(tokenizer, lengths, tokens=1000)
    expected = by_record(together, objective.corrupt(together, 2))
    for i, ids in enumerate(made):
        alone = pack([ids], 256, tokenizer, first_record=i)
        assert by_record(alone, objective.corrupt(alone, 2)) == {i: expected[i]}
    for i, ids in enumerate(made):
        if len(ids) < 50:
            continue
        for other in (dict(seed=5), dict(epoch=3), dict(record=i + 100)):
            alone = pack([ids], 256, tokenizer, first_record=other.get("record", i))
            out = MaskedLM(config, tokenizer, other.get("seed", 4)).corrupt(alone, other.get("epoch", 2))
            assert list(by_record(alone, out).values()) != [expected[i]], other


def test_number_of_targets_is_constant_and_grows_in_multiples():
    tokenizer = get_tokenizer("esm2")
    objective = MaskedLM(ObjectiveConfig(), tokenizer, seed=1)
    sizes = {objective.corrupt(packed(tokenizer, [400] * k, tokens=16384), 0).targets.numel() for k in (1, 20, 40)}
    assert sizes == {objective.num_targets(16384)} and objective.num_targets(16384) % 64 == 0
    assert 0.15 * 16384 < objective.num_targets(16384) < 0.19 * 16384
    crowded = objective.corrupt(packed(tokenizer, [1] * 1000, tokens=3000), 0)  # each has its target: a third of T
    assert (crowded.targets >= 0).sum() == 1000
    assert crowded.targets.numel() % objective.num_targets(3000) == 0


def test_an_empty_pack_has_no_targets():
    tokenizer, nothing = get_tokenizer("esm2"), np.zeros(0, dtype=np.int64)
    batch = PackedBatch.pack(nothing, nothing, tokens=512, pad_id=tokenizer.pad_id, max_length=64)
    for config in (ObjectiveConfig(), V1):
        objective = MaskedLM(config, tokenizer, seed=1)
        out = objective.corrupt(batch, 0)
        assert (out.targets == -100).all() and out.targets.numel() == objective.num_targets(512)
        total, count = objective.loss(Output(torch.zeros(512, 4), torch.randn(out.targets.numel(), 33), {}), out)
        assert (total.item(), count.item()) == (0.0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_is_a_sum_in_fp32_and_a_count(dtype):
    tokenizer = get_tokenizer("esm2")
    objective = MaskedLM(ObjectiveConfig(), tokenizer, seed=1)
    batch = objective.corrupt(packed(tokenizer, [30, 50]), 0)
    logits = torch.randn(batch.targets.numel(), 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    total, count = objective.loss(Output(torch.zeros(1), logits, {}), batch)
    valid = batch.targets >= 0
    expected = -logits.float().log_softmax(-1)[valid].gather(1, batch.targets[valid, None]).sum()
    assert total.shape == count.shape == () and total.dtype == torch.float32
    assert count.item() == valid.sum()
    torch.testing.assert_close(total, expected)


def test_bad_settings_are_reported_together():
    tokenizer = get_tokenizer("esm2")
    with pytest.raises(ValueError) as error:
        get_objective(ObjectiveConfig(select=0.0, mask=0.8, random=0.3, count="round"), tokenizer, 0)
    assert all(part in str(error.value) for part in ("select=0.0", "random=0.3", "'round'"))
    with pytest.raises(ValueError, match="'span' is not known: use one of masked_lm"):
        get_objective(ObjectiveConfig(name="span"), tokenizer, 0)
