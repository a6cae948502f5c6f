"""`moltron plan`: what it proposes, what it predicts of a given layout, and that its command line is one."""

import re
import shlex

import pytest

from moltron.cli import main as cli
from moltron.cli import plan
from moltron.config import compose
from moltron.config.schema import TrainConfig
from moltron.train.validate import validate


def run(capsys, *arguments):
    """Exit code, what was printed, what went wrong."""
    code = cli.main(["plan", *arguments])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def chosen(capsys, *arguments) -> TrainConfig:
    """The configuration of the command line that is proposed."""
    code, shown, error = run(capsys, *arguments)
    assert code == 0, error
    words = shlex.split(shown.splitlines()[-1])
    words = words[words.index("train") + 1 :]
    preset = words[words.index("--config-name") + 1] if "--config-name" in words else None
    config = compose.load_config(TrainConfig, [word for word in words if "=" in word], preset)
    world = int(arguments[arguments.index("--gpus") + 1])
    assert [p for p in validate(config, world) if not p.startswith("data.path=")] == []
    return config


@pytest.mark.parametrize(
    "arguments,tokens,packs,parallel",
    [
        ("esm2_8M --gpus 1 --memory 80", 131072, 16, {}),
        ("esm2_650M --gpus 8 --memory 80", 32768, 64, {}),  # sharding alone
        ("esm2_650M --gpus 1 --memory 80", 32768, 64, {}),
        ("esm2_650M --gpus 1 --memory 40", 16384, 128, {}),  # rather smaller packs than recomputing
        ("esm2_650M --gpus 1 --memory 24", 8192, 256, dict(recompute="selective")),
        ("esm2_650M --gpus 1 --memory 20", 32768, 64, dict(recompute="full")),
        ("esm2_15B --gpus 4 --memory 141", 12288, 172, dict(recompute="selective", reshard_after_forward=True)),
        ("esm2_15B --gpus 4 --memory 141 optim.state=fp8", 16384, 128, dict(recompute="selective")),
        ("esm2_15B --gpus 8 --memory 141", 16384, 128, dict(recompute="selective")),
        ("esm2_3B --gpus 4 --memory 141", 16384, 128, dict(reshard_after_forward=False)),
        ("esm2_650M --gpus 16 --memory 80", 32768, 64, dict(dp_replicate=2)),  # copies between nodes
        ("esm2_15B --gpus 8 --memory 80", 6144, 344, dict(reshard_after_forward=True, recompute="selective")),
        ("esm2_15B --gpus 32 --memory 16", 6144, 352, dict(reshard_after_forward=True, recompute="full")),
        ("pretrain_prott5_small --gpus 2 --memory 24", 1024, 2, {}),  # the tokens of a step stay near the preset's
    ],
)
def test_proposals(capsys, arguments, tokens, packs, parallel):
    config = chosen(capsys, *arguments.split())
    assert (config.batch.tokens, config.batch.packs) == (tokens, packs)
    expected = {"recompute": "none", "dp_replicate": 1, "tp": 1, "cp": 1, "pp": 1, "dp_shard": None} | parallel
    assert {key: getattr(config.parallel, key) for key in expected} == expected


def test_what_shards_cannot_do_is_cut_inside_of_a_node(capsys):
    """Sequences of which not one fits: tensor parallelism; and a pipeline before more GPUs than a node has."""
    config = chosen(capsys, "esm2_3B", "--gpus", "8", "--memory", "40", "data.max_length=262144")
    assert config.parallel.recompute == "full" and 1 < config.parallel.tp <= 8
    meshes = plan._layouts(plan.training("esm2_15B", ["gpus=32", "node=4"])[0])
    layouts = [layout for mesh in meshes for layout in mesh]
    assert max(layout.tp for layout in layouts) == 4 and max(layout.cp for layout in layouts) == 4
    pipelines = [layout.pp > 1 for layout in layouts]
    assert any(pipelines) and pipelines == sorted(pipelines)


def test_a_pack_holds_the_longest_sequence_whatever_its_length(capsys):
    config = chosen(capsys, "esm2_8M", "--gpus", "128", "data.max_length=32769")  # 16,384 would make the step
    assert (config.batch.tokens, config.batch.packs, config.parallel.tp) == (49152, 128, 1)


def test_a_larger_step_is_told(capsys):
    assert "3,072 a step, 3.0 × the preset's" in run(capsys, "pretrain_prott5_small", "--gpus", "3")[1]
    assert "× the preset's" not in run(capsys, "pretrain_prott5_small", "--gpus", "1")[1]


def test_a_decoder_keeps_its_share(capsys):
    config = chosen(capsys, "megamolbart_small", "--gpus", "8", "--memory", "40")
    assert (config.batch.tokens, config.batch.decoder_tokens, config.batch.packs) == (32768, 40960, 8)


def test_a_model_without_a_training_preset(capsys):
    assert chosen(capsys, "prott5_xl", "--gpus", "8", "--memory", "80").objective.name == "span_corruption"


def test_what_is_given_stays(capsys):
    given = ["parallel.tp=2", "batch.tokens=32768", "parallel.recompute=full", "data.path='my store'"]
    code, shown, _ = run(capsys, "esm2_650M", "--gpus", "2", "--memory", "80", *given)
    assert code == 0 and shlex.split(shown.splitlines()[-1])[-5:] == ["run_dir=run", *given]
    assert "tp 2" in shown and "33 blocks" in shown and re.search(r"tp \(2\) +\d", shown)
    config = plan.training("esm2_650M", given)[0]
    tensors = plan.predict(config, 2).peak / plan.GIB
    assert re.search(rf"tensors +{tensors:.2f} ", shown)


def test_moments_in_fp8_are_counted(capsys):
    _, shown, _ = run(capsys, "esm2_650M", "--gpus", "1", "--memory", "80", "optim.state=fp8")
    assert re.search(r"optimizer state +1\.29 +adamw, fp8 moments", shown)  # fp32: 4.85


def test_a_given_layout_that_does_not_fit_is_predicted_all_the_same(capsys):
    code, shown, _ = run(capsys, "esm2_650M", "--gpus", "1", "--memory", "40", "batch.tokens=32768", "parallel.pp=1")
    assert code == 1 and "does not fit" in shown and re.search(r"tensors +5[78]\.", shown)


def test_when_nothing_fits_it_says_what_would(capsys):
    code, _, error = run(capsys, "esm2_15B", "--gpus", "1", "--memory", "80")
    assert code == 1 and "smallest peak found is" in error and "recompute=full" in error
    memory, gpus = re.search(r"GPUs of (\d+) GB, or (\d+) of these", error).groups()
    assert run(capsys, "esm2_15B", "--gpus", "1", "--memory", memory)[0] == 0
    assert run(capsys, "esm2_15B", "--gpus", gpus, "--memory", "80")[0] == 0


def test_users_faults(capsys):
    assert "no such preset" in run(capsys, "esm2_7M", "--gpus", "8")[2]
    for wrong in ("--gpus 0", "--memory -3", "--gpus 12", "--gpus 2 parallel.tp=3", "--gpus 2 parallel.tpp=2"):
        code, _, error = run(capsys, "esm2_650M", *wrong.split())
        assert code == 2 and "problem" in error, wrong
