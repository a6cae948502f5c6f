"""The memory model: what autograd keeps to the byte, on one process and two; peaks that GPUs were measured at."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor

from moltron.cli import plan
from moltron.config.schema import ObjectiveConfig, OptimConfig, ParallelConfig
from moltron.models.batch import PackedBatch
from moltron.models.registry import build_model, get_spec
from moltron.objectives import get_objective
from moltron.parallel import collectives
from moltron.parallel.apply import assign_full, compile_units, parallelize, units
from moltron.parallel.footprint import Footprint, Work, footprint
from moltron.parallel.recompute import recompute_units
from moltron.tokenizers import get_tokenizer
from moltron.train.optim import Optimizer

GIB = 2**30
CONFIGS = Path(__file__).parents[3] / "src/moltron/configs/model"
RESULTS = Path(__file__).parents[3] / "benchmarks/results"

# Preset, tokens of a pack, targets of a pack (None: masked_lm's), peak in GiB, the page that has it, and the layout
# where it is not one GPU's. H100 and H200, bf16, compiled, AdamW if nothing else is said, one pack a step on one GPU
MEASURED = [
    ("esm2_8M", (131072,), None, 9.1, "gpu_h100_2026-11-25.md", {}),
    ("esm2_35M", (131072,), None, 26.79, "plan_h200_2026-11-26.md", {}),
    ("esm2_150M", (65536,), None, 45.3, "gpu_h100_2026-11-26.md", {}),
    ("esm2_650M", (32768,), None, 58.2, "gpu_h100_2026-11-25.md", {}),
    ("megamolbart_xsmall", (131072, 163840), 163840, 6.3, "gpu_two_streams_h100_2026-11-26.md", {}),
    ("prott5_small", (32768, 8192), 8192, 16.6, "gpu_two_streams_h100_2026-11-25.md", {}),
    ("esm2_650M", (32768,), None, 42.89, "plan_h200_2026-11-26.md", dict(recompute="selective")),
    ("esm2_650M", (32768,), None, 15.47, "plan_h200_2026-11-26.md", dict(recompute="full")),
    ("esm2_650M", (16384,), None, 32.18, "plan_h200_2026-11-26.md", dict(muon=True)),
    ("esm2_3B", (8192,), None, 50.14, "plan_h200_2026-11-26.md", dict(recompute="full")),
    ("esm2_3B", (8192,), None, 73.6, "fp8_h200_2026-11-26.md", {}),
    ("esm2_650M", (32768,), None, 43.6, "fp8_h200_2026-11-26.md", dict(fp8=True)),
    ("esm2_3B", (8192,), None, 65.7, "fp8_h200_2026-11-26.md", dict(fp8=True)),
    ("esm2_3B", (12288,), None, 74.3, "four_gpus_h200_2026-11-26/README.md", dict(fp8=True)),
    ("esm2_650M", (16384,), None, 30.8, "layouts_h200_2026-11-26/README.md", dict(world=2, packs=2)),
    ("esm2_650M", (16384,), None, 18.5, "layouts_h200_2026-11-26/README.md", dict(world=2, packs=4, tp=2)),
    ("esm2_650M", (16384,), None, 30.1, "layouts_h200_2026-11-26/README.md", dict(world=2, packs=4, pp=2)),
]
SIZES = dict(hidden_size=64, num_layers=3, num_heads=4, ffn_size=192)
MODELS = {
    "esm1": SIZES,
    "esm2": SIZES,
    "megamolbart": SIZES | dict(num_decoder_layers=2),
    "prott5": SIZES | dict(num_decoder_layers=2),
}
TOKENS, SECOND = 1024, 896  # of the streams


def preset(name: str) -> tuple[str, dict]:
    architecture = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    return architecture.pop("family"), architecture


def predict(name: str, world: int = 1, **options) -> Footprint:
    work = {key: options.pop(key) for key in Work._fields if key in options}
    family, architecture = preset(name)
    config = ParallelConfig(**options)
    return footprint(build_model(family, architecture), get_spec(family).plan, config, world, Work(**work))


@pytest.mark.parametrize("name,tokens,targets,peak,page,layout", MEASURED, ids=[f"{r[0]} {r[-1]}" for r in MEASURED])
def test_predicted_peaks_are_those_measured_within_5_percent(name, tokens, targets, peak, page, layout):
    assert f"| {peak} |" in (RESULTS / page).read_text()
    if targets is None:
        targets = get_objective(ObjectiveConfig(), get_tokenizer("esm2"), 0).num_targets(tokens[0])
    predicted = predict(name, **{"tokens": tokens, "targets": targets, "packs": 1} | layout)
    assert predicted.peak / GIB == pytest.approx(peak, rel=0.05)


RECORDS = [
    record
    for file in (
        "four_gpus_h200_2026-11-26/layouts",
        "four_gpus_h200_2026-11-26/fp8",
        "eight_gpus_h200_2026-11-26/layouts",
    )
    for record in json.loads((RESULTS / f"{file}.json").read_text())
]


@pytest.mark.parametrize("record", RECORDS, ids=[record["row"] for record in RECORDS])
def test_and_those_of_one_to_eight_gpus_within_2_percent(record):
    """Rows of benchmarks/layouts_gpu.py: 650M to 15B, every layout of four, FP8; the furthest was 1 % off."""
    model, world, *keys = record["row"].split()
    config, _ = plan.training(model, keys)
    assert plan.predict(config, int(world)).peak == pytest.approx(record["peak"], rel=0.02)


def batch_of(family: str) -> PackedBatch:
    lengths, decoder = np.array([90] * 11), None
    if family in ("megamolbart", "prott5"):
        decoder = (np.ones(880, dtype=np.int64), np.array([80] * 11), SECOND)
    ids = np.full(990, 5, dtype=np.int64)
    return PackedBatch.pack(ids, lengths, tokens=TOKENS, pad_id=1, max_length=128, decoder=decoder)


def kept_by_blocks(model: torch.nn.Module, family: str) -> list[int]:
    """Bytes that autograd keeps for each block but weights; what two blocks keep counts for the first."""
    owner, seen, alive, weights = [-1], {}, [], set()

    def pack(tensor):
        here = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        here = here.elem if isinstance(here, AsyncCollectiveTensor) else here
        storage = here.untyped_storage()
        alive.append(here)
        if owner[0] >= 0 and storage.data_ptr() not in weights:
            seen.setdefault(storage.data_ptr(), (owner[0], storage.nbytes()))
        return tensor

    blocks = units(model, get_spec(family).plan)
    for number, block in enumerate(blocks):

        def run(*inputs, forward=block.forward, number=number, block=block):
            for parameter in block.parameters():
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                weights.add(local.untyped_storage().data_ptr())
            owner[0] = number
            try:
                return forward(*inputs)
            finally:
                owner[0] = -1

        block.forward = run
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(batch_of(family))
    alive.append(output)
    return [sum(size for number, size in seen.values() if number == i) for i in range(len(blocks))]


def differences(family: str, config: ParallelConfig, world: int, **how) -> list[float]:
    """Bytes kept by each block more than predicted; but by the first of each stack, which keeps what all share."""
    spec = get_spec(family)
    model = parallelize(
        build_model(family, MODELS[family]),
        spec.plan,
        torch.device("cpu"),
        precision="fp32",
        compile=False,
        config=config,
    )
    model.init_weights(0, assign_full)
    kept = kept_by_blocks(model, family)
    tokens = (TOKENS,) if len(spec.plan.units) == 1 else (TOKENS, SECOND)
    work = Work(tokens, targets=64, packs=1, width=4, compiled=False)
    predicted = footprint(build_model(family, MODELS[family]), spec.plan, config, world, work).blocks
    assert min(kept) > 0
    return [a - b for i, (a, b) in enumerate(zip(kept, predicted, strict=True)) if i not in (0, SIZES["num_layers"])]


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("family", MODELS)
def test_blocks_keep_what_is_predicted_to_the_byte(family, recompute):
    assert set(differences(family, ParallelConfig(recompute=recompute), 1)) == {0}


LAYOUTS = {"dp_shard 2": {}, "tp 2": dict(tp=2), "cp 2": dict(cp=2)}


@pytest.fixture(scope="module")
def of_two_ranks(ranks_of):
    with ranks_of(__file__) as outputs:
        pass
    return json.loads(next(line for line in outputs[0].splitlines() if line.startswith("{")))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["esm2", "megamolbart"])
def test_a_rank_of_two_keeps_what_is_predicted_to_the_byte(of_two_ranks, family, layout):
    assert set(of_two_ranks[f"{family} {layout}"]) == {0}


def one_rank() -> None:
    """What a spawned process does: prints, on rank 0, the differences of every layout."""
    collectives.init("cpu")
    found = {}
    for family in ("esm2", "megamolbart"):
        for name, options in LAYOUTS.items():
            config = ParallelConfig(**options)
            collectives.share_packs(config.cp * config.tp)
            found[f"{family} {name}"] = differences(family, config, 2)
    if collectives.rank() == 0:
        print(json.dumps(found))
    collectives.barrier()
    collectives.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_compiled_block_keeps_what_is_predicted(recompute, monkeypatch):
    """torch's partitioner decides, the one that inductor uses; only the tiles of the pack come on top."""
    torch._dynamo.reset()
    model = build_model("esm1", MODELS["esm1"]).to_empty(device="cpu")
    model.init_weights(0)
    spec = get_spec("esm1")
    recompute_units(units(model, spec.plan), recompute)
    compiling = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda m, **how: compiling(m, **how, backend="aot_eager_decomp_partition")
    )
    compile_units(model, spec.plan, around=False)
    kept = kept_by_compiled(model)
    # On a CPU sequences' outputs are put together; recompute=selective does not keep both
    work = Work((TOKENS,), 64, 1, width=4, compiled=recompute != "none")
    config = ParallelConfig(recompute=recompute)
    predicted = footprint(build_model("esm1", MODELS["esm1"]), spec.plan, config, 1, work).blocks[0]
    assert kept == pytest.approx(predicted, rel=0.02)


