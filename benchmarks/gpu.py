"""Training and embedding speed on one GPU, beside Hugging Face transformers, in one run.

    python benchmarks/gpu.py [--sizes 8M 150M 650M] [--peers 8M 650M] [--compiled-peers 8M] [--output results.md]

Lengths are UniRef-like: lognormal, median 270, mean about 330, at most 1,022 residues.
Training is the product's own path: store → BatchPlan → BatchLoader (two processes) → TrainStep with fp32
masters, bf16, AdamW, clip 1.0; embedding is `Encoder.encode`, ids in, pooled vectors out. Peers get the same sequences,
sorted by length and padded to the longest of a batch, bf16 autocast for training and bf16 weights for embedding, sdpa,
the faster of plain and torch.compile. Windows of steps are timed from one synchronisation to the next: median and
range of 7. tok/s counts real tokens (specials included) only. MFU: performance.md's formula against 989 TF/s.
"""

from __future__ import annotations

import argparse
import functools
import gc
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moltron.config.schema import ObjectiveConfig, OptimConfig
from moltron.data.loader import BatchLoader
from moltron.data.plan import BatchPlan
from moltron.data.store import Store, StoreWriter
from moltron.infer.engine import Encoder, Wanted
from moltron.models.batch import PackedBatch
from moltron.models.registry import build_model, get_spec
from moltron.objectives import Limits, get_objective
from moltron.parallel import collectives
from moltron.parallel.apply import assign_full, parallelize
from moltron.tokenizers import get_tokenizer
from moltron.train.optim import Optimizer
from moltron.train.step import TrainStep

SIZES = {  # hidden, layers, heads, ffn, T of training, T of embedding, floors of both (issue 2)
    "8M": (320, 6, 20, 1280, 131072, 131072, 2_200_000, 7_000_000),
    "35M": (480, 12, 20, 1920, 131072, 131072, None, None),
    "150M": (640, 30, 20, 2560, 65536, 65536, 275_000, None),
    "650M": (1280, 33, 20, 5120, 32768, 32768, 95_000, 300_000),
    "3B": (2560, 36, 40, 10240, 8192, 32768, None, None),
}
PEAK = 989e12
WINDOWS = 7


def lengths(count: int, seed: int = 0) -> np.ndarray:
    """Residues of UniRef-like proteins."""
    drawn = np.random.default_rng(seed).lognormal(np.log(270), 0.6335, count)
    return np.clip(drawn.astype(np.int64), 20, 1022)


