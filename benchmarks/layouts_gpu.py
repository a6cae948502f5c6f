"""Layouts of several GPUs, and FP8, beside one GPU: the same run through `moltron train`, its losses, speed and memory.

    python benchmarks/layouts_gpu.py STORE OUT [--name pretrain_esm2_650M] [--layouts one fsdp tp …] [key=value …]

Each layout is a run of the preset with its own `parallel.*` keys, in processes of its own, from the same seed on the
same stream of samples. OUT gets the runs, layouts.md and layouts.png; runs that OUT has already are kept. tok/s is the
median over the lines of metrics.jsonl after the first two; memory the largest of the GPUs' peaks of tensors.
Loss: the mean over steps of |loss − the first layout's| / the first layout's, and the largest.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LAYOUTS = {  # processes, keys
    "one": (1, []),
    "one again": (1, ["train.seed=4321"]),
    "fp8": (1, ["train.precision=fp8"]),
    "fp8 moments": (1, ["optim.state=fp8"]),
    "fsdp": (2, ["parallel.dp_shard=2"]),
    "tp": (2, ["parallel.tp=2"]),
    "pp": (2, ["parallel.pp=2"]),
    "pp interleaved": (2, ["parallel.pp=2", "parallel.pp_schedule=interleaved"]),
    "cp": (2, ["parallel.cp=2"]),
    "replicate": (2, ["parallel.dp_replicate=2"]),
    "fsdp 4": (4, ["parallel.dp_shard=4"]),
    "tp 4": (4, ["parallel.tp=4"]),
    "pp 4": (4, ["parallel.pp=4"]),
    "tp 2 fsdp 2": (4, ["parallel.tp=2", "parallel.dp_shard=2"]),
    "pp 2 fsdp 2": (4, ["parallel.pp=2", "parallel.dp_shard=2"]),
}


def run(name: str, store: Path, out: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The lines of a layout's metrics.jsonl; an empty list where it failed."""
    processes, keys = LAYOUTS[name]
    folder = out / name.replace(" ", "_")
    done = folder / "done"
    if not done.exists():
        command = [sys.executable, "-m"]
        if processes > 1:
            port = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
            command += ["torch.distributed.run", *port, "--nproc-per-node", str(processes), "-m"]
        command += ["moltron", "train", "--config-name", arguments.name, f"data.path={store}", f"run_dir={folder}"]
        command += [*arguments.keys, *keys]
        begin = time.monotonic()
        with open(out / f"{folder.name}.log", "w") as log:
            try:
                code = subprocess.run(command, stdout=log, stderr=log, timeout=arguments.limit).returncode
            except subprocess.TimeoutExpired:
                code = -1
        print(f"{name}: exit code {code} after {time.monotonic() - begin:.0f} s", flush=True)
        if code:
            return []
        done.touch()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def report(runs: dict[str, list[dict[str, Any]]], device: str, tokens: str) -> str:
    lines = [
        f"# Layouts of GPUs: {device}, {time.strftime('%Y-%m-%d')}",
        "",
        f"`python benchmarks/layouts_gpu.py {' '.join(map(shlex.quote, sys.argv[1:]))}`; {tokens}.",
        "",
        "| layout | keys | last loss | loss apart, mean | largest | tok/s | to one GPU | peak GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    first = next(iter(runs.values()))
    speeds = {name: statistics.median(line["tokens_per_second"] for line in run[2:]) for name, run in runs.items()}
    for name, run in runs.items():
        apart = [abs(a["train_loss"] / b["train_loss"] - 1) for a, b in zip(run, first, strict=True)]
        lines.append(
            f"| {name} | `{' '.join(LAYOUTS[name][1])}` | {run[-1]['train_loss']:.4f} | {statistics.mean(apart):.1e} "
            f"| {max(apart):.1e} | {speeds[name]:,.0f} | {speeds[name] / next(iter(speeds.values())):.2f}× "
            f"| {max(line['memory'] for line in run) / 2**30:.1f} |"
        )
    return "\n".join(lines) + "\n"


def draw(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="training loss, nats a masked residue")
    for name, run in runs.items():
        axes.plot([line["step"] for line in run], [line["train_loss"] for line in run], label=name, linewidth=1)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    FigureCanvasAgg(figure).print_png(str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("keys", nargs="*", metavar="key=value", help="for all layouts, e.g. train.max_steps=100")
    parser.add_argument("--name", default="pretrain_esm2_650M", help="a preset")
    parser.add_argument("--layouts", nargs="+", default=["one", "fsdp", "tp", "pp", "cp"], choices=LAYOUTS)
    parser.add_argument("--limit", type=float, default=300, help="seconds a layout may take")
    arguments = parser.parse_intermixed_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.keys = ["train.log_every=1", "train.eval_every=100000", "checkpoint.every=100000", *arguments.keys]
    runs, page = {}, ""
    for name in arguments.layouts:
        if lines := run(name, arguments.store, arguments.out, arguments):
            runs[name] = lines
            life = json.loads((arguments.out / name.replace(" ", "_") / "manifest.json").read_text())["lives"][0]
            device = f"{life['device']}, torch {life['versions']['torch']}"
            page = report(runs, device, f"{lines[-1]['tokens'] / lines[-1]['step']:,.0f} real tokens a step")
            (arguments.out / "layouts.md").write_text(page)
            if len(runs) > 1:
                draw(runs, arguments.out / "layouts.png")
    print(page)


if __name__ == "__main__":
    main()
