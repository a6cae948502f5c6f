"""`moltron train`: the loop around the step, until max_steps, an early stop or a signal.

    build_run ──> for each step: data ──TrainStep──> (a step late) Reading ──> metrics.jsonl, progress
                                      every so often: evaluate, checkpoint; nothing is saved before its step is checked

SIGTERM, SIGUSR1 (Slurm's warning) and Ctrl-C finish the step, save and return exit code 75: run the same command again
to go on; a second signal ends the process at once. Knows nothing of model families and file formats.
"""

from __future__ import annotations

import dataclasses
import math
import resource
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moltron.checkpoint.manager import CheckpointError
from moltron.common.lock import locked
from moltron.common.logging import Progress, get_logger, setup_logging
from moltron.common.manifest import write_json
from moltron.common.watchdog import doing, watched
from moltron.config.schema import TrainConfig
from moltron.data.loader import BatchLoader
from moltron.data.plan import BatchPlan
from moltron.infer.evaluate import Evaluator
from moltron.objectives import Limits, get_objective
from moltron.parallel import collectives
from moltron.parallel.apply import total_norm
from moltron.parallel.mesh import is_sharded
from moltron.train.metrics import Meter, Sinks, peak_flops, perplexity
from moltron.train.setup import Run, build_run, check_config
from moltron.train.signals import StopSignal
from moltron.train.step import LossScaler, NonFiniteError, Pending, Reading, TrainStep

FINISHED, INTERRUPTED = 0, 75  # 75 is EX_TEMPFAIL of sysexits.h: try again later

log = get_logger(__name__)


@dataclass
class TrainResult:
    """reason: finished | early_stop | interrupted. val_loss: of the last evaluation; best_val_loss: of all."""

    run_dir: Path
    step: int
    tokens: int
    reason: str
    train_loss: float | None
    val_loss: float | None
    best_val_loss: float | None

    @property
    def exit_code(self) -> int:
        return INTERRUPTED if self.reason == "interrupted" else FINISHED


def train(config: TrainConfig) -> TrainResult:
    """Train as configured, or go on where the run in `config.run_dir` was stopped.

    Raises ConfigError with all problems of the configuration, NonFiniteError (train.nonfinite=stop), ValueError where
    data, checkpoints or memory do not fit, or where another process trains in the run folder.
    """
    device, failed = collectives.init(config.train.device), True
    setup_logging(collectives.rank())
    try:
        source = check_config(config)
        lock = locked(Path(config.run_dir) / ".lock", collectives.rank(), collectives.broadcast_object)
        with StopSignal() as stop, lock:
            trainer = Trainer(build_run(config, device, source), stop)
            try:
                result = trainer.run()
            finally:
                trainer.close()
        failed = False
        return result
    except torch.cuda.OutOfMemoryError as error:
        b = config.batch
        raise ValueError(
            f"out of memory on {torch.cuda.get_device_name(device)}: lower batch.tokens={b.tokens} and raise "
            f"batch.packs={b.packs} in proportion (the step stays the same), or set parallel.recompute=full, "
            f"or use more GPUs, there with parallel.reshard_after_forward=true ({str(error).splitlines()[0]})"
        ) from error
    finally:
        collectives.shutdown(failed)


