"""What is wrong with a configuration, all at once, and what a resume may change; nothing is built for it.

    TrainConfig, processes ──validate──> sentences with the numbers and the fix        two TrainConfigs ──differences──>

Knows nothing of devices and files, but whether those that are named are there.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from moltron.config.schema import TrainConfig
from moltron.layers import fp8
from moltron.models.registry import architecture_problems, get_spec, make_config
from moltron.objectives import OBJECTIVES, Objective
from moltron.parallel.mesh import AXES, mesh_shape
from moltron.parallel.pipeline import SCHEDULES, num_stages, splits_backward
from moltron.parallel.precision import BLOCK, REDUCED, TRAINED, fits_fp8
from moltron.parallel.recompute import MODES as RECOMPUTE
from moltron.tokenizers import get_tokenizer
from moltron.train import optim, schedule

# What a resumed run may change: how long, how often, where and how fast, but not what is computed. The data may move:
# its fingerprint is compared instead of its path.
FREE = (
    "run_dir",
    "data.path",
    "data.cache_dir",
    "train.max_steps",
    "train.device",
    "train.compile",
    "train.log_every",
    "train.eval_every",
    "train.eval_packs",
    "train.eval_molecules",
    "train.early_stop",
    "train.nonfinite",
    "train.hang_minutes",
    "checkpoint.",
    "parallel.",
    "logging.",
)

# Numbers must be greater than 0, but for these; of those ELSEWHERE the mesh says what is wrong, and any seed will do.
MAY_BE_0 = (
    "train.eval_molecules",
    "optim.weight_decay",
    "optim.schedule.warmup_steps",
    "optim.schedule.constant_steps",
    "optim.schedule.min_lr",
    "checkpoint.keep_best",
)
ELSEWHERE = ("train.seed", *(f"parallel.{axis}" for axis in AXES))


def validate(config: TrainConfig, world: int) -> list[str]:
    """Everything that is wrong with a configuration, as sentences with the numbers and the fix; [] if nothing is."""
    problems = _model_problems(config)
    d, t, o, s = config.data, config.train, config.optim, config.optim.schedule
    problems += _number_problems(config)
    choices = {
        "optim.name": (o.name, optim.NAMES),
        "optim.state": (o.state, ("fp32", "fp8")),
        "optim.schedule.name": (s.name, schedule.NAMES),
        "train.precision": (t.precision, ("auto", *TRAINED)),
        "train.fp8_recipe": (t.fp8_recipe, fp8.RECIPES),
        "train.device": (t.device, ("auto", "cpu", "cuda")),
        "train.nonfinite": (t.nonfinite, ("stop", "skip")),
        "parallel.recompute": (config.parallel.recompute, RECOMPUTE),
        "parallel.reduce_dtype": (config.parallel.reduce_dtype, REDUCED),
        "parallel.pp_schedule": (config.parallel.pp_schedule, SCHEDULES),
        "logging.wandb": (config.logging.wandb, ("disabled", "offline", "online")),
    }
    problems += [
        f"{key}={value} is unknown: choose one of {', '.join(known)}"
        for key, (value, known) in choices.items()
        if value not in known
    ]
    try:
        _, replicate, shard, *_ = mesh_shape(config.parallel, world)
        world = replicate * shard
    except ValueError as error:
        problems.append(str(error))
    problems += _pack_problems(config, world)
    if s.name == "noam" and s.warmup_steps == 0:
        problems.append("optim.schedule.name=noam needs optim.schedule.warmup_steps > 0")
    if not (Path(d.path) / "train.arrow").is_file():
        problems.append(f"data.path={d.path} has no train.arrow: give a folder that `moltron prepare` wrote")
    if Path(config.run_dir).exists() and not Path(config.run_dir).is_dir():
        problems.append(f"run_dir={config.run_dir} is a file: give a folder, new or of a run to resume")
    return problems


def _number_problems(config: TrainConfig) -> list[str]:
    o = config.optim
    problems = [] if len(o.betas) == 2 else [f"optim.betas={o.betas} must be two numbers"]
    below_1 = {f"optim.betas[{i}]": beta for i, beta in enumerate(o.betas)} | {"optim.muon_momentum": o.muon_momentum}
    for key, value in (_flatten(dataclasses.asdict(config)) | below_1).items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or key in ELSEWHERE or key.startswith(("model.", "objective.")):
            continue
        if key in below_1:
            fits, limits = 0 <= value < 1, "be in [0, 1)"
        elif key in MAY_BE_0:
            fits, limits = value >= 0, "not be negative"
        else:
            fits, limits = value > 0, "be greater than 0"
        if not fits:
            problems.append(f"{key}={value} must {limits}")
    return problems


def _pack_problems(config: TrainConfig, world: int) -> list[str]:
    """world: ranks, or groups of ranks, that have packs of their own."""
    packs, pp = config.batch.packs, config.parallel.pp
    if 0 < packs < world:
        return [f"batch.packs={packs} leaves {world - packs} of {world} processes idle: set batch.packs={world}"]
    if packs > 0 and pp > 1 and packs % world:
        near = round(packs / world) * world
        return [f"batch.packs={packs} cannot be shared equally by {world} processes: set batch.packs={near}"]
    each, is_loop = packs // world, config.parallel.pp_schedule in ("interleaved", "zero_bubble")
    if pp > 1 and packs > 0 and (each < pp or (is_loop and each % pp)):
        wanted = f"{'a multiple of' if is_loop else 'at least'} parallel.pp={pp}"
        fix = -(-each // pp) * pp * world
        return [f"batch.packs={packs} gives a pipeline {each}, it needs {wanted}: set batch.packs={fix}"]
    return []


def _model_problems(config: TrainConfig) -> list[str]:
    family, architecture = model_section(config)
    if family is None and architecture and config.init is not None:
        given = ", ".join(f"model.{key}" for key in architecture)
        return [f"init={config.init} brings its model, which cannot be changed: leave out {given}"]
    if family is None:
        return ["model is missing: choose a preset with --config-name, or model=esm2_8M, or init=WHAT"]
    problems = architecture_problems(family, architecture)
    if problems:
        return problems
    model_config = make_config(family, architecture)
    known = get_spec(family).objectives
    if config.objective.name not in known:
        problems.append(f"objective.name={config.objective.name} does not suit {family}: choose {', '.join(known)}")
        return problems
    tokenizer, kind = get_tokenizer(model_config.tokenizer), OBJECTIVES[config.objective.name]
    problems += kind.problems(config.objective, tokenizer)
    if kind.streams == 2 and not model_config.num_decoder_layers:
        problems.append(f"model.num_decoder_layers=0: {config.objective.name} trains a decoder")
    end = model_config.max_positions if model_config.positions_end else None
    keys = ("batch.tokens", "data.max_length"), ("batch.decoder_tokens", "data.decoder_max_length")
    sizes = zip(config.batch.streams(kind.streams), config.data.limits(kind.streams), strict=True)
    for (pack, sequence), (tokens, length) in zip(keys, sizes):
        if end is not None and length > end:
            remedy = f"lower {sequence}, or raise model.max_positions (new weights only)"
            problems.append(f"{sequence}={length} > model.max_positions={end}: {remedy}")
        if 0 < tokens < length:
            problems.append(f"{pack}={tokens} < {sequence}={length}: raise {pack} or lower {sequence}")
    problems += _cut_problems(config, model_config, kind)
    if config.train.precision == "fp8":
        problems += _fp8_problems(config, model_config, kind)
    if config.data.max_length <= tokenizer.num_specials:
        specials = f"{tokenizer.num_specials} special tokens"
        problems.append(f"data.max_length={config.data.max_length} leaves no residue beside {specials}")
    return problems


def _cut_problems(config: TrainConfig, model_config: Any, objective: type[Objective]) -> list[str]:
    """What tensor, context and pipeline parallelism cannot cut."""
    pp, tp, cp, hidden = config.parallel.pp, config.parallel.tp, config.parallel.cp, model_config.hidden_size
    if max(pp, tp, cp) < 2:
        return []
    cut = {"model.num_heads": (model_config.num_heads, tp), "model.ffn_size": (model_config.ffn_size, tp)}
    tokens = dict(zip(("batch.tokens", "batch.decoder_tokens"), config.batch.streams(objective.streams), strict=False))
    cut |= {key: (size, tp * cp if key == "batch.tokens" else tp) for key, size in tokens.items()}
    width = model_config.num_heads * (getattr(model_config, "head_dim", 0) or hidden // model_config.num_heads)
    matrices = {"model.num_heads": (getattr(model_config, "relative_buckets", 0), model_config.num_heads)}
    if config.optim.name == "adamw":  # those in blocks, too
        matrices |= {"attention's width": (hidden, width), "model.ffn_size": (hidden, model_config.ffn_size)}
    if config.optim.state == "fp8":
        fits = {key: shape[1] for key, shape in matrices.items() if fits_fp8(shape)}
        cut |= {f"optim.state=fp8: {key} / {BLOCK}": (columns // BLOCK, tp) for key, columns in fits.items()}
    asked = f"parallel.tp={tp}" + (f" × cp={cp}" if cp > 1 else "")
    problems = [
        f"{key}={size} cannot be shared equally by {asked} ranks" for key, (size, n) in cut.items() if size % max(n, 1)
    ]
    blocks = model_config.num_layers + getattr(model_config, "num_decoder_layers", 0)
    if (stages := num_stages(config.parallel)) > blocks:
        problems.append(f"parallel.pp={pp} makes {stages} pipeline stages, the model has {blocks} blocks: lower it")
    asked = "parallel." + " × ".join(f"{axis}={n}" for axis, n in (("pp", pp), ("tp", tp), ("cp", cp)) if n > 1)
    if objective.reconstructs and config.train.eval_molecules:
        problems.append(f"{asked}: decoding is not cut: set train.eval_molecules=0")
    return problems + _split_problems(config, model_config)


def _split_problems(config: TrainConfig, model_config: Any) -> list[str]:
    """With what torch cannot split a backward, or loses gradients in it (docs/parallelism.md)."""
    p = config.parallel
    unfit = {
        "train.compile=true": config.train.compile,
        "parallel.reshard_after_forward=true": p.reshard_after_forward,
        f"parallel.recompute={p.recompute}": p.recompute != "none",
        "relative positions": getattr(model_config, "blocks_share_weights", False),
        # whose ranks send to themselves
        f"torch {torch.__version__}, but for 2.13": p.pp_schedule == "zbv" and torch.__version__ < "2.13",
    }
    found = [what for what, is_so in unfit.items() if is_so]
    if not splits_backward(p) or not found:
        return []
    return [f"parallel.pp_schedule={p.pp_schedule} is not for {', '.join(found)}: use 1f1b or interleaved"]


def _fp8_problems(config: TrainConfig, model_config: Any, objective: type[Objective]) -> list[str]:
    tp, cp = config.parallel.tp, config.parallel.cp
    tokens = dict(zip(("tokens", "decoder_tokens"), config.batch.streams(objective.streams), strict=False))
    sizes = {f"batch.{key}": (size, cp if key == "tokens" else 1) for key, size in tokens.items()}
    sizes |= {f"model.{key}": (getattr(model_config, key), tp) for key in ("hidden_size", "ffn_size")}
    problems = [
        f"{key}={size}{f' / {ranks} ranks' * (ranks > 1)} is not a multiple of {fp8.MULTIPLE}, as train.precision=fp8 "
        "needs"
        for key, (size, ranks) in sizes.items()
        if size % (fp8.MULTIPLE * ranks)
    ]
    if model_config.num_layers < 3:
        problems.append(f"model.num_layers={model_config.num_layers}: fp8 leaves out the first and the last, use bf16")
    return problems


def model_section(config: TrainConfig) -> tuple[str | None, dict[str, Any]]:
    architecture = dict(config.model)
    return architecture.pop("family", None), architecture


def differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """The keys that define a run and differ, as `key: old → new`."""
    before, after = _flatten(dataclasses.asdict(old)), _flatten(dataclasses.asdict(new))
    keys = [key for key in sorted(before | after) if not key.startswith(FREE)]
    missing = "(not set)"
    return [
        f"{key}: {before.get(key, missing)} → {after.get(key, missing)}"
        for key in keys
        if before.get(key, missing) != after.get(key, missing)
    ]


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat
