"""Configuration: precedence, literal paths, typed keys, every problem at once."""

import dataclasses
from pathlib import Path

import pytest

from moltron.config import compose
from moltron.config.compose import CONFIGS, ConfigError, dump_config, load_config, load_yaml
from moltron.config.schema import EmbedConfig, EvaluateConfig, PrepareConfig, TrainConfig
from moltron.models.registry import architecture_problems, build_model
from moltron.models.spec import num_parameters
from moltron.train.validate import validate


def written_and_read(config, folder):
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    return load_yaml(type(config), folder / "config.yaml")


REQUIRED = ["data.path=store", "run_dir=run"]
PRESETS = compose.preset_names()
BENCHMARKS = Path(__file__).parents[3] / "benchmarks/presets"
# ../shared/spec/models.md §1, column "ours, V to 64"
PARAMETERS = {
    "pretrain_esm2_8M": 7_522_304,
    "pretrain_esm2_35M": 33_516_064,
    "pretrain_esm2_150M": 148_159_424,
    "pretrain_esm2_650M": 651_082_304,
    "pretrain_esm2_3B": 2_839_083_584,
    "pretrain_esm2_15B": 15_129_257_024,
    "pretrain_esm1_small": 43_563_328,
    "pretrain_prott5_small": 198_970_496,
    "pretrain_megamolbart_xsmall_span_aug": 4_015_104,
    "pretrain_megamolbart_small_span_aug": 44_795_904,
    "pretrain_megamolbart_large_span_aug": 236_457_984,
}


def test_the_presets_of_the_issue_are_there():
    assert set(PARAMETERS) <= set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_composes_builds_and_is_short(name):
    config = load_config(TrainConfig, REQUIRED, name)
    family = config.model.pop("family")
    assert architecture_problems(family, config.model) == []
    model = build_model(family, config.model)
    if name in PARAMETERS:
        assert num_parameters(model) == PARAMETERS[name]
    if name.startswith("pretrain_esm2"):
        assert config.batch.tokens * config.batch.packs == 2_097_152
    assert config.batch.tokens >= config.data.max_length
    assert len((CONFIGS / f"{name}.yaml").read_text().splitlines()) <= 25


def test_vocabulary_padded_as_v1_did_gives_v1_counts():
    """Spec §1, bold: the counts v1 asserts, with the vocabulary padded to 128 rows instead of 64."""
    for name, v1 in [
        ("pretrain_esm2_8M", 7_542_848),
        ("pretrain_esm2_650M", 651_164_288),
        ("pretrain_esm1_small", 43_612_544),
    ]:
        config = load_config(TrainConfig, REQUIRED, name)
        extra_rows = 128 - 64
        assert PARAMETERS[name] + extra_rows * (config.model["hidden_size"] + 1) == v1


def test_schema_then_preset_then_command_line():
    plain = load_config(TrainConfig, REQUIRED)
    preset = load_config(TrainConfig, REQUIRED, "pretrain_esm2_8M")
    override = load_config(TrainConfig, [*REQUIRED, "train.max_steps=7", "++batch.packs=3"], "pretrain_esm2_8M")
    assert (plain.train.max_steps, preset.train.max_steps, override.train.max_steps) == (1000, 500_000, 7)
    assert override.batch.packs == 3 and preset.optim.schedule.constant_steps == 50_000


def test_groups_and_model_fields_can_be_chosen():
    config = load_config(
        TrainConfig,
        [*REQUIRED, "model=esm2_35M", "objective=masked_lm_bionemo_v1", "model.num_layers=2"],
        "pretrain_esm2_8M",
    )
    assert config.model["hidden_size"] == 480 and config.model["num_layers"] == 2
    assert config.objective.count == "floor"
    assert load_config(TrainConfig, [*REQUIRED, "model=esm2_35M"]).model["num_heads"] == 20


@pytest.mark.parametrize("value", ["a b,c", "x[000..049]", "d=e={f}", "it's ${here}", "x_OP_000..003_CL_", "-"])
def test_path_values_are_literal(value, tmp_path):
    assert load_config(PrepareConfig, [f"input={value}", "output=o"]).input == value
    assert load_config(TrainConfig, [f"data.path={value}", "run_dir=r"]).data.path == value
    config = load_config(TrainConfig, [f"data.path={value}", "run_dir=r"])
    assert written_and_read(config, tmp_path).data.path == value


def test_home_is_expanded_and_null_empties_an_optional_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/mira")
    assert load_config(TrainConfig, ["data.path=~/s", "run_dir=r"]).data.path == "/home/mira/s"
    assert load_config(TrainConfig, [*REQUIRED, "init=null"]).init is None


def test_an_empty_path_is_a_problem():
    with pytest.raises(ConfigError, match=r"1 problem in the configuration:\n  - input= is empty: give input=…$"):
        load_config(PrepareConfig, ["input=", "output=b", "val_input="])


