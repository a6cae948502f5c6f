"""How fast the loader alone makes masked batches, and whether its memory stays flat.

    python benchmarks/loader.py --sequences 10000000 --repeats 5

Writes a store of made-up sequences (lengths lognormal, median 270, cropped at 1,022 residues) under --folder, removed
afterwards, then consumes a whole epoch of BatchLoader.steps() in one process, without workers: gather, ids, specials,
packing, masks.
tok/s counts real tokens: the median of --repeats equal stretches of the epoch, after a tenth of it as warm-up; tokens
a CPU second of the process do not depend on what else runs. The epoch must give every token of the store. Memory is
read after the warm-up and at the epoch's end: `anonymous` is what the process owns, `resident` also counts pages of
the mapped file, which the system takes back when it needs them. Results: benchmarks/results/loader_<cpu>_<date>.md.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import os
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from moltron.config.schema import ObjectiveConfig
from moltron.data.loader import BatchLoader
from moltron.data.plan import BatchPlan
from moltron.data.store import Store, StoreWriter
from moltron.objectives import get_objective
from moltron.tokenizers import get_tokenizer


def write_store(path: Path, num_sequences: int, seed: int = 0) -> None:
    generator = np.random.default_rng(seed)
    letters = np.frombuffer(b"LAGVSERTIDPKQNFYMHWC", dtype=np.uint8)
    with StoreWriter(path) as writer:
        for first in range(0, num_sequences, 20_000):
            count = min(20_000, num_sequences - first)
            lengths = generator.lognormal(np.log(270), 0.62, count).clip(11, 10_000).astype(np.int32)
            offsets = np.zeros(count + 1, dtype=np.int32)
            np.cumsum(lengths, out=offsets[1:])
            text = letters[generator.integers(0, 20, int(offsets[-1]), dtype=np.uint8)]
            column = pa.StringArray.from_buffers(count, pa.py_buffer(offsets), pa.py_buffer(text))
            writer.add(pa.array([f"made_up_{first + i}" for i in range(count)]), column)


def memory() -> dict[str, float]:
    """MiB resident, and of these anonymous (Linux)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(status[key].split()[0]) / 1024 for name, key in (("resident", "VmRSS"), ("anonymous", "RssAnon"))}


def cpu_name() -> str:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def measure(store: Store, tokens: int, count: str, repeats: int) -> list[str]:
    """One epoch of packs of `tokens`: the cells of a row of the report."""
    tokenizer, seed = get_tokenizer("esm2"), 1
    plan = BatchPlan(store, tokens, max_length=1024, seed=seed)
    objective = get_objective(ObjectiveConfig(count=count), tokenizer, seed)
    total = int((np.minimum(store.lengths, 1022) + 2).sum(dtype=np.int64))
    warm_up = max(1, total // tokens // 10)
    stretch = (total // tokens - warm_up) // repeats
    steps = BatchLoader(plan, store, tokenizer, objective, packs=1, epochs=1).steps()
    real = [step.tokens for step in itertools.islice(steps, warm_up)]
    start, wall, cpu = memory(), [], []
    for _ in range(repeats):
        begin, begin_cpu = time.perf_counter(), time.process_time()
        here = [step.tokens for step in itertools.islice(steps, stretch)]
        wall.append(sum(here) / (time.perf_counter() - begin) / 1e6)
        cpu.append(sum(here) / (time.process_time() - begin_cpu) / 1e6)
        real += here
    real += [step.tokens for step in steps]  # the rest of the epoch
    end = memory()
    if sum(real) != total:
        raise RuntimeError(f"the epoch gave {sum(real)} tokens, the store has {total}")
    ends = [f"{start[kind]:.0f}, {end[kind]:.0f}" for kind in ("anonymous", "resident")]
    speeds = [f"{statistics.median(wall):.1f}", " ".join(f"{speed:.1f}" for speed in wall)]
    fill = total / len(real) / tokens
    return [f"{tokens:,}", count, *speeds, f"{statistics.median(cpu):.1f}", str(stretch), f"{fill:.2%}", *ends]


def report(rows: list[list[str]], num_sequences: int, size: int, loads: list[str]) -> str:
    lines = [
        f"# Loader alone, {cpu_name()}, {os.cpu_count()} cores, {datetime.date.today()}",
        "",
        f"`python benchmarks/loader.py`: {num_sequences:,} made-up sequences, {size / 2**30:.2f} GiB on disk;",
        f"one process, no workers. numpy {np.__version__}, Python {platform.python_version()}. "
        f"Load average at start: {loads[0]}; at end: {loads[1]}.",
        "",
        "| T | count | M tok/s: median | all stretches | M tok a CPU second | packs a stretch | fill "
        "| anonymous MiB: start, end | resident MiB: start, end |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join(lines + ["| " + " | ".join(cells) + " |" for cells in rows]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=10_000_000)
    parser.add_argument("--tokens", type=int, nargs="+", default=[131072])
    parser.add_argument("--count", nargs="+", default=["bernoulli"], choices=["bernoulli", "floor"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--output", help="file to write the table to")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="moltron_loader_", dir=args.folder))
    try:
        begin = time.perf_counter()
        write_store(folder / "train.arrow", args.sequences)
        store = Store.open(folder / "train.arrow")
        print(f"store of {len(store):,} records after {time.perf_counter() - begin:.0f} s", flush=True)
        loads = ["{:.1f} {:.1f} {:.1f}".format(*os.getloadavg())]
        rows = []
        for tokens, count in itertools.product(args.tokens, args.count):
            rows.append(measure(store, tokens, count, args.repeats))
            print("| " + " | ".join(rows[-1]) + " |", flush=True)
        loads.append("{:.1f} {:.1f} {:.1f}".format(*os.getloadavg()))
        text = report(rows, len(store), (folder / "train.arrow").stat().st_size, loads)
    finally:
        shutil.rmtree(folder)
    print(text)
    if args.output:
        Path(args.output).write_text(text)


if __name__ == "__main__":
    main()
