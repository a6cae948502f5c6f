"""The command line: help with an example and every key, exit codes, argument order."""

import dataclasses
import os
import shlex
import subprocess
import sys
from importlib import metadata

import pytest

import moltron
from moltron.cli import main as cli
from moltron.config import compose
from moltron.config.schema import TrainConfig


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_shows_an_example_and_every_key(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and f"moltron {name} " in shown
    for key, _ in compose.schema_fields(cli.COMMANDS[name].schema):
        assert f"  {key} (" in shown


def test_help_shows_the_values_of_a_preset(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--config-name", "pretrain_esm2_8M", "--help"])
    shown = capsys.readouterr().out
    assert "keys (pretrain_esm2_8M):" in shown and "run_dir (required)" in shown
    packs = compose.load_config(TrainConfig, ["run_dir=r", "data.path=d"], "pretrain_esm2_8M").batch.packs
    assert f"batch.packs ({packs})" in shown and f"batch.packs ({TrainConfig().batch.packs})" not in shown
    assert cli.main(["train", "--config-name", "nope", "--help"]) == 2
    assert "no such preset" in capsys.readouterr().err


def test_help_shows_the_defaults_of_its_command():
    assert "objective.name (auto)" in cli._describe_keys(cli.COMMANDS["evaluate"], [])
    assert "objective.name (masked_lm)" in cli._describe_keys(cli.COMMANDS["train"], [])


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_example_is_a_valid_configuration(name):
    words = shlex.split(cli.COMMANDS[name].example)
    assert words[:2] == ["moltron", name]
    arguments, others = cli._parser().parse_known_args(words[1:])
    compose.load_config(
        cli.COMMANDS[name].schema, [*arguments.overrides, *others], getattr(arguments, "config_name", None)
    )


def test_values_may_stand_after_options(monkeypatch):
    seen = []
    monkeypatch.setitem(
        cli.COMMANDS, "train", dataclasses.replace(cli.COMMANDS["train"], run=lambda c: seen.append(c) or 0)
    )
    assert cli.main(["train", "data.path=a", "--config-name", "pretrain_esm2_8M", "run_dir=b", "train.seed=5"]) == 0
    assert (seen[0].data.path, seen[0].run_dir, seen[0].train.seed) == ("a", "b", 5)


def test_wrong_configuration_is_exit_code_2(capsys):
    assert cli.main(["embed", "model=a", "ouput=b"]) == 2
    shown = capsys.readouterr().err
    assert "did you mean output" in shown and "input is missing" in shown


def test_a_users_fault_is_one_line_and_exit_code_1(tmp_path, capsys):
    assert cli.main(["prepare", f"input={tmp_path}/none.fasta", f"output={tmp_path}/o"]) == 1
    assert "none.fasta" in capsys.readouterr().err


def test_python_dash_m_is_the_same_program_and_help_is_light():
    code = "\n".join([
        "import sys", "from moltron.cli.main import main",
        "try: main(['--help'])", "except SystemExit: pass", "assert 'torch' not in sys.modules",
    ])  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    shown = subprocess.run(
        [sys.executable, "-m", "moltron", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert all(name in shown for name in cli.COMMANDS)


@pytest.mark.parametrize(
    ("name", "then"), [("embed", "again, which then goes on where it stopped"), ("prepare", "again")]
)
def test_a_full_disk_is_one_line_with_the_place(monkeypatch, capsys, name, then):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(cli.COMMANDS, name, dataclasses.replace(cli.COMMANDS[name], run=full))
    assert cli.main([name, *["model=m"][: name == "embed"], "input=i", "output=d/o.npz"]) == 1
    shown = capsys.readouterr().err
    assert "No space left on device: make room where output=d/o.npz is" in shown and shown.endswith(f"{then}\n")


@pytest.mark.parametrize(("words", "unbuffered"), [("plan esm2_8M", ""), ("plan esm2_8M", "1"), ("train --help", "")])
def test_it_ends_in_silence_where_nobody_reads(words, unbuffered):
    program = subprocess.Popen(
        [sys.executable, "-m", "moltron", *words.split()],
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    program.stdout.close()
    assert program.stderr.read() == "" and program.wait() == 141


def test_a_broken_pipe_that_is_not_its_output_is_said(monkeypatch, capsys):
    def broken(_):
        raise BrokenPipeError(32, "Broken pipe", "a worker's")

    monkeypatch.setitem(cli.COMMANDS, "embed", dataclasses.replace(cli.COMMANDS["embed"], run=broken))
    assert cli.main(["embed", "model=m", "input=i", "output=o.npz"]) == 1
    assert 'Broken pipe: "a worker\'s"' in capsys.readouterr().err


def test_version_is_ours_and_torchs(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"moltron {moltron.__version__}, torch {metadata.version('torch')}\n"
