"""Every layout of four (slow: eight) ranks is one process, in float64: losses, gradient norms, weights, checkpoints."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from functools import cache
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moltron.checkpoint.manager import CheckpointManager
from moltron.config.schema import ObjectiveConfig, OptimConfig, ParallelConfig
from moltron.models.registry import build_model, get_spec
from moltron.objectives import Limits, get_objective
from moltron.parallel import collectives
from moltron.parallel.apply import assign_full, parallelize
from moltron.tokenizers import get_tokenizer
from moltron.train.optim import Optimizer
from moltron.train.setup import Run
from moltron.train.step import TrainStep

pytestmark = pytest.mark.timeout(1800)  # the first test waits for all layouts

SIZES = dict(hidden_size=32, num_layers=4, num_heads=4, ffn_size=64)
TWO = SIZES | dict(num_layers=2, num_decoder_layers=2, max_positions=64)
ESM1B = SIZES | dict(vocab_size=33, token_dropout=True, embed_norm=True, contact_head=True, mask_id=32)
XL = TWO | dict(num_layers=4, architecture="t5", head_dim=16, relative_buckets=8, relative_reach=20, tokenizer="prott5")
MODELS = {  # family, architecture, tokenizer, objective
    "esm2": ("esm2", SIZES, "esm2", "masked_lm"),
    "wide": ("esm2", SIZES | dict(hidden_size=256, num_layers=2, ffn_size=256), "esm2", "masked_lm"),
    "esm1b": ("esm1", ESM1B | dict(tokenizer="esm2"), "esm2", "masked_lm"),
    "megamolbart": ("megamolbart", TWO, "megamolbart", "denoising"),
    "prott5nv": ("prott5", TWO, "prott5nv", "span_corruption"),
    "t5": ("prott5", XL, "prott5", "span_corruption"),
}
INTERLEAVED = dict(pp=2, pp_schedule="interleaved")
LAYOUTS = {
    "dp_shard 4": {},
    "dp_replicate 2, dp_shard 2": dict(dp_replicate=2),
    "dp_shard 2, tp 2": dict(tp=2),
    "dp_replicate 2, tp 2": dict(dp_replicate=2, tp=2),
    "tp 4": dict(tp=4),
    "cp 4": dict(cp=4),
    "dp_shard 2, cp 2": dict(cp=2),
    "dp_replicate 2, cp 2": dict(dp_replicate=2, cp=2),
    "cp 2, tp 2": dict(cp=2, tp=2),
    "dp_shard 2, tp 2, recomputed": dict(tp=2, recompute="full", reshard_after_forward=True),
    "pp 4": dict(pp=4),
    "pp 2, dp_shard 2": dict(pp=2),
    "pp 2, dp_replicate 2": dict(pp=2, dp_replicate=2, dp_shard=1),
    "pp 2, tp 2": dict(pp=2, tp=2),
    "pp 2, cp 2": dict(pp=2, cp=2),
    "pp 2, dp_shard 2, interleaved": INTERLEAVED,
    "pp 2, tp 2, interleaved, recomputed": INTERLEAVED | dict(tp=2, recompute="full", reshard_after_forward=True),
}
SPLIT = {  # not for T5, whose blocks share weights: test_pipeline.py
    "pp 2, dp_shard 2, zbv": dict(pp=2, pp_schedule="zbv"),
    "pp 2, tp 2, zero bubble": dict(pp=2, tp=2, pp_schedule="zero_bubble"),
}
DROPS = dict(pp=2, pp_schedule="zero_bubble", reshard_after_forward=True)
EIGHT = {
    "pp 2, dp_shard 2, tp 2": dict(pp=2, tp=2),
    "pp 2, dp_shard 2, cp 2": dict(pp=2, cp=2),
    "pp 2, cp 2, tp 2": dict(pp=2, cp=2, tp=2),
    "pp 4, tp 2": dict(pp=4, tp=2),
    "pp 2, dp_replicate 2, tp 2, interleaved": INTERLEAVED | dict(dp_replicate=2, tp=2),
    "dp_replicate 2, cp 2, tp 2": dict(dp_replicate=2, cp=2, tp=2),
    "dp_shard 2, cp 2, tp 2": dict(cp=2, tp=2),
}
SPLIT_EIGHT = {
    "pp 2, cp 2, tp 2, zbv": dict(pp=2, cp=2, tp=2, pp_schedule="zbv"),
    "pp 4, dp_replicate 2, zero bubble": dict(pp=4, dp_replicate=2, dp_shard=1, pp_schedule="zero_bubble", pp_stages=1),
}
THREE = {"dp_shard 3": {}, "dp_replicate 3": dict(dp_replicate=3)}  # four packs: one has two, the others an empty one
SIX = {"dp_shard 3, tp 2": dict(tp=2), "dp_shard 3, cp 2": dict(cp=2)}
ALL = LAYOUTS | SPLIT | EIGHT | SPLIT_EIGHT | THREE | SIX
MUON = [("esm2", layout) for layout in ("dp_shard 4", "dp_replicate 2, tp 2", "cp 2, tp 2", "pp 2, dp_shard 2")]
MUON += [("megamolbart", "dp_replicate 2, tp 2")]  # matrices of one shape, some cut by rows, some by columns
FP8 = ["dp_shard 4", "tp 4", "pp 2, tp 2"]  # of moments
FP8_PAIRS = [*permutations(FP8, 2)]
OPTIMIZERS = {"adamw": {}, "muon": dict(name="muon"), "fp8": dict(state="fp8")}
BOTH = ("esm2", "megamolbart")
EVERYDAY = [(name, layout) for name in BOTH for layout in LAYOUTS]
EVERYDAY += [("esm2", "pp 2, dp_shard 2, zbv"), ("megamolbart", "pp 2, tp 2, zero bubble")]
SLOW = [(name, layout) for name in ("esm1b", "prott5nv", "t5") for layout in LAYOUTS]
SLOW += [("esm2", "pp 2, tp 2, zero bubble"), ("megamolbart", "pp 2, dp_shard 2, zbv")]
OF_EIGHT = [(name, layout) for name in (*BOTH, "t5") for layout in EIGHT]
OF_EIGHT += [(name, layout) for name in BOTH for layout in SPLIT_EIGHT]
NEXT = [2] * 5 + [1] * 5  # of a layout's checkpoint: so many of the layouts after it read it
PAIRS = [(saved, layout) for i, (saved, n) in enumerate(zip(LAYOUTS, NEXT)) for layout in [*LAYOUTS][i + 1 : i + 1 + n]]
PAIRS += [("pp 4", "dp_shard 4"), ("pp 2, dp_shard 2", "pp 2, tp 2, interleaved, recomputed")]
PAIRS += [("dp_shard 4", "pp 2, dp_shard 2, interleaved"), ("pp 2, tp 2", "cp 2, tp 2")]
PAIRS += [("dp_shard 4", "pp 2, dp_shard 2, zbv"), ("pp 2, dp_shard 2, zbv", "tp 4")]
if torch.__version__ < "2.13":  # whose zbv no gloo can run: train/validate.py refuses it
    EVERYDAY, SLOW, OF_EIGHT, PAIRS = (
        [x for x in cases if not x[1].endswith("zbv")] for cases in (EVERYDAY, SLOW, OF_EIGHT, PAIRS)
    )
    PAIRS = [pair for pair in PAIRS if not pair[0].endswith("zbv")]
STEPS, PACKS, TOKENS = 3, 4, 64


def packs(name, step):
    """The packs of a step, the same on all ranks."""
    tokenizer, objective_name = MODELS[name][2:]
    objective = get_objective(ObjectiveConfig(name=objective_name), get_tokenizer(tokenizer), 0)
    rng = np.random.default_rng(step)
    tokens, limits = ((TOKENS,), Limits(48)) if objective.streams == 1 else ((TOKENS, TOKENS), Limits(48, 48))
    found = []
    share = -(-PACKS // collectives.data_world_size())
    for pack in range(share * collectives.data_world_size()):
        lengths = rng.integers(5, 18, 3 if pack < PACKS else 0)
        ids = rng.integers(6, 20, lengths.sum())
        records = np.arange(len(lengths)) + 3 * pack
        found.append(objective.batch(ids, lengths, records, step, tokens=tokens, limits=limits))
    return objective, found


def trained(name, layout, optimizer_name, folder=None):
    """(losses and gradient norms, also a loss of evaluation; final weights whole); folder: for its checkpoint."""
    family, architecture, *_ = MODELS[name]
    spec, device = get_spec(family), torch.device("cpu")
    config = ParallelConfig(**layout)
    collectives.share_packs(config.cp * config.tp, config.pp)
    model = build_model(family, architecture).double()
    parallelize(model, spec.plan, device, precision="fp32", compile=False, config=config)
    model.init_weights(0, assign_full)
    optimizer = Optimizer(model, spec.plan, OptimConfig(**OPTIMIZERS[optimizer_name], lr=1e-2, muon_lr=1e-2), 1e-2)
    objective, _ = packs(name, 0)
    settings = dict(clip=1.0, scaler=None, skip_nonfinite=False, sync_each=config.reshard_after_forward)
    step, numbers = TrainStep(model, in_double(objective.loss), optimizer, device, **settings), []
    for i in range(STEPS):
        own = packs(name, i)[1][collectives.data_rank() :: collectives.data_world_size()]
        reading = step(i, own, sum(int((b.targets >= 0).sum()) for b in own), 1e-2).read()
        numbers += [reading.loss, reading.grad_norm, reading.tokens]
    if folder is not None:
        manager = CheckpointManager(folder)
        manager.save(STEPS, state_of(model, optimizer, copies=False), {})
        manager.wait()
    weights = {n: p.detach() for n, p in model.named_parameters()}
    wholes = {n: p.full_tensor() if hasattr(p, "full_tensor") else p.clone() for n, p in weights.items()}
    with torch.no_grad():
        loss = sum(objective.loss(model(batch), batch)[0].double() for batch in own)
    return [*numbers, collectives.all_reduce_sum(loss).item()], wholes


def in_double(loss):
    """Of fp32 logits, too: 1 / count times ranks, divided by ranks again, is exact in fp32 for 2, 4 and 8 only."""

    def whole(*arguments):
        with patch.object(torch.Tensor, "float", torch.Tensor.double):
            return loss(*arguments)

    return whole


def state_of(model, optimizer, copies=True):
    """As `Run.tensors` has it."""
    return Run.tensors(SimpleNamespace(model=model, optimizer=optimizer), copies)


def restored(name, layout, folder, optimizer_name="adamw"):
    """The whole weights and moments that a layout (None: each process alone) reads from another's checkpoint."""
    family, architecture, *_ = MODELS[name]
    spec, model = get_spec(family), build_model(family, architecture, "cpu" if layout is None else "meta").double()
    if layout is not None:
        config = ParallelConfig(**layout)
        parallelize(model, spec.plan, torch.device("cpu"), precision="fp32", compile=False, config=config)
    optimizer = Optimizer(model, spec.plan, OptimConfig(**OPTIMIZERS[optimizer_name]), 1e-2)
    manager = CheckpointManager(folder)
    state = state_of(model, optimizer)
    manager.restore(manager.find_latest(), state)
    wide = {n: p.double() if p.element_size() == 1 else p for n, p in state.items()}  # gloo knows no FP8
    return {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in wide.items()}


