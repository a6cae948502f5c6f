"""Encoder–decoders through `moltron train` and `evaluate`: as ESM, they learn, resume bit for bit, and share ranks."""

import json

import numpy as np
import pytest
import torch

from moltron.config.compose import ConfigError, load_config
from moltron.config.schema import EvaluateConfig, TrainConfig
from moltron.data.store import Clusters, StoreWriter
from moltron.infer.evaluate import evaluate_file
from moltron.tokenizers import get_tokenizer
from moltron.train.loop import train

VARIANTS = 2
COMMON = (
    *("model.hidden_size=32", "model.num_layers=1", "model.num_decoder_layers=1", "model.num_heads=2"),
    *("model.ffn_size=64", "model.max_positions=48", "data.max_length=48", "batch.packs=4"),
    *("optim.lr=3e-3", "optim.schedule.warmup_steps=4", "optim.schedule.decay_steps=12", "train.device=cpu"),
    *("train.log_every=1", "train.eval_every=4", "checkpoint.every=4", "logging.tensorboard=false"),
)
FAMILIES = {
    "prott5": ("model.family=prott5", "objective.name=span_corruption", "batch.tokens=192", "batch.decoder_tokens=96"),
    "megamolbart": (
        *("model.family=megamolbart", "objective.name=denoising", "objective.decoder_smiles=canonical"),
        *("batch.tokens=128", "batch.decoder_tokens=160"),
    ),
}
SHARES = ("val_token_accuracy", "val_exact_accuracy", "val_invalid")
TRAIN = """
import json, sys
from moltron.config.compose import load_config
from moltron.config.schema import TrainConfig
from moltron.parallel import collectives
from moltron.train.loop import train
collectives.shutdown, shutdown = lambda *_: None, collectives.shutdown  # one group for all runs
for arguments in json.loads(sys.argv[1]):
    train(load_config(TrainConfig, arguments))
shutdown()
"""


@pytest.fixture(scope="session")
def molecules(tmp_path_factory):
    """60 + 9 made-up molecules of 1 + VARIANTS rows each."""
    folder, tokenizer = tmp_path_factory.mktemp("molecules"), get_tokenizer("megamolbart")
    generator = np.random.default_rng(0)
    for split, count in (("train", 60), ("val", 9)):
        size = count * (1 + VARIANTS)
        smiles = ["".join(generator.choice(["C", "N", "O", "Cl"], n)).encode() for n in generator.integers(4, 30, size)]
        with StoreWriter(folder / f"{split}.arrow", "molecule", tokens=True) as writer:
            ids = [f"{split}|{i // (1 + VARIANTS)}" for i in range(size)]
            writer.add(ids, [s.decode() for s in smiles], [tokenizer.codes(s) for s in smiles])
        Clusters.save_equal(folder / f"{split}.arrow", count, 1 + VARIANTS)
    return folder


@pytest.fixture(scope="session")
def command(tiny_store, molecules):
    stores = {"prott5": tiny_store, "megamolbart": molecules}
    return lambda family, run_dir, *more: [
        *(*COMMON, *FAMILIES[family], f"data.path={stores[family]}", f"run_dir={run_dir}"),
        *("train.max_steps=12", *more),
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, command):
    """The folder of a whole run of each family."""
    folder = tmp_path_factory.mktemp("runs")
    for family in FAMILIES:
        train(load_config(TrainConfig, command(family, folder / family)))
    return folder


