import json
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import chisquare

from moltron.config.schema import ObjectiveConfig
from moltron.data import plan as plans
from moltron.data.plan import Position
from moltron.objectives import Limits, get_objective
from moltron.tokenizers import get_tokenizer

MASKED_LM = get_objective(ObjectiveConfig(), get_tokenizer("esm2"), 0)


class Records:
    """What a plan needs of a store: lengths."""

    def __init__(self, lengths, clusters=None, fingerprint="a"):
        self.lengths, self.clusters, self.fingerprint = np.asarray(lengths, dtype=np.int32), clusters, fingerprint
        self.alphabet = "protein"

    def __len__(self):
        return len(self.lengths)


def BatchPlan(store, tokens, max_length, **kwargs):  # one stream
    return plans.BatchPlan(store, MASKED_LM, (tokens,), Limits(max_length), **kwargs)


def pack_lengths(lengths, tokens):
    return plans.pack_lengths(lengths[None], (tokens,))


def uniref_like(n, seed=0):
    return np.random.default_rng(seed).lognormal(np.log(270), 0.62, n).clip(11, 20_000).astype(np.int32)


def flatten(bins):
    return [(b.records.tolist(), b.crops.tolist(), b.lengths.tolist()) for b in bins]


def take(plan, count, position=(0, 0, 0)):
    return list(islice(plan.bins(Position(*position)), count))


@pytest.mark.parametrize("tokens", [4096, 8192, 16384, 32768, 65536, 131072])
def test_fill_is_98_percent_and_no_bin_overflows(tokens):
    store = Records(uniref_like(150_000))  # three windows, so the last one counts too
    plan = BatchPlan(store, tokens, 1024, seed=3)
    bins = [b for w in range(plan.num_windows) for b in plan.window(0, w)]
    loads = np.array([(b.lengths + 2).sum() for b in bins])
    assert loads.max() <= tokens
    assert loads.sum() / (len(bins) * tokens) >= 0.98
    assert loads.min() >= 0.94 * tokens, "some bin is left nearly empty"
    assert max(b.lengths.max() for b in bins) == 1022


