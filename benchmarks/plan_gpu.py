"""What `moltron plan` predicts beside what GPUs take, and how fast they are: the product's own steps.

    python benchmarks/plan_gpu.py [--gpus 1 2] [--rows "esm2_650M 2 parallel.tp=2 batch.tokens=32768" …] [--output a.md]
    python benchmarks/plan_gpu.py --device cpu --tiny     # does every row run at all? few blocks, few tokens, gloo

A row is a model (a preset), a number of GPUs and keys of `moltron train`; each runs in processes of its own: store →
BatchPlan → BatchLoader → TrainStep, weights drawn on the device (`init_weights` draws on the host, minutes at 3B),
UniRef-like random proteins or random molecules. batch.packs is one a data-parallel rank where a row does not say.
Measured: torch.cuda.max_memory_allocated, the largest of all ranks, over `--steps` steps, of which the first compiles
and the second is recorded (one GPU, or tensor parallelism alone). That is what tensors take; the context, NCCL and what
the allocator holds beyond (`reserved`) come on top. Speed: real tokens a second and GPU, the median over the steps
after the third; MFU against the bf16 peak. A row that runs out of memory says so, and the next goes on. With --output,
the figures go to a .json beside it, too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
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

import torch

import gpu
from loader import write_molecules
from moltron.cli.plan import predict, training
from moltron.config.schema import TrainConfig
from moltron.data.loader import BatchLoader
from moltron.data.plan import BatchPlan
from moltron.data.store import Store, StoreWriter
from moltron.models.registry import build_model, get_spec, make_config
from moltron.objectives import Limits, get_objective
from moltron.parallel import collectives
from moltron.parallel.apply import local, parallelize
from moltron.parallel.mesh import is_sharded
from moltron.parallel.precision import TRAINED, resolve_precision
from moltron.tokenizers import get_tokenizer
from moltron.train.optim import Optimizer
from moltron.train.step import LossScaler, TrainStep

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


def config_of(row: str, tiny: bool) -> tuple[TrainConfig, int]:
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


def run_rank(row: str, folder: Path, device_type: str, tiny: bool, steps: int) -> dict[str, Any]:
    """The peak of this rank's steps. As train.setup and train.loop build them, without a run folder."""
    config, _ = config_of(row, tiny)
    device = collectives.init(device_type)
    collectives.share_packs(config.parallel.cp * config.parallel.tp, config.parallel.pp)
    architecture = dict(config.model)
    spec = get_spec(architecture.pop("family"))
    made, precision = make_config(spec.name, architecture), resolve_precision(config.train.precision, device, TRAINED)
    compiled = device.type == "cuda" and precision != "fp32" and getattr(made, "trains_compiled", True)
    whole = build_model(spec.name, architecture)
    settings: dict[str, Any] = dict(precision=precision, compile=compiled, config=config.parallel)
    settings["fp8_recipe"] = config.train.fp8_recipe
    model = parallelize(whole, spec.plan, device, **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            part = local(parameter.data)
            part.fill_(1.0) if name.endswith("norm.weight") else part.normal_(0.0, 0.02)
    tokenizer = get_tokenizer(made.tokenizer)
    objective = get_objective(config.objective, tokenizer, 0)
    if compiled:
        objective.compile()
    optimizer = Optimizer(model, spec.plan, config.optim, config.optim.lr)
    step = TrainStep(
        model,
        objective.loss,
        optimizer,
        device,
        clip=config.optim.clip,
        scaler=LossScaler() if precision == "fp16" else None,
        skip_nonfinite=False,
        sync_each=config.parallel.reshard_after_forward,
        graphs=compiled and not is_sharded(config.parallel, collectives.world_size()),
    )
    streams = objective.streams
    store = Store.open(folder / "train.arrow")
    plan = BatchPlan(store, objective, config.batch.streams(streams), Limits(*config.data.limits(streams)), seed=0)
    stream = iter(
        BatchLoader(
            plan,
            store,
            tokenizer,
            packs=config.batch.packs,
            rank=collectives.data_rank(),
            world=collectives.data_world_size(),
            workers=0,
            pin=device.type == "cuda",
        )
    )
    losses, speeds, flops = [], [], 0.0
    for i in range(steps):
        data = next(stream)
        reading = step(i, data.batches, data.count, 1e-4).read()
        losses.append(reading.loss)
        if i >= 3 and reading.seconds:
            speeds.append(reading.tokens / reading.seconds / collectives.world_size())
            flops = reading.flops / reading.tokens
    step.close()
    collectives.barrier()
    peak = reserved = 0
    if device.type == "cuda":
        torch.cuda.synchronize()
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    speed = statistics.median(speeds) if speeds else 0.0
    mfu = speed * flops / gpu.PEAK
    return dict(peak=peak, reserved=reserved, losses=losses, speed=speed, mfu=mfu, device=_name(device))


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"


def rank_main(arguments: argparse.Namespace) -> None:
    """One rank of one row: its result goes to a file."""
    begin = time.perf_counter()
    try:
        result = run_rank(arguments.row, arguments.folder, arguments.device, arguments.tiny, arguments.steps)
    except torch.OutOfMemoryError as error:
        result = dict(error="out of memory", why=str(error).splitlines()[0])
    except Exception as error:  # the parent reports it and goes on
        traceback.print_exc()
        result = dict(error=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200])
    result["seconds"] = time.perf_counter() - begin
    file = arguments.folder / f"rank{os.environ['RANK']}.json"
    file.with_suffix(".partial").write_text(json.dumps(result))
    file.with_suffix(".partial").rename(file)
    sys.stdout.flush()
    os._exit(1 if "error" in result else 0)  # without waiting for ranks that have failed


