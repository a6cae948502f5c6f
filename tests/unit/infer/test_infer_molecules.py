"""`moltron generate`: the table, the report and the rejects, for molecules that are known beforehand."""

import csv
import json
import os
import signal
import sys

import numpy as np
import pytest

from moltron.checkpoint.weights import save_pretrained
from moltron.cli.main import main
from moltron.config.schema import EvaluateConfig, GenerateConfig
from moltron.data.prepare import molecules as prepare_molecules
from moltron.data.readers import Record, Reject
from moltron.data.store import Clusters, StoreWriter
from moltron.infer import chemistry, molecules
from moltron.infer.api import Model, load_model
from moltron.infer.evaluate import evaluate_file
from moltron.infer.generate import Hypothesis
from moltron.infer.sampling import METHODS, Sampling, interpolate
from moltron.models.registry import build_model, get_spec
from moltron.tokenizers import get_tokenizer

SIZES = dict(hidden_size=32, num_layers=1, num_decoder_layers=2, num_heads=2, ffn_size=32, max_positions=24)
SEEDS = ["CCO", "c1ccccc1", "CC(=O)O"]
TOKENIZER = get_tokenizer("megamolbart")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = build_model("megamolbart", SIZES, "cpu")
    model.init_weights(3)
    return str(save_pretrained(model, get_spec("megamolbart"), model.config, tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture
def run(folder, tmp_path, monkeypatch):
    """Generates with decoders that say what they are told to."""

    def run(answers, records=SEEDS, **settings):
        (tmp_path / "in.csv").write_text("id,smiles\n" + "".join(f"m{i},{s}\n" for i, s in enumerate(records)))
        said = iter(answers or [])

        def explore(self, hiddens, sampling, numbers):
            each = 1 if settings.get("method") == "interpolate" else sampling.copies * sampling.kept
            texts = [[next(said) for _ in range(each)] for _ in hiddens]
            return [[Hypothesis(TOKENIZER.encode(t), -1.5, True) for t in some] for some in texts]

        if answers is not None:
            monkeypatch.setattr(Model, "explore", explore)
        config = GenerateConfig(folder, str(tmp_path / "in.csv"), str(tmp_path / "out.csv"), **settings)
        report = molecules.generate(config)
        with open(tmp_path / "out.csv", newline="") as file:
            return report, list(csv.DictReader(file))

    return run


def test_the_report_counts_what_the_table_shows(run, tmp_path):
    answers = ["OCC", "CCN", "CCN", "C1CC", "c1ccccc1C", "Cc1ccccc1", "CC(C", "CC(=O)OC", "CCOC(C)=O"]
    report, rows = run(answers, num_samples=3)
    assert [row["id"] for row in rows] == [f"m{i}" for i in (0, 1, 2) for _ in range(3)]
    assert [row["smiles"] for row in rows][:4] == ["CCO", "CCN", "CCN", "C1CC"]
    assert [row["valid"] for row in rows] == list("111011011")
    assert [row["novel"] for row in rows] == list("011011011"), "the seed itself is not novel"
    assert report["seeds"] == 3 and report["generated"] == 9
    assert report["validity"] == 7 / 9
    assert report["uniqueness"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert report["novelty"] == 6 / 7
    assert report["nuv"] == 4 / 9  # CCN, toluene, two esters
    assert rows[0]["similarity"] == "1.000" and 0 < float(rows[1]["similarity"]) < 1
    assert rows[3]["qed"] == rows[3]["similarity"] == "" and rows[0]["log_probability"] == "-1.5000"
    valid = [row for row in rows if row["valid"] == "1"]
    assert report["qed"] == pytest.approx(np.mean([float(row["qed"]) for row in valid]), abs=1e-3)
    assert json.loads((tmp_path / "out.json").read_text()) == report
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG") and report["rejected"] == 0
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("*.tsv"))


def test_between_neighbours(run):
    report, rows = run(["CC", "CCC", "CCCC", "CN"], method="interpolate", num_samples=2)
    assert [row["id"] for row in rows] == ["m0 > m1"] * 2 + ["m1 > m2"] * 2
    assert rows[0]["input"] == "CCO>c1ccccc1" and report["seeds"] == 2


def test_bad_records_are_listed_and_do_not_shift_the_rest(run, tmp_path):
    records = ["CCO", "C1CC", "C" * 25, "CN"]
    report, rows = run(["CC", "CC"], records=records, num_samples=1)
    assert [row["id"] for row in rows] == ["m0", "m3"] and report["rejected"] == 2
    lines = (tmp_path / "out.csv.rejects.tsv").read_text().splitlines()
    assert lines[0] == "source\tline\tid\treason"
    assert lines[1].endswith("3\tm1\tRDKit cannot read this SMILES")
    assert lines[2].endswith("4\tm2\t25 tokens, the model reads 24")


def test_embed_and_generate_reject_the_same_molecules(folder, tmp_path):
    """And go on: those with a few unknown tokens are used, as in training."""
    records = ["CCO", "C1CC(", "hello", "CCO>>CC=O", "CCCCC pentane", "C C", "CCé", "[13CH4]", "[H][H]", "*CC*", " CN "]
    (tmp_path / "in.csv").write_text(
        "id,smiles\n" + "".join(f"m{i},{s}\n" for i, s in enumerate(["C" * 23] * 9 + records))
    )
    keys = [f"model={folder}", f"input={tmp_path / 'in.csv'}", "device=cpu"]
    assert main(["embed", *keys, f"output={tmp_path / 'out.npz'}"]) == 3
    assert main(["generate", *keys, f"output={tmp_path / 'out.csv'}", "num_samples=1", "max_tokens=3"]) == 3
    assert np.load(tmp_path / "out.npz")["ids"].tolist() == [f"m{i}" for i in (*range(10), 18, 19)]
    with open(tmp_path / "out.csv", newline="") as file:
        assert [row["id"] for row in csv.DictReader(file)] == [f"m{i}" for i in (*range(10), 18, 19)]
    rejects = (tmp_path / "out.csv.rejects.tsv").read_text()
    assert (tmp_path / "out.npz.rejects.tsv").read_text() == rejects
    rows = list(csv.DictReader(rejects.splitlines(), delimiter="\t"))
    assert [(row["id"], int(row["line"])) for row in rows] == [(f"m{i}", i + 2) for i in range(10, 18)]
    unread, space, tokens = "RDKit cannot read", "white space inside", "none of its tokens is in the vocabulary"
    reasons = [unread] * 3 + [space] * 2 + ["a SMILES is ASCII"] + [tokens] * 2
    assert all(row["reason"].startswith(reason) for row, reason in zip(rows, reasons, strict=True))


def test_a_failure_inside_rdkit_is_a_molecule_that_it_cannot_read(monkeypatch):
    def fail(smiles):
        raise RuntimeError("Pre-condition Violation")

    monkeypatch.setattr(chemistry.rdkit(), "MolFromSmiles", fail)
    assert prepare_molecules.problem(b"CCO") == "RDKit cannot read this SMILES"


def test_no_valid_molecule_has_no_mean_and_the_radius_that_was_used_is_said(run):
    report, _ = run(["C1CC"] * 3, num_samples=1)
    assert report["qed"] is None and report["similarity"] is None and report["validity"] == 0
    assert report["scaled_radius"] == 1.0
    assert run(["CC", "CN"], method="interpolate", num_samples=1, overwrite=True)[0]["scaled_radius"] == 0.0


def test_ctrl_c_is_not_the_workers_affair():
    smiles = ["OCC"] * chemistry.FEW
    with chemistry.Judges() as judges:
        assert list(judges.each(chemistry.canonical, smiles)) == ["CCO"] * len(smiles)
        workers = list(judges.workers._processes)
        for worker in workers:
            os.kill(worker, signal.SIGINT)
        records = [Record("a", b"OCC", "in.smi", 1)] * chemistry.FEW
        checked = list(judges.check(iter([*records, Record("b", b"C1CC", "in.smi", 2)])))
        assert checked == [*records, Reject("in.smi", 2, "b", "RDKit cannot read this SMILES")]
        assert list(judges.workers._processes) == workers


def test_a_command_that_was_stopped_goes_on(run, tmp_path, monkeypatch):
    """Killed in the third chunk, with half a line written after the second: the same files as in one go."""
    monkeypatch.setattr(molecules, "CHUNK", 2)
    records, answers = ["CCO", "C1CC", "CN", "CCC", "C1", "CCCC", "CO"], ["CC", "C1CC", "CCN", "CN", "OC"]
    names = ("out.csv", "out.json", "out.csv.rejects.tsv")

    def files():
        return [(tmp_path / name).read_text() for name in names]

    run(answers, records, num_samples=1)
    expected = files()
    for name in (*names, "out.png"):
        (tmp_path / name).unlink()
    with pytest.raises(RuntimeError):  # StopIteration in a generator: there is no fifth answer
        run(answers[:4], records, num_samples=1)
    assert not (tmp_path / "out.csv").exists()
    with open(tmp_path / "out.csv.partial", "a") as file:
        file.write("m5,CCCC,")
    report, rows = run(answers[4:], records, num_samples=1)
    assert files() == expected and len(rows) == 5 == report["generated"]
    assert {path.name for path in tmp_path.iterdir()} == {"in.csv", "out.png", *names}


def test_what_was_begun_is_not_mixed_with_something_else(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(molecules, "CHUNK", 1)
    with pytest.raises(RuntimeError):
        run(["CC"], num_samples=1)
    with pytest.raises(ValueError, match=r"out.csv.partial has another input or reference: delete .*json"):
        run(["CC"], ["CCN", *SEEDS], num_samples=1)
    (tmp_path / "out.csv.partial").write_text("")
    with pytest.raises(ValueError, match="shorter than"):
        run(["CC"], num_samples=1)
    report, _ = run(["CC", "CN", "CO"], num_samples=1, seed=7)
    assert "begun with other settings" in capsys.readouterr().err and report["generated"] == 3


def test_what_was_begun_with_other_weights_starts_anew(run, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(molecules, "CHUNK", 1)
    with pytest.raises(RuntimeError):
        run(["CC"], num_samples=1)
    monkeypatch.setattr(molecules, "weights_hash", lambda module: "those of a later step")
    report, _ = run(["CC", "CN", "CO"], num_samples=1)
    assert "begun with other settings" in capsys.readouterr().err and report["generated"] == 3
    assert report["weights"] == "those of a later step"


def test_a_reference_that_changed_is_noticed(run, tmp_path, monkeypatch):
    monkeypatch.setattr(molecules, "CHUNK", 1)
    (tmp_path / "known.smi").write_text("CC\n")
    with pytest.raises(RuntimeError):
        run(["CC"], num_samples=1, reference=str(tmp_path / "known.smi"))
    (tmp_path / "known.smi").write_text("CCC\n")
    with pytest.raises(ValueError, match="another input or reference"):
        run(["CC"], num_samples=1, reference=str(tmp_path / "known.smi"))


@pytest.mark.parametrize("name", ["out.csv", "out.json", "out.png"])
def test_no_file_of_others_is_written_over(run, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"{name} exists: choose another output= or set overwrite=true"):
        run(["CC"] * 3, num_samples=1)
    assert (tmp_path / name).read_text() == "mine"
    run(["CC"] * 3, num_samples=1, overwrite=True)


def test_the_input_is_not_written_over(run, tmp_path):
    config = GenerateConfig("none", str(tmp_path / "in.csv"), f"{tmp_path}/../{tmp_path.name}/in.csv", overwrite=True)
    with pytest.raises(ValueError, match=r"in\.csv is what is read"):
        molecules.generate(config)


def test_what_was_cut_off_is_no_molecule_and_log_probability_has_no_penalty(run, folder):
    keys = dict(num_samples=2, method="topkp-perturbate", max_tokens=2, overwrite=True)
    report, rows = run(None, **keys)
    assert report["validity"] == 0 and all(row["valid"] == "0" and row["smiles"] for row in rows)
    _, punished = run(None, **keys, length_penalty=2.0)
    assert [row["log_probability"] for row in punished] == [row["log_probability"] for row in rows]


def test_novelty_against_a_reference(run, tmp_path):
    (tmp_path / "known.smi").write_text("OCCN first\nC1CC broken\n")
    report, _ = run(["NCCO", "CCN"] * 3, num_samples=2, reference=str(tmp_path / "known.smi"))
    assert report["novelty"] == 1 / 2
    with StoreWriter(
        tmp_path / "train.arrow", "molecule", tokens=True
    ) as writer:  # a molecule: canonical, then another
        smiles = ["CCN", "NCC", "CCCl", "ClCC"]
        writer.add(list("aabb"), smiles, [TOKENIZER.codes(s.encode()) for s in smiles])
    Clusters(np.array([0, 2]), np.array([2, 2]), np.arange(4)).save(tmp_path / "train.arrow")
    report, _ = run(["CCCl", "CCBr"] * 3, num_samples=2, reference=str(tmp_path / "train.arrow"), overwrite=True)
    assert report["novelty"] == 1 / 2


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_as_many_as_it_says(run, method):
    report, rows = run(None, method=method, num_samples=2, beam_size=3, scaled_radius=0.3, max_tokens=6)
    each = 2 * 3 if method == "beam-search-perturbate-sample" else 2
    assert report["generated"] == len(rows) == each * len(SEEDS)


def test_what_is_made_does_not_depend_on_the_rest_of_the_file(folder):
    model, sampling = load_model(folder), Sampling("topkp-perturbate", num_samples=3, max_tokens=8, seed=5)
    hiddens = model.hiddens(SEEDS)
    ids = lambda found: [h.ids.tolist() for h in found]  # noqa: E731
    together = model.explore(hiddens, sampling)
    alone = model.explore(hiddens[1:2], sampling, np.array([1]))
    assert ids(together[1]) == ids(alone[0]) and ids(together[0]) != ids(together[1])


def test_in_python(folder):
    model = load_model(folder)
    hiddens = model.hiddens(SEEDS)
    assert [h.shape for h in hiddens] == [(3, 32), (8, 32), (7, 32)]
    decoded = model.decode(hiddens, beams=2, max_tokens=5)
    padded, mask = np.zeros((3, 8, 32), np.float32), np.zeros((3, 8), bool)
    for row, kept, h in zip(padded, mask, hiddens, strict=True):
        row[: len(h)], kept[: len(h)] = h, True
    assert model.decode(padded, mask, beams=2, max_tokens=5) == decoded and len(decoded) == 3
    samples = model.sample(SEEDS, num_samples=4, max_tokens=5)
    assert [len(some) for some in samples] == [4, 4, 4]
    assert len(model.interpolate("CCO", "CCN", 6, max_tokens=5)) == 6


def test_interpolation_is_linear_and_the_longer_one_keeps_its_end():
    short, long = np.zeros((2, 3), np.float32), np.ones((4, 3), np.float32)
    there = interpolate(short, long, 3)
    assert [point[0, 0] for point in there] == [0.25, 0.5, 0.75]
    assert all((point[2:] == 1).all() and point.shape == (4, 3) for point in there)
    back = interpolate(long, short, 3)
    assert [point[0, 0] for point in back] == [0.75, 0.5, 0.25] and (back[0][2:] == 1).all()
    (middle,) = interpolate(np.zeros((1, 1), np.float32), np.ones((1, 1), np.float32), 1)
    assert middle == 0.5


def test_what_cannot_work_is_said(run, folder, model_folder, tmp_path):
    with pytest.raises(ValueError, match=r"method=x is unknown; there are: interpolate, greedy"):
        run([], method="x")
    with pytest.raises(ValueError, match="num_samples=0"):
        run([], num_samples=0)
    run(["CC"] * 3, num_samples=1)
    with pytest.raises(ValueError, match="exists"):
        run(["CC"] * 3, num_samples=1)
    with pytest.raises(ValueError, match=r"the name must end in \.csv"):
        molecules.generate(GenerateConfig(folder, "in.csv", "out.txt"))
    with pytest.raises(ValueError, match=r"is of proteins: `generate` makes molecules"):
        molecules.generate(GenerateConfig(model_folder, str(tmp_path / "in.csv"), str(tmp_path / "protein.csv")))
    with pytest.raises(ValueError, match="has no decoder"):
        load_model(model_folder).decode([np.zeros((3, 48), np.float32)])
    with pytest.raises(ValueError, match="puts no token before a sequence"):
        load_model(folder).embed(["CCO"], "cls")
    for sequence in ("not a smiles", "MKTAYIAKQRQISFVKSHFSRQ"):
        with pytest.raises(ValueError, match=rf"sequence 1 \({sequence}\): \d\d% of the letters .* in a molecule"):
            load_model(folder).embed(["CCO", sequence])
    with pytest.raises(ValueError, match=r"hidden states 1 have shape \(3, 7\), the model's are \(tokens, 32\)"):
        load_model(folder).decode([np.zeros((2, 32), np.float32), np.zeros((3, 7), np.float32)])
    (tmp_path / "long.smi").write_text(f"CCO\n{'C' * 30} long\n")
    with pytest.raises(
        ValueError, match="record 'long' has 30 tokens, the model reads 23, and molecules are not cropped"
    ):
        evaluate_file(EvaluateConfig(folder, str(tmp_path / "long.smi"), device="cpu"))
    (tmp_path / "broken.smi").write_text("CCO\nC1CC(C=O ring\n")
    with pytest.raises(ValueError, match="line 2, record 'ring': RDKit cannot read this SMILES"):
        evaluate_file(EvaluateConfig(folder, str(tmp_path / "broken.smi"), device="cpu"))
    for device in ("gpu", "cuda:99"):
        with pytest.raises(ValueError, match=f"device={device}"):
            run([], device=device, overwrite=True)
    with pytest.raises(ValueError, match="has not two molecules"):
        run([], records=["CCO"], method="interpolate", overwrite=True)


def test_without_libraries_to_draw_there_is_no_picture_but_a_word(tmp_path, monkeypatch, caplog):
    """As in a slim container: `from rdkit.Chem import Draw` fails on libXrender.so.1."""
    pytest.importorskip("rdkit", reason="RDKit is not installed")
    monkeypatch.delitem(sys.modules, "rdkit.Chem.Draw", raising=False)
    monkeypatch.delattr("rdkit.Chem.Draw", raising=False)
    monkeypatch.setitem(sys.modules, "rdkit.Chem.Draw", None)
    assert chemistry.canonical("OCC") == "CCO"
    with caplog.at_level("WARNING", logger="moltron"):
        chemistry.draw_grid(tmp_path / "grid.png", [("CCO", [])])
    assert "no picture" in caplog.text and not (tmp_path / "grid.png").exists()
