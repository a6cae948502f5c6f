"""One process, tiny runs: what a run writes, learns and refuses."""

import json
import math
import os
from functools import partial
from pathlib import Path

import pytest
import torch

from moltron.checkpoint.manager import list_checkpoints
from moltron.config.compose import ConfigError
from moltron.objectives.masked_lm import MaskedLM
from moltron.train.loop import train
from moltron.train.step import LossScaler, NonFiniteError

GOLDEN = Path(__file__).parents[2] / "golden" / "train_tiny_esm2.txt"


def test_golden_curve(tmp_path, tiny_config, read_lines):
    """The learning curve, rounded; UPDATE_GOLDEN=1 rewrites it."""
    run_dir = tmp_path / "run = [1], a"
    result = train(tiny_config(run_dir, "logging.tensorboard=true", "checkpoint.keep_last=1"))
    lines = read_lines(run_dir)
    curve = "".join(
        f"{line['step']:2d} {line['train_loss']:.4f} {line['val_loss'] or 0:.4f} {line['grad_norm']:.4f}\n"
        for line in lines
    )
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(curve)
    expected = [[float(x) for x in row.split()] for row in GOLDEN.read_text().splitlines()]
    assert [[float(x) for x in row.split()] for row in curve.splitlines()] == [
        pytest.approx(row, rel=2e-3, abs=2e-4) for row in expected
    ]

    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]
    assert [line["step"] for line in lines if line["val_loss"] is not None] == [8, 16, 20]
    assert lines[-1]["train_loss"] < 0.75 * lines[0]["train_loss"]
    assert lines[-1]["val_perplexity"] == pytest.approx(math.exp(lines[-1]["val_loss"]))
    assert lines[-1]["lr"] == pytest.approx(3e-4)
    assert lines[-1]["tokens"] == result.tokens > 20 * 4 * 192 * 0.8
    assert (result.step, result.exit_code, result.val_loss) == (20, 0, lines[-1]["val_loss"])
    assert result.best_val_loss == min(line["val_loss"] for line in lines if line["val_loss"] is not None)

    assert {path.name for path in run_dir.iterdir()} == {
        *("config.yaml", "manifest.json", "metrics.jsonl", "checkpoints", "loss_curve.png", "tensorboard")
    }
    manifest = json.loads((run_dir / "manifest.json").read_text())
    assert manifest["parameters"] == 20384
    assert manifest["records"] == {"train": 90, "val": 12}
    assert manifest["lives"][0]["versions"]["torch"] == torch.__version__
    assert (run_dir / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in list_checkpoints(run_dir / "checkpoints")] == ["step-00000020"]


def test_weights_of_a_run_start_another(tmp_path, tiny_config, read_lines):
    train(tiny_config(tmp_path / "first", "train.max_steps=6"))
    train(tiny_config(tmp_path / "second", "train.max_steps=1", "train.log_every=1", f"init={tmp_path / 'first'}"))
    train(tiny_config(tmp_path / "anew", "train.max_steps=1", "train.log_every=1"))
    warm, cold = (read_lines(tmp_path / name)[0] for name in ("second", "anew"))
    assert warm["train_loss"] < cold["train_loss"] - 0.3
    assert warm["step"] == 1
    with pytest.raises(ValueError, match=r"another model: model\.num_layers: 2 → 1"):
        train(tiny_config(tmp_path / "third", "model.num_layers=1", f"init={tmp_path / 'first'}"))


def test_a_loss_that_is_not_finite_stops_with_record_ids(tmp_path, tiny_config, monkeypatch, read_state):
    poison(monkeypatch, call=4 * 6 + 2)  # a pack of step 7
    with pytest.raises(NonFiniteError, match=r"step 7: loss nan.*train\|\d+.*step 5 is the last checkpoint") as error:
        train(tiny_config(tmp_path / "run", "train.eval_every=100"))
    assert "train.nonfinite=skip" in str(error.value)
    (pack,) = json.loads((tmp_path / "run" / "nonfinite_step7_rank0.json").read_text())["packs"]  # not the good packs
    assert pack["records"] and all(name.startswith("train|") for name in pack["records"])
    step, _, state = read_state(tmp_path / "run")
    assert step == 5
    assert all(torch.isfinite(tensor).all() for tensor in state.values())


