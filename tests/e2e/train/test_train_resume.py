"""A run that was stopped, killed and resumed is the undisturbed run, bit for bit."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from moltron.config.compose import ConfigError
from moltron.train.loop import train
from moltron.train.step import TrainStep

SIGNAL_AT = """
import os, sys
from moltron.train.step import TrainStep
real, at, number = TrainStep.__call__, int(sys.argv[1]), int(sys.argv[2])
def call(self, step, *args, **kwargs):
    if step == at:
        os.kill(os.getpid(), number)
    return real(self, step, *args, **kwargs)
TrainStep.__call__ = call
from moltron.cli.main import main
sys.exit(main(["train", *sys.argv[3:]]))
"""


def with_signal(step, number, arguments):
    return [sys.executable, "-c", SIGNAL_AT, str(step), str(int(number)), *arguments]


def run_with_signal(step, number, arguments):
    command = with_signal(step, number, arguments)
    return subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )


def test_sigterm_then_kill_then_a_torn_line(tmp_path, arguments, tiny_config, read_lines, read_state):
    train(tiny_config(tmp_path / "undisturbed"))

    disturbed = tmp_path / "disturbed"
    first = run_with_signal(7, signal.SIGTERM, arguments(disturbed))
    assert first.returncode == 75, first.stderr
    assert read_state(disturbed)[0] == 7
    assert [line["step"] for line in read_lines(disturbed)] == [2, 4, 6]

    second = run_with_signal(17, signal.SIGKILL, arguments(disturbed))  # while the one of 16 is written
    assert second.returncode == -signal.SIGKILL, second.stderr
    assert 7 <= read_state(disturbed)[0] <= 16
    with open(disturbed / "metrics.jsonl", "a") as file:
        file.write('{"step": 18, "train_lo')

    result = train(tiny_config(disturbed))
    assert (result.reason, result.exit_code, result.step) == ("finished", 0, 20)
    assert read_lines(disturbed) == read_lines(tmp_path / "undisturbed")
    (step, meta, state), (expected_step, expected_meta, expected) = map(
        read_state, (disturbed, tmp_path / "undisturbed")
    )
    assert (step, meta) == (expected_step, expected_meta)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_moments_in_fp8_go_on_bit_for_bit(tmp_path, tiny_config, read_lines, read_state):
    keys = ("optim.state=fp8", "model.hidden_size=64", "optim.schedule.decay_steps=20", "checkpoint.every=3")
    for run, ends in (("undisturbed", (8,)), ("resumed", (4, 8))):
        for end in ends:
            train(tiny_config(tmp_path / run, *keys, f"train.max_steps={end}"))
    (*_, state), (*_, expected) = (read_state(tmp_path / run) for run in ("resumed", "undisturbed"))
    assert sum(tensor.dtype == torch.float8_e4m3fn for tensor in expected.values()) > 8
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name].double(), expected[name].double()) for name in expected)
    losses = [[line["train_loss"] for line in read_lines(tmp_path / run)] for run in ("resumed", "undisturbed")]
    assert losses[0] == losses[1]


def test_a_second_command_is_kept_out_of_a_run_that_goes_on(tmp_path, arguments, tiny_config, read_lines):
    run_dir = tmp_path / "run"
    with subprocess.Popen(with_signal(7, signal.SIGSTOP, arguments(run_dir)), stderr=subprocess.DEVNULL) as first:
        os.waitpid(first.pid, os.WUNTRACED)  # it stands still
        with pytest.raises(ValueError, match=rf"run/.lock is held by process {first.pid} on "):
            train(tiny_config(run_dir))
        first.kill()
    assert train(tiny_config(run_dir)).step == 20
    assert [line["step"] for line in read_lines(run_dir)] == [*range(2, 21, 2)]


def test_a_second_signal_ends_at_once():
    code = (
        "import os, signal\n"
        "from moltron.train.signals import StopSignal\n"
        "with StopSignal() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGUSR1)\n"
        "    assert stop.received\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('still here')\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.returncode == -signal.SIGTERM
    assert "still here" not in ended.stdout


def test_slurms_warning_saves_and_says_so(tmp_path, tiny_config, read_state, monkeypatch):
    real = TrainStep.__call__

    def call(self, step, *args, **kwargs):
        if step == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(self, step, *args, **kwargs)

    monkeypatch.setattr(TrainStep, "__call__", call)
    before = signal.getsignal(signal.SIGUSR1)
    result = train(tiny_config(tmp_path / "run"))
    assert (result.reason, result.exit_code, result.step) == ("interrupted", 75, 3)
    assert read_state(tmp_path / "run")[0] == 3
    assert signal.getsignal(signal.SIGUSR1) == before


@pytest.fixture
def short_run(tmp_path, tiny_config):
    run_dir = tmp_path / "run"
    train(tiny_config(run_dir, "train.max_steps=2"))
    return run_dir


def test_another_configuration_is_refused_with_all_differences(short_run, tiny_config):
    with pytest.raises(ConfigError) as error:
        others = ("model.num_layers=3", "objective.select=0.2", "batch.packs=2", "optim.state=fp8")
        train(tiny_config(short_run, "optim.lr=1e-4", *others))
    text = str(error.value)
    for key in ("optim.lr: 0.003 → 0.0001", "model.num_layers: 2 → 3", "objective.select", "batch.packs: 4 → 2"):
        assert key in text
    assert "optim.state: fp32 → fp8" in text
    assert f"init={short_run}" in text


def test_what_may_change_on_resume(short_run, tiny_config, read_lines):
    free = ("train.max_steps=4", "train.log_every=1", "train.eval_every=3", "checkpoint.keep_last=1")
    assert train(tiny_config(short_run, *free)).step == 4
    assert [line["step"] for line in read_lines(short_run)] == [2, 3, 4]
    assert train(tiny_config(short_run, "train.max_steps=3")).step == 4  # nothing left to do


def test_other_data_is_refused(short_run, tiny_config, tmp_path):
    from moltron.data.store import StoreWriter

    (tmp_path / "other").mkdir()
    with StoreWriter(tmp_path / "other" / "train.arrow") as writer:
        writer.add(["a"], ["ACDEF"])
    with pytest.raises(ConfigError, match=r"train\.arrow"):
        train(tiny_config(short_run, f"data.path={tmp_path / 'other'}"))


def test_no_good_checkpoint_is_no_silent_restart(short_run, tiny_config):
    for shard in (short_run / "checkpoints").glob("step-*/*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match="none of the 1 checkpoints"):
        train(tiny_config(short_run, "train.max_steps=4"))
