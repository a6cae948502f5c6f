"""Decoding against exhaustive enumeration and plain loops, on a toy model whose next token depends on the record's
hidden states, the last two tokens, and how many there are: the end becomes ever likelier."""

import itertools
import math

import numpy as np
import pytest
import torch

from moltron.common import rng
from moltron.infer.generate import Decoding, Generator, draw, normal, penalty

V, BOS, EOS, D = 5, 0, 1, 3


class Cache:
    def __init__(self, memory_BD, capacity):
        self.memory_BD, self.before, self.used, self.capacity = memory_BD, None, 0, capacity

    def select(self, rows):
        selected = Cache(self.memory_BD[rows], self.capacity)
        selected.before, selected.used = None if self.before is None else self.before[rows], self.used
        return selected


class Toy(torch.nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.nn.Parameter(torch.randn(D + 2 * V, V, generator=generator) * 2)
        self.calls = []

    def start(self, memory_TD, layout, capacity, num_sequences):
        pieces = memory_TD.split(list(layout.lengths))[:num_sequences]
        return Cache(torch.stack([piece.mean(0) for piece in pieces]), capacity)

    def step(self, ids_B, cache):
        assert cache.used < cache.capacity
        cache.used += 1
        before = torch.full_like(ids_B, BOS) if cache.before is None else cache.before
        cache.before = ids_B
        self.calls.append(len(ids_B))
        one_hot = torch.nn.functional.one_hot
        seen = torch.cat((2 * cache.memory_BD, one_hot(ids_B, V), one_hot(before, V)), 1)
        return seen.to(self.table.dtype) @ self.table + 0.3 * cache.used * one_hot(torch.tensor(EOS), V)


def generator(seed=0, capacity=5, **kwargs):
    return Generator(Toy(seed), bos_id=BOS, eos_id=EOS, capacity=capacity, **kwargs)


def hiddens(count, seed=0):
    draws = np.random.default_rng(seed)
    return [draws.normal(size=(draws.integers(1, 9), D)).astype(np.float32) for _ in range(count)]


def log_p(model, hidden, ids):
    """Σ log p of ids one after another, by the toy alone."""
    cache = Cache(torch.from_numpy(hidden).mean(0)[None], 99)
    total, last = 0.0, BOS
    for token in ids:
        total += model.step(torch.tensor([last]), cache).log_softmax(-1)[0, token].item()
        last = token
    return total


def every_sequence(limit):
    """All that end within `limit` tokens, the end included."""
    others = [token for token in range(V) if token != EOS]
    return [[*ids, EOS] for n in range(limit) for ids in itertools.product(others, repeat=n)]


@pytest.mark.parametrize("alpha", [0.0, 0.8])
def test_a_beam_as_wide_as_the_tree_finds_what_enumeration_finds(alpha):
    engine, limit = generator(capacity=4), 4
    settings = Decoding(beams=4**3, length_penalty=alpha)
    for hidden, found in zip(hiddens(6), engine.decode(hiddens(6), settings), strict=True):
        scores = {
            tuple(ids): log_p(engine.model, hidden, ids) / penalty(len(ids), settings) for ids in every_sequence(limit)
        }
        ranked = sorted(scores.items(), key=lambda item: -item[1])[: len(found)]
        ends = [h for h in found if h.finished]
        assert len(ends) == 64
        assert [(*h.ids.tolist(), EOS) for h in ends] == [ids for ids, _ in ranked[: len(ends)]]
        np.testing.assert_allclose([h.score for h in ends], [s for _, s in ranked[: len(ends)]], rtol=1e-5)


def beam_by_hand(model, hidden, width, limit):
    live, done = [((), 0.0)], []
    for _ in range(limit):
        grown = [((*ids, t), log_p(model, hidden, (*ids, t))) for ids, _ in live for t in range(V)]
        done += [(ids, score) for ids, score in grown if ids[-1] == EOS]
        live = sorted((g for g in grown if g[0][-1] != EOS), key=lambda g: -g[1])[:width]
    return sorted(done, key=lambda g: -g[1])[:width]


@pytest.mark.parametrize("width", [2, 3])
def test_a_narrow_beam_is_the_textbook_s(width):
    engine = generator(seed=3, capacity=12)
    for hidden, found in zip(hiddens(5), engine.decode(hiddens(5), Decoding(beams=width)), strict=True):
        expected = beam_by_hand(engine.model, hidden, width, 12)
        assert [(*h.ids.tolist(), EOS) for h in found] == [ids for ids, _ in expected]


def test_greedy_takes_the_likeliest_and_says_whether_it_ended():
    engine = generator(seed=1, capacity=20)
    ended = []
    for hidden, (found,) in zip(hiddens(40), engine.decode(hiddens(40), Decoding()), strict=True):
        cache, ids = Cache(torch.from_numpy(hidden).mean(0)[None], 99), [BOS]
        while len(ids) < 21 and (len(ids) == 1 or ids[-1] != EOS):
            ids.append(int(engine.model.step(torch.tensor([ids[-1]]), cache).argmax()))
        assert [BOS, *found.ids.tolist(), *([EOS] if found.finished else [])] == ids
        assert found.score == pytest.approx(log_p(engine.model, hidden, ids[1:]), rel=1e-5)
        ended.append(found.finished)
    assert any(ended) and not all(ended)


def test_ended_rows_leave_the_batch():
    engine = generator(seed=1, capacity=30)
    engine.decode(hiddens(40), Decoding())
    assert engine.model.calls[0] == 40 and engine.model.calls[-1] < 40


@pytest.mark.parametrize("settings", [Decoding(sample=True, radius=0.5, seed=3), Decoding(beams=3, radius=0.5)])
def test_results_depend_on_the_key_not_on_the_company(settings):
    records = hiddens(7)
    rows, keys = np.repeat(np.arange(7), 3), np.arange(21) + 100
    together = generator().decode(records, settings, rows, keys)
    few_at_a_time = generator(tokens=40).decode(records, settings, rows, keys)
    backwards = generator().decode(records, settings, rows[::-1], keys[::-1])[::-1]
    for other in (few_at_a_time, backwards):
        for a, b in zip(together, other, strict=True):
            assert [h.ids.tolist() for h in a] == [h.ids.tolist() for h in b]
    assert len({tuple(h[0].ids) for h in together}) > 7  # the copies of a record differ


def test_samples_have_the_model_s_probabilities():
    engine, count = generator(seed=2, capacity=1), 4000
    (hidden,) = hiddens(1)
    found = engine.decode([hidden], Decoding(sample=True, temperature=1.5), np.zeros(count, dtype=np.int64))
    drawn = np.bincount([h[0].ids[0] if len(h[0].ids) else EOS for h in found], minlength=V) / count
    cache = Cache(torch.from_numpy(hidden).mean(0)[None], 9)
    expected = (engine.model.step(torch.tensor([BOS]), cache) / 1.5).softmax(-1)[0].detach().numpy()
    assert np.abs(drawn - expected).max() < 4 * math.sqrt(0.25 / count)


def test_top_k_and_top_p_cut_the_tail():
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.05, 0.3, 0.15]])).expand(1000, -1)
    uniform = torch.arange(1000) / 1000
    kept = lambda **options: set(draw(logits, uniform, Decoding(sample=True, **options)).tolist())  # noqa: E731
    assert kept() == {0, 1, 2, 3, 4}
    assert kept(top_k=2) == {1, 3}
    assert kept(top_p=0.65) == {1, 3}
    assert kept(top_p=0.75) == {1, 3, 4}
    assert kept(top_p=0.01) == {1}
    shares = np.bincount(draw(logits, uniform, Decoding(sample=True, top_k=2)).numpy(), minlength=5) / 1000
    np.testing.assert_allclose(shares, [0, 4 / 7, 0, 3 / 7, 0], atol=2e-3)