def furthest(found, expected):
    """Of the tensors of all ranks, each of which may have some only."""
    names = [None] * collectives.world_size()
    dist.all_gather_object(names, set(found))
    assert set().union(*names) == set(expected)
    worst = max(((p - expected[n]).norm() / expected[n].norm().clamp_min(1e-6)).item() for n, p in found.items())
    return collectives.all_reduce_max(torch.tensor(worst)).item()


def on_rank(folder):
    """What each process does. Prints, on rank 0, differences from one process by model, optimizer, layout."""
    results = {}
    collectives.init("cpu")
    cases = json.loads((folder / "cases.json").read_text())
    for name, optimizer, layout in cases:
        expected = torch.load(folder / f"{name} {optimizer}.pt", weights_only=True)
        saves = folder / f"{name} {layout}" if (name, optimizer) in (("esm2", "adamw"), ("wide", "fp8")) else None
        numbers, weights = trained(name, ALL[layout], optimizer, saves)
        wrong = [abs(a - b) / abs(b) for a, b in zip(numbers, expected["numbers"], strict=True)]
        results[f"{name}, {optimizer}, {layout}"] = max(wrong), furthest(weights, expected["weights"])
    if any(optimizer == "muon" for _, optimizer, _ in cases):  # every day
        numbers, _ = trained("esm2", DROPS, "adamw")
        expected = torch.load(folder / "esm2 adamw.pt", weights_only=True)
        results["drops"] = numbers[1] / expected["numbers"][1], 0.0
        wholes = {}
        for saved, layout in PAIRS:  # save here, load there
            folder_of = folder / f"esm2 {saved}"
            if saved not in wholes:
                wholes[saved] = restored("esm2", LAYOUTS["dp_shard 4"], folder_of)
            results[f"{saved} → {layout}"] = 0.0, furthest(restored("esm2", ALL[layout], folder_of), wholes[saved])
    if ["wide", "fp8", FP8[0]] in cases:
        for saved, layout in FP8_PAIRS:
            whole, parts = (restored("wide", x, folder / f"wide {saved}", "fp8") for x in (None, LAYOUTS[layout]))
            results[f"{saved} → {layout}, fp8"] = 0.0, furthest(parts, whole)
    if collectives.rank() == 0:
        print(json.dumps(results))
    collectives.shutdown()