def kept_by_compiled(model: torch.nn.Module) -> int:
    weights, seen, alive = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        alive.append(tensor)
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(TOKENS, SIZES["hidden_size"], requires_grad=True)
    layout = PackedBatch.pack(np.full(1024, 5), np.array([128] * 8), tokens=TOKENS, pad_id=1, max_length=128).layout
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive.append(next(iter(model.layers.values()))(x, layout, None))
    return sum(seen.values())


def test_memory_is_divided_as_the_axes_say():
    work = dict(tokens=(8192,), targets=1600, packs=1)
    alone, shard = predict("esm2_650M", **work), predict("esm2_650M", 8, **work)
    assert shard.memory["weights"] * 8 == pytest.approx(alone.memory["weights"])
    assert shard.memory["optimizer state"] * 8 == pytest.approx(alone.memory["optimizer state"])
    assert shard.memory["activations"] == alone.memory["activations"]
    assert predict("esm2_650M", 8, dp_replicate=2, **work).memory["weights"] == 2 * shard.memory["weights"]
    resharded = predict("esm2_650M", 8, reshard_after_forward=True, **work)
    assert resharded.memory["weights to compute with"] < 0.1 * shard.memory["weights to compute with"]
    assert predict("esm2_650M", 2, cp=2, **work).memory["activations"] == alone.memory["activations"] / 2
    every_second = predict("esm2_650M", recompute="full", recompute_every=2, **work)
    full = predict("esm2_650M", recompute="full", **work)
    assert full.peak < every_second.peak < alone.peak
    muon = predict("esm2_650M", muon=True, **work)
    assert muon.memory["optimizer state"] == pytest.approx(8 * 651e6 - 4 * 649e6, rel=0.01)
    packed = predict("esm2_650M", fp8_moments=True, **work)
    assert packed.memory["optimizer state"] == pytest.approx((2 + 8 / 64) * 651e6, rel=0.01)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("family", MODELS)
