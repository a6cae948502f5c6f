"""Training checkpoints: sharded, asynchronous, atomic, hash-checked. Knows nothing of models or optimizers.

    save ──stage (copy to the host)──> returns ┊ in the background: shards ──> manifest.json ──rename──> step-00000500
    find_latest ──verify every hash──> newest good folder ──restore──> tensors in place, on any number of ranks

A checkpoint is a folder of safetensors shards and a manifest with everything that is no tensor. It is written under a
hidden name, flushed, and renamed last, so a folder named step-* is complete; nothing in it is a pickle.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moltron.checkpoint.shards import Chunk, local_chunk, read_shards, write_shard
from moltron.common.manifest import fsync, read_json, sha256_file, write_json

MANIFEST = "manifest.json"
FORMAT = "moltron-checkpoint-1"
log = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint could not be written, or is not what it says."""


@dataclass(frozen=True)
class Manifest:
    """step: finished optimizer steps. metric: lower is better. meta: what the caller gave to `save`.

    tensors: name → [dtype, shape]; files: name → {"size", "sha256"}.
    """

    step: int
    metric: float | None
    meta: dict[str, Any]
    tensors: dict[str, list]
    files: dict[str, dict]


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of one checkpoint folder. Raises CheckpointError where it is missing or damaged."""
    file = Path(path) / MANIFEST
    try:
        content = read_json(file)
        checksum = content.pop("sha256")
        if content.pop("format") != FORMAT or checksum != _checksum(content):
            raise ValueError("its own checksum does not match")
        return Manifest(**content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: no readable checkpoint manifest ({error})") from error


def _checksum(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def list_checkpoints(folder: str | Path) -> list[Path]:
    """All finished checkpoints of a folder, oldest first; unverified."""
    return sorted((p for p in Path(folder).glob("step-*") if p.name[5:].isdecimal()), key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def problem_of(path: Path, rank: int = 0, world: int = 1) -> str | None:
    """Why a checkpoint cannot be used, naming the file; None if all is well. A rank hashes its share of the files."""
    try:
        files = read_manifest(path).files
        for name in sorted(files)[rank::world]:
            if sha256_file(path / name) != files[name]["sha256"]:
                return f"{path / name}: the content does not match its sha256 in {MANIFEST}"
    except (CheckpointError, OSError) as error:
        return str(error)
    return None


def find_good(folder: str | Path, best: bool = False) -> Path | None:
    """The newest checkpoint that verifies, or the best by metric (newest where none has a metric); one process."""
    paths = list_checkpoints(folder)[::-1]
    if best:
        paths.sort(key=_metric_of)  # stable: newest first among equals
    for path in paths:
        problem = problem_of(path)
        if problem is None:
            return path
        log.warning("Checkpoint refused: %s. Trying another one.", problem)
    return None


def _metric_of(path: Path) -> float:
    """Infinite where there is no metric or the manifest is damaged, so that these sort last."""
    try:
        metric = read_manifest(path).metric
    except CheckpointError:
        return math.inf
    return math.inf if metric is None else metric


def load_tensors(path: str | Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> Manifest:
    """Fill `tensors` in place from a checkpoint of any number of ranks; values are cast to the tensors' dtype.

    For each first part of a name (`model`, `optim`) that `tensors` has, the names, those of all ranks of `group`
    together, must be the checkpoint's exactly, so that nothing is left out by accident. Raises CheckpointError, on all
    ranks, listing names and shapes that differ.
    """
    manifest = read_manifest(path)
    groups = {name.split(".")[0] for name in tensors}
    stored = {name: entry for name, entry in manifest.tensors.items() if name.split(".")[0] in groups}
    problems = [f"{name} is not in the checkpoint" for name in tensors if name not in stored]
    problems += [
        f"{name} has shape {stored[name][1]} in the checkpoint, {list(tensor.shape)} here"
        for name, tensor in tensors.items()
        if name in stored and stored[name][1] != list(tensor.shape)
    ]
    ranks = _gather((list(tensors), problems), group)
    held = {name for names, _ in ranks for name in names}
    problems = list(dict.fromkeys(problem for _, found in ranks for problem in found))
    problems += [f"{name} is in the checkpoint only" for name in stored if name not in held]
    if problems:
        more = f" … and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(f"{path} does not fit: {'; '.join(problems[:8])}{more}")
    read_shards(Path(path), tensors, group)
    return manifest


def _gather(value: Any, group: dist.ProcessGroup | None) -> list:
    """The values of all ranks; None: of this one alone."""
    values: list = [value]
    if group is not None:
        values = [None] * dist.get_world_size(group)
        dist.all_gather_object(values, value, group=group)
    return values


class CheckpointManager:
    """Writes and finds the checkpoints of one run. All ranks make one and make the same calls in the same order.

    folder: shared by all ranks. keep_last: newest ones that stay (at least 1). keep_best: how many more stay by the
    lowest metric. Files travel through a gloo group of the manager's own, so that the background thread never shares
    one with the training.
    """

    def __init__(self, folder: str | Path, keep_last: int = 2, keep_best: int = 1):
        if keep_last < 1 or keep_best < 0:
            raise ValueError(f"checkpoint.keep_last={keep_last} must be ≥ 1 and checkpoint.keep_best={keep_best} ≥ 0")
        self.folder, self.keep_last, self.keep_best = Path(folder), keep_last, keep_best
        self.rank, self.world = 0, 1
        self.group: Any = None
        if dist.is_initialized() and dist.get_world_size() > 1:
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
            self.group = dist.new_group(backend="gloo")
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None
        self._staging: dict[str, Tensor] = {}  # host copies, kept from one save to the next
        self._refused: set[Path] = set()  # damaged ones found by this run: not counted when pruning

    def save(self, step: int, tensors: Mapping[str, Tensor], meta: dict[str, Any], metric: float | None = None) -> None:
        """Copy the state to the host and write it in the background.

        tensors: DTensors, which several ranks may share and others not have, or plain tensors that are the same on all
        ranks. meta: plain values for JSON, rank 0's is
        kept. Waits for the save before; raises CheckpointError if that one failed. The caller may change the tensors
        as soon as this returns.
        """
        self.wait()
        try:
            meta = json.loads(json.dumps(meta, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"the meta of a checkpoint holds plain values only: {error}") from error
        metric = None if metric is None or math.isnan(metric) else float(metric)
        content = {"step": step, "metric": metric, "meta": meta}
        staged = self._stage(tensors)
        begun = [name for name, (_, offset) in staged.items() if not any(offset)]  # each tensor begins on one rank
        entries = {n: [str(tensors[n].dtype).removeprefix("torch."), list(tensors[n].shape)] for n in begun}
        self._pending = self._thread.submit(self._write, step, staged, entries, content)

    def wait(self) -> None:
        """Until the last save is on disk. Raises CheckpointError, on all ranks, if it could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def find_latest(self) -> Path | None:
        """The newest checkpoint whose hashes all match, the same on every rank; a damaged one is named in a warning."""
        self.wait()
        if self.rank == 0:
            self._tidy()
        paths = _gather(list_checkpoints(self.folder), self.group)[0]
        for path in reversed(paths):
            problems = [p for p in _gather(problem_of(path, self.rank, self.world), self.group) if p]
            if not problems:
                return path
            self._refused.add(path)
            if self.rank == 0:
                log.warning("Checkpoint refused: %s. Trying the previous one.", "; ".join(dict.fromkeys(problems)))
        return None

    def restore(self, path: str | Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Fill `tensors` in place, see `load_tensors`; returns the meta."""
        self.wait()
        return load_tensors(path, tensors, self.group).meta

    def _stage(self, tensors: Mapping[str, Tensor]) -> dict[str, Chunk]:
        staged: dict[str, Chunk] = {}
        for index, name in enumerate(sorted(tensors)):
            chunk = local_chunk(tensors[name], owner=index % self.world, rank=self.rank)
            if chunk is not None:
                piece, offset = chunk
                buffer = self._staging.get(name)
                if buffer is None or buffer.shape != piece.shape or buffer.dtype != piece.dtype:
                    buffer = torch.empty(piece.shape, dtype=piece.dtype, pin_memory=piece.is_cuda)
                staged[name] = (buffer.copy_(piece, non_blocking=True), offset)
        self._staging = {name: buffer for name, (buffer, _) in staged.items()}
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        return staged

    def _write(self, step: int, staged: dict[str, Chunk], entries: dict[str, list], content: dict) -> None:
        partial = self.folder / f".step-{step:08d}.partial"
        shard = f"shard-{self.rank + 1:05d}-of-{self.world:05d}.safetensors"

        def prepare() -> None:
            if self.rank == 0:
                self._tidy()
                partial.mkdir(parents=True)

        def publish() -> None:
            if self.rank == 0:
                content["tensors"] = {name: entry for part, _ in written for name, entry in sorted(part.items())}
                content["files"] = {name: entry for _, part in written for name, entry in part.items()}
                self._publish(partial, content)

        def write() -> tuple[dict, dict]:
            return entries, {shard: write_shard(partial / shard, staged)} if staged else {}

        self._together(step, partial, prepare)
        written = self._together(step, partial, write)
        self._together(step, partial, publish)

    def _together(self, step: int, partial: Path, action: Callable[[], Any]) -> list:
        """Run `action` on each rank; if it fails on one, all of them raise, and nothing half-written stays."""
        result, failure = None, None
        try:
            result = action()
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
        results, failures = zip(*_gather((result, failure), self.group))
        if any(failures):
            if self.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self.folder}: "
                f"{'; '.join(dict.fromkeys(filter(None, failures)))}; if the disk is full, free some space. "
                "Earlier checkpoints are untouched."
            )
        return list(results)

    def _publish(self, partial: Path, content: dict) -> None:
        write_json(partial / MANIFEST, {"format": FORMAT, **content, "sha256": _checksum(content)})
        fsync(partial)
        final = partial.with_name(partial.name[1:].removesuffix(".partial"))
        replaced = partial.with_suffix(".replaced")
        if final.exists():  # the step once more: the old one steps aside, `_tidy` brings it back after a crash here
            os.rename(final, replaced)
        os.rename(partial, final)
        fsync(self.folder)
        self._refused.discard(final)
        shutil.rmtree(replaced, ignore_errors=True)
        self._prune(content["step"])

    def _prune(self, step: int) -> None:
        """Delete what neither keep_last nor keep_best holds. Those after `step`, an abandoned future, stay."""
        paths = [p for p in list_checkpoints(self.folder) if _step_of(p) <= step and p not in self._refused]
        ranked = [p for p in sorted(reversed(paths), key=_metric_of) if _metric_of(p) < math.inf]
        for path in set(paths) - {*paths[-self.keep_last :], *ranked[: self.keep_best]}:
            doomed = self.folder / f".{path.name}.partial"  # so that a half-deleted one never looks finished
            with contextlib.suppress(OSError):
                os.rename(path, doomed)
                shutil.rmtree(doomed)

    def _tidy(self) -> None:
        """Remove what an interrupted save left behind; rank 0, no save in flight."""
        for path in self.folder.glob(".step-*.replaced"):
            final = self.folder / path.name[1:].removesuffix(".replaced")
            if not final.exists():
                os.rename(path, final)
        for path in [*self.folder.glob(".step-*.replaced"), *self.folder.glob(".step-*.partial")]:
            shutil.rmtree(path, ignore_errors=True)