class Trainer:
    """One life of a run."""

    def __init__(self, run: Run, stop: StopSignal):
        self.run_, self.stop, self.config = run, stop, run.config
        config, meta = run.config, run.meta or {}
        self.step_done: int = meta.get("step", 0)
        self.position: dict[str, Any] | None = meta.get("position")
        self.best: list[float] = meta.get("best", [])  # the lowest validation losses, as many as are kept
        self.evals_since_best: int = meta.get("evals_since_best", 0)
        self.skipped: int = meta.get("skipped", 0)
        self.val_loss: float | None = meta.get("val_loss")
        self.saved_step = self.step_done if run.meta else None
        self.reading: Reading | None = None
        peak = peak_flops(torch.cuda.get_device_name(run.device)) if run.device.type == "cuda" else None
        peak = peak and peak * collectives.world_size()
        self.scaler = LossScaler(**meta.get("scaler", {})) if run.precision == "fp16" else None
        objective = get_objective(config.objective, run.tokenizer, config.train.seed)
        if run.compiled:
            objective.compile()
        totals = {name: meta.get(name, 0) for name in ("tokens", "decoder_tokens")[: objective.streams]}
        self.meter = Meter(totals, meta.get("seconds", 0.0), peak)
        self.train_step = TrainStep(
            run.model,
            objective.loss,
            run.optimizer,
            run.device,
            clip=config.optim.clip,
            scaler=self.scaler,
            skip_nonfinite=config.train.nonfinite == "skip",
            sync_each=config.parallel.reshard_after_forward,
            graphs=run.compiled and not is_sharded(config.parallel, collectives.world_size()),
        )
        tokens, limits = config.batch.streams(objective.streams), config.data.limits(objective.streams)
        plan = BatchPlan(
            run.train_store,
            objective,
            tokens,
            Limits(*limits),
            window=config.data.window,
            seed=config.train.seed,
            clusters=config.data.clusters,
        )
        self.loader = BatchLoader(
            plan,
            run.train_store,
            run.tokenizer,
            packs=config.batch.packs,
            rank=collectives.data_rank(),
            world=collectives.data_world_size(),
            position=self.position,
            workers=2 if run.device.type == "cuda" else 0,
            pin=run.device.type == "cuda",
        )
        self.evaluator = None
        if run.val_store is not None:
            self.evaluator = Evaluator(
                run.val_store,
                run.tokenizer,
                config.objective,
                run.device,
                tokens=tokens,
                limits=Limits(*limits),
                packs=config.train.eval_packs,
                molecules=config.train.eval_molecules,
            )
        self.sinks = None
        if collectives.rank() == 0:
            self.sinks = Sinks(run.folder, config.logging, dataclasses.asdict(config), self.step_done)

    def close(self) -> None:
        """Also after an error: what is being written is finished."""
        self.train_step.close()
        try:
            self.run_.manager.wait()
        except CheckpointError as error:
            log.error("%s", error)
        if self.sinks is not None:
            self.sinks.close()

    def run(self) -> TrainResult:
        last = self.config.train.max_steps
        if self.step_done >= last:
            log.info("Step %d of train.max_steps=%d is done: nothing left to do", self.step_done, last)
            return self._result("finished")
        self._announce()
        minutes, watch = self.config.train.hang_minutes, nullcontext()
        if collectives.is_launched():
            watch = watched(self.run_.places, collectives.rank(), collectives.world_size(), minutes)
        with watch, Progress("train", last, self.step_done, enabled=self.sinks is not None) as progress:
            reason = self._steps(last, progress)
        with self.meter.part("checkpoint"):
            self.run_.manager.wait()
        if self.sinks is not None:
            self.sinks.draw()
        log.info("%s at step %d of %d; the run is in %s", reason, self.step_done, last, self.run_.folder)
        return self._result(reason)

    def _steps(self, last: int, progress: Progress) -> str:
        waiting: list[Pending] = []  # at most one step that the device may still be working on
        reason = "finished"
        steps = iter(self.loader)
        self.meter.reset(time.perf_counter())
        while self.step_done < last and reason == "finished":
            step = self.step_done + 1
            doing(f"step {step}: loading data")
            with self.meter.part("data"):
                data = next(steps)
            doing(f"step {step}: computing")
            waiting.append(self.train_step(step, data.batches, data.count, self.run_.rate(step), self.stop.received))
            self.step_done, self.position = step, data.position
            due, stop = self._due(step, last), False
            while len(waiting) > (0 if due or self.train_step.waits else 1):
                pending = waiting.pop(0)
                stop |= self._finish(pending, progress, defer_line=due and not waiting)
            if due:
                reason = self._evaluate_and_save(step, last)
                progress.update(step, self._text())
            stop |= collectives.world_size() == 1 and self.stop.received
            if stop and reason == "finished" and step < last:
                reason = "interrupted"
        for pending in waiting:
            self._finish(pending, progress)
        if self.saved_step != self.step_done:
            self._save(None)
        steps.close()  # type: ignore[attr-defined]
        return reason

    def _due(self, step: int, last: int) -> bool:
        config = self.config
        return step == last or step % config.train.eval_every == 0 or step % config.checkpoint.every == 0

    def _finish(self, pending: Pending, progress: Progress, defer_line: bool = False) -> bool:
        """Read a step's numbers: check, count, write its line. Returns whether a rank was asked to stop."""
        doing(f"step {pending.step}: waiting for the device")
        reading = self.reading = pending.read()
        if reading.skipped:
            self.skipped += 1
        if not reading.finite and self.config.train.nonfinite == "stop" and not reading.skipped:
            raise NonFiniteError(self._report(reading))
        if not reading.finite and (self.scaler is None or not math.isfinite(reading.loss)):
            log.warning("Step %d skipped: loss %g, gradient norm %g", reading.step, reading.loss, reading.grad_norm)
        self.meter.add(reading.counts, reading.flops, reading.seconds)
        if not defer_line:
            if reading.step % self.config.train.log_every == 0:
                self._write(self._line(reading))
            progress.update(reading.step, self._text())
        return reading.stop

    def _evaluate_and_save(self, step: int, last: int) -> str:
        """What is due after `step`, whose reading is in; returns the reason to stop, or "finished" to go on.

        The line is written before the checkpoint: a resume drops lines after its step, but could not add a lost one.
        """
        config, reading = self.config, self.reading
        assert reading is not None
        val_loss, is_kept, reason = None, False, "finished"
        is_eval = self.evaluator is not None and (step == last or step % config.train.eval_every == 0)
        is_logged = is_eval or step % config.train.log_every == 0 or step == last
        line = self._line(reading) if is_logged else {}  # its window ends here, before the evaluation
        if self.evaluator is not None and is_eval:
            with self.meter.part("eval"):
                val_loss = self.val_loss = self.evaluator.loss(self.run_.model)
                generated = self.evaluator.generated(self.run_.model)
            if not math.isfinite(val_loss):
                raise NonFiniteError(f"step {step}: the validation loss is {val_loss}: {self._advice()}")
            line |= {"val_loss": val_loss, "val_perplexity": perplexity(val_loss)}
            line |= {f"val_{name}": share for name, share in generated.items()}
            self.evals_since_best = 0 if val_loss < min(self.best, default=math.inf) else self.evals_since_best + 1
            self.best = sorted([*self.best, val_loss])[: max(config.checkpoint.keep_best, 1)]
            is_kept = val_loss in self.best and config.checkpoint.keep_best > 0
            if config.train.early_stop is not None and self.evals_since_best >= config.train.early_stop:
                reason = "early_stop"
        if line:
            self._write(line)
        if step == last or step % config.checkpoint.every == 0 or is_kept or reason != "finished":
            self._save(val_loss)
        if val_loss is not None and self.sinks is not None:
            self.sinks.draw()
        return reason

    def _save(self, val_loss: float | None) -> None:
        doing(f"step {self.step_done}: saving a checkpoint")
        with self.meter.part("checkpoint"):
            tensors = self.run_.tensors(copies=False)
            weights = {name: p.detach() for p, name in self.run_.optimizer.names.items()}
            norm = total_norm(self.run_.model, weights)
            if not math.isfinite(norm.item()):
                raise NonFiniteError(f"step {self.step_done}: weights are not finite: {self._advice()}")
            meta = {
                "model": {"family": self.run_.spec.name, "config": dataclasses.asdict(self.run_.architecture)},
                "step": self.step_done,
                "position": self.position,
                **self.meter.totals,
                "seconds": self.meter.trained,
                "updates": self.run_.optimizer.updates,
                "skipped": self.skipped,
                "best": self.best,
                "evals_since_best": self.evals_since_best,
                "val_loss": self.val_loss,
            }
            if self.scaler is not None:
                meta["scaler"] = {"scale": self.scaler.scale, "good": self.scaler.good}
            self.run_.manager.save(self.step_done, tensors, meta, val_loss)
            self.saved_step = self.step_done

    def _write(self, line: dict[str, Any]) -> None:
        if self.sinks is not None:
            self.sinks.write(line)

    def _line(self, reading: Reading) -> dict[str, Any]:
        """One metrics line, not evaluated yet; the next window begins."""
        return {
            "step": reading.step,
            "train_loss": _number(reading.loss),
            "val_loss": None,
            "val_perplexity": None,
            "lr": reading.lr,
            "grad_norm": _number(reading.grad_norm),
            **self.meter.totals,
            "skipped": self.skipped,
            **({"loss_scale": self.scaler.scale} if self.scaler is not None else {}),
            **self.meter.rates(),
            "memory": _peak_memory(self.run_.device),
        }

    def _text(self) -> str:
        """What stands beside the bar."""
        parts = []
        if self.reading is not None:
            parts.append(f"loss {self.reading.loss:.3f}")
        if self.val_loss is not None:
            parts.append(f"val ppl {perplexity(self.val_loss):.2f}")
        if self.sinks is not None and self.sinks.lines:
            parts.append(f"{self.sinks.lines[-1].get('tokens_per_second', 0):,.0f} tok/s")
        return "  ".join(parts)

    def _announce(self) -> None:
        run, b, held_out = self.run_, self.config.batch, self.run_.val_store or ()
        log.info(
            f"{run.spec.name} on {collectives.world_size()} × {run.device.type} in {run.precision}: "
            f"step {self.step_done} to {self.config.train.max_steps}, {b.packs} packs of {b.tokens} tokens a step, "
            f"{len(run.train_store)} training and {len(held_out)} validation records"
        )

    def _report(self, reading: Reading) -> str:
        """Say which records made a step's loss or gradient useless; all of this rank's go to a file."""
        bad = [i for i, loss in enumerate(reading.packs) if not math.isfinite(loss)]
        packs = [
            {"loss": _number(reading.packs[i]), "records": self.run_.train_store.ids(reading.records[i])}
            for i in (bad or range(len(reading.packs)))
        ]
        path = self.run_.folder / f"nonfinite_step{reading.step}_rank{collectives.rank()}.json"
        write_json(path, {"step": reading.step, "grad_norm": _number(reading.grad_norm), "packs": packs})
        ids = [name for pack in packs for name in pack["records"]]
        shown = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
        return (
            f"step {reading.step}: loss {reading.loss}, gradient norm {reading.grad_norm}; "
            f"the batch's records are {shown} (all in {path}). {self._advice()}"
        )

    def _advice(self) -> str:
        saved = f"step {self.saved_step} is the last checkpoint" if self.saved_step else "no checkpoint was written yet"
        return (
            f"{saved}; run again with train.nonfinite=skip to leave such steps out, or begin a new run with a lower "
            "optim.lr, a longer warm-up or train.precision=fp32"
        )

    def _result(self, reason: str) -> TrainResult:
        loss, best = self.reading.loss if self.reading is not None else None, min(self.best, default=None)
        tokens = self.meter.totals["tokens"]
        return TrainResult(self.run_.folder, self.step_done, tokens, reason, loss, self.val_loss, best)


def _number(value: float) -> float | None:
    """JSON has no nan and no infinity."""
    return value if math.isfinite(value) else None


def _peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on the GPU, or that the process took on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