def sequences(count: int, seed: int = 0) -> list[bytes]:
    rng = np.random.default_rng(seed)
    letters = np.frombuffer(b"LAGVSERTIDPKQNFYMHWC", dtype=np.uint8)
    sizes = lengths(count, seed)
    text = letters[rng.integers(0, 20, sizes.sum())].tobytes()
    ends = np.cumsum(sizes)
    return [text[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def windows(step: Callable[[], int], seconds: float = 1.0, warm_up: int = 5) -> tuple[list[float], float]:
    """tok/s of WINDOWS windows of about `seconds` each, and the seconds of the first step (compilation)."""
    begin = time.perf_counter()
    step()
    torch.cuda.synchronize()
    first = time.perf_counter() - begin
    for _ in range(warm_up):
        step()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    torch.cuda.synchronize()
    steps = max(3, round(seconds / (time.perf_counter() - begin)))
    speeds = []
    for _ in range(WINDOWS):
        begin = time.perf_counter()
        tokens = sum(step() for _ in range(steps))
        torch.cuda.synchronize()
        speeds.append(tokens / (time.perf_counter() - begin))
    return speeds, first


def build(size: str) -> torch.nn.Module:
    hidden, layers, heads, ffn, *_ = SIZES[size]
    return build_model("esm2", dict(hidden_size=hidden, num_layers=layers, num_heads=heads, ffn_size=ffn))


def flops_per_token(size: str, store: Store) -> float:
    lengths = store.lengths[:].astype(np.int64) + 2
    tokens = int(lengths.sum())
    whole = PackedBatch.pack(np.zeros(tokens), lengths, tokens=tokens, pad_id=0, max_length=1024)
    return build(size).flops(whole) / tokens  # type: ignore[operator]


def train(size: str, store: Store, device: torch.device, precision: str = "bf16") -> Callable[[], int]:
    """One optimizer step of one pack, through the product's own loader and step."""
    spec, tokenizer, tokens = get_spec("esm2"), get_tokenizer("esm2"), SIZES[size][4]
    name, _, recipe = precision.partition(" ")
    options: dict = dict(fp8_recipe=recipe) if recipe else {}
    model = parallelize(build(size), spec.plan, device, precision=name, compile=True, **options)
    model.init_weights(0, assign_full)  # type: ignore[operator]
    objective = get_objective(ObjectiveConfig(), tokenizer, 0)
    objective.compile()
    optimizer = Optimizer(model, spec.plan, OptimConfig(), 4e-4)
    step = TrainStep(
        model,
        objective.loss,
        optimizer,
        device,
        clip=1.0,
        scaler=None,
        skip_nonfinite=False,
        sync_each=False,
        graphs=True,
    )
    plan = BatchPlan(store, objective, (tokens,), Limits(1024), seed=0)
    stream = iter(BatchLoader(plan, store, tokenizer, packs=1, pin=True, workers=2))
    pending: list[Any] = []

    def one() -> int:
        data = next(stream)
        pending.append(step(len(pending), data.batches, data.count, 4e-4))
        if len(pending) > 1:
            pending[-2].read()  # as the loop does: one step late
        return data.tokens

    return one


def embed(size: str, texts: list[bytes], device: torch.device) -> Callable[[], int]:
    """One call of Encoder.encode over many sequences."""
    tokenizer = get_tokenizer("esm2")
    model = build(size).to_empty(device=device)
    model.init_weights(0)
    encoder = Encoder(
        model,
        pad_id=tokenizer.pad_id,
        device=device,
        precision="bf16",
        tokens=SIZES[size][5],
        plan=get_spec("esm2").plan,
    )
    encoder.compile()
    ids = [tokenizer.encode(text) for text in texts]
    total = sum(map(len, ids))
    wanted = Wanted(layers=(SIZES[size][1],))

    def one() -> int:
        encoder.encode(ids, wanted)
        return total

    return one


def budgets(lengths: list[int], tokens: int) -> list[list[int]]:
    """Which sequences make a padded batch: sorted by length, at most `tokens` with padding to a multiple of 8."""
    batches: list[list[int]] = [[]]
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batches[-1] and (len(batches[-1]) + 1) * -(-lengths[i] // 8) * 8 > tokens:
            batches.append([])
        batches[-1].append(i)
    return batches


def padded_batches(ids: list[np.ndarray], tokens: int, device: torch.device) -> Iterator[tuple]:
    """(ids, mask, real tokens)."""
    for batch in budgets([len(one) for one in ids], tokens):
        yield pad([ids[i] for i in batch], device)


def pad(batch: list[np.ndarray], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, int]:
    width = -(-max(map(len, batch)) // 8) * 8
    padded = np.ones((len(batch), width), dtype=np.int64)
    for row, ids in zip(padded, batch, strict=True):
        row[: len(ids)] = ids
    ids_BL = torch.from_numpy(padded)
    return ids_BL.to(device), (ids_BL != 1).to(device), sum(map(len, batch))


def peer(
    work: str, size: str, texts: list[bytes], device: torch.device, tokens: int, compiled: bool
) -> Callable[[], int]:
    from transformers import EsmConfig, EsmForMaskedLM

    hidden, layers, heads, ffn, *_ = SIZES[size]
    config = EsmConfig(
        vocab_size=33, mask_token_id=32, pad_token_id=1, hidden_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, intermediate_size=ffn, position_embedding_type="rotary", token_dropout=True,
        layer_norm_eps=1e-5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=1026,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    model = EsmForMaskedLM(config).to(device)
    if work == "embed":
        model = model.to(torch.bfloat16).eval()
    if compiled:
        for layer in model.esm.encoder.layer:
            layer.compile(dynamic=True)
    batches = list(padded_batches([get_tokenizer("esm2").encode(t) for t in texts], tokens, device))
    np.random.default_rng(0).shuffle(batches)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, fused=True) if work == "train" else None
    calls = iter(range(10**9))

    def one() -> int:
        ids, mask, real = batches[next(calls) % len(batches)]
        if optimizer is None:
            with torch.inference_mode():
                hidden_BLD = model.esm(ids, attention_mask=mask).last_hidden_state
                inside = mask[..., None].to(hidden_BLD.dtype)
                (hidden_BLD * inside).sum(1).div(inside.sum(1)).float()  # stays on the device
            return real
        chosen = (torch.rand(ids.shape, device=device) < 0.15) & mask
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(ids.masked_fill(chosen, 32), mask, labels=ids.masked_fill(~chosen, -100)).loss
        update(model, optimizer, loss)
        return real

    return one


def update(model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def clean_up() -> None:
    gc.collect()
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def measure(name: str, make: Callable[[], Callable[[], int]], rows: list[dict], **extra: Any) -> dict | None:
    clean_up()
    try:
        speeds, first = windows(make())
    except torch.OutOfMemoryError:
        rows.append(dict(name=name, median=None, memory=None, **extra))
        print(f"{name}: out of memory", flush=True)
        return None
    memory = torch.cuda.max_memory_allocated() / 2**30
    row = dict(name=name, median=statistics.median(speeds), low=min(speeds), high=max(speeds), first=first,
               memory=memory, **extra)  # fmt: skip
    rows.append(row)
    print(f"{name}: {row['median']:,.0f} tok/s ({row['low']:,.0f}–{row['high']:,.0f}), {memory:.1f} GiB, "
          f"first step {first:.1f} s", flush=True)  # fmt: skip
    return row


def peers(
    work: str, size: str, texts: list[bytes], device: torch.device, rows: list[dict], arguments: argparse.Namespace
) -> None:
    """transformers at the largest power-of-two budget that fits, plain and compiled."""
    for compiled, sizes in ((False, arguments.peers), (True, arguments.compiled_peers)):
        if size not in sizes:
            continue
        tokens = SIZES[size][4 if work == "train" else 5]
        label = "transformers" + (" compiled" if compiled else "")
        while tokens >= 2048:
            name = f"{work} {size} {label}, {tokens:,} padded"
            make = lambda tokens=tokens, compiled=compiled: peer(work, size, texts, device, tokens, compiled)  # noqa: E731
            if measure(name, make, rows, work=work, size=size, peer=True):
                break
            tokens //= 2


def report(rows: list[dict]) -> str:
    device = torch.cuda.get_device_name()
    import triton

    lines = [
        f"# GPU speed: {device}, {time.strftime('%Y-%m-%d')}",
        "",
        f"`python benchmarks/gpu.py {' '.join(sys.argv[1:])}`; torch {torch.__version__}, "
        f"triton {triton.__version__}, Python {platform.python_version()}.",
        "",
        "Real tokens only; median (range) of 7 windows of about 1 s. Ratio: against the best transformers row.",
        "",
        "| work | tok/s | range | memory GiB | first step s | MFU | issue 2 asks | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["median"] is None:
            lines.append(f"| {row['name']} | out of memory | | | | | | |")
            continue
        rivals = [
            r["median"]
            for r in rows
            if r.get("peer") and r["median"] and r["work"] == row["work"] and r["size"] == row["size"]
        ]
        ratio = f"{row['median'] / max(rivals):.1f}×" if rivals and not row.get("peer") else ""
        mfu = f"{row['median'] * row['flops'] / PEAK:.1%}" if row.get("flops") else ""
        floor = f"{row['floor']:,}" if row.get("floor") else ""
        lines.append(
            f"| {row['name']} | {row['median']:,.0f} | {row['low']:,.0f}–{row['high']:,.0f} | {row['memory']:.1f} "
            f"| {row['first']:.1f} | {mfu} | {floor} | {ratio} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["8M", "150M", "650M"], choices=SIZES)
    parser.add_argument("--precisions", nargs="+", default=["bf16"], help="of training; 'fp8 rowwise' has a recipe")
    parser.add_argument("--work", nargs="+", default=["train", "embed"], choices=["train", "embed"])
    parser.add_argument("--peers", nargs="*", default=[], choices=SIZES, help="sizes with transformers beside them")
    parser.add_argument(
        "--compiled-peers", nargs="*", default=[], choices=SIZES, help="and compiled, the faster counts"
    )
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device = collectives.init("cuda")
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        texts = sequences(60_000)
        with StoreWriter(Path(folder) / "train.arrow") as writer:
            writer.add([str(i) for i in range(len(texts))], texts)
        store = Store.open(Path(folder) / "train.arrow")
        for size in arguments.sizes:
            if "train" in arguments.work:
                for precision in arguments.precisions:
                    name = f"train {size} moltron, {precision}, {SIZES[size][4]:,} packed"
                    make = functools.partial(train, size, store, device, precision)
                    floor = SIZES[size][6] if precision == "bf16" else None
                    measure(name, make, rows, work="train", size=size, floor=floor,
                            flops=flops_per_token(size, store))  # fmt: skip
                peers("train", size, texts[:20_000], device, rows, arguments)
            if "embed" in arguments.work:
                some = texts[: {"8M": 16_000, "35M": 8_000, "150M": 4_000, "650M": 2_000}.get(size, 1_000)]
                name = f"embed {size} moltron, {SIZES[size][5]:,} packed"
                make = functools.partial(embed, size, some, device)
                measure(name, make, rows, work="embed", size=size, floor=SIZES[size][7])
                peers("embed", size, some, device, rows, arguments)
            if arguments.output:  # after each size: a run that is cut off keeps what it has
                arguments.output.write_text(report(rows))
    print(report(rows))
    collectives.shutdown()


if __name__ == "__main__":
    main()