def test_path_keys_named_in_the_issue_are_literal():
    fields = [f for s in (TrainConfig, PrepareConfig, EmbedConfig, EvaluateConfig) for f in compose.schema_fields(s)]
    keys = {key for key, field in fields if field.metadata.get("path")}
    named = {
        "input",
        "output",
        "model",
        "init",
        "members",
        "mapping",
        "clusters",
        "val_input",
        "test_input",
        "data.path",
    }
    assert named | {"run_dir"} <= keys


def test_all_problems_at_once():
    with pytest.raises(ConfigError) as caught:
        load_config(
            TrainConfig,
            ["data.path=s", "train.max_step=3", "optim.lr=fast", "batch.tokens=1.5", "objective=nix", "lonely"],
            "pretrain_esm2_8M",
        )
    problems = "\n".join(caught.value.problems)
    for piece in [
        "train.max_steps",
        "optim.lr=fast",
        "batch.tokens=1.5",
        "objective=nix: no such preset",
        "'lonely'",
        "run_dir is missing",
    ]:
        assert piece in problems
    assert len(caught.value.problems) == 6


def test_unknown_preset_names_near_ones():
    with pytest.raises(ConfigError, match="pretrain_esm2_8M"):
        load_config(TrainConfig, REQUIRED, "pretrain_esm2_8")


def test_unknown_models_name_near_ones_with_a_preset_and_without():
    for preset in (None, "pretrain_esm2_8M"):
        with pytest.raises(ConfigError, match="model=esm2_9M: no such preset; near it are: esm2_8M"):
            load_config(TrainConfig, [*REQUIRED, "model=esm2_9M"], preset)


def test_own_presets_that_are_broken_or_name_no_model(tmp_path):
    (tmp_path / "bad.yaml").write_text("model: [a\n  b: c\n")
    with pytest.raises(ConfigError, match=r"1 problem.*\n  - --config-name bad: .*bad\.yaml.* line 2"):
        load_config(TrainConfig, REQUIRED, "bad", [str(tmp_path)])
    (tmp_path / "own.yaml").write_text("train:\n  max_steps: 5\n")
    config = load_config(TrainConfig, [*REQUIRED, "model=esm2_8M"], "own", [str(tmp_path)])
    assert (config.train.max_steps, config.model["num_layers"]) == (5, 6)


def test_one_value_for_a_list_says_how_to_write_one():
    with pytest.raises(ConfigError, match=r"layers=3 must be a list: layers=\[3\]"):
        load_config(EmbedConfig, ["model=a", "input=b", "output=c", "layers=3"])


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.yaml")))
def test_presets_of_the_benchmarks_are_whole(name):
    config = load_config(TrainConfig, ["data.path=D", "run_dir=R"], name, [str(BENCHMARKS)])
    assert validate(config, world=1) == ["data.path=D has no train.arrow: give a folder that `moltron prepare` wrote"]


def test_own_presets_by_option_and_environment(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text(
        "defaults: [pretrain_esm2_8M, override model: wide, _self_]\ntrain: {max_steps: 5}\n"
    )
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "wide.yaml").write_text(
        "family: esm2\nhidden_size: 64\nnum_layers: 1\nnum_heads: 2\nffn_size: 64\n"
    )
    config = load_config(TrainConfig, REQUIRED, "mine", [str(tmp_path)])
    assert config.train.max_steps == 5 and config.model["hidden_size"] == 64 and config.optim.betas[1] == 0.98
    monkeypatch.setenv("MOLTRON_CONFIG_PATH", str(tmp_path))
    assert load_config(TrainConfig, REQUIRED, "mine") == config


def test_a_folder_of_presets_that_is_not_there_is_named(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=rf"1 problem.*\n  - --config-dir .*: {tmp_path}/nodir is no folder"):
        load_config(TrainConfig, REQUIRED, "pretrain_esm2_8M", [f"{tmp_path}/nodir"])
    monkeypatch.setenv("MOLTRON_CONFIG_PATH", f"{tmp_path}:{tmp_path}/gone")
    with pytest.raises(ConfigError, match=rf"\$MOLTRON_CONFIG_PATH: {tmp_path}/gone is no folder"):
        load_config(TrainConfig, REQUIRED, "pretrain_esm2_8M")


def test_architecture_problems_are_sentences():
    problems = architecture_problems("esm2", {"hidden_size": 30, "num_heads": 4, "num_layers": 0, "width": 3})
    text = "\n".join(problems)
    for piece in ["model.width", "model.ffn_size is missing", "model.num_layers=0", "not a multiple"]:
        assert piece in text
    assert "esm1, esm2" in architecture_problems("bert", {})[0]


def test_dumped_configuration_is_the_same(tmp_path):
    config = load_config(TrainConfig, REQUIRED, "pretrain_esm2_650M")
    assert written_and_read(TrainConfig("r"), tmp_path).run_dir == "r"
    assert dataclasses.asdict(written_and_read(config, tmp_path)) == dataclasses.asdict(config)


@pytest.mark.parametrize("text", ["", "model: [a\n b: c", "- a"])
def test_a_damaged_configuration_is_named(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"1 problem.*\n  - .*config\.yaml"):
        load_yaml(TrainConfig, tmp_path / "config.yaml")
