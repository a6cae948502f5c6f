"""No rank ever holds a whole model, begun from the seed, a folder, a run or a checkpoint. One spawn of two ranks.

Measured on the host, where a shard and a whole model look alike to everyone but the allocator.
"""

import json
import os

import pytest

from moltron.checkpoint.weights import save_pretrained
from moltron.models.registry import build_model, get_spec, make_config

BUILD_ALL = """
import gc, json, sys, threading
from moltron.config.compose import load_config
from moltron.config.schema import TrainConfig
from moltron.parallel import collectives
from moltron.parallel.tensor import local
from moltron.train.setup import build_run, check_config

def held():
    "Bytes of the process itself, without files that are mapped."
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def watch():
    while not over.wait(0.002):
        most[0] = max(most[0], held())

device, results = collectives.init("cpu"), {}
for name, arguments in json.loads(sys.argv[1]).items():
    gc.collect()
    before, most, over = held(), [0], threading.Event()
    thread = threading.Thread(target=watch)
    thread.start()
    config = load_config(TrainConfig, arguments)
    run = build_run(config, device, check_config(config))
    over.set()
    thread.join()
    shards = sum(local(tensor).nbytes for tensor in run.tensors().values())
    results[name] = most[0] - before, shards, sum(t.nbytes for n, t in run.tensors().items() if n.startswith("model."))
    if name == "seed":
        model = {"family": "esm2", "config": vars(run.architecture)}
        run.manager.save(1, run.tensors(), {"model": model, "step": 1, "updates": 1})
        run.manager.wait()
    del run
if collectives.rank() == 0:
    print(json.dumps(results))
collectives.shutdown()
"""
SIZES = dict(hidden_size=1024, num_layers=3, num_heads=16, ffn_size=4096)
TENSOR = 4 * SIZES["hidden_size"] * SIZES["ffn_size"]  # bytes of the largest one
LIVES = ("seed", "folder", "run", "checkpoint")


@pytest.fixture(scope="module")
def memory(tmp_path_factory, ranks_of, arguments):
    """Of each life (the most that it took, what it holds in the end, bytes of the whole model)."""
    folder = tmp_path_factory.mktemp("memory")
    model, config = build_model("esm2", SIZES).to_empty(device="cpu"), make_config("esm2", SIZES)
    model.init_weights(0)
    save_pretrained(model, get_spec("esm2"), config, folder / "weights", "huggingface")
    del model
    sizes = [f"model.{key}={value}" for key, value in SIZES.items()]
    jobs = {
        "seed": arguments(folder / "seed", *sizes),
        "folder": arguments(folder / "folder", *sizes, f"init={folder / 'weights'}"),
        "run": arguments(folder / "run", *sizes, f"init={folder / 'seed'}"),
        "checkpoint": arguments(folder / "seed", *sizes),
    }
    freed = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}  # what is freed goes back at once
    with ranks_of("-c", BUILD_ALL, json.dumps(jobs), **freed) as outputs:
        pass
    return json.loads(outputs[0].splitlines()[-1])


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
@pytest.mark.parametrize("life", LIVES)
def test_a_rank_holds_its_shards_and_a_few_tensors(memory, life):
    most, shards, whole = memory[life]
    assert shards < 0.51 * 3 * whole  # weights and AdamW's two moments
    assert most < shards + 3 * TENSOR < shards + 0.4 * whole