def test_a_tiny_data_set_fills_its_bins_evenly():
    lengths = uniref_like(600).clip(0, 1022)
    bins = BatchPlan(Records(lengths), 16384, 1024).window(0, 0)
    needed = -(-int((lengths + 2).sum()) // 16384)
    assert len(bins) == needed
    loads = [int((b.lengths + 2).sum()) for b in bins]
    assert max(loads) - min(loads) < 200


@pytest.mark.parametrize(
    "lengths",
    [[], [7], [16] * 9, [1] * 50, [16, 1, 16, 1], [9] * 5, list(range(1, 17)), [8, 8, 9, 7, 16, 15, 1, 2, 14]],
)
def test_packing_keeps_every_sequence_once(lengths):
    packs = pack_lengths(np.array(lengths, dtype=np.int64), 16)
    assert sorted(i for pack in packs for i in pack.tolist()) == list(range(len(lengths)))
    for pack in packs:
        chosen = [lengths[i] for i in pack]
        assert 0 < sum(chosen) <= 16 and chosen == sorted(chosen, reverse=True)


def test_packing_random_lengths_keeps_every_sequence_once():
    generator = np.random.default_rng(1)
    for _ in range(200):
        tokens = int(generator.integers(4, 60))
        lengths = generator.integers(1, tokens + 1, int(generator.integers(1, 80)))
        packs = pack_lengths(lengths, tokens)
        assert np.array_equal(np.sort(np.concatenate(packs)), np.arange(len(lengths)))
        assert max(lengths[pack].sum() for pack in packs) <= tokens


def test_packing_refuses_what_cannot_fit():
    with pytest.raises(ValueError, match="17 tokens does not fit into a pack of 16"):
        pack_lengths(np.array([3, 17]), 16)


@pytest.mark.parametrize("window", [64, 65536])
def test_each_record_once_an_epoch_in_another_order(window):
    plan = BatchPlan(Records(uniref_like(500)), 4096, 1024, window=window)
    orders = []
    for epoch in range(3):
        records = np.concatenate([b.records for e, b, _ in plan.bins(Position(), 3) if e == epoch])
        assert np.array_equal(np.sort(records), np.arange(500))
        orders.append(np.concatenate([plan.order(epoch, w)[0] for w in range(plan.num_windows)]))
    assert all((a == b).mean() < 0.05 for a, b in [orders[:2], orders[1:]])


def test_windows_are_equally_large():
    plan = BatchPlan(Records(uniref_like(1001)), 4096, 1024, window=100)
    sizes = {len(plan.order(0, w)[0]) for w in range(plan.num_windows)}
    assert plan.num_windows == 11 and sizes == {91}


def test_crops_reach_both_ends_equally_often():
    room, extra = 30, 4
    plan = BatchPlan(Records([room + extra] * 200 + [room] * 10 + [5] * 10), 64, room + 2)
    starts = []
    for epoch in range(10):
        for b in plan.window(epoch, 0):
            long = b.records < 200
            assert (b.lengths[long] == room).all() and (b.crops[~long] == 0).all()
            assert (b.crops + b.lengths <= plan.store.lengths[b.records]).all()
            starts.extend(b.crops[long].tolist())
    counts = np.bincount(starts, minlength=extra + 1)
    assert len(counts) == extra + 1 and chisquare(counts).pvalue > 1e-4


def clustered(counts):
    order = np.random.default_rng(0).permutation(int(np.sum(counts)))
    start = np.cumsum(counts) - counts
    return Records(uniref_like(len(order)), SimpleNamespace(start=start, count=np.asarray(counts), order=order))


def test_clusters_are_drawn_once_an_epoch_and_members_uniformly():
    counts = np.array([1, 2, 5, 1, 8, 3])
    store = clustered(counts)
    cluster_of = np.empty(len(store), dtype=int)
    cluster_of[store.clusters.order] = np.repeat(np.arange(6), counts)
    plan, drawn = BatchPlan(store, 8192, 1024, seed=2), []
    assert plan.num_items == 6
    for epoch in range(1000):
        records = np.concatenate([b.records for b in plan.window(epoch, 0)])
        assert np.array_equal(np.sort(cluster_of[records]), np.arange(6))
        drawn.append(records)
    times = np.bincount(np.concatenate(drawn), minlength=len(store))
    for cluster in np.flatnonzero(counts > 1):
        assert chisquare(times[cluster_of == cluster]).pvalue > 1e-4
    assert BatchPlan(store, 8192, 1024, clusters=False).num_items == len(store)


def test_any_position_leads_to_the_same_stream():
    store = Records(uniref_like(300))
    plan = BatchPlan(store, 4096, 1024, window=100, seed=5)
    stream = take(plan, 80)
    assert stream[-1][0] >= 2, "the stream should cross epochs"
    for k, (_, _, after) in enumerate(stream[:-1]):
        saved = json.loads(json.dumps(plan.dump(after)))
        fresh = BatchPlan(store, 4096, 1024, window=100, seed=5)
        (epoch, bin, following), *_ = take(fresh, 1, fresh.load(saved))
        assert (epoch, following) == (stream[k + 1][0], stream[k + 1][2])
        assert flatten([bin]) == flatten([stream[k + 1][1]])


def test_everything_depends_on_seed_and_epoch():
    store = Records(uniref_like(300))
    one, two = (BatchPlan(store, 4096, 1024, seed=seed) for seed in (1, 2))
    assert flatten(one.window(0, 0)) == flatten(BatchPlan(store, 4096, 1024, seed=1).window(0, 0))
    assert flatten(one.window(0, 0)) != flatten(two.window(0, 0))
    assert flatten(one.window(0, 0)) != flatten(one.window(1, 0))


def test_bins_do_not_trend_in_size():
    """At T = max_length the packing itself goes from long to short; the hashed order must hide that."""
    bins = BatchPlan(Records(uniref_like(20_000)), 1024, 1024).window(0, 0)
    counts = [len(b.records) for b in bins]
    assert abs(np.corrcoef(counts, np.arange(len(bins)))[0, 1]) < 5 / np.sqrt(len(bins))


def test_a_position_of_another_plan_is_refused():
    store = Records(uniref_like(50))
    saved = BatchPlan(store, 4096, 1024).dump(Position(1, 0, 2))
    assert BatchPlan(store, 4096, 1024).load(saved) == (1, 0, 2)
    others = [BatchPlan(store, 8192, 1024), BatchPlan(store, 4096, 512), BatchPlan(store, 4096, 1024, seed=1)]
    others += [BatchPlan(Records(store.lengths, fingerprint="b"), 4096, 1024), BatchPlan(store, 4096, 1024, window=9)]
    for other in others:
        with pytest.raises(ValueError, match="another plan"):
            other.load(saved)


def test_evaluation_takes_the_records_in_order():
    store = clustered(np.array([3, 1, 4, 1, 5, 9]))
    plan = plans.BatchPlan.evaluation(store, MASKED_LM, (4096,), Limits(1024))
    assert plan.order(0, 0)[0].tolist() == list(range(23))
    records = np.concatenate([b.records for _, b, _ in plan.bins(Position(), 1)])
    assert sorted(records.tolist()) == list(range(23))


def test_all_problems_are_reported_at_once():
    with pytest.raises(ValueError) as error:
        BatchPlan(Records([]), 512, 2)
    for part in ("no room beside the special tokens", "no records"):
        assert part in str(error.value)