def test_a_poisoned_step_right_before_a_checkpoint_is_not_saved(tmp_path, tiny_config, monkeypatch, read_state):
    poison(monkeypatch, call=4 * 4 + 1)  # step 5, whose end is a checkpoint
    with pytest.raises(NonFiniteError, match="no checkpoint was written yet"):
        train(tiny_config(tmp_path / "run", "train.eval_every=100"))
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == []


def test_a_loss_that_is_not_finite_can_be_skipped(tmp_path, tiny_config, monkeypatch, read_lines, read_state):
    poison(monkeypatch, call=4 * 2 + 1)
    overrides = ("train.nonfinite=skip", "train.log_every=1", "train.max_steps=5", "train.eval_every=100")
    assert train(tiny_config(tmp_path / "run", *overrides)).step == 5
    lines = read_lines(tmp_path / "run")
    assert [line["train_loss"] is None for line in lines] == [False, False, True, False, False]
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 1]
    _, meta, state = read_state(tmp_path / "run")
    assert meta["updates"] == 4
    assert all(torch.isfinite(tensor).all() for tensor in state.values())


def poison(monkeypatch, call):
    """Make the `call`-th loss that is computed nan."""
    real, calls = MaskedLM.loss, iter(range(1, 10**6))

    def loss(self, output, batch):
        total, count = real(self, output, batch)
        return (total * math.nan if next(calls) == call else total), count

    monkeypatch.setattr(MaskedLM, "loss", loss)


def test_early_stop_keeps_the_last_state(tmp_path, tiny_config, read_state):
    overrides = ("optim.lr=1e-12", "optim.schedule.min_lr=0", "train.eval_every=1", "train.early_stop=2")
    result = train(tiny_config(tmp_path / "run", *overrides, "train.max_steps=50"))
    assert (result.reason, result.exit_code) == ("early_stop", 0)
    assert read_state(tmp_path / "run")[0] == result.step < 50


def test_best_checkpoints_are_kept(tmp_path, tiny_config, monkeypatch):
    from moltron.infer.evaluate import Evaluator

    losses = iter([3.0, 1.0, 2.0, 4.0, 5.0])
    monkeypatch.setattr(Evaluator, "loss", lambda self, model: next(losses))
    keys = ("train.eval_every=1", "train.max_steps=5", "checkpoint.every=100", "checkpoint.keep_last=1")
    train(tiny_config(tmp_path / "run", *keys, "checkpoint.keep_best=2"))
    kept = [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert kept == ["step-00000002", "step-00000003", "step-00000005"]


def test_fp16_finds_its_loss_scale(tmp_path, tiny_config, read_lines, read_state, monkeypatch):
    monkeypatch.setattr("moltron.train.loop.LossScaler", partial(LossScaler, scale=2.0**30))
    keys = ("train.precision=fp16", "train.max_steps=24", "train.log_every=24", "train.eval_every=24")
    train(tiny_config(tmp_path / "run", *keys))
    (line,) = read_lines(tmp_path / "run")
    _, meta, _ = read_state(tmp_path / "run")
    assert 5 < line["skipped"] < 20
    assert line["loss_scale"] == meta["scaler"]["scale"] == 2.0 ** (30 - line["skipped"])
    assert meta["updates"] == 24 - line["skipped"]
    assert line["train_loss"] < 3.4


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_fp8_on_a_cpu_says_what_it_is_for(tmp_path, tiny_config, capsys, precision):
    train(tiny_config(tmp_path / "run", f"train.precision={precision}", "train.max_steps=1", "model.num_layers=3"))
    assert capsys.readouterr().err.count("fp8 on a CPU is for testing") == (precision == "fp8")


def test_all_problems_at_once(tmp_path, tiny_config):
    overrides = ("batch.tokens=32", "optim.schedule.name=cosinus", "train.nonfinite=ignore", "checkpoint.every=0")
    with pytest.raises(ConfigError) as error:
        train(tiny_config(tmp_path / "run", *overrides, "data.path=/nowhere"))
    assert len(error.value.problems) == 5
    assert not (tmp_path / "run").exists()