@pytest.mark.parametrize("family", list(FAMILIES))
def test_it_learns_and_counts_both_streams(runs, read_lines, read_state, family):
    lines = read_lines(runs / family)
    assert lines[-1]["val_loss"] < lines[3]["val_loss"] < lines[0]["train_loss"]
    for key in ("tokens", "decoder_tokens"):
        counts = np.diff([0, *(line[key] for line in lines)])
        budget = 4 * int(next(k for k in FAMILIES[family] if k.startswith(f"batch.{key}=")).split("=")[1])
        assert (counts > 0).all() and (counts <= budget).all()
    assert read_state(runs / family)[1]["decoder_tokens"] == lines[-1]["decoder_tokens"]
    shares = [[line[key] for key in SHARES if key in line] for line in lines]
    counts = [3 if family == "megamolbart" and step % 4 == 0 else 0 for step in range(1, 13)]
    assert list(map(len, shares)) == counts and all(0 <= share <= 1 for found in shares for share in found)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_resumed_is_undisturbed_bit_for_bit(runs, command, read_lines, read_state, tmp_path, family):
    for steps in (5, 12):
        train(load_config(TrainConfig, command(family, tmp_path / "run", f"train.max_steps={steps}")))
    numbers = [{k: v for k, v in line.items() if not k.startswith("val_")} for line in read_lines(tmp_path / "run")]
    whole = [{k: v for k, v in line.items() if not k.startswith("val_")} for line in read_lines(runs / family)]
    assert numbers == whole
    (_, _, state), (_, _, expected) = (read_state(path) for path in (tmp_path / "run", runs / family))
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_evaluate_agrees_with_the_run(runs, read_lines, tiny_store, molecules, family):
    folder = {"prott5": tiny_store, "megamolbart": molecules}[family]
    objective = [f"{key}" for key in FAMILIES[family] if key.startswith("objective.")]
    keys = [f"model={runs / family}", f"input={folder / 'val.arrow'}", "device=cpu", *objective]
    result = evaluate_file(load_config(EvaluateConfig, keys))
    assert result["loss"] == pytest.approx(read_lines(runs / family)[-1]["val_loss"], rel=1e-5)
    assert result["sequences"] == {"prott5": 12, "megamolbart": 9}[family], "each molecule once"
    assert [result.get(key.removeprefix("val_")) for key in SHARES] == [
        read_lines(runs / family)[-1].get(key) for key in SHARES
    ]


def test_two_ranks_are_one_process(runs, ranks_of, command, read_lines, read_state, tmp_path):
    jobs = json.dumps([command(family, tmp_path / family) for family in FAMILIES])
    with ranks_of("-c", TRAIN, jobs):
        pass
    for family in FAMILIES:
        one, two = read_lines(runs / family), read_lines(tmp_path / family)
        assert len(one) == len(two) == 12
        for a, b in zip(one, two, strict=True):
            assert (a["tokens"], a["decoder_tokens"]) == (b["tokens"], b["decoder_tokens"])
            assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
            assert [a.get(key) for key in SHARES] == pytest.approx([b.get(key) for key in SHARES], abs=0.02)
        (_, meta, expected), (_, meta_two, state) = (read_state(home / family) for home in (runs, tmp_path))
        assert meta["position"] == meta_two["position"] and state.keys() == expected.keys()
        for name in expected:
            if name.startswith("model."):
                torch.testing.assert_close(state[name], expected[name], rtol=0, atol=5e-4)


def test_what_does_not_fit_is_said(command, tiny_store, tmp_path):
    keys = command("megamolbart", tmp_path / "run", "data.max_length=20")
    with pytest.raises(ValueError, match=r"\d+ of 180 records have more than 19 tokens .*max_length=19"):
        train(load_config(TrainConfig, keys))
    keys = command("megamolbart", tmp_path / "other", f"data.path={tiny_store}")
    with pytest.raises(ValueError, match="holds proteins, the model reads molecules"):
        train(load_config(TrainConfig, keys))
    wrong = ("data.decoder_max_length=64", "batch.decoder_tokens=32", "objective.density=2")
    with pytest.raises(ConfigError) as error:
        train(load_config(TrainConfig, command("prott5", tmp_path / "third", *wrong)))
    for part in ("data.decoder_max_length=64 > model.max_positions=48", "batch.decoder_tokens=32 <", "density=2"):
        assert part in str(error.value)
    keys = command("megamolbart", tmp_path / "fourth", "data.clusters=false")
    with pytest.raises(ValueError, match=r"decoder_smiles=canonical choose among .*: set data.clusters=true"):
        train(load_config(TrainConfig, keys))
