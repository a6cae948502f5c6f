"""ProtT5 and MegaMolBART in and out: `transformers`' T5 both ways, everything else refused by name."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration, T5Model

from moltron.checkpoint import weights as weights_module
from moltron.checkpoint.weights import convert, load_pretrained, resolve, save_pretrained
from moltron.config.schema import ConvertConfig
from moltron.models.batch import PackedBatch
from moltron.models.encoder import MissingHead
from moltron.models.registry import build_model, get_spec

IDS, DECODER_IDS = np.array([3, 9, 20, 14, 14, 7, 1]), np.array([0, 127, 5, 11])
TINY = dict(hidden_size=48, num_layers=3, num_decoder_layers=2, num_heads=4, ffn_size=96)
T5 = {**TINY, "architecture": "t5", "head_dim": 16, "tokenizer": "prott5", "norm_eps": 1e-6}
MODELS = {
    "prott5nv": ("prott5", TINY),
    "prott5-xl": ("prott5", T5),
    "a head of its own": ("prott5", {**T5, "tied_head": False}),
    "encoder alone": ("prott5", {**T5, "num_decoder_layers": 0}),
    "megamolbart": ("megamolbart", TINY),
}


def scramble(model):
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model.eval()


def theirs(kind=T5ForConditionalGeneration, **changes):
    fields = dict(
        vocab_size=128, d_model=48, d_kv=16, d_ff=96, num_layers=3, num_decoder_layers=2, num_heads=4,
        decoder_start_token_id=0, relative_attention_num_buckets=12, relative_attention_max_distance=50,
    )  # fmt: skip
    return scramble(kind(T5Config(**fields | changes)))


@torch.no_grad()
def logits_there(model):
    return model.eval()(input_ids=torch.from_numpy(IDS)[None], decoder_input_ids=torch.from_numpy(DECODER_IDS)[None])[
        0
    ][0]


def batch(decoder=True):
    second = (DECODER_IDS, np.array([len(DECODER_IDS)]), 64) if decoder else None
    return PackedBatch.pack(IDS, np.array([len(IDS)]), tokens=64, pad_id=0, max_length=64, decoder=second)


@torch.no_grad()
def logits_here(loaded):
    return loaded.model.logits(loaded.model(batch()).hidden)[: len(DECODER_IDS)]


def assert_same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("format", ["moltron", "huggingface"])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip(tmp_path, name, format):
    family, architecture = MODELS[name]
    model, spec = scramble(build_model(family, architecture, "cpu")), get_spec(family)
    if format == "huggingface" and name in ("prott5nv", "megamolbart"):
        with pytest.raises(ValueError, match=r"transformers has no .*use format=moltron"):
            save_pretrained(model, spec, model.config, tmp_path / "out", format)
        assert list(tmp_path.iterdir()) == []
        return
    folder = save_pretrained(model, spec, model.config, tmp_path / "out", format)
    loaded = load_pretrained(folder)
    assert (resolve(folder)[0], loaded.spec, loaded.config) == (format, spec, model.config)
    assert isinstance(loaded.model.head, MissingHead) == (name == "encoder alone")
    assert_same_weights(loaded.model, model)


def test_a_vocabulary_that_the_folder_would_not_be_read_with_is_refused(tmp_path):
    family, architecture = next(model for model in MODELS.values() if model[1].get("architecture") == "t5")
    model = scramble(build_model(family, {**architecture, "tokenizer": "prott5nv"}, "cpu"))
    with pytest.raises(ValueError, match=r"ids of tokenizer prott5nv .*use format=moltron"):
        save_pretrained(model, get_spec(family), model.config, tmp_path / "out", "huggingface")


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_from_and_to_transformers(tmp_path, monkeypatch, tied, sharded):
    model = theirs(tie_word_embeddings=tied)
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(torch.randn(128, 48) * 0.2)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="50KB" if sharded else "5GB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file() == sharded
    loaded = load_pretrained(tmp_path / "theirs")
    assert loaded.config.tied_head == tied
    torch.testing.assert_close(logits_here(loaded), logits_there(model), atol=1e-5, rtol=1e-5)

    monkeypatch.setattr(weights_module, "SHARD_BYTES", 50_000 if sharded else 10**9)
    convert(ConvertConfig(input=str(tmp_path / "theirs"), output=str(tmp_path / "back")))
    back, info = T5ForConditionalGeneration.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits_there(back), logits_there(model))
    assert_same_weights(load_pretrained(tmp_path / "back").model, loaded.model)
    assert not (tmp_path / "back" / "vocab.txt").exists()


def test_ours_runs_in_transformers(tmp_path):
    architecture = {**T5, "norm_eps": 3e-4, "relative_buckets": 8, "relative_reach": 5}
    model = scramble(build_model("prott5", architecture, "cpu"))
    save_pretrained(model, get_spec("prott5"), model.config, tmp_path / "out", "huggingface")
    there, info = T5ForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    here = load_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits_there(there), logits_here(here), atol=1e-5, rtol=1e-5)


def test_the_encoder_alone(tmp_path):
    """T5EncoderModel, in half precision as published, and back."""
    model = theirs(T5EncoderModel)
    model.half().save_pretrained(tmp_path / "encoder")
    loaded = load_pretrained(tmp_path / "encoder")
    assert (loaded.config.num_layers, loaded.config.num_decoder_layers) == (3, 0)
    assert isinstance(loaded.model.head, MissingHead)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    with torch.no_grad():
        hidden = loaded.model(batch(decoder=False)).hidden[: len(IDS)]
        expected = model.float()(torch.from_numpy(IDS)[None]).last_hidden_state[0]
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"encoder alone .*no logits or losses"):
        loaded.model.logits(hidden)
    config = ConvertConfig(input=str(tmp_path / "encoder"), output=str(tmp_path / "back"), dtype="float16")
    convert(config)
    back, info = T5EncoderModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values()) and back.dtype == torch.float16
    for name, tensor in model.half().state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def test_bf16_in_one_torch_file_with_the_copies_that_old_versions_wrote(tmp_path):
    model = theirs()
    model.bfloat16().save_pretrained(tmp_path / "m")
    state = load_file(tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "model.safetensors").unlink()
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
        state[name] = state["shared.weight"].clone()
    state["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.zeros(12, 4)
    torch.save(state, tmp_path / "m" / "pytorch_model.bin")
    old = dict(scale_decoder_outputs="absent", is_gated_act="absent", dense_act_fn="absent", n_positions=77)
    edit_config(tmp_path / "m", **old, output_past=True, task_specific_params={"summarization": {}})
    loaded = load_pretrained(tmp_path / "m")
    assert loaded.config.max_positions == 77
    torch.testing.assert_close(logits_here(loaded), logits_there(model.float()), atol=1e-5, rtol=1e-5)


def test_a_t5_model_without_the_head_of_its_own(tmp_path):
    theirs(T5Model).save_pretrained(tmp_path / "m")
    assert not isinstance(load_pretrained(tmp_path / "m").model.head, MissingHead)  # the embedding is the head
    edit_config(tmp_path / "m", tie_word_embeddings=False, scale_decoder_outputs="absent")
    loaded = load_pretrained(tmp_path / "m")
    assert isinstance(loaded.model.head, MissingHead)
    with pytest.raises(ValueError, match=r"has no language-model head .*no logits or losses"):
        logits_here(loaded)
    with pytest.raises(ValueError, match="cannot be written"):
        save_pretrained(loaded.model, loaded.spec, loaded.config, tmp_path / "out")


def test_decoder_layers_default_to_the_encoders(tmp_path):
    theirs(num_decoder_layers=3).save_pretrained(tmp_path / "m")
    edit_config(tmp_path / "m", num_decoder_layers="absent")
    assert load_pretrained(tmp_path / "m").config.num_decoder_layers == 3


@pytest.mark.parametrize(
    "changes, problem",
    [
        (dict(feed_forward_proj="gated-gelu"), "a T5 1.1, whose gated feed-forward layers"),
        (dict(feed_forward_proj="gelu"), "feed_forward_proj='gelu' is supported only as 'relu'"),
        (dict(vocab_size=32128), "vocab_size=32128 is supported only as 128"),
        (dict(vocab_size="absent"), "vocab_size is missing"),
        (dict(pad_token_id=3), "pad_token_id=3 is supported only as 0"),
        (dict(eos_token_id=2), "eos_token_id=2 is supported only as 1"),
        (dict(decoder_start_token_id=5), "decoder_start_token_id=5 is supported only as 0"),
        (dict(is_decoder=True), "is_decoder=True is not supported"),
        (dict(quantization_config={"bits": 8}), "quantization_config={'bits': 8} is not supported"),
        (dict(number_of_heads=4), "number_of_heads=4 is not a known field"),
        (dict(d_ff=80), r"has shape \[96, 48\], \[80, 48\] by its configuration"),
        (dict(num_layers=2), "not known: encoder.block.2"),
        (dict(num_layers=4), r"missing encoder\.layers\.3"),
    ],
)
def test_what_is_refused(tmp_path, changes, problem):
    theirs().save_pretrained(tmp_path / "m")
    edit_config(tmp_path / "m", **changes)
    with pytest.raises(ValueError, match=problem):
        load_pretrained(tmp_path / "m")


@pytest.mark.parametrize(
    "name, problem",
    [
        ("decoder.embed_tokens.weight", "embeddings of their own are not supported"),
        ("lm_head.weight", "which tie_word_embeddings in config.json says it is"),
    ],
)
def test_copies_that_are_none(tmp_path, name, problem):
    theirs().save_pretrained(tmp_path / "m")
    state = load_file(tmp_path / "m" / "model.safetensors")
    state[name] = state["shared.weight"] + 1
    save_file(state, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=problem):
        load_pretrained(tmp_path / "m")


def test_dropout_is_named(tmp_path, caplog):
    theirs().save_pretrained(tmp_path / "m")
    with caplog.at_level("INFO"):
        load_pretrained(tmp_path / "m")
    assert "dropout_rate not applied in training: moltron's models have no dropout" in caplog.text
