"""How fast the loader alone makes batches with targets, and whether its memory stays flat.

    python benchmarks/loader.py --family esm2 prott5 megamolbart --sequences 1000000 --repeats 5

Writes a store of made-up records under --folder, removed afterwards: proteins (lengths lognormal, median 270) or
molecules (random chemistry tokens, normal, 45 ± 10, a canonical row and two variants each). Then consumes a whole epoch
of BatchLoader.steps() in one process, without workers: order, lengths, packing, gather, ids, corruption.
tok/s counts real tokens of the encoder: the median of --repeats equal stretches of the epoch, after a tenth of it as
warm-up; tokens a CPU second of the process do not depend on what else runs. For one stream the epoch must give every
token of the store. `plan` is seconds for the first window: order, lengths(), packing; `lengths` for lengths() alone.
Fill is of each stream. Memory is read after the warm-up and at the epoch's end: `anonymous` is what the process owns,
`resident` also counts pages of the mapped file, which the system takes back when it needs them.
Results: benchmarks/results/loader_<cpu>_<date>.md.
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
from moltron.data.store import Clusters, Store, StoreWriter
from moltron.objectives import Limits, get_objective
from moltron.tokenizers import get_tokenizer

VARIANTS = 2  # of a made-up molecule, beside its canonical row
FAMILIES = {  # tokenizer, objective, limits, and U / T of a pack
    "esm2": ("esm2", dict(name="masked_lm"), Limits(1024), None),
    "esm2_floor": ("esm2", dict(name="masked_lm", count="floor"), Limits(1024), None),
    "prott5": ("prott5nv", dict(name="span_corruption"), Limits(512, 256), 0.25),
    "prott5_v1": ("prott5nv", dict(name="span_corruption", mean_span=1.0), Limits(512, 256), 0.3125),
    "megamolbart": ("megamolbart", dict(name="denoising"), Limits(128, 128), 1.25),
}


def write_molecules(path: Path, num_molecules: int, seed: int = 0) -> None:
    """Codes only: the text column, which no batch is made of, is empty."""
    generator = np.random.default_rng(seed)
    per, rows = 1 + VARIANTS, 20_000
    with StoreWriter(path, "molecule", tokens=True) as writer:
        for first in range(0, num_molecules, rows):
            count = min(rows, num_molecules - first)
            lengths = generator.normal(45, 10, count * per).astype(np.int64).clip(5, 120)
            codes = generator.integers(1, 252, int(lengths.sum()), dtype=np.uint8).tobytes()
            ends = np.cumsum(lengths).tolist()
            tokens = [codes[a:b] for a, b in zip([0, *ends], ends)]
            ids = [f"made_up_{first + i // per}" for i in range(count * per)]
            writer.add(ids, [""] * len(ids), tokens)
    Clusters.save_equal(path, num_molecules, per)


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


def measure(store: Store, family: str, tokens: int, repeats: int) -> list[str]:
    """One epoch of packs of `tokens`: the cells of a row of the report."""
    name, settings, limits, share = FAMILIES[family]
    tokenizer, seed = get_tokenizer(name), 1
    objective = get_objective(ObjectiveConfig(**settings), tokenizer, seed)
    sizes = (tokens,) if share is None else (tokens, int(tokens * share))
    plan = BatchPlan(store, objective, sizes, limits, seed=seed)
    begin = time.perf_counter()
    bins = plan.window(0, 0)
    planning = time.perf_counter() - begin
    records, lengths = (np.concatenate([getattr(bin, key) for bin in bins]) for key in ("records", "lengths"))
    begin = time.perf_counter()
    here = objective.lengths(lengths, records, 0, limits).sum(1)
    alone = time.perf_counter() - begin
    num_packs = len(bins) * plan.num_windows  # nearly
    warm_up = max(1, num_packs // 10)
    stretch = max(1, (num_packs - warm_up) // (repeats + 1))
    steps = BatchLoader(plan, store, tokenizer, packs=1, epochs=1).steps()
    real = [(step.tokens, step.decoder_tokens) for step in itertools.islice(steps, warm_up)]
    start, wall, cpu = memory(), [], []
    for _ in range(repeats):
        begin, begin_cpu = time.perf_counter(), time.process_time()
        made = [(step.tokens, step.decoder_tokens) for step in itertools.islice(steps, stretch)]
        count = sum(encoder for encoder, _ in made) / 1e6
        wall.append(count / (time.perf_counter() - begin))
        cpu.append(count / (time.process_time() - begin_cpu))
        real += made
    real += [(step.tokens, step.decoder_tokens) for step in steps]  # the rest of the epoch
    end = memory()
    totals = np.array(real).sum(0)
    if plan.num_windows == 1 and (totals[: len(here)] != here).any():
        raise RuntimeError(f"the epoch gave {totals} tokens, lengths() promised {here}")
    total = int((np.minimum(store.lengths, plan.room) + tokenizer.num_specials).sum(dtype=np.int64))
    if share is None and totals[0] != total:
        raise RuntimeError(f"the epoch gave {totals[0]} tokens, the store has {total}")
    ends = [f"{start[kind]:.0f}, {end[kind]:.0f}" for kind in ("anonymous", "resident")]
    speeds = [f"{statistics.median(wall):.1f}", " ".join(f"{speed:.1f}" for speed in wall)]
    fill = ", ".join(f"{total / len(real) / size:.2%}" for total, size in zip(totals, sizes))
    timed = f"{planning:.2f} ({len(records):,} records, lengths {alone:.3f})"
    packs = " + ".join(f"{size:,}" for size in sizes)
    return [family, packs, *speeds, f"{statistics.median(cpu):.1f}", str(stretch), fill, timed, *ends]


def report(rows: list[list[str]], num_sequences: int, size: int, loads: list[str]) -> str:
    lines = [
        f"# Loader alone, {cpu_name()}, {os.cpu_count()} cores, {datetime.date.today()}",
        "",
        f"`python benchmarks/loader.py`: {num_sequences:,} made-up sequences, {size / 2**30:.2f} GiB on disk in all;",
        f"one process, no workers. numpy {np.__version__}, Python {platform.python_version()}. "
        f"Load average at start: {loads[0]}; at end: {loads[1]}.",
        "",
        "| family | T + U | M tok/s: median | all stretches | M tok a CPU second | packs a stretch | fill | plan, s "
        "| anonymous MiB: start, end | resident MiB: start, end |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join(lines + ["| " + " | ".join(cells) + " |" for cells in rows]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=10_000_000)
    parser.add_argument("--tokens", type=int, nargs="+", default=[131072])
    parser.add_argument("--family", nargs="+", default=["esm2"], choices=list(FAMILIES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--output", help="file to write the table to")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="moltron_loader_", dir=args.folder))
    try:
        loads = ["{:.1f} {:.1f} {:.1f}".format(*os.getloadavg())]
        stores: dict[str, Store] = {}
        rows = []
        for family, tokens in itertools.product(args.family, args.tokens):
            kind = get_tokenizer(FAMILIES[family][0]).alphabet
            if kind not in stores:
                begin = time.perf_counter()
                {"protein": write_store, "molecule": write_molecules}[kind](folder / f"{kind}.arrow", args.sequences)
                stores[kind] = Store.open(folder / f"{kind}.arrow")
                print(f"{len(stores[kind]):,} {kind} records after {time.perf_counter() - begin:.0f} s", flush=True)
            rows.append(measure(stores[kind], family, tokens, args.repeats))
            print("| " + " | ".join(rows[-1]) + " |", flush=True)
        loads.append("{:.1f} {:.1f} {:.1f}".format(*os.getloadavg()))
        text = report(rows, args.sequences, sum(file.stat().st_size for file in folder.glob("*.arrow")), loads)
    finally:
        shutil.rmtree(folder)
    print(text)
    if args.output:
        Path(args.output).write_text(text)


if __name__ == "__main__":
    main()
