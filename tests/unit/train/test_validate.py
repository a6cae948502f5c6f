"""The configuration is judged as a whole, with numbers and the fix; what defines a run is told from what does not."""

import dataclasses

import pytest
import torch
from torch.torch_version import TorchVersion

from moltron.config.compose import schema_fields
from moltron.config.schema import TrainConfig
from moltron.train.validate import FREE, MAY_BE_0, _flatten, differences, validate

MODEL = {"family": "esm2", "hidden_size": 32, "num_layers": 1, "num_heads": 2, "ffn_size": 64}


@pytest.fixture
def config(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "train.arrow").touch()
    result = TrainConfig(run_dir=str(tmp_path / "run"), model=dict(MODEL))
    result.data.path = str(tmp_path / "store")
    return result


def test_the_defaults_are_valid(config):
    assert validate(config, world=1) == []
    assert validate(config, world=8) == []


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        ("batch", "packs", 3, "batch.packs=3 leaves 1 of 4 processes idle: set batch.packs=4"),
        ("batch", "tokens", 512, "batch.tokens=512 < data.max_length=1024: raise batch.tokens or lower"),
        ("data", "max_length", 2, "leaves no residue beside 2 special tokens"),
        ("data", "path", "/nowhere", "data.path=/nowhere has no train.arrow: give a folder that `moltron prepare`"),
        ("train", "max_steps", 0, "train.max_steps=0 must be greater than 0"),
        ("train", "eval_packs", 0, "train.eval_packs=0 must be greater than 0"),
        ("train", "precision", "fp4", "train.precision=fp4 is unknown: choose one of auto, fp32, bf16, fp16, fp8"),
        ("train", "fp8_recipe", "row", "train.fp8_recipe=row is unknown: choose one of tensorwise, rowwise"),
        ("train", "nonfinite", "go", "train.nonfinite=go is unknown"),
        ("optim", "name", "adam", "optim.name=adam is unknown: choose one of adamw, muon"),
        ("optim", "state", "int8", "optim.state=int8 is unknown: choose one of fp32, fp8"),
        ("optim", "lr", float("nan"), "optim.lr=nan must be greater than 0"),
        ("optim", "betas", (0.9, 1.0), "optim.betas[1]=1.0 must be in [0, 1)"),
        ("optim", "betas", (0.9,), "optim.betas=(0.9,) must be two numbers"),
        ("optim", "weight_decay", -1, "optim.weight_decay=-1 must not be negative"),
        ("objective", "name", "causal", "objective.name=causal does not suit esm2: choose masked_lm"),
        ("logging", "wandb", "yes", "logging.wandb=yes is unknown"),
    ],
)
def test_one_problem(config, section, key, value, words):
    setattr(getattr(config, section), key, value)
    assert [words in problem for problem in validate(config, world=4)] == [True]


def test_model_problems(config):
    config.model = {}
    missing = ["model is missing: choose a preset with --config-name, or model=esm2_8M, or init=WHAT"]
    assert validate(config, 1) == missing
    config.model = {"num_layers": 3, "num_heads": 2}
    assert validate(config, 1) == missing
    config.init = "hf"
    assert validate(config, 1) == [
        "init=hf brings its model, which cannot be changed: leave out model.num_layers, model.num_heads"
    ]
    config.model = {**MODEL, "num_heads": 3, "depth": 4}
    assert len(validate(config, 1)) == 2
    config.model = {**MODEL, "family": "esm1"}
    config.data.max_length = 2000
    (problem,) = validate(config, 1)
    assert "data.max_length=2000 > model.max_positions=" in problem
    config.model = dict(MODEL)  # rotary positions have no end
    assert validate(config, 1) == []


@pytest.mark.parametrize("axis", ["pp", "tp", "cp"])
def test_what_is_cut_does_not_decode(config, axis):
    config.model = {**MODEL, "family": "megamolbart", "num_layers": 2, "num_decoder_layers": 2}
    config.objective.name, config.data.max_length = "denoising", 64
    setattr(config.parallel, axis, 2)
    assert validate(config, world=2) == [f"parallel.{axis}=2: decoding is not cut: set train.eval_molecules=0"]
    setattr(config.parallel, axis, 1)
    assert validate(config, world=2) == []


def test_no_axis_cuts_a_block_of_fp8_moments(config):
    config.model, config.optim.state, config.parallel.tp = {**MODEL, "hidden_size": 128, "ffn_size": 192}, "fp8", 2
    assert validate(config, world=2) == [
        "optim.state=fp8: model.ffn_size / 64=3 cannot be shared equally by parallel.tp=2 ranks"
    ]
    config.model |= {"hidden_size": 320, "ffn_size": 256}
    assert validate(config, world=2) == [
        "optim.state=fp8: attention's width / 64=5 cannot be shared equally by parallel.tp=2 ranks"
    ]
    config.model |= {"hidden_size": 200, "ffn_size": 64 * 5 - 2}  # in fp32 then
    assert validate(config, world=2) == []
    config.model |= {"hidden_size": 320, "ffn_size": 320}
    config.optim.name = "muon"  # it has these matrices
    assert validate(config, world=2) == []


