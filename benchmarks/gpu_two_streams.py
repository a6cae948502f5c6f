"""Encoder–decoders on one GPU beside Hugging Face transformers, in one run: training, embedding, generation.

    python benchmarks/gpu_two_streams.py [--rows "train megamolbart xsmall" …] [--no-peers] [--output results.md]

Molecules: random chemistry tokens, lengths normal 45 ± 10. Proteins: lognormal, median 270, at most 510 residues
(ProtT5 small) or 1,022 (ProtT5-XL). Training is the product's own path as in gpu.py: store → BatchPlan → BatchLoader →
TrainStep, fp32 masters, bf16, AdamW, clip 1.0. The peers, BART (MegaMolBART) and T5 (ProtT5) of the same sizes, get the
very sequences of our packs, sorted by length and padded, bf16 autocast for training and bf16 weights for embedding, the
faster of plain and compiled layers, at the largest power-of-two budget that fits.
Generation: hidden states on the host in, ids out, greedy; weights are random and never end, so every molecule gets
`--molecule-tokens` tokens. Windows as in gpu.py. tok/s counts real tokens of the encoder. MFU against 989 TF/s.
Shares: of the GPU's busy time, by the profiler.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

import gpu
from loader import write_molecules
from moltron.config.schema import ObjectiveConfig, OptimConfig
from moltron.data.loader import BatchLoader, Step
from moltron.data.plan import BatchPlan
from moltron.data.store import Store, StoreWriter
from moltron.infer.engine import Encoder, Wanted, ahead
from moltron.infer.generate import Decoding, Generator
from moltron.models.batch import PackedBatch
from moltron.models.registry import build_model, get_spec
from moltron.objectives import Limits, get_objective
from moltron.parallel import collectives
from moltron.parallel.apply import assign_full, parallelize
from moltron.tokenizers import get_tokenizer
from moltron.train.optim import Optimizer
from moltron.train.step import TrainStep

SIZES: dict[str, dict[str, Any]] = {  # architectures as in configs/model
    "megamolbart xsmall": dict(hidden_size=256, num_layers=2, num_decoder_layers=2, num_heads=4, ffn_size=1024),
    "megamolbart small": dict(hidden_size=512, num_layers=6, num_decoder_layers=6, num_heads=8, ffn_size=2048),
    "prott5 small": dict(hidden_size=768, num_layers=12, num_decoder_layers=12, num_heads=12, ffn_size=3072),
    "prott5 XL": dict(
        architecture="t5", hidden_size=1024, num_layers=24, num_decoder_layers=0, num_heads=32, head_dim=128,
        ffn_size=16384, norm_eps=1e-6, tokenizer="prott5",
    ),
}  # fmt: skip
TOKENS = {"megamolbart xsmall": 131072, "megamolbart small": 65536, "prott5 small": 32768, "prott5 XL": 32768}
OBJECTIVES = {
    "megamolbart": ("denoising", 1.25, Limits(128, 128)),
    "prott5": ("span_corruption", 0.25, Limits(512, 256)),
}
FLOORS = {"generate megamolbart xsmall": 20_000, "generate megamolbart small": 7_400}  # issue 4, molecules/s
ROWS = [
    *(f"{work} megamolbart {size}" for size in ("xsmall", "small") for work in ("train", "embed", "generate")),
    "train prott5 small",
    "embed prott5 XL",
]


def loader_of(name: str, store: Store, **options: Any) -> BatchLoader:
    family = name.split()[0]
    objective_name, share, limits = OBJECTIVES[family]
    tokenizer = get_tokenizer("megamolbart" if family == "megamolbart" else "prott5nv")
    objective = get_objective(ObjectiveConfig(name=objective_name), tokenizer, 0)
    sizes = (TOKENS[name], int(TOKENS[name] * share))
    return BatchLoader(BatchPlan(store, objective, sizes, limits, seed=0), store, tokenizer, packs=1, **options)


def train(name: str, store: Store, device: torch.device, seen: list[Step]) -> Callable[[], int]:
    spec, loader = get_spec(name.split()[0]), loader_of(name, store, pin=True, workers=2)
    model = parallelize(build_model(spec.name, SIZES[name]), spec.plan, device, precision="bf16", compile=True)
    model.init_weights(0, assign_full)
    loader.objective.compile()
    optimizer = Optimizer(model, spec.plan, OptimConfig(), 1e-4)
    settings: dict[str, Any] = dict(clip=1.0, scaler=None, skip_nonfinite=False, sync_each=False, graphs=True)
    step = TrainStep(model, loader.objective.loss, optimizer, device, **settings)
    stream, pending = iter(loader), []

    def one() -> int:
        data = next(stream)
        if len(seen) < 8:
            seen.append(data)
        pending.append(step(len(pending), data.batches, data.count, 1e-4))
        if len(pending) > 1:
            pending[-2].read()
        return data.tokens

    return one


def encoder_of(name: str, device: torch.device) -> Encoder:
    spec, config = get_spec(name.split()[0]), SIZES[name]
    tokenizer = get_tokenizer(config.get("tokenizer", "megamolbart"))
    model = build_model(spec.name, config).to_empty(device=device)
    model.init_weights(0)
    settings: dict[str, Any] = dict(device=device, precision="bf16", tokens=TOKENS[name], plan=spec.plan)
    encoder = Encoder(model, pad_id=tokenizer.pad_id, **settings)
    encoder.compile()
    return encoder


def embed(name: str, ids: list[np.ndarray], device: torch.device) -> Callable[[], int]:
    encoder, wanted = encoder_of(name, device), Wanted(layers=(SIZES[name]["num_layers"],))
    total = sum(map(len, ids))

    def one() -> int:
        encoder.encode(ids, wanted)
        return total

    return one


def generate(name: str, ids: list[np.ndarray], device: torch.device, tokens: int) -> Callable[[], int]:
    """Counts molecules."""
    encoder, tokenizer = encoder_of(name, device), get_tokenizer("megamolbart")
    hiddens = encoder.encode(ids, Wanted((SIZES[name]["num_layers"],), None, hiddens=True)).hiddens
    states = hiddens[SIZES[name]["num_layers"]]
    ends: dict[str, Any] = dict(bos_id=tokenizer.bos_id, eos_id=tokenizer.vocab_size)  # an end that never comes
    generator = Generator(encoder.model, **ends, capacity=512, device=device, precision="bf16")
    settings = Decoding(max_tokens=tokens)

    def one() -> int:
        return len(generator.decode(states, settings))

    return one


# --------------------------------------------------------------------------------------------------------------- peers


def peer_model(name: str, device: torch.device) -> Any:
    import transformers as hf

    c = SIZES[name]
    if name.startswith("megamolbart"):
        heads: dict[str, Any] = {
            f"{side}_{key}": value
            for side, layers in (("encoder", c["num_layers"]), ("decoder", c["num_decoder_layers"]))
            for key, value in (("layers", layers), ("ffn_dim", c["ffn_size"]), ("attention_heads", c["num_heads"]))
        }
        config = hf.BartConfig(
            vocab_size=576, d_model=c["hidden_size"], max_position_embeddings=512, pad_token_id=0, dropout=0.0,
            attention_dropout=0.0, activation_dropout=0.0, **heads,
        )  # fmt: skip
        return hf.BartForConditionalGeneration(config).to(device)
    config = hf.T5Config(
        vocab_size=128, d_model=c["hidden_size"], d_kv=c.get("head_dim", 64), d_ff=c["ffn_size"], dropout_rate=0.0,
        num_layers=c["num_layers"], num_heads=c["num_heads"], pad_token_id=0, decoder_start_token_id=0,
    )  # fmt: skip
    whole = c["num_decoder_layers"] > 0
    return (hf.T5ForConditionalGeneration(config) if whole else hf.T5EncoderModel(config)).to(device)


def layers_of(model: Any) -> list[Any]:
    stacks = [s for s in (model.get_encoder(), getattr(model, "get_decoder", lambda: None)()) if s is not None]
    return [layer for stack in stacks for layer in (stack.layers if hasattr(stack, "layers") else stack.block)]


def padded(rows: list[np.ndarray], fill: int) -> torch.Tensor:
    out = np.full((len(rows), -(-max(map(len, rows)) // 8) * 8), fill, dtype=np.int64)
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = row
    return torch.from_numpy(out)


def unpacked(steps: list[Step]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(encoder's ids, decoder's ids, labels) of every sequence of our packs."""
    found = []
    for batch in (batch for step in steps for batch in step.batches):
        assert batch.decoder_ids is not None and batch.decoder_layout is not None
        assert batch.targets is not None and batch.target_positions is None
        labels = batch.targets.numpy()
        for source, i in ((batch, i) for i in range(batch.num_sequences)):
            a, b = (layout.cu_seqlens[i : i + 2].tolist() for layout in (source.layout, batch.decoder_layout))
            found.append((batch.ids.numpy()[slice(*a)], batch.decoder_ids.numpy()[slice(*b)], labels[slice(*b)]))
    return found


