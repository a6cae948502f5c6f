"""From a configuration to all that a training loop needs; the run folder's birth certificate; what a resume may change.

    TrainConfig ──check_config: all problems at once──> stores, tokenizer, objective ──> plan, loader
                    model on meta ──parallelize──> checkpoint | init=WHAT | init_weights(seed) ──> optimizer ──> Run

A run folder holds config.yaml, manifest.json (one entry a life of the run), metrics.jsonl, checkpoints/. Knows nothing
of steps and time.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import moltron
from moltron.checkpoint.manager import CheckpointManager, list_checkpoints
from moltron.checkpoint.weights import Source, fill, find_source
from moltron.common.logging import get_logger
from moltron.common.manifest import read_json, write_json
from moltron.config.compose import ConfigError, dump_config, load_yaml
from moltron.config.schema import TrainConfig
from moltron.data.store import Store
from moltron.layers import fp8
from moltron.models.registry import architecture_problems, build_model, get_spec, make_config
from moltron.models.spec import ModelSpec, num_parameters
from moltron.objectives import OBJECTIVES, Objective
from moltron.parallel import collectives
from moltron.parallel.apply import assign_full, parallelize, reshard
from moltron.parallel.mesh import mesh_shape
from moltron.parallel.pipeline import SCHEDULES, num_stages, pipeline_of, splits_backward
from moltron.parallel.precision import DTYPES, REDUCED, resolve_precision
from moltron.parallel.recompute import MODES as RECOMPUTE
from moltron.tokenizers import Tokenizer, get_tokenizer
from moltron.train import optim, schedule

log = get_logger(__name__)

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


@dataclass
class Run:
    """Everything of a run that is built once."""

    config: TrainConfig
    folder: Path
    device: torch.device
    precision: str
    spec: ModelSpec
    architecture: Any  # the family's config dataclass
    model: nn.Module
    tokenizer: Tokenizer
    train_store: Store
    val_store: Store | None
    optimizer: optim.Optimizer
    rate: schedule.Schedule
    manager: CheckpointManager
    meta: dict[str, Any] | None  # of the checkpoint that was restored
    compiled: bool  # the units; then packs can be recorded as CUDA graphs, too
    parameters: int  # of all ranks

    def tensors(self, copies: bool = True) -> dict[str, Tensor]:
        """What a checkpoint holds, live: `model.<name>` and `optim.<kind>.<name>`.

        copies: also what this rank has of another stage's, which that one saves.
        """
        reshard(self.model)
        weights = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        pipeline = pipeline_of(self.model)
        others = () if copies or pipeline is None else tuple(f".{name}" for name in pipeline.copies)
        return {n: t for n, t in (weights | self.optimizer.state_tensors()).items() if not n.endswith(others)}


def validate(config: TrainConfig, world: int) -> list[str]:
    """Everything that is wrong with a configuration, as sentences with the numbers and the fix; [] if nothing is."""
    problems = _model_problems(config)
    b, d, t, o, s, c = config.batch, config.data, config.train, config.optim, config.optim.schedule, config.checkpoint
    positive = {
        "batch.tokens": b.tokens,
        "batch.decoder_tokens": b.decoder_tokens,
        "batch.packs": b.packs,
        "data.max_length": d.max_length,
        "data.decoder_max_length": d.decoder_max_length,
        "data.window": d.window,
        "train.max_steps": t.max_steps,
        "train.log_every": t.log_every,
        "train.eval_every": t.eval_every,
        "train.eval_packs": t.eval_packs,
        "train.early_stop": t.early_stop,
        "train.hang_minutes": t.hang_minutes,
        "checkpoint.every": c.every,
        "checkpoint.keep_last": c.keep_last,
        "parallel.recompute_every": config.parallel.recompute_every,
        "parallel.pp_stages": config.parallel.pp_stages,
        "optim.lr": o.lr,
        "optim.muon_lr": o.muon_lr,
        "optim.eps": o.eps,
        "optim.clip": o.clip,
        "optim.schedule.decay_steps": s.decay_steps,
    }
    problems += [
        f"{key}={value} must be greater than 0"
        for key, value in positive.items()
        if value is not None and not value > 0
    ]
    at_least_0 = {
        "train.eval_molecules": t.eval_molecules,
        "optim.weight_decay": o.weight_decay,
        "optim.schedule.warmup_steps": s.warmup_steps,
        "optim.schedule.constant_steps": s.constant_steps,
        "optim.schedule.min_lr": s.min_lr,
        "checkpoint.keep_best": c.keep_best,
    }
    problems += [f"{key}={value} must not be negative" for key, value in at_least_0.items() if not value >= 0]
    below_1 = {"optim.betas[0]": o.betas[0], "optim.betas[1]": o.betas[1], "optim.muon_momentum": o.muon_momentum}
    problems += [f"{key}={value} must be in [0, 1)" for key, value in below_1.items() if not 0 <= value < 1]
    choices = {
        "optim.name": (o.name, optim.NAMES),
        "optim.schedule.name": (s.name, schedule.NAMES),
        "train.precision": (t.precision, ("auto", *DTYPES, "fp8")),
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
    family, architecture = _model_section(config)
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
    for key, length in zip(("data.max_length", "data.decoder_max_length"), config.data.limits(kind.streams)):
        if end is not None and length > end:
            problems.append(
                f"{key}={length} > model.max_positions={end}: lower {key}, or raise model.max_positions (new weights "
                "only)"
            )
    for key, tokens, length in zip(
        ("tokens", "decoder_tokens"), config.batch.streams(kind.streams), config.data.limits(kind.streams)
    ):
        if 0 < tokens < length:
            of_sequence = "data.max_length" if key == "tokens" else "data.decoder_max_length"
            problems.append(f"batch.{key}={tokens} < {of_sequence}={length}: raise batch.{key} or lower {of_sequence}")
    problems += _cut_problems(config, model_config, kind)
    if config.train.precision == "fp8":
        problems += _fp8_problems(config, model_config, kind)
    if config.data.max_length <= tokenizer.num_specials:
        problems.append(
            f"data.max_length={config.data.max_length} leaves no residue beside {tokenizer.num_specials} special tokens"
        )
    return problems


def _cut_problems(config: TrainConfig, model_config: Any, objective: type[Objective]) -> list[str]:
    """What tensor, context and pipeline parallelism cannot cut."""
    pp, tp, cp = config.parallel.pp, config.parallel.tp, config.parallel.cp
    if max(pp, tp, cp) < 2:
        return []
    cut = {"model.num_heads": (model_config.num_heads, tp), "model.ffn_size": (model_config.ffn_size, tp)}
    tokens = dict(zip(("batch.tokens", "batch.decoder_tokens"), config.batch.streams(objective.streams), strict=False))
    cut |= {key: (size, tp * cp if key == "batch.tokens" else tp) for key, size in tokens.items()}
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
    }
    found = [what for what, is_so in unfit.items() if is_so]
    if not splits_backward(p) or not found:
        return []
    return [f"parallel.pp_schedule={p.pp_schedule} is not for {', '.join(found)}: use 1f1b or interleaved"]


def _fp8_problems(config: TrainConfig, model_config: Any, objective: type[Objective]) -> list[str]:
    if config.parallel.tp > 1:
        return [f"parallel.tp={config.parallel.tp}: train.precision=fp8 does not cut matrices; use dp_shard, cp or pp"]
    tokens = dict(zip(("tokens", "decoder_tokens"), config.batch.streams(objective.streams), strict=False))
    sizes = {f"batch.{key}": size // (config.parallel.cp if key == "tokens" else 1) for key, size in tokens.items()}
    sizes |= {"model.hidden_size": model_config.hidden_size, "model.ffn_size": model_config.ffn_size}
    problems = [
        f"{key}={size}{' for each of the cp ranks' * (config.parallel.cp > 1)} is not a multiple of {fp8.MULTIPLE}, "
        "as train.precision=fp8 needs"
        for key, size in sizes.items()
        if size % fp8.MULTIPLE
    ]
    if model_config.num_layers < 3:
        problems.append(f"model.num_layers={model_config.num_layers}: fp8 leaves out the first and the last, use bf16")
    return problems


def _model_section(config: TrainConfig) -> tuple[str | None, dict[str, Any]]:
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


def check_config(config: TrainConfig) -> Source | None:
    """Find the model of a run to resume, or of `init`, which is returned. Raises ConfigError with all problems."""
    folder, source = Path(config.run_dir), None
    if not config.model and (folder / "config.yaml").is_file():
        config.model = load_yaml(TrainConfig, folder / "config.yaml").model
    if not config.model and config.init is not None:
        source = find_source(config.init)
        config.model = {"family": source.spec.name, **dataclasses.asdict(source.config)}
    problems = validate(config, collectives.world_size())
    if problems:
        raise ConfigError(problems)
    return source


def build_run(config: TrainConfig, device: torch.device, source: Source | None) -> Run:
    """Build and fill everything. source: see `check_config`. Raises ValueError where files do not fit."""
    folder = Path(config.run_dir)
    collectives.share_packs(config.parallel.cp * config.parallel.tp, config.parallel.pp)
    _warn(config)
    stores = _open_stores(config)
    _check_same_run(config, folder, stores)

    family, architecture = _model_section(config)
    assert family is not None
    spec, precision = get_spec(family), config.train.precision
    precision = precision if precision == "fp8" else resolve_precision(precision, device)
    model_config = make_config(family, architecture)
    # elsewhere attention goes by lengths, new in each pack
    can_compile = device.type == "cuda" and precision != "fp32" and getattr(model_config, "trains_compiled", True)
    can_compile &= not splits_backward(config.parallel)
    if config.train.compile and not can_compile:
        needs = "CUDA, train.precision=bf16, fp16 or fp8, and a model without relative biases"
        raise ConfigError([f"train.compile=true needs {needs}: leave it out"])
    if config.parallel.cpu_offload and device.type != "cuda":
        raise ConfigError(["parallel.cpu_offload=true needs CUDA: here all is on the host already"])
    if precision == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ConfigError([f"train.precision=fp8: {torch.cuda.get_device_name(device)} has no FP8 units; use bf16"])
    compiled = can_compile if config.train.compile is None else config.train.compile
    whole = build_model(family, architecture)
    parameters = num_parameters(whole)
    model = parallelize(
        whole,
        spec.plan,
        device,
        precision=precision,
        compile=compiled,
        config=config.parallel,
        fp8_recipe=config.train.fp8_recipe,
    )
    sched = config.optim.schedule
    rate = schedule.build_schedule(sched, config.optim.lr, config.train.max_steps, model_config.hidden_size)
    run = Run(
        config=config,
        folder=folder,
        device=device,
        precision=precision,
        spec=spec,
        architecture=model_config,
        model=model,
        tokenizer=get_tokenizer(model_config.tokenizer),
        train_store=stores["train"],
        val_store=stores.get("val"),
        optimizer=optim.Optimizer(model, spec.plan, config.optim, schedule.peak(sched, rate)),
        rate=rate,
        manager=CheckpointManager(folder / "checkpoints", config.checkpoint.keep_last, config.checkpoint.keep_best),
        meta=None,
        compiled=compiled,
        parameters=parameters,
    )
    run.meta = _fill(run, source)
    if collectives.rank() == 0:
        _certify(run)
    collectives.barrier()
    return run


def _warn(config: TrainConfig) -> None:
    s, steps = config.optim.schedule, config.train.max_steps
    if s.name != "constant" and s.warmup_steps >= steps:
        log.warning(
            "The warm-up (optim.schedule.warmup_steps=%d) outlasts the run (train.max_steps=%d): "
            "the rate never reaches optim.lr.",
            s.warmup_steps,
            steps,
        )
    packs, world = config.batch.packs, collectives.data_world_size()
    if packs % world:
        whole = -(-packs // world) * world
        log.warning("batch.packs=%d on %d processes: a step takes as long as one of %d packs", packs, world, whole)


def _open_stores(config: TrainConfig) -> dict[str, Store]:
    """train and, where there is one, val. Rank 0 goes first: it may have to write an index."""
    stores: dict[str, Store] = {}
    for is_turn in (collectives.rank() == 0, collectives.rank() != 0):
        if is_turn:
            for split in ("train", "val"):
                file = Path(config.data.path) / f"{split}.arrow"
                if file.is_file():
                    stores[split] = Store.open(file, config.data.cache_dir)
        collectives.barrier()
    alphabet = get_tokenizer(make_config(*_model_section(config)).tokenizer).alphabet  # type: ignore[arg-type]
    if stores["train"].alphabet != alphabet:
        raise ValueError(f"{stores['train'].path} holds {stores['train'].alphabet}s, the model reads {alphabet}s")
    if not len(stores["train"]):
        raise ValueError(f"{stores['train'].path} has no records: prepare the data again")
    if "val" in stores and not len(stores["val"]):
        del stores["val"]
    return stores


def _check_same_run(config: TrainConfig, folder: Path, stores: dict[str, Store]) -> None:
    """Refuse to go on with another configuration or other data than the run began with."""
    saved = folder / "config.yaml"
    if not saved.is_file():
        if list_checkpoints(folder / "checkpoints"):
            raise ValueError(f"{folder} has checkpoints but no config.yaml: restore it, or choose another run_dir")
        return
    before = load_yaml(TrainConfig, saved)
    found = differences(before, config)
    steps, sched = (before.train.max_steps, config.train.max_steps), config.optim.schedule
    if steps[0] != steps[1] and sched.decay_steps is None and sched.name in schedule.DECAYING:
        log.warning(
            "train.max_steps %d → %d moves the end of the %s decay (optim.schedule.decay_steps)", *steps, sched.name
        )
    data = read_json(folder / "manifest.json")["data"] if (folder / "manifest.json").is_file() else {}
    for split, store in stores.items():
        if data.get(split, store.fingerprint) != store.fingerprint:
            found.append(f"data.path ({split}.arrow): {data[split][:12]}… → {store.fingerprint[:12]}…")
    if found:
        raise ConfigError(
            [
                *(f"{difference} is not what the run in {folder} began with" for difference in found),
                f"to resume, take these back; to start anew choose another run_dir; to go on from its weights in a new "
                f"run, set init={folder} and another run_dir",
            ]
        )


def _fill(run: Run, source: Source | None) -> dict[str, Any] | None:
    """Give the model its numbers: a checkpoint's, `init`'s, or the seed's. Returns the meta of the first."""
    latest = run.manager.find_latest()
    if latest is not None:
        meta = run.manager.restore(latest, run.tensors())
        run.optimizer.set_updates(meta["updates"])
        log.info("Resuming from %s", latest)
        return meta
    broken = list_checkpoints(run.folder / "checkpoints")
    if broken:
        raise ValueError(
            f"none of the {len(broken)} checkpoints in {broken[-1].parent} is whole: nothing to resume from"
        )
    if run.config.init is None:
        run.model.init_weights(run.config.train.seed, assign=assign_full)  # type: ignore[operator]
        return None
    source = source or find_source(run.config.init)
    ours, theirs = dataclasses.asdict(run.architecture), dataclasses.asdict(source.config)
    if source.spec.name != run.spec.name or ours != theirs:
        found = [f"model.{k}: {theirs.get(k)} → {v}" for k, v in ours.items() if theirs.get(k) != v]
        names = f"{source.spec.name} is not {run.spec.name}; " if source.spec.name != run.spec.name else ""
        raise ValueError(f"init={run.config.init} is another model: {names}{', '.join(found)}: change model or init")
    if why := fill(source, dict(run.model.named_parameters()), assign_full, run.manager.restore):
        raise ValueError(f"init={run.config.init}: {why}")
    log.info("Starting from the weights of %s", run.config.init)
    return None


