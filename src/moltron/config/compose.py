"""From a command line to a plain dataclass: the only module that knows Hydra.

    schema < preset (--config-name; folders: --config-dir, $MOLTRON_CONFIG_PATH, the package) < key=value

Hydra composes the preset and its groups (`model=esm2_35M`); each leaf is then set on the typed schema alone, so that
all problems are found, not the first. Values of path keys never meet Hydra's grammar: they are literal.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

CONFIGS = Path(__file__).parents[1] / "configs"
Config = TypeVar("Config")


class ConfigError(ValueError):
    """Everything that is wrong with a configuration, one problem a line."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''} in the configuration"
        super().__init__("\n  - ".join([count + ":", *problems]))


def load_config(
    schema: type[Config],
    overrides: Sequence[str] = (),
    config_name: str | None = None,
    config_dirs: Sequence[str] = (),
) -> Config:
    """Compose and check a configuration of dataclass `schema`. Raises ConfigError with every problem found."""
    problems: list[str] = []
    folders = search_path(config_dirs)
    missing = [folder for folder in folders if not folder.is_dir()]
    problems += [f"--config-dir or $MOLTRON_CONFIG_PATH: {folder} is no folder" for folder in missing]
    folders = [folder for folder in folders if folder not in missing]
    literals, choices, values = _split(schema, overrides, folders, problems)
    preset = _compose(config_name, choices, folders, problems) if config_name or choices else OmegaConf.create({})
    plain = OmegaConf.to_container(preset, resolve=True)
    return _build(schema, [*_leaves(plain), *values], literals, problems)


def dump_config(config: Any) -> str:
    """The configuration as YAML; `load_yaml` of it gives the same dataclass back."""
    plain = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples become lists
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def load_yaml(schema: type[Config], file: Path) -> Config:
    """A configuration that `dump_config` wrote. Raises ConfigError where the file is damaged."""
    try:
        plain = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([f"{file}: {' '.join(str(error).split())}"]) from error
    if not isinstance(plain, dict):
        raise ConfigError([f"{file} is empty or damaged: put it back, or choose another run_dir"])
    leaves = list(_leaves(plain))
    paths = _path_keys(schema)
    return _build(schema, [x for x in leaves if x[0] not in paths], [x for x in leaves if x[0] in paths], [])


def _build(schema: type[Config], values: Any, literals: Any, problems: list[str]) -> Config:
    """The dataclass with `values` checked one by one against its types, and `literals` as they are."""
    config = OmegaConf.structured(schema)
    for key, value in values:
        _set(config, key, value, problems)
    for key, _ in literals:
        OmegaConf.update(config, key, "given")
    for key in sorted(OmegaConf.missing_keys(config)):
        if not any(problem.startswith(f"{key}=") for problem in problems):
            problems.append(f"{key} is missing: give {key}=…")
    if problems:
        raise ConfigError(problems)
    result = OmegaConf.to_object(config)
    for key, value in literals:
        *parents, name = key.split(".")
        owner = result
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, name, value)
    return typing.cast(Config, result)


def search_path(config_dirs: Sequence[str] = ()) -> list[Path]:
    """Where presets and groups are looked for, first hit wins."""
    extra = [*config_dirs, *filter(None, os.environ.get("MOLTRON_CONFIG_PATH", "").split(os.pathsep))]
    return [*(Path(folder).expanduser().absolute() for folder in extra), CONFIGS]


def preset_names(config_dirs: Sequence[str] = ()) -> list[str]:
    return sorted({file.stem for folder in search_path(config_dirs) for file in folder.glob("*.yaml")})


