"""Layouts of GPUs, FP8 and what else a key can say: speed, losses, and measured peaks beside `moltron plan`'s.

    python benchmarks/layouts_gpu.py [--rows "esm2_650M 2 parallel.tp=2 batch.tokens=32768" …] [--store STORE]
    python benchmarks/layouts_gpu.py --merge a.json b.json --output c.md      # one page of several runs
    python benchmarks/layouts_gpu.py --device cpu --tiny     # does every row run at all? few blocks, few tokens, gloo

A row is a model (a preset), a number of GPUs and keys of `moltron train`; its ranks run `moltron train`'s own Trainer,
step for step, but save nothing. The next row's processes start while one runs, up to the first touch of a GPU. Without
--store, UniRef-like random proteins or random molecules. batch.packs is one a data-parallel rank where a row does not
say. Rows of one model, batch.tokens and batch.packs see the same samples and masks.

Speed: real tokens a second and GPU, the median over the steps after the third, by the GPUs' clocks; MFU against the
bf16 peak. Peak: torch.cuda.max_memory_allocated, the largest of all ranks; the context, NCCL and what the allocator
holds beyond (`reserved`) come on top. Loss: the mean of the last tenth of the steps; apart: its relative difference to
that of the model's first row with the same samples. A row that fails says why, and the next goes on. Beside --output
a .json with the numbers of each step, and a .png of the losses.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gpu
from loader import write_molecules
from moltron.cli.plan import predict, training
from moltron.config.schema import TrainConfig
from moltron.data.store import StoreWriter
from moltron.parallel import collectives
from moltron.train.loop import Trainer
from moltron.train.setup import build_run, check_config
from moltron.train.signals import StopSignal

ROWS = [
    "esm2_8M 1 batch.tokens=131072",
    "esm2_35M 1 batch.tokens=131072",
    "esm2_150M 1 batch.tokens=65536",
    "esm2_650M 1 batch.tokens=32768",
    "esm2_650M 1 batch.tokens=32768 parallel.recompute=selective",
    "esm2_650M 1 batch.tokens=32768 parallel.recompute=full",
    "esm2_650M 1 batch.tokens=16384 optim.name=muon",
    "esm2_3B 1 batch.tokens=8192 parallel.recompute=full",
    "esm2_150M 1 batch.tokens=16384 train.precision=fp32",
    "esm1_small 1 batch.tokens=32768",
    "megamolbart_xsmall 1 batch.tokens=131072 batch.decoder_tokens=163840",
    "megamolbart_small 1 batch.tokens=65536 batch.decoder_tokens=81920",
    "prott5_small 1 batch.tokens=32768 batch.decoder_tokens=8192",
    "esm2_650M 2 batch.tokens=32768",
    "esm2_650M 2 batch.tokens=32768 batch.packs=4",
    "esm2_650M 2 batch.tokens=32768 batch.packs=4 parallel.reshard_after_forward=true",
    "esm2_650M 2 batch.tokens=32768 parallel.dp_replicate=2",
    "esm2_650M 2 batch.tokens=32768 parallel.tp=2",
    "esm2_650M 2 batch.tokens=32768 parallel.tp=2 parallel.recompute=full",
    "esm2_650M 2 batch.tokens=32768 parallel.cp=2",
    "esm2_650M 2 batch.tokens=32768 parallel.pp=2 batch.packs=4",
    "esm2_3B 2 batch.tokens=8192 parallel.reshard_after_forward=true",
    "esm2_3B 2 batch.tokens=8192 parallel.recompute=full parallel.reshard_after_forward=true",
    "megamolbart_small 2 batch.tokens=65536 batch.decoder_tokens=81920",
]
GIB = 2**30


def config_of(row: str, tiny: bool = False) -> tuple[TrainConfig, int]:
    """tiny: an architecture that runs anywhere, with the row's layout."""
    model, world, *keys = row.split()
    config, _ = training(model, keys)
    if not any(key.startswith("batch.packs") for key in keys):
        p = config.parallel
        shared = p.pp * p.cp * p.tp
        config.batch.packs = max(1, int(world) // shared) * (p.pp if p.pp > 1 else 1)
    if tiny:
        config.model |= dict(hidden_size=64, num_layers=4, num_heads=4, ffn_size=128)
        config.model |= {key: 4 for key in ("num_decoder_layers",) if key in config.model}
        config.batch.tokens, config.data.max_length = 1024, min(config.data.max_length, 256)
        if config.batch.decoder_tokens is not None:
            config.batch.decoder_tokens, config.data.decoder_max_length = 1280, config.data.max_length
    return config, int(world)


def write_store(path: Path, config: TrainConfig, world: int, steps: int) -> None:
    """Enough records for all steps."""
    tokens = max(config.batch.tokens, config.batch.decoder_tokens or 0) * max(config.batch.packs, world) * (steps + 1)
    if config.model["family"] == "megamolbart":
        write_molecules(path, max(2_000, tokens // 40))
        return
    with StoreWriter(path) as writer:
        texts = gpu.sequences(max(200, tokens // 200))
        writer.add([str(i) for i in range(len(texts))], texts)


def run_rank(arguments: argparse.Namespace) -> dict[str, Any]:
    """The readings of a row's steps and the peak of this rank."""
    config, _ = config_of(arguments.row, arguments.tiny)
    config.data.path, config.run_dir = str(arguments.store), str(arguments.folder / "run")
    config.train.device, config.train.max_steps = arguments.device, arguments.steps
    marks = [time.perf_counter()]
    device = collectives.init(arguments.device)
    source = check_config(config)
    marks.append(time.perf_counter())
    with StopSignal() as stop:
        trainer = Trainer(build_run(config, device, source), stop)
        steps = iter(trainer.loader)
        marks.append(time.perf_counter())
        pending: list[Any] = []
        for step in range(1, arguments.steps + 1):
            data = next(steps)
            pending.append(trainer.train_step(step, data.batches, data.count, trainer.run_.rate(step)))
            if step > 1:
                pending[-2].read()  # as the loop does: one step late
            if step == 1 and device.type == "cuda":
                torch.cuda.synchronize()
            if step == 1:
                marks.append(time.perf_counter())
        readings = [each.read() for each in pending]
        marks.append(time.perf_counter())
        steps.close()  # type: ignore[attr-defined]
        trainer.close()
    collectives.barrier()
    peak = reserved = 0
    name = platform.processor() or "CPU"
    if device.type == "cuda":
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        name = torch.cuda.get_device_name(device)
    world = collectives.world_size()
    speeds = [r.tokens / r.seconds / world for r in readings if r.seconds]
    speed = statistics.median(speeds[2:]) if speeds[2:] else 0.0
    return dict(
        device=f"{name}, torch {torch.__version__}",
        speed=speed,
        mfu=speed * readings[-1].flops / readings[-1].tokens / gpu.PEAK,
        peak=peak,
        reserved=reserved,
        tokens_a_step=statistics.mean(r.tokens for r in readings),
        seconds=dict(zip(("join", "build", "first step", "steps"), np.diff(marks).tolist(), strict=True)),
        losses=[r.loss for r in readings],
        grad_norms=[r.grad_norm for r in readings],
        speeds=speeds,
    )


def rank_main(arguments: argparse.Namespace) -> None:
    """One rank of one row: its result goes to a file."""
    while not (arguments.folder / "go").exists():
        time.sleep(0.05)
    try:
        result = run_rank(arguments)
    except torch.OutOfMemoryError as error:
        result = dict(error="out of memory", why=str(error).splitlines()[0])
    except Exception as error:  # the parent reports it and goes on
        traceback.print_exc()
        result = dict(error=f"{type(error).__name__}: {' '.join(str(error).split())}"[:300])
    file = arguments.folder / f"rank{os.environ['RANK']}.json"
    file.with_suffix(".partial").write_text(json.dumps(result))
    file.with_suffix(".partial").rename(file)
    sys.stdout.flush()
    os._exit(1 if "error" in result else 0)  # without waiting for ranks that have failed


class Row:
    """The processes of a row: they wait for `run` before they touch a GPU."""

    def __init__(self, row: str, arguments: argparse.Namespace):
        self.row, self.arguments = row, arguments
        config, world = config_of(row, arguments.tiny)
        self.temporary = tempfile.TemporaryDirectory()
        folder = self.folder = Path(self.temporary.name)
        store = arguments.store or folder
        if not arguments.store:
            write_store(folder / "train.arrow", config, world, arguments.steps)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, __file__, "--row", row, "--folder", str(folder), "--device", arguments.device]
        command += ["--store", str(store), "--steps", str(arguments.steps), *(["--tiny"] if arguments.tiny else [])]
        self.ranks = []
        for rank in range(world):
            where = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            extra = {key: str(value) for key, value in where.items()}
            self.ranks.append(subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"} | extra))
        self.predicted = predict(config, world, arguments.device)

    def run(self) -> dict[str, Any]:
        """All ranks: the largest peak's, or what went wrong."""
        (self.folder / "go").touch()
        begin = time.monotonic()
        codes: list[int | None] = [None] * len(self.ranks)
        while time.monotonic() < begin + self.arguments.timeout and None in codes and not any(codes):
            time.sleep(0.1)
            codes = [process.poll() for process in self.ranks]
        self.kill()
        files = [self.folder / f"rank{rank}.json" for rank in range(len(self.ranks))]
        results = [json.loads(file.read_text()) for file in files if file.is_file()]
        whole = dict(row=self.row, predicted=asdict(self.predicted) | dict(peak=self.predicted.peak))
        whole["wall"] = time.monotonic() - begin
        self.temporary.cleanup()
        if failed := [result for result in results if "error" in result]:
            return whole | next((result for result in failed if result["error"] == "out of memory"), failed[0])
        if len(results) < len(self.ranks):
            why = f"no result after {self.arguments.timeout:.0f} s" if None in codes else f"exit codes {codes}"
            return whole | dict(error=why)
        return whole | max(results, key=lambda result: result["peak"])

    def kill(self) -> None:
        for process in self.ranks:
            process.kill()
            process.wait()


def samples(record: dict[str, Any]) -> tuple[Any, ...]:
    """What two rows have in common that see the same samples, at the same rates."""
    config, _ = config_of(record["row"])
    return record["row"].split()[0], config.batch.tokens, config.batch.packs, config.optim.lr, len(record["losses"])


def last_loss(record: dict[str, Any]) -> float:
    losses = record["losses"]
    return statistics.mean(losses[-max(1, len(losses) // 10) :])


def line(record: dict[str, Any], records: list[dict[str, Any]]) -> str:
    model, world, *keys = record["row"].split()
    start = f"| {model} | {world} | `{' '.join(keys)}` |"
    predicted = record["predicted"]["peak"] / GIB
    if "error" in record:
        return f"{start} {record['error']} | | | | {predicted:.2f} | | | | {record['wall']:.0f} |"
    peak, reserved, error, apart = "", "", "", ""
    first = next(r for r in records if "error" not in r and samples(r) == samples(record))
    if first is not record:
        apart = f"{last_loss(record) / last_loss(first) - 1:+.2%}"
    if record["peak"]:
        peak, reserved = f"{record['peak'] / GIB:.2f}", f"{record['reserved'] / GIB:.2f}"
        error = f"{record['predicted']['peak'] / record['peak'] - 1:+.1%}"
    return (
        f"{start} {record['speed']:,.0f} | {record['mfu']:.1%} | {last_loss(record):.4f} | {apart} "
        f"| {predicted:.2f} | {peak} | {error} | {reserved} | {record['wall']:.0f} |"
    )


HEAD = [
    "| model | GPUs | keys | tok/s a GPU | MFU | loss | apart | predicted GiB | measured | error | reserved | s |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|",
]


def write(records: list[dict[str, Any]], output: Path) -> None:
    """The page, its numbers and its picture."""
    device = next((record["device"] for record in records if "device" in record), "")
    lines = [f"# Layouts: {device}, {time.strftime('%Y-%m-%d')}", ""]
    lines += [f"`python benchmarks/layouts_gpu.py {shlex.join(sys.argv[1:])}`", "", *HEAD]
    output.write_text("\n".join([*lines, *(line(record, records) for record in records)]) + "\n")
    output.with_suffix(".json").write_text(json.dumps(records))
    draw([record for record in records if "losses" in record], output.with_suffix(".png"))


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Losses by step, one field a model; long runs as means of a hundredth of their steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(record["row"].split()[0] for record in records))
    if not models:
        return
    figure = Figure(figsize=(6.5 * len(models), 4.5), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        for record in (record for record in records if record["row"].split()[0] == model):
            _, world, *keys = record["row"].split()
            losses = record["losses"]
            window = max(1, len(losses) // 100)
            means = [statistics.mean(losses[i : i + window]) for i in range(0, len(losses), window)]
            at = range(window, len(losses) + window, window)
            axes.plot(at, means, label=" ".join([f"{world} GPU", *keys]), linewidth=1)
        axes.set(title=model, xlabel="step", ylabel="training loss, nats a masked residue")
        axes.legend(frameon=False, fontsize=6)
        axes.spines[["top", "right"]].set_visible(False)
    FigureCanvasAgg(figure).print_png(str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=ROWS)
    parser.add_argument("--gpus", nargs="+", type=int, help="rows of so many GPUs only")
    parser.add_argument("--store", type=Path, help="a folder of `moltron prepare`")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--timeout", type=float, default=120, help="seconds a row")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--merge", nargs="+", type=Path, help="the .json of runs, instead of a run")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        rank_main(arguments)
    if arguments.merge:
        write([record for file in arguments.merge for record in json.loads(file.read_text())], arguments.output)
        return
    print("\n".join(HEAD), flush=True)
    names = [row for row in arguments.rows if not arguments.gpus or int(row.split()[1]) in arguments.gpus]
    records: list[dict[str, Any]] = []
    following = Row(names[0], arguments)
    for i in range(len(names)):
        row = following
        if i + 1 < len(names):
            following = Row(names[i + 1], arguments)
        records.append(row.run())
        print(line(records[-1], records), flush=True)
        if arguments.output:  # after each row: a run that is cut off keeps what it has
            write(records, arguments.output)


if __name__ == "__main__":
    main()
