"""Three lines from a model to vectors; what cannot be embedded is said with its remedy."""

import subprocess
import sys

import numpy as np
import pytest

from moltron import load_model
from moltron.infer.windows import cut

SEQUENCES = ["MKTAYIAKQRQISFVKSHFSRQ", "GG", "ACDEFGHIKLMNPQRSTVWY" * 3]


@pytest.fixture(scope="module")
def model(model_folder):
    return load_model(model_folder, device="cpu")


def test_shapes_and_order(model):
    vectors = model.embed(SEQUENCES)
    assert vectors.shape == (3, 48) and vectors.dtype == np.float32
    hiddens, logits = model.hiddens(SEQUENCES), model.logits(SEQUENCES)
    for sequence, vector, hidden, logit in zip(SEQUENCES, vectors, hiddens, logits, strict=True):
        assert hidden.shape == (len(sequence), 48) and logit.shape == (len(sequence), 33)
        np.testing.assert_allclose(hidden.mean(0), vector, rtol=1e-4, atol=1e-5)
    assert np.array_equal(model.embed(SEQUENCES[::-1]), vectors[::-1])
    assert np.array_equal(model.embed(SEQUENCES, layer=2), vectors)
    assert not np.array_equal(model.embed(SEQUENCES, layer=0), vectors)
    assert model.embed([]).shape == (0, 48) and model.hiddens([]) == []


def test_contacts(model_folder):
    model = load_model(model_folder, device="cpu")
    with pytest.raises(ValueError, match="the contact head was not fitted"):  # as after any training
        model.contacts(SEQUENCES[0])
    model.module.contact_head.weight.data.normal_()
    contacts = model.contacts(SEQUENCES[0])
    assert contacts.shape == (22, 22)
    assert np.array_equal(contacts, model.contacts(SEQUENCES[0].lower()))
    np.testing.assert_allclose(contacts, contacts.T, atol=1e-6)


def test_odd_letters_follow_the_one_rule(model):
    assert np.array_equal(model.embed(["mk ta-J*"]), model.embed(["MKTAX"]))


def test_repr_says_what_it_is(model, model_folder):
    assert "esm2" in repr(model) and "2 layers" in repr(model) and model_folder in repr(model)


def test_long_sequences(model):
    long = "ACDEFGHIKLMNPQRSTVWY" * 10
    with pytest.raises(ValueError, match=r"sequence 1 has 200 residues, the limit is 64.*truncate.*window"):
        model.embed(["MK", long])
    assert np.array_equal(model.embed([long], long="truncate"), model.embed([long[:64]]))
    parts = cut(200, 64, 16)
    windows = model.hiddens([long[begin:end] for begin, end, _, _ in parts])
    expected = np.concatenate([h[a - begin : b - begin] for h, (begin, _, a, b) in zip(windows, parts, strict=True)])
    (stitched,) = model.hiddens([long], long="window", overlap=16)
    assert np.array_equal(stitched, expected)
    with_others = model.embed(["MK", long, "GG"], long="window", overlap=16)
    np.testing.assert_allclose(with_others[1], expected.mean(0), rtol=1e-4, atol=1e-5)
    assert np.array_equal(with_others[[0, 2]], model.embed(["MK", "GG"]))
    assert np.array_equal(model.embed([long], "max", long="window", overlap=16)[0], expected.max(0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.embed("MKT"), "list of sequences"),
        (lambda m: m.embed(["MKT", " "]), "sequence 1 is empty"),
        (lambda m: m.embed(["MKT", None]), "sequence 1 is None, a NoneType: give a str"),
        (lambda m: m.embed([b"MKT"]), "sequence 0 is b'MKT', a bytes: give a str"),
        (lambda m: m.embed(["MKT", "CC(=O)N"]), r"sequence 1 \(CC\(=O\)N\): 43% of the letters .* in a protein"),
        (lambda m: m.embed(["MKT"], "median"), "pooling='median'"),
        (lambda m: m.embed(["MKT"], layer=3), "layers: 3 is not one of 0 .* 2"),
        (lambda m: m.embed(["MKT"], long="drop"), "long='drop'"),
        (lambda m: m.hiddens(["MKT" * 30], long="window", overlap=64), "overlap=64"),
    ],
)
def test_what_cannot_be_done_is_said(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


@pytest.mark.parametrize(
    ("device", "message"),
    [("gpu", "device=gpu is unknown; there are: auto, cpu, cuda"), ("cpu:7", "is unknown"), ("cuda:99", "torch sees")],
)
def test_a_device_that_is_not_there_is_said(model_folder, device, message):
    with pytest.raises(ValueError, match=message):
        load_model(model_folder, device=device)


def test_importing_moltron_does_not_import_torch():
    code = "import sys, moltron; assert 'torch' not in sys.modules; assert moltron.__version__"
    subprocess.run([sys.executable, "-c", code], check=True)