def test_noise_is_normal_and_a_function_of_its_state():
    states = rng.hash_u64(0, rng.NOISE, np.arange(2000))
    noise = normal(states, 64, torch.device("cpu"))
    assert torch.equal(noise[5:7], normal(states[5:7], 64, torch.device("cpu")))
    assert abs(noise.mean().item()) < 0.01 and abs(noise.std().item() - 1) < 0.01
    assert abs((noise**4).mean().item() - 3) < 0.1 and noise.abs().max() < 6
    assert abs(np.corrcoef(noise[:, 0], noise[:, 1])[0, 1]) < 0.1
    bits = rng.fold(states[:, None], np.arange(64))
    expected = np.sqrt(-2 * np.log(((bits >> np.uint64(40)).astype(np.float32) + 0.5) / 2**24))
    expected *= np.cos((bits & np.uint64(2**24 - 1)).astype(np.float32) * (2 * np.pi / 2**24))
    np.testing.assert_allclose(noise.numpy(), expected, atol=1e-5)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match=r"beam_size=0.*temperature=0.*top_p=2"):
        generator().decode(hiddens(1), Decoding(beams=0, temperature=0, top_p=2))
    with pytest.raises(ValueError, match="does not sample"):
        generator().decode(hiddens(1), Decoding(beams=2, sample=True))
    with pytest.raises(ValueError, match="hidden states 1 have no tokens"):
        generator().decode([*hiddens(1), np.zeros((0, D), np.float32)], Decoding())
