"""Two ranks on gloo are one process: the same samples, masks, losses, gradient norms and weights. One spawn for all."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from moltron.checkpoint.manager import find_good, read_manifest
from moltron.cli.main import main
from moltron.train.loop import train

TRAIN_ALL = """
import json, os, signal, sys
from moltron.config.compose import load_config
from moltron.config.schema import TrainConfig
from moltron.parallel import collectives
from moltron.train.loop import train
from moltron.train.step import TrainStep
collectives.shutdown, shutdown = lambda *_: None, collectives.shutdown  # one group for all runs
*jobs, last = [load_config(TrainConfig, arguments) for arguments in json.loads(sys.argv[1])]
for config in jobs:
    train(config)
real = TrainStep.__call__
def call(self, step, *args, **kwargs):
    if step == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGUSR1)
    return real(self, step, *args, **kwargs)
TrainStep.__call__ = call
result = train(last)
assert (result.reason, result.exit_code) == ("interrupted", 75) and result.step <= 4, result
shutdown()
"""
SHORT = ("train.max_steps=3", "train.log_every=1", "train.eval_every=3", "checkpoint.every=2", "checkpoint.keep_last=9")
ONE_STAGE = "parallel.pp_stages=1"
RUNS = {
    "adamw": SHORT,
    "muon": (*SHORT, "optim.name=muon"),
    "moments": (*SHORT, "optim.state=fp8", "model.hidden_size=64"),
    "each": (*SHORT, "parallel.reshard_after_forward=true", "train.max_steps=2", "train.eval_packs=3"),
    "hybrid": (*SHORT, "parallel.dp_replicate=2", "parallel.recompute=full"),
    "tensor": (*SHORT, "parallel.tp=2"),
    "context": (*SHORT, "parallel.cp=2"),
    "pipeline": (*SHORT, "parallel.pp=2"),
    "init": (*SHORT, "init={folder}/weights", "parallel.pp=2"),
    "init of a run": (*SHORT, "init={folder}/source", "parallel.pp=2", "parallel.pp_schedule=zero_bubble", ONE_STAGE),
    "half": (*SHORT, "train.precision=bf16"),
    "half tensor": (*SHORT, "train.precision=bf16", "parallel.tp=2"),
    "half pipeline": (*SHORT, "train.precision=bf16", "parallel.pp=2", "optim.name=muon"),
    "fp8 pipeline": (*SHORT, "train.precision=fp8", "model.num_layers=4", "parallel.pp=2", "batch.packs=2"),
}
ROUGH = ("muon", "moments")  # a last bit decides where a number is rounded to
ROUNDED = ("half", "half tensor", "half pipeline", "fp8 pipeline")  # two ranks round elsewhere


def without_axes(keys):
    """For one process."""
    return [key for key in keys if not key.startswith(("parallel.dp_", "parallel.tp", "parallel.cp", "parallel.pp"))]


@pytest.fixture(scope="module")
def both(tmp_path_factory, ranks_of, arguments, tiny_config):
    """The folders of every run, by one process and by two ranks."""
    folder = tmp_path_factory.mktemp("gloo")
    runs = {name: [key.format(folder=folder) for key in keys] for name, keys in RUNS.items()}
    train(tiny_config(folder / "source", "train.max_steps=2", "train.seed=5"))
    main(["convert", f"input={folder / 'source'}", f"output={folder / 'weights'}", "format=huggingface"])
    jobs = [arguments(folder / "two" / name, *keys) for name, keys in runs.items()]
    jobs += [arguments(folder / "two" / "stopped", "train.max_steps=50", "train.eval_every=50", "checkpoint.every=50")]
    with ranks_of("-c", TRAIN_ALL, json.dumps(jobs)):
        for name, keys in runs.items():
            train(tiny_config(folder / "one" / name, *without_axes(keys)))
    return folder


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [(name, 1e-3 if name in ROUGH else 1e-5) for name in RUNS if name not in ("context", *ROUNDED)],
)
def test_two_ranks_are_one_process(both, read_lines, read_state, name, tolerance):
    one, two = (read_lines(both / home / name) for home in ("one", "two"))
    assert len(one) == len(two) >= 2
    for a, b in zip(one, two, strict=True):
        assert a["tokens"] == b["tokens"]
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=tolerance)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=10 * tolerance if name in ROUGH else tolerance)
    assert one[-1]["val_loss"] == pytest.approx(two[-1]["val_loss"], rel=tolerance)
    (_, meta, expected), (_, meta_two, state) = (read_state(both / home / name) for home in ("one", "two"))
    assert meta["position"] == meta_two["position"]
    assert state.keys() == expected.keys()
    for key in expected:
        if key.startswith("model."):
            torch.testing.assert_close(state[key], expected[key], rtol=0, atol=5e-3 if name in ROUGH else 2e-5)


@pytest.mark.parametrize("name", ROUNDED)
def test_in_half_precision_two_ranks_are_one_process_but_for_rounding(both, read_lines, name):
    one, two = (read_lines(both / home / name) for home in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a["tokens"] == b["tokens"] and a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-2)


@pytest.mark.parametrize("name", ROUNDED)
def test_a_checkpoint_after_an_evaluation_has_the_masters(both, name):
    """Not the weights in half precision that an evaluation has gathered."""
    path = find_good(both / "two" / name / "checkpoints")
    assert path.name == "step-00000003"  # where it was evaluated
    assert {dtype for dtype, _ in read_manifest(path).tensors.values()} == {"float32"}


def test_a_pipeline_is_converted(both, read_state, tmp_path):
    main(["convert", f"input={both / 'two' / 'pipeline'}", f"output={tmp_path / 'out'}", "format=moltron"])
    weights, (*_, state) = load_file(tmp_path / "out" / "model.safetensors"), read_state(both / "two" / "pipeline")
    for name, value in weights.items():
        assert torch.equal(value, state[f"model.{name}"]), name


def test_a_signal_to_one_rank_stops_both_at_one_step(both, read_state):
    step, meta, _ = read_state(both / "two" / "stopped")
    assert step == meta["step"] == meta["updates"] in (3, 4)


@pytest.mark.parametrize("name", ["adamw", "muon", "moments", "hybrid", "tensor", "pipeline"])
def test_one_process_goes_on_where_two_ranks_stopped(both, tiny_config, read_lines, tmp_path, name):
    run_dir = tmp_path / "run"
    shutil.copytree(both / "two" / name, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step-00000003")
    train(tiny_config(run_dir, *without_axes(RUNS[name])))
    for a, b in zip(read_lines(both / "one" / name), read_lines(run_dir), strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-3 if name in ROUGH else 1e-5)


def test_fp8_moments_are_in_the_checkpoints(both):
    tensors = read_manifest(find_good(both / "two" / "moments" / "checkpoints")).tensors
    assert tensors["optim.exp_avg.layers.0.attention.qkv.weight"] == ["float8_e4m3fn", [192, 64]]
    assert tensors["optim.exp_avg_sq_root_scale.layers.0.attention.qkv.weight"] == ["float32", [192, 1]]
    assert tensors["optim.exp_avg.layers.0.attention.qkv.bias"] == ["float32", [192]]


def test_what_tensor_parallelism_cannot_cut_is_said_at_once(tiny_config):
    from moltron.train.validate import validate

    problems = validate(tiny_config("/nowhere/run", "parallel.tp=5"), world=10)
    assert problems == [
        "model.num_heads=2 cannot be shared equally by parallel.tp=5 ranks",
        "model.ffn_size=64 cannot be shared equally by parallel.tp=5 ranks",
        "batch.tokens=192 cannot be shared equally by parallel.tp=5 ranks",
    ]


def test_what_no_pipeline_can_be_is_said_at_once(tiny_config):
    from moltron.train.validate import validate

    problems = validate(tiny_config("/nowhere/run", "parallel.pp=3", "batch.packs=2"), world=3)
    assert problems == [
        "parallel.pp=3 makes 3 pipeline stages, the model has 2 blocks: lower it",
        "batch.packs=2 gives a pipeline 2, it needs at least parallel.pp=3: set batch.packs=3",
    ]
    assert validate(tiny_config("/nowhere/run", "parallel.pp=2", "batch.packs=7"), world=6) == [
        "batch.packs=7 cannot be shared equally by 3 processes: set batch.packs=6"
    ]
    keys = ("parallel.pp=2", "parallel.pp_schedule=interleaved", "parallel.pp_stages=1", "batch.packs=3")
    assert validate(tiny_config("/nowhere/run", *keys), world=2) == [
        "batch.packs=3 gives a pipeline 3, it needs a multiple of parallel.pp=2: set batch.packs=4"
    ]
