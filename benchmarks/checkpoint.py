"""Checkpoints: seconds until save returns, until it is on disk, verified and restored, and the cost to steps beside it.

python benchmarks/checkpoint.py 35M                                   # one process, CPU or GPU
torchrun --nproc-per-node 2 benchmarks/checkpoint.py 650M             # FSDP2; then a load on one rank is checked
"""

import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from moltron.checkpoint.manager import CheckpointManager, load_tensors
from moltron.models.registry import build_model
from moltron.parallel import collectives

SIZES = {"8M": (320, 6), "35M": (480, 12), "150M": (640, 30), "650M": (1280, 33)}


def main() -> None:
    hidden, layers = SIZES[sys.argv[1] if len(sys.argv) > 1 else "35M"]
    device = collectives.init()
    architecture = {"hidden_size": hidden, "num_layers": layers, "num_heads": 20, "ffn_size": 4 * hidden}
    model = build_model("esm2", architecture, device)
    model.init_weights(0)
    if collectives.world_size() > 1:
        for block in model.layers.values():
            fully_shard(block)
        fully_shard(model)
    state = {f"model.{n}": p.detach() for n, p in model.named_parameters()}
    for kind in ("exp_avg", "exp_avg_sq"):
        state |= {f"optim.{kind}.{n}": torch.rand_like(p.detach()) for n, p in model.named_parameters()}
    nbytes = sum(t.numel() * t.element_size() for t in state.values())
    folder = Path(collectives.broadcast_object(tempfile.mkdtemp()))
    manager = CheckpointManager(folder)
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device)

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def products(seconds: float) -> float:
        """Milliseconds of a product that stands for a training step."""
        begin, count = clock(), 0
        while clock() - begin < seconds:
            a @ a
            count += 1
        return (clock() - begin) / count * 1e3

    products(1.0)
    alone = products(1.0)
    rows = []
    for step in range(1, 6):
        begin = clock()
        manager.save(step, state, {})
        staged = clock() - begin
        beside = products(0.5)
        manager.wait()
        rows.append((staged, clock() - begin, beside))
    begin = clock()
    path = manager.find_latest()
    verified = clock() - begin
    restored = {n: torch.zeros_like(t) for n, t in state.items()}
    begin = clock()
    manager.restore(path, restored)
    loaded = clock() - begin
    local = lambda t: t.to_local() if hasattr(t, "to_local") else t  # noqa: E731
    assert all(torch.equal(local(restored[n]), local(state[n])) for n in state)
    full = {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).cpu() for n, t in state.items()}
    if collectives.rank() == 0:
        one = {n: torch.zeros(t.shape) for n, t in full.items()}
        load_tensors(path, one)
        assert all(torch.equal(one[n], full[n]) for n in one)
        first, (staged, total, beside) = rows[0], sorted(rows[1:])[len(rows[1:]) // 2]
        print(
            f"{nbytes / 1e9:.2f} GB, {collectives.world_size()} rank(s) on {device.type}, torch {torch.__version__}: "
            f"save returns after {staged:.3f} s (first {first[0]:.2f}), on disk after {total:.2f} s; "
            f"a step beside it {beside:.1f} ms, alone {alone:.1f} ms; verified in {verified:.2f} s, "
            f"restored in {loaded:.2f} s"
        )
        shutil.rmtree(folder)
    if dist.is_initialized():
        collectives.shutdown()


if __name__ == "__main__":
    main()
