"""The race: seconds to a validation perplexity, 8M on Swiss-Prot, end to end through `moltron train`.

    python benchmarks/race.py --prepare CORPUS STORE                  # swissprot_2014_01_go.fasta.xz, clusters.tsv.xz
    python benchmarks/race.py STORE OUT 'name: key=value key=value' … [--target 13.0] [--limit 300]

Each entry is a run of the preset presets/race_esm2_8M.yaml with its keys changed, in a process of its own, stopped once
an evaluation reads the target or after `limit` seconds of training. OUT gets the runs, race.md and race.png; entries
that OUT has already are kept, so a race can be cut into several calls.

The clock is `seconds` of metrics.jsonl (training without evaluation), from the beginning of the first step, less what
the first line's steps took beyond the later ones' pace: that is compilation, shown beside it. A reading counts at the
step it was taken after. Evaluations (six packs, with the compilation of their own first one) are shown beside it too.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PRESETS = Path(__file__).parent / "presets"
POLL = 0.2  # seconds


@dataclass
class Result:
    name: str
    keys: list[str]
    lines: list[dict[str, Any]]
    wall: float  # of the whole process
    device: str

    @property
    def compile_seconds(self) -> float:
        """What the first line's steps took beyond the pace of the later ones."""
        first, later = self.lines[0], self.lines[1:]
        pace = statistics.median(line["tokens_per_second"] for line in later)
        return max(first["seconds"] - first["tokens"] / pace, 0.0)

    def curve(self) -> list[tuple[float, float, int]]:
        """(seconds, perplexity, tokens) of each evaluation."""
        start = self.compile_seconds
        evaluated = [line for line in self.lines if line["val_perplexity"] is not None]
        return [(line["seconds"] - start, line["val_perplexity"], line["tokens"]) for line in evaluated]

    def reached(self, target: float) -> tuple[float, float, int] | None:
        return next((point for point in self.curve() if point[1] <= target), None)


def read_lines(file: Path) -> list[dict[str, Any]]:
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def run(store: Path, out: Path, entry: str, target: float, limit: float) -> Result:
    name, _, keys = entry.partition(":")
    folder = out / name.strip().replace(" ", "_")
    done = folder / "wall.json"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, "-m", "moltron", "train", "--config-dir", str(PRESETS)]
        command += ["--config-name", "race_esm2_8M", f"data.path={store}", f"run_dir={folder}", *keys.split()]
        begin = time.monotonic()
        with open(out / f"{folder.name}.log", "w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
            while process.poll() is None:
                time.sleep(POLL)
                lines = read_lines(folder / "metrics.jsonl")
                evaluated = [line["val_perplexity"] for line in lines if line["val_perplexity"] is not None]
                if lines and (lines[-1]["seconds"] > limit or min(evaluated, default=math.inf) <= target):
                    process.send_signal(signal.SIGTERM)
                    process.wait()
        if process.returncode not in (0, 75):
            raise SystemExit(f"{entry}: exit code {process.returncode}, see {out / folder.name}.log")
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        done.write_text(json.dumps(time.monotonic() - begin))
    life = json.loads((folder / "manifest.json").read_text())["lives"][0]
    lines, wall = read_lines(folder / "metrics.jsonl"), json.loads(done.read_text())
    return Result(name.strip(), keys.split(), lines, wall, f"{life['device']}, torch {life['versions']['torch']}")


def report(results: list[Result], target: float) -> str:
    lines = [
        f"# The race to a perplexity of {target}: {results[0].device}, {time.strftime('%Y-%m-%d')}",
        "",
        f"`python benchmarks/race.py {' '.join(map(shlex.quote, sys.argv[1:]))}`",
        "",
        "| run | keys | s to target | M tokens to target | best perplexity (at s) | tok/s | compile s | process s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        hit, curve = r.reached(target), r.curve()
        best = min(curve, key=lambda point: point[1], default=(math.nan, math.nan, 0))
        speed = statistics.median(line["tokens_per_second"] for line in r.lines[1:])
        reached = f"{hit[0]:.0f} | {hit[2] / 1e6:.0f}" if hit else "– | –"
        lines.append(
            f"| {r.name} | `{' '.join(r.keys) or 'the preset'}` | {reached} | {best[1]:.3f} ({best[0]:.0f}) "
            f"| {speed:,.0f} | {r.compile_seconds:.0f} | {r.wall:.0f} |"
        )
    return "\n".join(lines) + "\n"


def draw(results: list[Result], target: float, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="seconds of training", ylabel="validation perplexity")
    for r in results:
        points = [(seconds, value) for seconds, value, _ in r.curve() if value < 17]
        axes.plot(*zip(*points), label=r.name, linewidth=1.2) if points else None
    axes.axhline(target, color="black", linewidth=0.8, linestyle="--")
    if axes.get_lines()[1:]:
        axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    FigureCanvasAgg(figure).print_png(str(path))


def prepare(corpus: Path, store: Path) -> None:
    """Swiss-Prot with its UR50-like clusters and splits (performance.md, "The race")."""
    if not (store / "manifest.json").exists():
        command = [sys.executable, "-m", "moltron", "prepare", f"input={corpus}/swissprot_2014_01_go.fasta.xz"]
        command += [f"clusters={corpus}/clusters.tsv.xz", "cluster_column=ur50_like", f"output={store}"]
        subprocess.run(command, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("entries", nargs="*", metavar="'NAME: key=value …'")
    parser.add_argument("--prepare", type=Path, metavar="CORPUS", help="make STORE from the corpus first")
    parser.add_argument("--target", type=float, default=13.0)
    parser.add_argument("--limit", type=float, default=300.0)
    arguments = parser.parse_args()
    if arguments.prepare:
        prepare(arguments.prepare, arguments.store)
    if arguments.out is None:
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = []
    for entry in arguments.entries or ["prototype:"]:
        results.append(run(arguments.store, arguments.out, entry, arguments.target, arguments.limit))
        page = report(results, arguments.target)  # after each run: a call that is cut off keeps what it has
        (arguments.out / "race.md").write_text(page)
        draw(results, arguments.target, arguments.out / "race.png")
    print(page)


if __name__ == "__main__":
    main()
