"""Loss of a file: masks are a function of (seed 0, index), whatever the packs; as torch's cross-entropy says."""

import json
import math

import numpy as np
import pytest
import torch

from moltron import load_model
from moltron.cli.main import main
from moltron.config.schema import EmbedConfig, EvaluateConfig, ObjectiveConfig, PrepareConfig
from moltron.data.prepare import prepare
from moltron.data.store import Store, StoreWriter
from moltron.infer.bulk import embed
from moltron.infer.evaluate import Evaluator, evaluate_file
from moltron.models.batch import PackedBatch
from moltron.objectives import Limits, get_objective

RESIDUES = np.array(list("ACDEFGHIKLMNPQRSTVWY"))


@pytest.fixture
def records():
    rng = np.random.default_rng(0)
    return [(f"P{i}", "".join(rng.choice(RESIDUES, rng.integers(1, 90)))) for i in range(40)]


def test_loss_is_that_of_each_sequence_alone(model_folder, fasta, records):
    model = load_model(model_folder, "cpu")
    objective = get_objective(ObjectiveConfig(), model.tokenizer, 0)
    total, targets = 0.0, 0
    short = [(record_id, sequence[:64]) for record_id, sequence in records]
    for index, (_, sequence) in enumerate(short):
        ids = model.tokenizer.encode(sequence)
        batch = PackedBatch.pack(
            ids, np.array([len(ids)]), tokens=128, pad_id=1, max_length=66, records=np.array([index])
        )
        batch = objective.corrupt(batch, 0)
        chosen = batch.targets >= 0
        logits = model.module(batch).logits[chosen]
        total += torch.nn.functional.cross_entropy(logits, batch.targets[chosen], reduction="sum").item()
        targets += int(chosen.sum())
    result = evaluate_file(EvaluateConfig(model=model_folder, input=fasta(short), device="cpu"))
    assert result["targets"] == targets and result["sequences"] == 40
    assert result["loss"] == pytest.approx(total / targets, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))


def test_packs_do_not_matter_and_long_records_are_cropped(model_folder, fasta, records):
    source = fasta(records)
    results = [
        evaluate_file(EvaluateConfig(model=model_folder, input=source, device="cpu", tokens=tokens))
        for tokens in (64, 128, 4096)
    ]
    for result in results[1:]:
        assert result["targets"] == results[0]["targets"]
        assert result["loss"] == pytest.approx(results[0]["loss"], rel=1e-6)


def test_a_prepared_split_and_its_fasta_agree(model_folder, fasta, records, tmp_path, capsys):
    source = fasta(records)
    prepare(PrepareConfig(input=source, output=str(tmp_path / "data"), duplicates="keep"))
    arguments = ["evaluate", f"model={model_folder}", "device=cpu"]
    assert main([*arguments, f"input={tmp_path / 'data' / 'train.arrow'}"]) == 0
    prepared = json.loads(capsys.readouterr().out)
    assert main([*arguments, f"input={source}"]) == 0
    assert set(prepared) == {"loss", "perplexity", "targets", "sequences"}
    assert json.loads(capsys.readouterr().out) == pytest.approx(prepared, rel=1e-6)


def test_the_index_of_a_read_only_folder_goes_where_one_says(model_folder, tmp_path, records, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    with StoreWriter(tmp_path / "data" / "val.arrow") as writer:
        writer.add(*zip(*records, strict=True))
    build = Store._build_index

    def refuse(self, files, base):
        if files[0].parent == tmp_path / "data":
            raise PermissionError(13, "Permission denied")
        build(self, files, base)

    monkeypatch.setattr(Store, "_build_index", refuse)
    arguments = ["evaluate", f"model={model_folder}", "device=cpu", f"input={tmp_path / 'data' / 'val.arrow'}"]
    assert main(arguments) == 1
    assert "cache_dir of `moltron evaluate`" in capsys.readouterr().err
    assert main([*arguments, f"cache_dir={tmp_path / 'cache'}"]) == 0
    assert json.loads(capsys.readouterr().out)["sequences"] == 40 and list((tmp_path / "cache").glob("val.*.npy"))


def test_a_broken_record_is_an_error_with_its_line(model_folder, fasta):
    with pytest.raises(ValueError, match=r"line 3, record 'b'"):
        evaluate_file(EvaluateConfig(model=model_folder, input=fasta([("a", "MKT"), ("b", "---")]), device="cpu"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (dict(device="cpu:7", tokens=-5), "device=cpu:7 is unknown.*; tokens=-5 must be at least 1"),
        (dict(molecules=-1), "molecules=-1 must not be negative"),
        (dict(objective=ObjectiveConfig(name="denoising")), "objective.name=denoising does not suit esm2: .*masked_lm"),
    ],
)
def test_settings_that_cannot_work(model_folder, fasta, keys, message):
    with pytest.raises(ValueError, match=message):
        evaluate_file(EvaluateConfig(model_folder, fasta([("a", "MKT")]), **keys))


def test_the_evaluator_leaves_the_model_as_it_was_and_reads_as_many_packs_as_it_may(model_folder, tmp_path, records):
    with StoreWriter(tmp_path / "val.arrow") as writer:
        writer.add(*zip(*records, strict=True))
    model = load_model(model_folder, "cpu")
    model.module.train()
    arguments = (Store.open(tmp_path / "val.arrow"), model.tokenizer, ObjectiveConfig(), torch.device("cpu"))
    targets = []
    for packs in (0, 1, 2, None):
        evaluator = Evaluator(*arguments, tokens=(256,), limits=Limits(66), packs=packs)
        loss_sum, count = evaluator.sums(model.module)
        assert model.module.training
        assert evaluator.loss(model.module) == (loss_sum / count if count else pytest.approx(math.nan, nan_ok=True))
        targets.append(count)
    assert targets[0] == 0 < targets[1] < targets[2] < targets[3]


def test_molecules_are_refused_by_a_model_of_proteins(model_folder, tmp_path):
    (tmp_path / "in.smi").write_text("CCO ethanol\n")
    with pytest.raises(ValueError, match=r"in\.smi holds molecules, proteins are wanted"):
        evaluate_file(EvaluateConfig(model_folder, str(tmp_path / "in.smi")))
    with pytest.raises(ValueError, match=r"in\.smi holds molecules"):
        embed(EmbedConfig(model_folder, str(tmp_path / "in.smi"), str(tmp_path / "out.npz")))
    with StoreWriter(tmp_path / "val.arrow", "molecule", tokens=True) as writer:
        writer.add(["a"], ["CCO"], [b"\x01\x01\x0e"])
    with pytest.raises(ValueError, match=r"val\.arrow holds molecules, the model reads proteins"):
        evaluate_file(EvaluateConfig(model_folder, str(tmp_path / "val.arrow")))
