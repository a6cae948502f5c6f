import json
import multiprocessing
import os
import signal
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest
import torch

from moltron.config.schema import ObjectiveConfig
from moltron.data.loader import BatchLoader
from moltron.data.plan import BatchPlan
from moltron.data.store import Store, StoreWriter
from moltron.objectives import Limits, MaskedLM, get_objective
from moltron.tokenizers import get_tokenizer

TOKENIZER = get_tokenizer("esm2")
T, MAX_LENGTH, PACKS = 512, 128, 8


@pytest.fixture(scope="module")
def sequences():
    generator = np.random.default_rng(0)
    lengths = generator.lognormal(np.log(50), 0.6, 400).clip(1, 300).astype(int)
    return [generator.choice(list(b"ACDEFGHIKLMNPQRSTVWYX"), n).astype(np.uint8).tobytes() for n in lengths]


@pytest.fixture(scope="module")
def store(tmp_path_factory, sequences):
    path = tmp_path_factory.mktemp("store") / "train.arrow"
    with StoreWriter(path) as writer:
        for first in range(0, len(sequences), 150):
            chosen = sequences[first : first + 150]
            writer.add([f"id{first + i}" for i in range(len(chosen))], chosen)
    return Store.open(path)


LIMITS = Limits(MAX_LENGTH)


def learned(seed=7):
    return get_objective(ObjectiveConfig(), TOKENIZER, seed)


def make(store, objective=None, seed=7, packs=PACKS, **kwargs):
    plan = BatchPlan(store, objective or learned(seed), (T,), LIMITS, window=150, seed=seed)
    return BatchLoader(plan, store, TOKENIZER, packs=packs, **kwargs)


class Untouched(MaskedLM):
    """Batches as they are before anything is masked."""

    def __init__(self):
        super().__init__(ObjectiveConfig(), TOKENIZER, 0)

    def corrupt(self, batch, epoch):
        return batch


def contents(batch):
    tensors = [batch.ids, batch.layout.cu_seqlens, batch.layout.positions, batch.target_positions, batch.targets]
    return [t.tolist() for t in tensors if t is not None] + [batch.records.tolist(), batch.num_tokens]


def first_steps(loader, count):
    return list(islice(iter(loader), count))


def split(batch):
    """[(record, ids)] of the real sequences of a batch"""
    ends = np.cumsum(batch.layout.lengths)[: batch.num_sequences]
    return list(zip(batch.records.tolist(), np.split(batch.ids.numpy()[: batch.num_tokens], ends[:-1])))


