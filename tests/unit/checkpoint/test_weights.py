"""Weights in and out: the same numbers in `transformers`, fair-esm and here; everything else refused by name."""

import argparse
import json
import logging
import resource

import esm
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, EsmConfig, EsmForMaskedLM, EsmModel

from moltron.checkpoint import weights as weights_module
from moltron.checkpoint.manager import CheckpointManager
from moltron.checkpoint.weights import convert, load_pretrained, resolve, save_pretrained
from moltron.config.schema import ConvertConfig
from moltron.layers.positions import rotary_frequencies
from moltron.models.batch import PackedBatch
from moltron.models.contacts import predict_contacts
from moltron.models.encoder import MissingHead
from moltron.models.esm2.convert import with_rotary_dtype
from moltron.models.registry import FAMILIES, build_model, make_config
from moltron.tokenizers import get_tokenizer

SEQUENCE = "MKTAYIAKQRQISFVKSHFSRQ"
ESM2 = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "ffn_size": 128, "max_positions": 64}
ESM1B = ESM2 | {
    "vocab_size": 33,
    "gelu": "none",
    "token_dropout": True,
    "embed_norm": True,
    "contact_head": True,
    "mask_id": 32,
    "tokenizer": "esm2",
}
ESM1NV = {k: v for k, v in ESM2.items() if k != "max_positions"} | {"max_positions": 48}
MODELS = {"esm2": ("esm2", ESM2), "esm1b": ("esm1", ESM1B), "esm1nv": ("esm1", ESM1NV)}


