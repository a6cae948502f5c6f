"""How fast and in how much memory `moltron prepare` works: made-up UniRef-like proteins from FASTA.

    python benchmarks/prepare.py --records 100000 1000000 --threads 2 --write

Lengths are lognormal (median 270, sigma 0.65, cut at 16 … 2,048), lines of 60 residues, 1 % equal sequences;
val_size=0.005. Each size runs in a process of its own, on at most --threads cores; peak memory is that process's VmHWM,
in all and anonymous (without pages of mapped files, which the system takes back when it needs them). Goal: 1 million
records in 60 s.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

LINE = 60


def write_fasta(path: Path, records: int, seed: int = 0) -> int:
    """-> residues written."""
    rng = np.random.default_rng(seed)
    letters = np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", np.uint8)
    total, last = 0, b""
    with open(path, "wb") as file:
        for first in range(0, records, 20_000):
            count = min(20_000, records - first)
            lengths = np.clip(rng.lognormal(np.log(270), 0.65, count), 16, 2048).astype(int)
            text = letters[rng.integers(0, 20, lengths.sum())].tobytes()
            ends = np.cumsum(lengths)
            again = rng.random(count) < 0.01
            for at in range(count):
                last = last if again[at] and last else text[ends[at] - lengths[at] : ends[at]]
                total += len(last)
                body = b"\n".join(last[i : i + LINE] for i in range(0, len(last), LINE))
                file.write(b">UniRef50_%08d made up n=1 Tax=none\n%s\n" % (first + at, body))
    return total


def measure(fasta: str, output: str) -> None:
    """In the child process: prints one JSON line."""
    from moltron.config.schema import PrepareConfig
    from moltron.data.prepare import prepare

    peak = {"anonymous": 0}

    def watch() -> None:
        while True:
            status = Path("/proc/self/status").read_text().splitlines()
            anonymous = next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))
            peak["anonymous"] = max(peak["anonymous"], anonymous)
            time.sleep(0.05)

    threading.Thread(target=watch, daemon=True).start()
    start = time.perf_counter()
    manifest = prepare(PrepareConfig(input=fasta, output=output, val_size=0.005))
    seconds = time.perf_counter() - start
    cpu = time.process_time()  # with what importing took
    status = Path("/proc/self/status").read_text().splitlines()
    high = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    result = {"seconds": seconds, "cpu": cpu, "peak_mib": high / 1024, "anonymous_mib": peak["anonymous"] / 1024}
    print(json.dumps({**result, **manifest["records"]}))


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="a Markdown file in benchmarks/results")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        measure(*arguments.child)
        return
    rows = []
    for records in arguments.records:
        with tempfile.TemporaryDirectory() as folder:
            fasta = Path(folder) / "made_up.fasta"
            residues = write_fasta(fasta, records)
            size = fasta.stat().st_size
            cores = sorted(os.sched_getaffinity(0))[: arguments.threads]
            command = [sys.executable, __file__, "--child", str(fasta), f"{folder}/out"]
            done = subprocess.run(
                command,
                check=True,
                capture_output=True,
                text=True,
                preexec_fn=lambda cores=cores: os.sched_setaffinity(0, cores),
            )
            result = json.loads(done.stdout.splitlines()[-1])
            load = os.getloadavg()[0]
        rows.append(
            f"| {records:,} | {residues:,} | {size / 2**20:,.0f} | {result['seconds']:.1f} | {result['cpu']:.1f} | "
            f"{records / result['seconds']:,.0f} | {result['peak_mib']:,.0f} | {result['anonymous_mib']:,.0f} "
            f"| {load:.1f} |"
        )
        print(rows[-1], flush=True)
    day = datetime.date.today().isoformat()
    head = "| records | residues | FASTA MiB | seconds | CPU seconds | records/s | peak MiB | of it anonymous | load |"
    command = " ".join(["python", "benchmarks/prepare.py", *sys.argv[1:]])
    text = [
        f"# prepare, {cpu_name()}, {len(cores)} cores, {day}",
        "",
        f"`{command}`; Python {platform.python_version()}.",
        "One run a row; imports count in CPU seconds only; load: the machine's one-minute average at the end.",
        "",
        head,
        "|" + "---|" * head.count(" |"),
        *rows,
        "",
    ]
    print("\n".join(text))
    if arguments.write:
        name = "".join(letter if letter.isalnum() else "_" for letter in cpu_name())
        target = Path(__file__).parent / "results" / f"prepare_{name}_{day}.md"
        target.parent.mkdir(exist_ok=True)
        target.write_text("\n".join(text))


if __name__ == "__main__":
    main()