def budgets(rows: list[Any], lengths: list[int], tokens: int) -> list[list[Any]]:
    """Rows in batches as gpu.py's, in random order."""
    batches = [[rows[i] for i in batch] for batch in gpu.budgets(lengths, tokens)]
    np.random.default_rng(0).shuffle(batches)  # type: ignore[arg-type]
    return batches


def peer_train(name: str, steps: list[Step], device: torch.device, tokens: int, compiled: bool) -> Callable[[], int]:
    model = peer_model(name, device)
    for layer in layers_of(model) if compiled else ():
        layer.compile(dynamic=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    rows = unpacked(steps)
    batches = [
        ([padded([row[j] for row in batch], fill).to(device) for j, fill in ((0, 0), (1, 0), (2, -100))],
         padded([np.ones(len(row[0])) for row in batch], 0).to(device), sum(len(row[0]) for row in batch))
        for batch in budgets(rows, [len(row[0]) for row in rows], tokens)
    ]  # fmt: skip
    calls = iter(range(10**9))

    def one() -> int:
        (ids, decoder_ids, labels), mask, real = batches[next(calls) % len(batches)]
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits = model(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder_ids).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        gpu.update(model, optimizer, loss)
        return real

    return one


def peer_embed(
    name: str, ids: list[np.ndarray], device: torch.device, tokens: int, compiled: bool, ready: bool
) -> Callable[[], int]:
    """Sorted and padded in a thread, vectors back on the host. ready: batches on the device beforehand, and no way
    back for the vectors."""
    model = peer_model(name, device).get_encoder().to(torch.bfloat16).eval()
    for layer in (model.layers if hasattr(model, "layers") else model.block) if compiled else ():
        layer.compile(dynamic=True)
    groups = budgets(ids, [len(row) for row in ids], tokens)

    def padded_with_mask(batch: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor, int]:
        mask = padded([np.ones(len(row), dtype=np.int64) for row in batch], 0)
        return padded(batch, 0).pin_memory(), mask.pin_memory(), sum(map(len, batch))

    if ready:
        stream = itertools.cycle([(i.to(device), m.to(device), n) for i, m, n in map(padded_with_mask, groups)])
    else:
        stream = ahead(map(padded_with_mask, itertools.cycle(groups)), depth=3)

    @torch.inference_mode()
    def one() -> int:
        ids, mask, real = next(stream)
        ids, mask = ids.to(device, non_blocking=True), mask.to(device, non_blocking=True)
        hidden_BLD = model(input_ids=ids, attention_mask=mask).last_hidden_state
        inside = mask[..., None].to(hidden_BLD.dtype)
        vectors_BD = (hidden_BLD * inside).sum(1).div(inside.sum(1)).float()
        if not ready:
            vectors_BD.cpu()
        return real

    return one


# -------------------------------------------------------------------------------------------------------------- report


def shares(one: Callable[[], int]) -> str:
    """What the GPU does: attention, matrix products, the rest; and how much of the time it is busy."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        begin = time.perf_counter()
        for _ in range(3):
            one()
        torch.cuda.synchronize()
        wall = time.perf_counter() - begin
    sums = {"attention": 0.0, "GEMM": 0.0, "rest": 0.0}
    for event in found.events() or ():
        if event.device_type != torch.autograd.DeviceType.CUDA or event.is_user_annotation:
            continue
        name = event.name.lower()
        if any(
            part in name for part in ("forward_kernel", "dq_kernel", "dkdv_kernel", "rotate_kernel", "fmha", "flash")
        ):
            kind = "attention"
        else:
            kind = "GEMM" if any(part in name for part in ("nvjet", "gemm", "cutlass", "splitk")) else "rest"
        sums[kind] += event.device_time / 1e6
    busy = sum(sums.values()) or 1.0
    return f"{', '.join(f'{k} {v / busy:.0%}' for k, v in sums.items())}; busy {min(busy / wall, 1):.0%}"


def measure(name: str, make: Callable[[], Callable[[], int]], rows: list[dict], profiled: bool, **extra: Any) -> bool:
    gpu.clean_up()
    try:
        one = make()
        speeds, first = gpu.windows(one, seconds=0.5)
        extra["shares"] = shares(one) if profiled else ""
    except torch.OutOfMemoryError:
        print(f"{name}: out of memory", flush=True)
        return False
    row = dict(name=name, median=statistics.median(speeds), low=min(speeds), high=max(speeds), first=first,
               memory=torch.cuda.max_memory_allocated() / 2**30, **extra)  # fmt: skip
    rows.append(row)
    print(f"{name}: {row['median']:,.0f}/s ({row['low']:,.0f}–{row['high']:,.0f}), {row['memory']:.1f} GiB, "
          f"first {first:.1f} s; {row['shares']}", flush=True)  # fmt: skip
    return True


def peers(work: str, make: Callable[..., Callable[[], int]], rows: list[dict], tokens: int) -> None:
    for compiled, ready in itertools.product((False, True), (False, True) if work.startswith("embed") else (True,)):
        budget, options = tokens, {"ready": ready} if work.startswith("embed") else {}
        while budget >= 2048:
            label = f"{work}: transformers{' compiled' * compiled}, {budget:,} padded{', on the device' * ready}"
            bound = functools.partial(make, budget, compiled, **options)
            if measure(label, bound, rows, False, work=work, peer=True, ready=ready):
                break
            budget //= 2


def report(rows: list[dict]) -> str:
    import transformers

    lines = [
        f"# Encoder–decoders: {torch.cuda.get_device_name()}, {time.strftime('%Y-%m-%d')}",
        "",
        f"`python benchmarks/gpu_two_streams.py {' '.join(sys.argv[1:])}`; torch {torch.__version__}, "
        f"transformers {transformers.__version__}.",
        "",
        "A second: real tokens of the encoder, or molecules (generate). Median (range) of 7 windows of about .5 s. "
        "Ratio: against the fastest row of transformers; of embedding, the fastest that goes from ids on the host to "
        "vectors on the host, as ours does (in brackets: the fastest whose batches lay on the device beforehand).",
        "",
        "| work | a second | range | memory GiB | first step s | MFU | GPU time | issue 4 asks | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        rivals = [r for r in rows if r.get("peer") and r["work"] == row["work"]]
        alike = [r["median"] for r in rivals if not r["ready"] or row["work"].startswith("train")]
        ratio = ""
        if rivals and not row.get("peer"):
            ratio = f"{row['median'] / max(alike):.1f}×"
            if len(alike) < len(rivals):
                ratio += f" ({row['median'] / max(r['median'] for r in rivals):.1f}×)"
        mfu = f"{row['median'] * row['flops'] / gpu.PEAK:.1%}" if row.get("flops") else ""
        asked = FLOORS.get(row["work"])
        floor = f"{asked:,}" if asked and not row.get("peer") else ""
        lines.append(
            f"| {row['name']} | {row['median']:,.0f} | {row['low']:,.0f}–{row['high']:,.0f} | {row['memory']:.1f} "
            f"| {row['first']:.1f} | {mfu} | {row['shares']} | {floor} | {ratio} |"
        )
    return "\n".join(lines) + "\n"


def flops_a_token(name: str, store: Store, work: str) -> float:
    """Training FLOPs of a pack, by its encoder's tokens; a third of the encoder's for embedding."""
    if work == "train":
        step = next(iter(loader_of(name, store).steps()))
        return build_model(name.split()[0], SIZES[name]).flops(step.batches[0]) / step.tokens  # type: ignore[operator]
    lengths = np.minimum(store.lengths[:].astype(np.int64), 1022) + 1
    tokens = int(lengths.sum())
    whole = PackedBatch.pack(np.zeros(tokens), lengths, tokens=tokens, pad_id=0, max_length=1024)
    model: Any = build_model(name.split()[0], SIZES[name] | {"num_decoder_layers": 0})
    return model.flops(whole) / tokens / 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--molecule-tokens", type=int, default=45)
    parser.add_argument("--records", type=int, default=120_000)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device, rows = collectives.init("cuda"), []
    with tempfile.TemporaryDirectory() as folder:
        write_molecules(Path(folder) / "molecules.arrow", arguments.records)
        with StoreWriter(Path(folder) / "proteins.arrow") as writer:
            texts = gpu.sequences(arguments.records)
            writer.add([str(i) for i in range(len(texts))], texts)
        rng = np.random.default_rng(0)
        sizes = rng.normal(45, 10, arguments.records).astype(int).clip(5, 120)
        molecules = [rng.integers(20, 270, n) for n in sizes]
        proteins = [get_tokenizer("prott5").encode(text) for text in texts[:1000]]
        for row in arguments.rows:
            work, name = row.split(" ", 1)
            is_molecule = name.startswith("megamolbart")
            store = Store.open(Path(folder) / ("molecules.arrow" if is_molecule else "proteins.arrow"))
            steps: list[Step] = []
            some = molecules if is_molecule else proteins
            count = 30_000 if name.endswith("xsmall") else 8_000
            make: Any = {
                "train": functools.partial(train, name, store, device, steps),
                "embed": functools.partial(embed, name, some, device),
                "generate": functools.partial(generate, name, molecules[:count], device, arguments.molecule_tokens),
            }[work]
            title = f"{row}: moltron, {TOKENS[name]:,} packed" if work != "generate" else f"{row}: moltron"
            flops = None if work == "generate" else flops_a_token(name, store, work)
            measure(title, make, rows, True, work=row, flops=flops)
            if work != "generate" and not arguments.no_peers:
                rival = (peer_train, steps) if work == "train" else (peer_embed, some)
                peers(row, functools.partial(rival[0], name, rival[1], device), rows, TOKENS[name])
            if arguments.output:
                arguments.output.write_text(report(rows))
    print(report(rows))
    collectives.shutdown()


if __name__ == "__main__":
    main()
