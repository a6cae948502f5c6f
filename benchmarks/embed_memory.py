"""Peak memory of `moltron embed` against the length of its input: it must not grow.

    python benchmarks/embed_memory.py [--records 10000 40000] [--formats npz h5 parquet safetensors]

A tiny model with made-up records of 30 residues, embeddings and hiddens, 2,000 records a shard; each run is a process
of its own, its peak is the kernel's (ru_maxrss).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from moltron.checkpoint.weights import save_pretrained
from moltron.models.registry import build_model, get_spec

REPORT = "import resource, sys; print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
CODE = f"from moltron.cli.main import main; import sys; code = main(sys.argv[1:]); {REPORT}; sys.exit(code)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, nargs="*", default=[10_000, 40_000])
    parser.add_argument("--formats", nargs="*", default=["npz", "h5", "parquet", "safetensors"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = build_model("esm2", dict(hidden_size=64, num_layers=1, num_heads=4, ffn_size=64), "cpu")
        model.init_weights(0)
        save_pretrained(model, get_spec("esm2"), model.config, folder / "model")
        print("| records | format | output MB | seconds | peak MB |\n|---|---|---|---|---|")
        for count in args.records:
            letters = np.random.default_rng(0).choice(np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", np.uint8), (count, 30))
            with open(folder / "in.fasta", "wb") as file:
                file.writelines(b">P%d\n%s\n" % (i, row.tobytes()) for i, row in enumerate(letters))
            for suffix in args.formats:
                output = folder / f"out.{suffix}"
                keys = [f"model={folder}/model", f"input={folder}/in.fasta", f"output={output}", "device=cpu"]
                keys += ["outputs=[embeddings,hiddens]", "shard_size=2000"]
                begin = time.perf_counter()
                command = [sys.executable, "-c", CODE, "embed", *keys]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ)
                peak = done.stdout.split("peak ")[1].strip()
                size = output.stat().st_size >> 20
                print(f"| {count:,} | {suffix} | {size} | {time.perf_counter() - begin:.0f} | {peak} |", flush=True)
                output.unlink()


if __name__ == "__main__":
    main()
