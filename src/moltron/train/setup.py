"""From a configuration to all that a training loop needs; the run folder's birth certificate.

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
from moltron.common import watchdog
from moltron.common.logging import get_logger
from moltron.common.manifest import read_json, staged_file, write_json
from moltron.config.compose import ConfigError, dump_config, load_yaml
from moltron.config.schema import TrainConfig
from moltron.data.store import Store
from moltron.models.registry import build_model, compiles, get_spec, make_config
from moltron.models.spec import ModelSpec, num_parameters
from moltron.parallel import collectives
from moltron.parallel.apply import assign_full, parallelize, reshard
from moltron.parallel.pipeline import pipeline_of, splits_backward
from moltron.parallel.precision import TRAINED, resolve_precision
from moltron.tokenizers import Tokenizer, get_tokenizer
from moltron.train import optim, schedule
from moltron.train.validate import differences, model_section, validate

log = get_logger(__name__)


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

    @property
    def places(self) -> Path:
        """Where the ranks write what they are doing, for the watchdog."""
        return self.folder / ".ranks"

    def tensors(self, copies: bool = True) -> dict[str, Tensor]:
        """What a checkpoint holds, live: `model.<name>` and `optim.<kind>.<name>`.

        copies: also what this rank has of another stage's, which that one saves.
        """
        reshard(self.model)
        weights = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        pipeline = pipeline_of(self.model)
        others = () if copies or pipeline is None else tuple(f".{name}" for name in pipeline.copies)
        return {n: t for n, t in (weights | self.optimizer.state_tensors()).items() if not n.endswith(others)}


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
    family, architecture = model_section(config)
    assert family is not None
    model_config = make_config(family, architecture)
    tokenizer = get_tokenizer(model_config.tokenizer)
    stores = _open_stores(config, tokenizer.alphabet)
    _check_same_run(config, folder, stores)

    spec, precision = get_spec(family), resolve_precision(config.train.precision, device, TRAINED)
    can_compile = compiles(model_config, precision, device.type) and not splits_backward(config.parallel)
    if config.train.compile and not can_compile:
        needs = "CUDA, train.precision=bf16, fp16 or fp8, no relative biases, and heads of a multiple of 8 up to 128"
        raise ConfigError([f"train.compile=true needs {needs}: leave it out"])
    if config.parallel.cpu_offload and device.type != "cuda":
        raise ConfigError(["parallel.cpu_offload=true needs CUDA: here all is on the host already"])
    if precision == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ConfigError([f"train.precision=fp8: {torch.cuda.get_device_name(device)} has no FP8 units; use bf16"])
    if precision == "fp8" and device.type == "cpu":
        log.info("train.precision=fp8 on a CPU is for testing the numbers: simulated, many times slower than bf16")
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
        tokenizer=tokenizer,
        train_store=stores["train"],
        val_store=stores.get("val"),
        optimizer=optim.Optimizer(
            model, spec.plan, config.optim, schedule.peak(sched, rate), compile=config.train.compile is not False
        ),
        rate=rate,
        manager=CheckpointManager(folder / "checkpoints", config.checkpoint.keep_last, config.checkpoint.keep_best),
        meta=None,
        compiled=compiled,
        parameters=parameters,
    )
    run.meta = _fill(run, source)
    if collectives.rank() == 0:
        _certify(run)
        watchdog.forget(run.places)
    collectives.barrier()
    return run


def _warn(config: TrainConfig) -> None:
    s, steps = config.optim.schedule, config.train.max_steps
    if s.name != "constant" and s.warmup_steps >= steps:
        log.warning(
            f"The warm-up (optim.schedule.warmup_steps={s.warmup_steps}) outlasts the run (train.max_steps={steps}): "
            "the rate never reaches optim.lr."
        )
    packs, world = config.batch.packs, collectives.data_world_size()
    if packs % world:
        whole = -(-packs // world) * world
        log.warning("batch.packs=%d on %d processes: a step takes as long as one of %d packs", packs, world, whole)


def _open_stores(config: TrainConfig, alphabet: str) -> dict[str, Store]:
    """train and, where there is one, val. Rank 0 goes first: it may have to write an index. alphabet: the model's."""
    stores: dict[str, Store] = {}
    for is_turn in (collectives.rank() == 0, collectives.rank() != 0):
        if is_turn:
            for split in ("train", "val"):
                file = Path(config.data.path) / f"{split}.arrow"
                if file.is_file():
                    stores[split] = Store.open(file, config.data.cache_dir)
        collectives.barrier()
    if stores["train"].alphabet != alphabet:
        raise ValueError(f"{stores['train'].path} holds {stores['train'].alphabet}s, the model reads {alphabet}s")
    if not len(stores["train"]):  # said before the run is bound to this data
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
    folder = run.folder / "checkpoints"
    if broken := list_checkpoints(folder):
        raise ValueError(f"none of the {len(broken)} checkpoints in {folder} is whole: nothing to resume from")
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
    with staged_file(run.folder / "config.yaml") as partial:
        partial.write_text(dump_config(run.config), encoding="utf-8")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """The commit of the checkout that this package runs from, with `-dirty`; None where it is installed."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