def run_row(row: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All ranks of a row: the largest peak, or what went wrong."""
    config, world = config_of(row, arguments.tiny)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_store(folder / "train.arrow", config, world, arguments.steps)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, __file__, "--row", row, "--folder", name, "--device", arguments.device]
        command += ["--steps", str(arguments.steps), *(["--tiny"] if arguments.tiny else [])]
        ranks = []
        for rank in range(world):
            where = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            extra = {key: str(value) for key, value in where.items()}
            ranks.append(subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"} | extra))
        end = time.monotonic() + arguments.timeout
        codes: list[int | None] = [None] * world
        while time.monotonic() < end and None in codes and not any(codes):
            time.sleep(0.1)
            codes = [process.poll() for process in ranks]
        for process in ranks:
            process.kill()
            process.wait()
        files = [folder / f"rank{rank}.json" for rank in range(world)]
        results = [json.loads(file.read_text()) for file in files if file.is_file()]
    if failed := [result for result in results if "error" in result]:
        return next((result for result in failed if result["error"] == "out of memory"), failed[0])
    if len(results) < world:
        return dict(error=f"no result after {arguments.timeout:.0f} s" if None in codes else f"exit codes {codes}")
    return max(results, key=lambda result: result["peak"])


def line(row: str, predicted: Any, result: dict[str, Any]) -> str:
    model, world, *keys = row.split()
    parts = ", ".join(f"{part} {size / GIB:.2f}" for part, size in predicted.memory.items() if size > 0.005 * GIB)
    measured, reserved, error = result.get("error", "—"), "", ""
    if result.get("peak"):
        measured, reserved = f"{result['peak'] / GIB:.2f}", f"{result['reserved'] / GIB:.2f}"
        error = f"{predicted.peak / result['peak'] - 1:+.1%}"
    speed = f"{result['speed']:,.0f} | {result['mfu']:.1%}" if result.get("speed") else " | "
    seconds = f"{result['seconds']:.0f}" if "seconds" in result else ""
    return (
        f"| {model} | {world} | {' '.join(keys)} | {speed} | {parts} | {predicted.peak / GIB:.2f} | {measured} "
        f"| {error} | {reserved} | {seconds} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=ROWS)
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 2], help="rows of so many GPUs only")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--timeout", type=float, default=120, help="seconds a row")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        rank_main(arguments)
    lines = [
        "| model | GPUs | keys | tok/s a GPU | MFU | predicted, GiB by part | predicted peak | measured peak | error "
        "| reserved | s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    where, records = "", []
    for row in (row for row in arguments.rows if int(row.split()[1]) in arguments.gpus):
        predicted = predict(*config_of(row, arguments.tiny), arguments.device)
        result = run_row(row, arguments)
        where = result.get("device", where)
        lines.append(line(row, predicted, result))
        records.append(dict(row=row, predicted=asdict(predicted), **result))
        print(lines[-1], flush=True)
        if arguments.output:  # after each row: a run that is cut off keeps what it has
            head = f"# Predicted and measured peaks: {where}, {time.strftime('%Y-%m-%d')}\n\n"
            head += f"`python benchmarks/plan_gpu.py {' '.join(sys.argv[1:])}`; torch {torch.__version__}. GiB.\n\n"
            arguments.output.write_text(head + "\n".join(lines) + "\n")
            arguments.output.with_suffix(".json").write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
