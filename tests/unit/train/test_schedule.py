"""Schedules against the golden rates and peaks of the specification (models.md §5) and by their formulas."""

import math

import pytest

from moltron.config.schema import ScheduleConfig
from moltron.train import schedule
from moltron.train.schedule import build_schedule, peak


def build(name, lr, max_steps=500_000, hidden_size=320, **keys):
    config = ScheduleConfig(name=name, **keys)
    return config, build_schedule(config, lr, max_steps, hidden_size)


@pytest.mark.parametrize(
    ("name", "lr", "keys", "step", "golden"),
    [
        ("cosine", 4e-4, dict(warmup_steps=2000, constant_steps=50_000, min_lr=4e-5), 479, 9.58e-5),  # ESM2nv 8M
        ("cosine", 2e-4, dict(warmup_steps=500, constant_steps=50_000, min_lr=2e-5), 482, 1.928e-4),  # ESM1nv, v1.11
        ("noam", 1.0, dict(warmup_steps=8000, min_lr=1e-5, hidden_size=256), 478, 4.175e-5),  # MegaMolBART xsmall
        ("noam", 0.01, dict(warmup_steps=5000, min_lr=1e-6, hidden_size=512), 478, 5.975e-7),  # retrosynthesis
        ("inverse_sqrt", 1e-4, dict(warmup_steps=2), 181, 1.284e-5),  # ProtT5nv
        ("warmup_anneal_hold", 4e-4, dict(warmup_steps=2000, min_lr=4e-5), 499, 1.298e-4),  # ESM2nv, v1.11
    ],
)
def test_golden_rates(name, lr, keys, step, golden):
    hidden_size = keys.pop("hidden_size", 320)
    _, rate = build(name, lr, hidden_size=hidden_size, **keys)
    assert rate(step) == pytest.approx(golden, rel=5e-4)


@pytest.mark.parametrize(("hidden_size", "golden"), [(256, 6.99e-4), (512, 4.94e-4), (1024, 3.49e-4)])
def test_golden_noam_peaks(hidden_size, golden):
    config, rate = build("noam", 1.0, hidden_size=hidden_size, warmup_steps=8000, min_lr=1e-5)
    assert peak(config, rate) == rate(8000) == pytest.approx(golden, rel=2e-3)
    assert rate(10**9) == 1e-5
    assert rate(1) < 1e-5  # the floor holds after the warm-up only


def test_golden_retrosynthesis_peak():
    config, rate = build("noam", 0.01, hidden_size=512, warmup_steps=5000, min_lr=1e-6)
    assert peak(config, rate) == pytest.approx(6.25e-6, rel=1e-3)


def test_cosine_decays_to_its_constant_tail():
    _, rate = build("cosine", 1.0, max_steps=1000, warmup_steps=100, constant_steps=200, min_lr=0.1)
    assert [rate(s) for s in (1, 50, 100)] == pytest.approx([0.01, 0.5, 1.0])
    assert rate(450) == pytest.approx(0.55)  # half way from 100 to 800
    assert rate(275) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert [rate(s) for s in (800, 900, 1000, 5000)] == [0.1] * 4


def test_linear_reaches_its_end():
    _, rate = build("linear", 1.0, max_steps=110, warmup_steps=10, min_lr=0.2)
    assert rate(4) == pytest.approx(5 / 11)
    assert [rate(s) for s in (10, 60, 110, 500)] == pytest.approx([1.0, 0.6, 0.2, 0.2])


def test_warmup_anneal_hold_holds_at_a_tenth():
    _, rate = build("warmup_anneal_hold", 4e-4, max_steps=500_000, warmup_steps=2000, min_lr=4e-5)
    assert rate(2000) == 4e-4
    assert rate(251_000) == pytest.approx(2e-4)
    assert rate(460_000) == rate(500_000) == 4e-5


def test_inverse_sqrt_is_continuous():
    _, rate = build("inverse_sqrt", 1e-4, warmup_steps=99, min_lr=1e-6)
    assert rate(49) == pytest.approx(0.5e-4)
    assert rate(99) == pytest.approx(1e-4)
    assert rate(399) == pytest.approx(0.5e-4)
    assert rate(10**8) == 1e-6


def test_constant():
    _, rate = build("constant", 3e-4, warmup_steps=10)
    assert rate(5) == pytest.approx(1.5e-4)
    assert rate(10) == rate(10**6) == 3e-4
    _, rate = build("constant", 3e-4, warmup_steps=0)
    assert rate(1) == 3e-4


@pytest.mark.parametrize("name", schedule.NAMES)
@pytest.mark.parametrize("warmup_steps", [0, 1, 7, 50])
def test_every_schedule_is_positive_and_peaks_after_warm_up(name, warmup_steps):
    if name == "noam" and warmup_steps == 0:
        pytest.skip("noam is defined by its warm-up")
    config, rate = build(name, 1e-3, max_steps=40, warmup_steps=warmup_steps, min_lr=1e-6)
    rates = [rate(s) for s in range(1, 60)]
    assert all(r > 0 for r in rates)
    assert max(rates) <= peak(config, rate) * (1 + 1e-12)


def test_decay_steps_end_the_decay_before_max_steps():
    _, rate = build("linear", 1.0, max_steps=1000, warmup_steps=0, decay_steps=100, min_lr=0.0)
    assert rate(50) == pytest.approx(0.5)
    assert rate(100) == 0.0


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"cosin is unknown: choose one of cosine, linear"):
        build("cosin", 1e-3)
