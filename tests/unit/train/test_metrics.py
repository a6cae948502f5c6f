"""The metrics file survives a torn line and a rewind; clocks and rates add up; the picture is drawn."""

import json
import sys

import pytest

from moltron.config.schema import LoggingConfig
from moltron.train import metrics
from moltron.train.metrics import Meter, Sinks, draw_loss_curve, peak_flops, perplexity, rewind


def test_rewind_drops_a_torn_line_and_the_future(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert rewind(path, 0) == []
    sinks = Sinks(tmp_path, LoggingConfig(tensorboard=False), {}, step=0)
    for step in (2, 4, 6):
        sinks.write({"step": step, "train_loss": 1.0})
    torn = '{"step": 8, "tr'
    with open(path, "a") as file:
        file.write(torn)
    assert [line["step"] for line in rewind(path, 9)] == [2, 4, 6] and torn not in path.read_text()
    assert [line["step"] for line in rewind(path, 4)] == [2, 4]
    sinks.write({"step": 6, "train_loss": 2.0})
    assert [json.loads(text)["step"] for text in path.read_text().splitlines()] == [2, 4, 6]


def test_meter_rates(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 4.0, 10.0]).__next__
    monkeypatch.setattr(metrics.time, "perf_counter", clock)
    meter = Meter({"tokens": 100}, peak=2000.0)
    with meter.part("eval"):  # 2 seconds
        pass
    meter.add({"tokens": 300, "padded_tokens": 500}, flops=3000.0)  # ended now, at 4
    meter.add({"tokens": 500, "padded_tokens": 500}, flops=5000.0, seconds=6.0)  # at 10, whatever the host's clock says
    rates = meter.rates()
    assert rates["seconds"] == 8 and meter.trained == 8
    assert rates["tokens_per_second"] == 800 / 8  # 10 seconds without 2 of evaluation
    assert rates["padded_tokens_per_second"] == 1000 / 8
    assert (rates["share_eval"], rates["data_wait"]) == (0.2, 0.0)
    assert rates["mfu"] == 0.5
    assert rates["share_compute"] == pytest.approx(0.8)
    assert meter.totals == {"tokens": 900}
    assert (meter.window.total(), meter.window_flops, meter.began) == (0, 0.0, 10.0)
    assert Meter({"tokens": 0}).rates()["mfu"] is None


def test_peak_flops_by_name():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 9.89e14
    assert peak_flops("NVIDIA H100 PCIe") == 7.56e14
    assert peak_flops("NVIDIA L40S") == 3.62e14
    assert peak_flops("NVIDIA L40") == 1.81e14 and peak_flops("NVIDIA L4") == 1.21e14
    assert peak_flops("NVIDIA GH200 480GB") == 9.89e14
    assert peak_flops("Some CPU") is None


def test_perplexity_stays_a_number():
    assert perplexity(0.0) == 1.0
    assert json.loads(json.dumps(perplexity(1e9))) > 1e300


def test_sinks_write_tensorboard_and_picture(tmp_path):
    sinks = Sinks(tmp_path, LoggingConfig(tensorboard=True), {}, step=0)
    sinks.write({"step": 1, "train_loss": 3.0, "val_loss": None})
    sinks.write({"step": 2, "train_loss": 2.0, "val_loss": 2.5})
    sinks.draw()
    sinks.close()
    assert (tmp_path / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "tensorboard").iterdir())
    assert not list(tmp_path.glob("*.partial*"))


def test_wandb_offline(tmp_path):
    pytest.importorskip("wandb")
    sinks = Sinks(tmp_path, LoggingConfig(tensorboard=False, wandb="offline"), {"lr": 1}, step=0)
    sinks.write({"step": 1, "train_loss": 3.0})
    sinks.close()
    assert list((tmp_path / "wandb").glob("offline-run-*"))
    assert (tmp_path / "wandb_id").read_text()


def test_wandb_missing_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        Sinks(tmp_path, LoggingConfig(tensorboard=False, wandb="offline"), {}, step=0)


def test_a_picture_of_nothing(tmp_path):
    draw_loss_curve([], tmp_path / "loss_curve.png")
    assert (tmp_path / "loss_curve.png").exists()
