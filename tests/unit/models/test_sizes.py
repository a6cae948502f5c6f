"""Parameter counts of ../shared/spec/models.md §1, ours and v1's; what a model section may say."""

from importlib.resources import files

import pytest

from moltron.config.compose import load_config
from moltron.config.schema import TrainConfig
from moltron.models import encoder, encoder_decoder
from moltron.models.registry import architecture_problems, build_model, compiles, make_config
from moltron.models.spec import num_parameters

PARAMETERS = {  # ours, with the vocabulary padded to 64 rows, and v1's, with 128; further counts of v1 by positions
    "esm2_8M": (7_522_304, 7_542_848, {}),
    "esm1_small": (43_563_328, 43_612_544, {256: 43_415_936, 1024: 44_005_760}),
    "prott5_small": (198_970_496, 198_970_496, {256: 198_773_888, 1024: 199_363_712}),
    "prott5_xl": (2_818_830_336, None, {}),
    "megamolbart_xsmall": (4_015_104, 4_047_872, {}),
    "megamolbart_small": (44_795_904, 44_861_440, {256: 44_926_976, 512: 45_058_048, 1024: 45_320_192}),
    "megamolbart_large": (236_457_984, 236_589_056, {}),
}


def count(name, **changes):
    section = load_config(TrainConfig, ["data.path=store", "run_dir=run", f"model={name}"]).model
    return num_parameters(build_model(section.pop("family"), section | changes))


@pytest.mark.parametrize("name", PARAMETERS)
def test_counts(name):
    assert count(name) == PARAMETERS[name][0]


@pytest.mark.parametrize("name", [name for name, (_, v1, _) in PARAMETERS.items() if v1])
def test_v1_counts_with_the_vocabulary_padded_as_there(name, monkeypatch):
    for module in (encoder, encoder_decoder):
        monkeypatch.setattr(module, "pad_to", lambda vocab_size: -(-vocab_size // 128) * 128)
    _, v1, others = PARAMETERS[name]
    assert count(name) == v1
    for positions, expected in others.items():
        assert count(name, max_positions=positions) == expected


SIZES = dict(hidden_size=48, num_layers=2, num_decoder_layers=2, num_heads=4, ffn_size=96)


@pytest.mark.parametrize(
    "changes, problem",
    [
        (dict(architecture="t6"), "model.architecture='t6' must be one of nv, t5"),
        (dict(num_decoder_layers=-1), "model.num_decoder_layers=-1 must be at least 0"),
        (dict(num_layers=0), "model.num_layers=0 must be at least 1"),
        (dict(num_heads=5), "model.hidden_size=48 is not a multiple of model.num_heads=5"),
        (dict(architecture="t5", num_heads=5, head_dim=16), None),
        (dict(num_decoder_layers=0), None),
    ],
)
def test_what_a_section_may_say(changes, problem):
    assert architecture_problems("prott5", SIZES | changes) == ([problem] if problem else [])


def test_what_follows_from_the_architecture():
    nv, t5 = make_config("prott5", SIZES), make_config("prott5", {**SIZES, "architecture": "t5"})
    assert (nv.positions_end, nv.trains_compiled) == (True, True)
    assert (t5.positions_end, t5.trains_compiled) == (False, False)


def test_blocks_are_compiled_where_attention_goes_by_the_kernels():
    nv, t5, odd = (
        make_config("prott5", SIZES | dict(num_heads=3) | x) for x in ({}, dict(architecture="t5"), dict(num_heads=4))
    )
    assert compiles(nv, "bf16", "cuda") and not compiles(nv, "fp32", "cuda") and not compiles(nv, "bf16", "cpu")
    assert not compiles(t5, "bf16", "cuda") and compiles(t5, "bf16", "cuda", trains=False)
    assert not compiles(odd, "bf16", "cuda")  # heads of 12


@pytest.mark.parametrize("name", sorted(path.stem for path in (files("moltron") / "configs/model").iterdir()))
def test_every_size_is_born_without_memory(name):
    section = load_config(TrainConfig, ["data.path=store", "run_dir=run", f"model={name}"]).model
    model = build_model(section.pop("family"), section)
    assert all(tensor.is_meta for tensor in model.state_dict(keep_vars=True).values())
    assert all(buffer.is_meta for buffer in model.buffers())