def spawned(cases, processes=4):
    """The results of `on_rank` for these (model, optimizer, layout)."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        Path(folder, "cases.json").write_text(json.dumps(cases))
        for name, optimizer in dict.fromkeys(case[:2] for case in cases):
            numbers, weights = trained(name, {}, optimizer)
            torch.save({"numbers": numbers, "weights": weights}, Path(folder, f"{name} {optimizer}.pt"))
        probe.bind(("127.0.0.1", 0))
        world = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        probe.close()
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, folder],
                env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(processes)
        ]
        try:
            outputs = [rank.communicate(timeout=580) for rank in ranks]
            assert [rank.returncode for rank in ranks] == [0] * processes, outputs[0][1][-3000:]
        finally:
            for rank in ranks:
                rank.kill()
        return json.loads(outputs[0][0].splitlines()[-1])


@pytest.fixture(scope="module")
def results():
    return spawned(
        [(name, "adamw", layout) for name, layout in EVERYDAY] + [(name, "muon", layout) for name, layout in MUON]
    )


@pytest.fixture(scope="module")
def slow_results():
    return spawned([(name, "adamw", layout) for name, layout in SLOW])


@pytest.mark.parametrize(("name", "layout"), EVERYDAY)
def test_a_layout_is_one_process(results, name, layout):
    numbers, weights = results[f"{name}, adamw, {layout}"]
    assert numbers < 1e-9 and weights < 1e-9


def test_torch_drops_gradients_of_a_split_backward_where_weights_are_gathered_again(results):
    """If this fails, torch is mended: allow parallel.reshard_after_forward in train/setup.py:_split_problems."""
    assert results["drops"][0] < 0.9  # of the first step's gradient norm


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout"), SLOW)
def test_a_layout_is_one_process_for_the_other_families(slow_results, name, layout):
    test_a_layout_is_one_process(slow_results, name, layout)


@pytest.fixture(scope="module")
def results_of_three():
    return spawned([(name, "adamw", layout) for name in BOTH for layout in THREE], 3)


@pytest.mark.parametrize("layout", THREE)
@pytest.mark.parametrize("name", BOTH)
def test_packs_that_are_not_shared_equally_are_one_process(results_of_three, name, layout):
    test_a_layout_is_one_process(results_of_three, name, layout)


@pytest.fixture(scope="module")
def results_of_six():
    others = spawned([(name, "adamw", layout) for name in ("esm1b", "prott5nv") for layout in THREE], 3)
    return spawned([(name, "adamw", layout) for name in BOTH for layout in SIX], 6) | others


@pytest.mark.slow
def test_nor_with_other_axes_nor_by_the_other_families(results_of_six):
    assert len(results_of_six) == 8
    for numbers, weights in results_of_six.values():
        assert numbers < 1e-9 and weights < 1e-9


@cache
def results_of_eight(name):
    return spawned([(name, "adamw", layout) for one, layout in OF_EIGHT if one == name], 8)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout"), sorted(OF_EIGHT))
def test_three_axes_on_eight_ranks_are_one_process(name, layout):
    test_a_layout_is_one_process(results_of_eight(name), name, layout)


@pytest.mark.parametrize(("name", "layout"), MUON)
def test_muon_too(results, name, layout):
    """Its iteration runs in fp32 here, in bf16 on a GPU."""
    numbers, weights = results[f"{name}, muon, {layout}"]
    assert numbers < 1e-3 and weights < 5e-3


@pytest.fixture(scope="module")
def results_of_fp8():
    return spawned([("wide", "fp8", layout) for layout in FP8])


@pytest.mark.parametrize("layout", FP8)
def test_moments_in_fp8_too(results_of_fp8, layout):
    """All is computed in float64, so no number comes to the other side of where rounding goes up."""
    numbers, weights = results_of_fp8[f"wide, fp8, {layout}"]
    assert numbers < 1e-6 and weights < 1e-6


@pytest.mark.parametrize(("saved", "layout"), FP8_PAIRS)
def test_moments_in_fp8_are_saved_here_and_loaded_there(results_of_fp8, saved, layout):
    assert results_of_fp8[f"{saved} → {layout}, fp8"][1] == 0.0


@pytest.mark.parametrize(("saved", "layout"), PAIRS)
def test_saved_here_loaded_there(results, saved, layout):
    assert results[f"{saved} → {layout}"][1] == 0.0


if __name__ == "__main__":
    on_rank(Path(sys.argv[1]))