def test_what_fp8_asks_for_is_said_at_once(config):
    config.model, config.train.precision = dict(MODEL, hidden_size=24, num_layers=2), "fp8"
    config.batch.tokens = 1032
    problems = validate(config, world=1)
    assert [p.split(" ")[0] for p in problems] == ["batch.tokens=1032", "model.hidden_size=24", "model.num_layers=2:"]
    config.model, config.batch.tokens = dict(MODEL, num_layers=3), 1024
    assert validate(config, world=1) == []
    config.parallel.tp, config.model["ffn_size"] = 2, 48
    needs = "/ 2 ranks is not a multiple of 16, as train.precision=fp8 needs"
    assert validate(config, world=2) == [f"model.ffn_size=48 {needs}"]
    config.model["ffn_size"] = 64
    assert validate(config, world=2) == []


@pytest.mark.parametrize("schedule", ["zero_bubble", "zbv"])
def test_what_no_split_backward_can_have(config, schedule, monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.13.0"))
    config.parallel.pp, config.parallel.pp_schedule, config.parallel.pp_stages = 2, schedule, 1
    config.model = {**MODEL, "num_layers": 4}
    assert validate(config, world=2) == []
    config.train.compile, config.parallel.reshard_after_forward, config.parallel.recompute = True, True, "full"
    unfit = "train.compile=true, parallel.reshard_after_forward=true, parallel.recompute=full"
    said = f"parallel.pp_schedule={schedule} is not for"
    assert validate(config, world=2) == [f"{said} {unfit}: use 1f1b or interleaved"]
    config.train.compile, config.parallel.reshard_after_forward, config.parallel.recompute = False, False, "none"
    config.model = {**config.model, "family": "prott5", "architecture": "t5", "num_decoder_layers": 4}
    config.objective.name = "span_corruption"
    assert validate(config, world=2) == [f"{said} relative positions: use 1f1b or interleaved"]


def test_zbv_wants_a_torch_whose_ranks_do_not_send_to_themselves(config, monkeypatch):
    config.parallel.pp, config.parallel.pp_schedule, config.model = 2, "zbv", {**MODEL, "num_layers": 4}
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0+cu130"))
    said = "parallel.pp_schedule=zbv is not for torch 2.11.0+cu130, but for 2.13: use 1f1b or interleaved"
    assert validate(config, world=2) == [said]
    config.parallel.pp_schedule, config.parallel.pp_stages = "zero_bubble", 1
    assert validate(config, world=2) == []


NUMBERS = {  # keys of plain numbers, and their values
    key: default
    for key, default in _flatten(dataclasses.asdict(TrainConfig())).items()
    if isinstance(default, int | float) and not isinstance(default, bool)
    if not key.startswith("objective.") and key != "train.seed"
}


@pytest.mark.parametrize("key", sorted(NUMBERS))
def test_every_number_has_a_least(config, key):
    """Any seed will do; objectives have rules of their own."""
    *sections, last = key.split(".")
    parent = config
    for section in sections:
        parent = getattr(parent, section)
    setattr(parent, last, -1)
    assert any(key in problem for problem in validate(config, world=1))
    setattr(parent, last, 0)
    assert any(key in problem for problem in validate(config, world=1)) != (key in (*MAY_BE_0, "optim.muon_momentum"))


def test_the_least_are_rules_of_keys_that_there_are():
    assert len(NUMBERS) > 20 and {*MAY_BE_0} <= {*NUMBERS}


def test_moments_in_fp8_are_not_cut_within_a_block(config):
    config.optim.state, config.parallel.tp, config.data.max_length = "fp8", 2, 64
    config.model = {**MODEL, "hidden_size": 64, "ffn_size": 192}
    asked = "cannot be shared equally by parallel.tp=2 ranks"
    assert validate(config, world=2) == [
        f"optim.state=fp8: attention's width / 64=1 {asked}",
        f"optim.state=fp8: model.ffn_size / 64=3 {asked}",
    ]
    table = dict(architecture="t5", num_heads=64, head_dim=16, relative_buckets=64, num_decoder_layers=1)
    config.model = {**MODEL, **table, "family": "prott5", "hidden_size": 64, "tokenizer": "prott5"}
    config.objective.name, config.optim.name = "span_corruption", "muon"
    assert validate(config, world=2) == [f"optim.state=fp8: model.num_heads / 64=1 {asked}"]


def test_noam_needs_a_warm_up(config):
    config.optim.schedule.name, config.optim.schedule.warmup_steps = "noam", 0
    (problem,) = validate(config, 1)
    assert "warmup_steps > 0" in problem


def test_every_key_is_either_free_or_defines_the_run(config):
    """Change each key in turn; only what FREE names may go unnoticed."""
    keys = [key for key, _ in schema_fields(TrainConfig)]
    assert len(keys) > 40
    for key in keys:
        other = TrainConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(TrainConfig)})
        *sections, last = key.split(".")
        parent = other
        for section in sections:
            copy = dataclasses.replace(getattr(parent, section))
            setattr(parent, section, copy)
            parent = copy
        setattr(parent, last, {"changed": 1} if key == "model" else "changed")
        assert bool(differences(config, other)) == (not key.startswith(FREE)), key


def test_tuples_from_yaml_are_no_difference(config):
    other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, betas=[0.9, 0.98]))
    assert differences(config, other) == []