@pytest.mark.parametrize("world", [2, 3, 8])
def test_all_worlds_see_the_same_stream_masks_included(store, world):
    expected = first_steps(make(store), 12)
    ranks = [first_steps(make(store, rank=rank, world=world), 12) for rank in range(world)]
    for k, step in enumerate(expected):
        share = -(-PACKS // world)
        every = [ranks[i % world][k].batches[i // world] for i in range(share * world)]
        together, empty = every[:PACKS], every[PACKS:]
        assert all(b.num_sequences == 0 and (b.targets == -100).all() for b in empty)
        assert {len(rank[k].batches) for rank in ranks} == {share}
        assert [contents(b) for b in together] == [contents(b) for b in step.batches]
        assert all(rank[k].position == step.position for rank in ranks)
        assert sum(rank[k].count for rank in ranks) == step.count
        assert sum(rank[k].tokens for rank in ranks) == step.tokens
    assert expected[-2].position["epoch"] >= 1, "the test should cross an epoch"


def test_resume_from_every_position_is_equal_to_the_bit(store):
    straight = first_steps(make(store, packs=3), 40)
    assert straight[-2].position["epoch"] >= 1
    for k in range(len(straight) - 1):
        position = json.loads(json.dumps(straight[k].position))
        step = next(make(store, packs=3, position=position).steps())
        assert [contents(b) for b in step.batches] == [contents(b) for b in straight[k + 1].batches]
        assert step.position == straight[k + 1].position


def test_batches_hold_the_records_letters(store, sequences):
    for step in first_steps(make(store, Untouched()), 10):
        assert step.count == 0
        for batch in step.batches:
            assert batch.ids.shape == (T,) and (batch.ids[batch.num_tokens :] == TOKENIZER.pad_id).all()
            for record, ids in split(batch):
                assert (ids[0], ids[-1]) == (TOKENIZER.bos_id, TOKENIZER.eos_id)
                text, whole = TOKENIZER.decode(ids[1:-1]).encode(), sequences[record]
                assert text in whole and len(text) == min(len(whole), MAX_LENGTH - 2)


def test_counts_are_those_of_the_batches(store):
    for step in first_steps(make(store), 3):
        assert step.count == sum(int((b.targets != -100).sum()) for b in step.batches)
        assert step.tokens == sum(b.num_tokens for b in step.batches)


@pytest.mark.parametrize("world", [1, 4])
def test_one_epoch_ends_with_every_record_seen_and_ranks_in_step(store, world):
    plan = BatchPlan.evaluation(store, learned(0), (T,), LIMITS)
    build = lambda rank: BatchLoader(plan, store, TOKENIZER, packs=4, rank=rank, world=world, epochs=1)  # noqa: E731
    ranks = [list(build(rank)) for rank in range(world)]
    assert len({len(steps) for steps in ranks}) == 1
    batches = [b for steps in ranks for step in steps for b in step.batches]
    assert len(batches) == 4 * len(ranks[0]) and all(b.ids.shape == (T,) for b in batches)
    empty = [b for b in batches if b.num_sequences == 0]
    assert 0 < len(empty) < 4 and all((b.targets == -100).all() for b in empty)
    assert sorted(r for b in batches for r in b.records.tolist()) == list(range(len(store)))


def test_worker_processes_build_the_same_stream_in_the_same_order(store):
    plain = first_steps(make(store), 7)
    for workers in (1, 3):
        steps = iter(make(store, workers=workers))
        for expected in plain:
            step = next(steps)
            assert [contents(b) for b in step.batches] == [contents(b) for b in expected.batches]
            assert step.position == expected.position and step.count == expected.count
    ends = make(store, epochs=1, workers=2)
    assert len(list(ends)) == len(list(make(store, epochs=1)))


def test_breaking_off_ends_the_workers_and_a_jobs_sigterm_does_not(store):
    steps = iter(make(store, workers=1))
    next(steps)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGTERM)
    for _ in range(6):  # more than were waiting
        next(steps)
    assert worker.is_alive()
    steps.close()
    worker.join(timeout=20)
    assert not worker.is_alive()


def test_a_process_ends_though_its_loader_was_never_closed(store):
    """The workers ignore SIGTERM, by which Python ends them: once it waited for them without end."""
    program = f"""
from moltron.config.schema import ObjectiveConfig
from moltron.data.loader import BatchLoader
from moltron.data.plan import BatchPlan
from moltron.data.store import Store
from moltron.objectives import Limits, get_objective
from moltron.tokenizers import get_tokenizer
store, tokenizer = Store.open({str(store.path)!r}), get_tokenizer("esm2")
plan = BatchPlan(store, get_objective(ObjectiveConfig(), tokenizer, 0), (512,), Limits(128))
steps = iter(BatchLoader(plan, store, tokenizer, packs=1, workers=1))
next(steps)
raise RuntimeError("of the consumer")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and done.stderr.rstrip().endswith("RuntimeError: of the consumer")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_reaches_the_consumer_with_the_records_ids(store, workers):
    class Fails(Untouched):
        def corrupt(self, batch, epoch):
            raise ZeroDivisionError("odd batch")

    first = next(make(store, packs=1).steps()).batches[0]
    with pytest.raises(RuntimeError, match=rf"records {store.ids(first.records[:1])[0]}, .*odd batch"):
        next(iter(make(store, Fails(), packs=1, workers=workers)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_batches_are_equal(store):
    for plain, pinned in zip(first_steps(make(store), 3), first_steps(make(store, pin=True), 3)):
        assert [contents(b) for b in plain.batches] == [contents(b) for b in pinned.batches]
        for batch in pinned.batches:
            assert batch.ids.is_pinned() and batch.targets.is_pinned() and batch.layout.positions.is_pinned()


def test_ids_are_int64_and_of_their_own_memory(store):
    one, two = (next(make(store).steps()).batches[0] for _ in range(2))
    assert one.ids.dtype == one.targets.dtype == one.target_positions.dtype == torch.int64
    assert one.ids.data_ptr() != two.ids.data_ptr()