def test_fp8_moments_are_counted_to_the_byte(family, name):
    model, plan = build_model(family, MODELS[family], "cpu"), get_spec(family).plan
    state = Optimizer(model, plan, OptimConfig(name=name, state="fp8"), 1.0).state_tensors()
    held = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    whole = build_model(family, MODELS[family])
    tokens = (TOKENS,) if len(plan.units) == 1 else (TOKENS, SECOND)
    predicted = [
        footprint(whole, plan, ParallelConfig(), 1, Work(tokens, 64, 1, muon=name == "muon", fp8_moments=packed))
        for packed in (True, False)
    ]
    plain = Optimizer(model, plan, OptimConfig(name=name), 1.0).state_tensors()
    in_fp32 = sum(tensor.numel() * tensor.element_size() for tensor in plain.values())
    saved = [found.memory["optimizer state"] for found in predicted]
    assert saved[1] - saved[0] == in_fp32 - held > 0


def test_gradients_of_several_packs_are_whole_unless_weights_are_resharded():
    work = dict(tokens=(8192,), targets=1600)
    sizes = [predict("esm2_650M", 8, packs=packs, **work).memory["gradients"] for packs in (1, 4)]
    assert sizes[0] == 0 and sizes[1] == pytest.approx(4 * 651e6, rel=0.01)
    resharded = predict("esm2_650M", 8, packs=4, reshard_after_forward=True, **work)
    assert resharded.memory["gradients"] == pytest.approx(sizes[1] / 8)


def test_the_first_rank_of_a_pipeline_holds_the_most_packs():
    work = dict(tokens=(8192,), targets=1600, packs=8)
    alone = predict("esm2_650M", **work).memory["activations"]
    assert predict("esm2_650M", 4, pp=4, **work).memory["activations"] == pytest.approx(alone, rel=0.1)
    interleaved = predict("esm2_650M", 4, pp=4, pp_schedule="interleaved", **work)
    assert interleaved.memory["activations"] > 1.2 * alone


def test_bytes_sent():
    work = dict(tokens=(8192,), targets=1600, packs=2)
    hidden, weights = 8192 * 1280 * 2, 651e6
    assert predict("esm2_650M", **work).sent == {}
    sent = predict("esm2_650M", 4, **work).sent
    assert sent == {"dp_shard": pytest.approx((2 + 4) * weights * 3 / 4, rel=0.01)}  # gathered once, added up once
    again = predict("esm2_650M", 4, reshard_after_forward=True, **work).sent
    assert again == {"dp_shard": pytest.approx(2 * (2 * 2 + 4) * weights * 3 / 4, rel=0.01)}
    assert predict("esm2_650M", 2, tp=2, **work).sent == {"tp": 2 * 33 * 8 * hidden / 2}
    assert predict("esm2_650M", 2, cp=2, **work).sent["cp"] == 2 * 33 * 2 * 2 * hidden / 2
    assert predict("esm2_650M", 2, pp=2, **work).sent["pp"] == 2 * hidden
    replicated = predict("esm2_650M", 4, dp_replicate=2, **work).sent["dp_replicate"]
    assert replicated == pytest.approx(4 * weights / 2, rel=0.01)


if __name__ == "__main__":
    one_rank()