def scramble(model):
    """Random numbers everywhere, so that swapped or forgotten tensors show."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model


def make(name, **changes):
    family, architecture = MODELS[name]
    config = make_config(family, architecture | changes)
    model = scramble(build_model(family, architecture | changes, "cpu"))
    model.embed.weight.data[config.vocab_size :] = 0
    model.head.bias.data[config.vocab_size :] = 0
    return model, FAMILIES[family], config


def hf_config(kind="rotary", **changes):
    fields = dict(
        vocab_size=33, mask_token_id=32, pad_token_id=1, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, position_embedding_type=kind, token_dropout=True, layer_norm_eps=1e-5,
        emb_layer_norm_before=kind == "absolute", max_position_embeddings=66, initializer_range=0.5,
    )  # fmt: skip
    return EsmConfig(**fields | changes)


def ids_of(tokenizer, masked=3):
    ids = get_tokenizer(tokenizer).encode(SEQUENCE).copy()
    ids[masked] = get_tokenizer(tokenizer).mask_id
    return ids


@torch.no_grad()
def logits_here(pretrained):
    tokenizer = get_tokenizer(pretrained.config.tokenizer)
    ids = ids_of(pretrained.config.tokenizer)
    batch = PackedBatch.pack(
        ids, np.array([len(ids)]), tokens=64, pad_id=tokenizer.pad_id, max_length=pretrained.config.max_positions
    )
    return pretrained.model.logits(pretrained.model(batch).hidden[: len(ids)])


@torch.no_grad()
def logits_there(model):
    return model.eval()(torch.from_numpy(ids_of("esm2"))[None]).logits[0]


def assert_same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# -------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("format", ["moltron", "huggingface"])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip(tmp_path, name, format):
    model, spec, config = make(name)
    if name == "esm1nv" and format == "huggingface":
        with pytest.raises(ValueError, match=r"transformers has no ESM with.*use format=moltron"):
            save_pretrained(model, spec, config, tmp_path / "out", format)
        assert list(tmp_path.iterdir()) == []
        return
    folder = save_pretrained(model, spec, config, tmp_path / "out", format)
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1  # whoever may read one file may read all
    loaded = load_pretrained(folder)
    assert (resolve(folder)[0], loaded.spec, loaded.config) == (format, spec, config)
    assert_same_weights(loaded.model, model)
    assert {p.requires_grad for n, p in loaded.model.named_parameters() if n.startswith("contact_head")} <= {False}
    assert not loaded.model.training


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("kind", ["rotary", "absolute"])
def test_from_and_to_transformers(tmp_path, monkeypatch, kind, sharded):
    theirs = scramble(EsmForMaskedLM(hf_config(kind)))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB" if sharded else "5GB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file() == sharded
    loaded = load_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(logits_here(loaded), logits_there(theirs), atol=1e-5, rtol=1e-5)

    monkeypatch.setattr(weights_module, "SHARD_BYTES", 20_000 if sharded else 10**9)
    config = ConvertConfig(input=str(tmp_path / "theirs"), output=str(tmp_path / "back"))
    assert convert(config) == tmp_path / "back"
    assert len(list((tmp_path / "back").glob("*.safetensors"))) == 1 or sharded
    back, info = EsmForMaskedLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits_there(back), logits_there(theirs))
    assert_same_weights(load_pretrained(tmp_path / "back").model, loaded.model)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert tokenizer(SEQUENCE)["input_ids"] == get_tokenizer("esm2").encode(SEQUENCE).tolist()
    assert (tokenizer.mask_token_id, tokenizer.pad_token_id) == (32, 1)


@pytest.mark.parametrize("name", ["esm2", "esm1b"])
def test_ours_runs_in_transformers(tmp_path, name):
    model, spec, config = make(name, layer_norm_eps=3e-4, token_dropout=False)
    save_pretrained(model, spec, config, tmp_path / "out", "huggingface")
    theirs, info = EsmForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert theirs.config.layer_norm_eps == 3e-4
    pretrained = load_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits_there(theirs), logits_here(pretrained), atol=1e-5, rtol=1e-5)


def test_dtypes(tmp_path):
    model, spec, config = make("esm2", rotary_dtype="float16")
    save_pretrained(model, spec, config, tmp_path / "half", "huggingface", torch.bfloat16)
    assert load_file(tmp_path / "half" / "model.safetensors")["lm_head.bias"].dtype == torch.bfloat16
    loaded = load_pretrained(tmp_path / "half")
    assert loaded.config == config
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}


def test_esm_model_has_no_head(tmp_path):
    theirs = scramble(EsmModel(hf_config()))
    theirs.save_pretrained(tmp_path / "encoder")
    loaded = load_pretrained(tmp_path / "encoder")
    ids = torch.from_numpy(ids_of("esm2"))
    batch = PackedBatch.pack(ids.numpy(), np.array([len(ids)]), tokens=64, pad_id=1, max_length=64)
    with torch.no_grad():
        hidden = loaded.model(batch).hidden[: len(ids)]
        torch.testing.assert_close(hidden, theirs.eval()(ids[None]).last_hidden_state[0], atol=1e-5, rtol=1e-5)
    assert isinstance(loaded.model.head, MissingHead)
    with pytest.raises(ValueError, match="has no language-model head"):
        loaded.model.logits(hidden)
    with pytest.raises(ValueError, match="has no language-model head"):
        save_pretrained(loaded.model, loaded.spec, loaded.config, tmp_path / "out")


# ------------------------------------------------------------------------------------------------- rotary frequencies


def set_frequencies(folder, change):
    state = load_file(folder / "model.safetensors")
    name = next(n for n in state if n.endswith("inv_freq"))
    exact = state.pop(name)
    for i in range(2):
        state[f"esm.encoder.layer.{i}.attention.self.rotary_embeddings.inv_freq"] = change(exact).clone()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_frequencies_are_honoured(tmp_path, dtype):
    theirs = scramble(EsmForMaskedLM(hf_config(hidden_size=64)))
    for layer in theirs.esm.encoder.layer:  # sharp attention, so that positions matter
        layer.attention.self.query.weight.data *= 6
        layer.attention.self.key.weight.data *= 6
    theirs.save_pretrained(tmp_path / "m")
    assert load_pretrained(tmp_path / "m").config.rotary_dtype == "float32"
    exact = logits_here(load_pretrained(tmp_path / "m"))
    set_frequencies(tmp_path / "m", lambda f: f.to(dtype).float())  # as in the published ESM-2
    loaded = load_pretrained(tmp_path / "m")
    assert loaded.config.rotary_dtype == str(dtype).removeprefix("torch.")
    theirs = logits_there(EsmForMaskedLM.from_pretrained(tmp_path / "m"))
    torch.testing.assert_close(logits_here(loaded), theirs, atol=2e-5, rtol=1e-5)
    assert (exact - theirs).abs().max() > 1e-4
    save_pretrained(loaded.model, loaded.spec, loaded.config, tmp_path / "out", "huggingface")
    assert torch.equal(logits_there(EsmForMaskedLM.from_pretrained(tmp_path / "out")), theirs)
    set_frequencies(tmp_path / "m", lambda f: f.to(dtype))
    assert load_pretrained(tmp_path / "m").config == loaded.config


def test_frequencies_rounded_twice_are_bfloat16():
    """A model trained in fp16, stored in bf16: one unit off where fp16 fell on a tie."""
    config = make_config("esm2", ESM2 | {"hidden_size": 128})
    twice = rotary_frequencies(64, 10000.0, torch.float16).bfloat16()
    assert not torch.equal(twice.float(), rotary_frequencies(64, 10000.0, torch.bfloat16))
    assert with_rotary_dtype(config, {"inv_freq": twice}, "").rotary_dtype == "bfloat16"


def test_other_frequencies_are_refused(tmp_path):
    EsmForMaskedLM(hf_config()).save_pretrained(tmp_path / "m")
    set_frequencies(tmp_path / "m", lambda f: f**0.5)
    with pytest.raises(ValueError, match="inv_freq holds other rotary frequencies"):
        load_pretrained(tmp_path / "m")


# ---------------------------------------------------------------------------------------------------------- config.json


def edit_config(folder, **changes):
    content = json.loads((folder / "config.json").read_text())
    content |= changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v != "absent"}))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "m"
    EsmForMaskedLM(hf_config()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "change",
    [
        {"is_folding_model": True},
        {"esmfold_config": {"trunk": {}}},
        {"is_decoder": True},
        {"add_cross_attention": True},
        {"tie_word_embeddings": False},
        {"hidden_act": "relu"},
        {"pad_token_id": 0},
        {"pad_token_id": "absent"},
        {"mask_token_id": 31},
        {"vocab_size": 64},
        {"vocab_list": ["<cls>", "A"]},
        {"chunk_size_feed_forward": 8},
        {"rope_scaling": {"type": "linear"}},
        {"a_new_trick": 1},
        {"emb_layer_norm_before": True},
    ],
)
def test_config_refused_by_name(tmp_path, plain, change):
    folder = tmp_path / "m"
    folder.mkdir()
    for file in plain.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text((plain / "config.json").read_text())
    edit_config(folder, **change)
    with pytest.raises(ValueError, match=rf"config\.json.*{next(iter(change))}"):
        load_pretrained(folder)


def test_every_field_of_transformers_config_is_known(tmp_path):
    """A field that a new version of transformers writes must be decided on here."""
    for kind in ("rotary", "absolute"):
        EsmForMaskedLM(hf_config(kind)).save_pretrained(tmp_path / kind)
        fields = json.loads((tmp_path / kind / "config.json").read_text())
        assert len(fields) >= 25
        assert load_pretrained(tmp_path / kind).config.layer_norm_eps == 1e-5


def test_absent_fields_mean_what_transformers_takes(tmp_path):
    EsmForMaskedLM(hf_config("absolute", layer_norm_eps=1e-12, token_dropout=False)).save_pretrained(tmp_path / "m")
    absent = dict.fromkeys(
        ["layer_norm_eps", "token_dropout", "position_embedding_type", "initializer_range"], "absent"
    )
    edit_config(tmp_path / "m", **absent)
    config = load_pretrained(tmp_path / "m").config
    assert (config.layer_norm_eps, config.token_dropout, config.init_std) == (1e-12, False, 0.02)
    assert config.tokenizer == "esm2"


def test_other_families_and_vocabularies_are_refused(tmp_path, plain):
    save = dict(model_type="bert")
    (tmp_path / "config.json").write_text(json.dumps(save))
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"no family of moltron reads.*bert"):
        load_pretrained(tmp_path)
    for file in plain.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    pieces = get_tokenizer("esm2").pieces
    (tmp_path / "vocab.txt").write_text("\n".join([*pieces[:4], *reversed(pieces[4:])]))
    with pytest.raises(ValueError, match=r"vocab\.txt: differs.*line 5"):
        load_pretrained(tmp_path)


# --------------------------------------------------------------------------------------------------------- tensor files


def edit_tensors(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def copy_of(folder, target):
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("esm.encoder.layer.1.attention.self.key.bias"), r"missing: .*layer\.1\.attention\.self\.key"),
        (lambda s: s.update({"classifier.weight": torch.ones(2)}), r"not known: .*classifier\.weight"),
        (lambda s: s.pop("lm_head.bias"), r"missing head\.bias"),
        (lambda s: s.update({"lm_head.bias": torch.ones(40)}), r"head\.bias has shape"),
        (lambda s: s.update({"lm_head.decoder.weight": torch.ones(33, 32)}), "not tied"),
    ],
)
def test_wrong_tensors_are_refused(tmp_path, plain, change, message):
    folder = copy_of(plain, tmp_path / "m")
    edit_tensors(folder, change)
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder)


def test_keys_dropped_on_purpose_and_a_tied_decoder(tmp_path, plain):
    folder = copy_of(plain, tmp_path / "m")

    def add(state):
        state["esm.embeddings.position_ids"] = torch.arange(66)[None]
        state["lm_head.decoder.weight"] = state["esm.embeddings.word_embeddings.weight"].clone()
        state.pop("esm.contact_head.regression.weight")
        state.pop("esm.contact_head.regression.bias")

    edit_tensors(folder, add)
    loaded, original = load_pretrained(folder), load_pretrained(plain)
    assert torch.equal(logits_here(loaded), logits_here(original))
    assert not loaded.model.contact_head.weight.any()


def test_broken_and_absent_files(tmp_path, plain):
    (tmp_path / "store").mkdir()
    for name in ("train.arrow", "manifest.json"):
        (tmp_path / "store" / name).write_text("{}")
    folder = copy_of(plain, tmp_path / "m")
    (folder / "model.safetensors").write_bytes((plain / "model.safetensors").read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"model\.safetensors: not readable"):
        load_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        load_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(ValueError, match=r"files that are not there: model-1\.safetensors"):
        load_pretrained(folder)
    for what, message in [
        (tmp_path / "nothing", "no such file or folder; names for download: .*esm2_8M"),
        ("esm2_8m", r"no such file or folder; did you mean esm2_8M or"),
        (plain / "config.json", "a folder or a fair-esm .pt"),
        (tmp_path, "neither a run folder"),
        (tmp_path / "store", "store is a data folder of `moltron prepare`, not a model"),
    ]:
        with pytest.raises(ValueError, match=message):
            resolve(what)


def test_pytorch_model_bin_is_read_without_code(tmp_path, plain):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text((plain / "config.json").read_text())
    torch.save(load_file(plain / "model.safetensors"), folder / "pytorch_model.bin")
    assert_same_weights(load_pretrained(folder).model, load_pretrained(plain).model)
    torch.save({"x": Evil(str(tmp_path / "owned"))}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="not a torch file of tensors"):
        load_pretrained(folder)
    assert not (tmp_path / "owned").exists()


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


# ------------------------------------------------------------------------------------------------------------- fair-esm


def fair_model(kind):
    if kind == "esm2":
        model = esm.model.esm2.ESM2(num_layers=2, embed_dim=32, attention_heads=2)
        args = argparse.Namespace(
            encoder_layers=2, encoder_embed_dim=32, encoder_attention_heads=2, token_dropout=True, arch="x"
        )
        return scramble(model).eval(), {"cfg": {"model": args}}
    args = argparse.Namespace(
        arch="roberta_large", layers=2, embed_dim=32, ffn_embed_dim=48, attention_heads=2, max_positions=64,
        token_dropout=True, emb_layer_norm_before=kind == "esm1b",
    )  # fmt: skip
    model = esm.ProteinBertModel(args, esm.Alphabet.from_architecture("roberta_large"))
    raw = {f"encoder_{k}" if k in ("layers", "embed_dim", "ffn_embed_dim", "attention_heads") else k: v
           for k, v in vars(args).items() if k != "emb_layer_norm_before"}  # fmt: skip
    return scramble(model).eval(), {"args": argparse.Namespace(**raw)}


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("kind", ["esm2", "esm1b", "esm1v"])
def test_fair_esm_file(tmp_path, kind, old_format):
    model, checkpoint = fair_model(kind)
    state = model.state_dict()
    regression = {name: state.pop(name) for name in list(state) if name.startswith("contact_head")}
    fairseq = {
        f"encoder.{name}" if name.startswith("lm_head") else f"encoder.sentence_encoder.{name}": tensor
        for name, tensor in state.items()
    }
    path = tmp_path / f"{kind}_t2.pt"
    torch.save(checkpoint | {"model": fairseq}, path, _use_new_zipfile_serialization=not old_format)
    if kind != "esm1v":
        torch.save({"model": regression}, tmp_path / f"{kind}_t2-contact-regression.pt")
    there, alphabet = model, None
    if kind != "esm1v":  # through fair-esm's own loader, which zeroes the row of <mask> in ESM-1b
        data = checkpoint | {"model": fairseq}
        there, alphabet = esm.pretrained.load_model_and_alphabet_core(path.stem, data, {"model": regression})
    else:
        there.embed_tokens.weight.data[32] = 0
    there.eval()
    loaded = load_pretrained(path)
    tokens = torch.from_numpy(ids_of("esm2"))[None]
    with torch.no_grad():
        expected = there(tokens, return_contacts=True)
    torch.testing.assert_close(logits_here(loaded), expected["logits"][0], atol=1e-5, rtol=1e-5)
    if kind == "esm1v":
        assert not loaded.config.contact_head and not loaded.config.embed_norm
        return
    batch = PackedBatch.pack(tokens[0].numpy(), np.array([tokens.shape[1]]), tokens=64, pad_id=1, max_length=64)
    with torch.no_grad():
        contacts = predict_contacts(loaded.model, batch)
    torch.testing.assert_close(contacts, expected["contacts"][0], atol=1e-5, rtol=1e-4)
    assert alphabet.all_toks == get_tokenizer("esm2").pieces
    save_pretrained(loaded.model, loaded.spec, loaded.config, tmp_path / "hf", "huggingface")
    theirs = logits_there(EsmForMaskedLM.from_pretrained(tmp_path / "hf"))
    torch.testing.assert_close(theirs, expected["logits"][0], atol=1e-5, rtol=1e-5)


def test_fair_esm_others_are_refused(tmp_path):
    path = tmp_path / "m.pt"
    torch.save({"args": argparse.Namespace(arch="protein_bert_base"), "model": {}}, path)
    with pytest.raises(ValueError, match="protein_bert_base"):
        load_pretrained(path)
    torch.save({"state": 1}, path)
    with pytest.raises(ValueError, match=r"no fair-esm checkpoint|not a fair-esm checkpoint"):
        load_pretrained(path)
    torch.save({"args": Evil(str(tmp_path / "owned")), "model": {}}, path)
    with pytest.raises(ValueError, match="not a torch file of tensors"):
        load_pretrained(path)
    assert not (tmp_path / "owned").exists()


# ------------------------------------------------------------------------------------------------- training checkpoints


@pytest.mark.parametrize("name", MODELS)
def test_run_folder_takes_the_best_and_says_so(tmp_path, name, caplog):
    run = tmp_path / "run"
    manager = CheckpointManager(run / "checkpoints")
    family, architecture = MODELS[name]
    model, _, config = make(name)
    for step, metric in [(1, 3.0), (2, 2.0), (3, 2.5)]:
        tensors = {f"model.{n}": p.detach() + step for n, p in model.named_parameters()}
        tensors |= {f"optim.exp_avg.{n}": p.detach() for n, p in model.named_parameters()}
        manager.save(step, tensors, {"model": {"family": family, "config": architecture}}, metric)
    manager.wait()
    with caplog.at_level(logging.INFO):
        loaded = load_pretrained(run)
    assert "step-00000002" in caplog.text and loaded.source.endswith("step-00000002")
    assert loaded.config == config
    assert torch.equal(loaded.model.norm.weight, model.norm.weight + 2)
    latest = load_pretrained(run / "checkpoints" / "step-00000003")
    assert torch.equal(latest.model.norm.weight, model.norm.weight + 3)
    (run / "checkpoints" / "step-00000002" / "shard-00001-of-00001.safetensors").unlink()
    assert load_pretrained(run).source.endswith("step-00000003")
    convert(ConvertConfig(input=str(run), output=str(tmp_path / "out"), format="moltron"))
    assert_same_weights(load_pretrained(tmp_path / "out").model, latest.model)
    shard = run / "checkpoints" / "step-00000003" / "shard-00001-of-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"Checkpoint refused: .*does not match its sha256"):
        load_pretrained(run / "checkpoints" / "step-00000003")


def test_checkpoints_that_do_not_say_or_fit(tmp_path):
    manager = CheckpointManager(tmp_path / "a")
    manager.save(1, {"model.x": torch.ones(1)}, {})
    manager.wait()
    with pytest.raises(ValueError, match="does not say which model"):
        load_pretrained(tmp_path / "a")
    model, _, _ = make("esm2")
    tensors = {f"model.{n}": p for n, p in model.named_parameters()}
    manager = CheckpointManager(tmp_path / "b")
    manager.save(1, tensors, {"model": {"family": "esm2", "config": ESM2 | {"num_layers": 3}}})
    manager.wait()
    with pytest.raises(ValueError, match=r"model\.layers\.2\S+ is not in the checkpoint.*more"):
        load_pretrained(tmp_path / "b")
    for shard in (tmp_path / "b" / "step-00000001").glob("shard*"):
        shard.unlink()
    with pytest.raises(ValueError, match="no checkpoint in it is whole"):
        load_pretrained(tmp_path / "b")


def test_a_full_disk_is_a_value_error_and_leaves_nothing(tmp_path, plain):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # no larger files
    try:
        with pytest.raises(ValueError, match=r"out: cannot be written \(.*File too large"):
            convert(ConvertConfig(input=str(plain), output=str(tmp_path / "out"), format="moltron"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_convert_guards_its_output(tmp_path, plain):
    output = tmp_path / "out"
    config = ConvertConfig(input=str(plain), output=str(output), format="moltron")
    convert(config)
    with pytest.raises(ValueError, match="overwrite=true"):
        convert(config)
    config.overwrite = True
    convert(config)
    config.format = "onnx"
    with pytest.raises(ValueError, match="format='onnx'"):
        convert(config)
    with pytest.raises(ValueError, match="dtype='int8'"):
        convert(ConvertConfig(input=str(plain), output=str(output), dtype="int8"))
    with pytest.raises(ValueError, match="is the input itself"):
        convert(ConvertConfig(input=str(output), output=str(output), overwrite=True))
    with pytest.raises(ValueError, match="a folder is written, not a file"):
        convert(ConvertConfig(input=str(plain), output=str(tmp_path / "esm2.pt")))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