def _certify(run: Run) -> None:
    """Write config.yaml and manifest.json; each life of the run adds an entry to `lives`. Never the environment."""
    run.folder.mkdir(parents=True, exist_ok=True)
    path = run.folder / "manifest.json"
    lives = read_json(path)["lives"] if path.is_file() else []
    lives.append(
        {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "from_step": run.meta["step"] if run.meta else 0,
            "command": sys.argv,
            "processes": collectives.world_size(),
            "device": _device_name(run.device),
            "cpus": os.cpu_count(),
            "host_memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            "precision": run.precision,
            "versions": {
                "moltron": moltron.__version__,
                "git": _git_commit(),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "cuda": torch.version.cuda,
                "platform": platform.platform(),
            },
        }
    )
    stores = {"train": run.train_store, "val": run.val_store}
    content = {
        "model": run.spec.name,
        "parameters": run.parameters,
        "data": {split: store.fingerprint for split, store in stores.items() if store is not None},
        "records": {split: len(store) for split, store in stores.items() if store is not None},
        "lives": lives,
    }
    write_json(path, content)
    partial = run.folder / "config.yaml.partial"
    partial.write_text(dump_config(run.config), encoding="utf-8")
    os.replace(partial, run.folder / "config.yaml")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """The commit of the checkout that this package runs from, with `-dirty`; None where it is installed."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