def schema_fields(schema: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """Every key that can be set, dotted, with its field."""
    for field in dataclasses.fields(schema):
        nested = typing.get_type_hints(schema)[field.name]
        if dataclasses.is_dataclass(nested):
            yield from schema_fields(typing.cast(type, nested), f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field


def _split(schema: type, overrides: Sequence[str], folders: list[Path], problems: list[str]):
    """Sort the command line into literal values of path keys, choices of config groups, and parsed values."""
    fields = dict(schema_fields(schema))
    literals: list[tuple[str, Any]] = []
    choices: list[str] = []
    values: list[tuple[str, Any]] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.lstrip("+")
        if not equals:
            problems.append(f"{override!r} is not of the form key=value")
        elif key in fields and fields[key].metadata.get("path"):
            optional = fields[key].default is None
            if not text and not optional:
                problems.append(f"{key}= is empty: give {key}=…")
            literals.append((key, None if optional and text in ("null", "") else os.path.expanduser(text)))
        elif any((folder / key).is_dir() for folder in folders) and "." not in key:
            known = sorted({file.stem for folder in folders for file in (folder / key).glob("*.yaml")})
            if text in known:
                choices.append(f"{key}={text}")
            else:
                near = difflib.get_close_matches(text, known, n=3, cutoff=0.4)
                problems.append(
                    f"{key}={text}: no such preset; {'near it' if near else 'there'} are: {', '.join(near or known)}"
                )
        else:
            try:
                parsed = OverridesParser.create().parse_override(f"{key}={text}")
                values.append((key, parsed.value()))
                if parsed.is_sweep_override():
                    values.pop()
                    problems.append(f"{override}: one value, not several; there are no sweeps: start a run for each")
            except HydraException as error:
                problems.append(f"{override}: {str(error).splitlines()[0]}")
    return literals, choices, values


def _compose(config_name: str | None, choices: list[str], folders: list[Path], problems: list[str]) -> DictConfig:
    empty = OmegaConf.create({})
    if config_name is not None:
        config_name = config_name.removesuffix(".yaml")
        home = next((folder for folder in folders if (folder / f"{config_name}.yaml").is_file()), None)
        if home is None:
            near = difflib.get_close_matches(config_name, preset_names([str(f) for f in folders]), n=3, cutoff=0.4)
            names = ", ".join(near or preset_names([str(f) for f in folders]))
            where = ", ".join(str(folder) for folder in folders)
            problems.append(
                f"--config-name {config_name}: no such preset in {where}; {'near it' if near else 'there'} are: {names}"
            )
            return empty
    else:
        home = CONFIGS
    path = "[" + ",".join(f'"file://{folder}"' for folder in folders if folder != home) + "]"
    search = f"hydra.searchpath={path}"
    try:
        with initialize_config_dir(str(home), version_base="1.3"):
            default = compose(config_name, overrides=[search], return_hydra_config=True).hydra.runtime.choices
            chosen = [choice if choice.partition("=")[0] in default else f"+{choice}" for choice in choices]
            composed = compose(config_name, overrides=[search, *chosen])
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        where = f"--config-name {config_name}: " if config_name else ""
        problems.append(where + " ".join(str(error).split()))
        return empty
    return composed


def _leaves(plain: Any) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in nested dictionaries."""
    for key, value in plain.items():
        if isinstance(value, dict) and value:
            yield from ((f"{key}.{name}", inner) for name, inner in _leaves(value))
        else:
            yield str(key), value


def _path_keys(schema: type) -> set[str]:
    return {key for key, field in schema_fields(schema) if field.metadata.get("path")}


def _set(config: DictConfig, key: str, value: Any, problems: list[str]) -> None:
    """Set one leaf on the typed schema, or say why it cannot be."""
    try:
        parent: Any = config
        for part in key.split(".")[:-1]:
            parent = parent[part]
        open_section = OmegaConf.get_type(parent) is dict
        OmegaConf.update(config, key, value, force_add=open_section)
    except (OmegaConfBaseException, TypeError, AttributeError) as error:
        schema = OmegaConf.get_type(config)
        known = [name for name, _ in schema_fields(typing.cast(type, schema))]
        if key in known and OmegaConf.is_list(OmegaConf.select(config, key)) and not isinstance(value, list):
            problems.append(f"{key}={value} must be a list: {key}=[{value}]")
        elif key in known:
            problems.append(f"{key}={value}: {str(error).splitlines()[0]}")
        else:
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else "; --help lists all keys"
            problems.append(f"{key} is no key of this command{hint}")
