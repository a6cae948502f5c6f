"""Checkpoints: exact, atomic under kill -9, refused when damaged, and of no particular number of ranks."""

import errno
import json
import logging
import multiprocessing
import os
import random
import resource
import signal
import time

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh

from moltron.checkpoint import manager as manager_module
from moltron.checkpoint.manager import (
    MANIFEST,
    CheckpointError,
    CheckpointManager,
    find_good,
    list_checkpoints,
    read_manifest,
)
from moltron.parallel import collectives


def make_state(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "model.embed.weight": torch.randn(33, 8, generator=generator),
        "model.half": torch.randn(5, generator=generator).bfloat16(),
        "optim.exp_avg.embed.weight": torch.randn(33, 8, generator=generator),
        "optim.step.embed.weight": torch.tensor(float(step)),
        "rng.cpu": torch.randint(0, 256, (17,), generator=generator).byte(),
    }


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def zeros_like(state):
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


def names(folder):
    return [path.name for path in list_checkpoints(folder)]


def test_round_trip_is_exact(tmp_path):
    manager = CheckpointManager(tmp_path)
    meta = {"position": [1, 2, 3], "lr": 0.1 + 0.2, "model": {"family": "esm2", "config": {"eps": 1e-5}}}
    state = make_state(7)
    manager.save(7, state, meta, metric=2.5)
    for tensor in state.values():  # staged before save returned
        tensor.zero_()
    manager.wait()
    restored = zeros_like(state)
    path = manager.find_latest()
    assert manager.restore(path, restored) == meta
    assert_equal(restored, make_state(7))
    manifest = read_manifest(path)
    assert (manifest.step, manifest.metric) == (7, 2.5)
    assert {p.name for p in path.iterdir()} == {MANIFEST, "shard-00001-of-00001.safetensors"}
    assert len({p.stat().st_mode for p in path.iterdir()}) == 1  # whoever may read one file may read all


def test_parts_and_dtype_casts(tmp_path):
    manager = CheckpointManager(tmp_path)
    manager.save(1, make_state(1), {})
    path = manager.find_latest()
    model = {name: torch.zeros_like(t).half() for name, t in make_state(1).items() if name.startswith("model.")}
    manager.restore(path, model)
    assert torch.equal(model["model.embed.weight"], make_state(1)["model.embed.weight"].half())


def test_differences_are_all_named(tmp_path):
    manager = CheckpointManager(tmp_path)
    manager.save(1, make_state(1), {})
    path = manager.find_latest()
    with pytest.raises(CheckpointError, match=r"model\.new is not in the checkpoint.*model\.half is in the checkpoint"):
        manager.restore(path, {"model.embed.weight": torch.zeros(33, 8), "model.new": torch.zeros(1)})
    wrong = zeros_like(make_state(1)) | {"model.half": torch.zeros(6)}
    with pytest.raises(CheckpointError, match=r"model\.half has shape \[5\] in the checkpoint, \[6\] here"):
        manager.restore(path, wrong)


def damage_byte(path):
    with open(path, "r+b") as file:
        file.seek(-3, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-3, os.SEEK_END)
        file.write(bytes([byte ^ 1]))


def damage_tail(path):
    os.truncate(path, path.stat().st_size - 5)


@pytest.mark.parametrize("damage", [damage_byte, damage_tail, os.unlink])
@pytest.mark.parametrize("victim", ["shard-00001-of-00001.safetensors", MANIFEST])
def test_damage_is_named_and_the_previous_one_offered(tmp_path, caplog, damage, victim):
    manager = CheckpointManager(tmp_path, keep_last=3)
    for step in (1, 2):
        manager.save(step, make_state(step), {}, metric=-step)
    manager.wait()
    damage(tmp_path / "step-00000002" / victim)
    with caplog.at_level(logging.WARNING):
        assert manager.find_latest().name == "step-00000001"
        assert find_good(tmp_path).name == find_good(tmp_path, best=True).name == "step-00000001"
    assert f"step-00000002/{victim}" in caplog.text
    damage(tmp_path / "step-00000001" / victim)
    assert manager.find_latest() is None


def test_an_edited_manifest_is_refused(tmp_path):
    manager = CheckpointManager(tmp_path)
    manager.save(1, make_state(1), {"lr": 0.5})
    manifest = manager.find_latest() / MANIFEST
    manifest.write_text(manifest.read_text().replace("0.5", "0.6"))
    with pytest.raises(CheckpointError, match="checksum does not match"):
        read_manifest(manifest.parent)
    assert manager.find_latest() is None


def test_a_damaged_one_does_not_push_out_the_good(tmp_path):
    manager = CheckpointManager(tmp_path, keep_last=1, keep_best=0)
    manager.save(1, make_state(1), {})
    manager.wait()
    other = CheckpointManager(tmp_path, keep_last=3)
    other.save(5, make_state(5), {})
    other.wait()
    damage_tail(tmp_path / "step-00000005" / "shard-00001-of-00001.safetensors")
    assert manager.find_latest().name == "step-00000001"
    manager.save(3, make_state(3), {})
    assert manager.find_latest().name == "step-00000003"
    manager.save(5, make_state(5), {})  # the damaged step is reached again
    assert manager.find_latest().name == "step-00000005"
    assert names(tmp_path) == ["step-00000005"]


def test_a_damaged_one_is_not_counted(tmp_path):
    manager = CheckpointManager(tmp_path, keep_last=2, keep_best=0)
    for step in (1, 5):
        manager.save(step, make_state(step), {})
    manager.wait()
    damage_tail(tmp_path / "step-00000005" / "shard-00001-of-00001.safetensors")
    assert manager.find_latest().name == "step-00000001"
    manager.save(6, make_state(6), {})
    manager.wait()
    assert names(tmp_path) == ["step-00000001", "step-00000005", "step-00000006"]  # the damaged one is left to the user


def test_pruning_keeps_last_and_best(tmp_path):
    manager = CheckpointManager(tmp_path, keep_last=2, keep_best=1)
    for step, metric in enumerate([5.0, 1.0, 4.0, float("nan"), None, 3.0], start=1):
        manager.save(step, {"model.w": torch.ones(2)}, {}, metric)
    manager.wait()
    assert names(tmp_path) == ["step-00000002", "step-00000005", "step-00000006"]
    assert find_good(tmp_path, best=True).name == "step-00000002"
    assert find_good(tmp_path).name == "step-00000006"


def test_a_full_disk_leaves_what_was_there(tmp_path):
    manager = CheckpointManager(tmp_path)
    manager.save(1, make_state(1), {})
    manager.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # the kernel refuses in mid-file, as on a full disk
    try:
        manager.save(2, make_state(2), {})
        with pytest.raises(CheckpointError, match=r"step 2 could not be written.*free some space.*untouched"):
            manager.save(3, make_state(3), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    manager.save(3, make_state(3), {})
    assert manager.find_latest().name == "step-00000003"


def test_no_space_for_the_manifest(tmp_path, monkeypatch):
    def no_space(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

    manager = CheckpointManager(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(manager_module, "fsync", no_space)
        manager.save(1, make_state(1), {})
        with pytest.raises(CheckpointError, match="No space left on device"):
            manager.wait()
    assert list(tmp_path.iterdir()) == []


def save_for_ever(folder, ready):
    manager = CheckpointManager(folder, keep_last=2, keep_best=0)
    for step in range(1, 10_000):
        manager.save(max(1, step - step % 2), make_state(step - step % 2), {"step": step})  # each step twice
        ready.set()


def test_kill_9_at_any_moment(tmp_path):
    context = multiprocessing.get_context("fork")
    rng = random.Random(0)
    newest = 0
    for attempt in range(12):
        ready = context.Event()
        folder = tmp_path / str(attempt % 3)  # some folders see several kills
        process = context.Process(target=save_for_ever, args=(folder, ready))
        process.start()
        assert ready.wait(60)
        time.sleep(rng.uniform(0.02, 0.25))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        manager = CheckpointManager(folder)
        path = manager.find_latest()
        assert path == (list_checkpoints(folder) or [None])[-1]  # whatever bears the name is whole
        assert all(not p.name.startswith(".") for p in folder.iterdir())
        if path is not None:
            state = zeros_like(make_state(0))
            manager.restore(path, state)
            newest = max(newest, int(path.name[5:]))
            assert_equal(state, make_state(0 if int(path.name[5:]) == 1 else int(path.name[5:])))
    assert newest > 4


def test_killed_while_a_step_is_replaced(tmp_path):
    manager = CheckpointManager(tmp_path)
    manager.save(4, make_state(4), {})
    manager.wait()
    os.rename(tmp_path / "step-00000004", tmp_path / ".step-00000004.replaced")
    assert CheckpointManager(tmp_path).find_latest().name == "step-00000004"


def test_arguments(tmp_path):
    with pytest.raises(ValueError, match="keep_last=0"):
        CheckpointManager(tmp_path, keep_last=0)
    manager = CheckpointManager(tmp_path)
    with pytest.raises(ValueError, match="plain values"):
        manager.save(1, {}, {"x": torch.ones(1)})
    manager.save(1, {"model.x": torch.ones(1, dtype=torch.complex128)}, {})
    with pytest.raises(ValueError, match="complex128"):
        manager.wait()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_state_is_staged_before_save_returns(tmp_path):
    manager = CheckpointManager(tmp_path)
    state = {f"model.{i}": torch.full((1000, 1000), float(i), device="cuda") for i in range(20)}
    for step in (1, 2):
        manager.save(step, state, {})
        for tensor in state.values():
            tensor += 1
    restored = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    manager.restore(manager.find_latest(), restored)
    for i in range(20):
        assert (restored[f"model.{i}"] == i + 1).all()


# ------------------------------------------------------------------------------------------------------ several ranks

PLACEMENTS = {"model.embed.weight": [Shard(0)], "optim.exp_avg.embed.weight": [Shard(1)], "model.half": [Shard(0)]}


def distributed_state(step, mesh):
    state = make_state(step) | {"model.small": torch.tensor([1.0, 2.0])}  # fewer rows than ranks
    placements = PLACEMENTS | {"model.small": [Shard(0)], "rng.cpu": [Replicate()]}
    return {n: distribute_tensor(t, mesh, placements[n]) if n in placements else t for n, t in state.items()}


def on_rank(rank, world, store, job, folder):
    dist.init_process_group("gloo", rank=rank, world_size=world, store=dist.FileStore(str(store), world))
    mesh = init_device_mesh("cpu", (world,))
    manager = CheckpointManager(folder)
    if job == "save":
        for step in (1, 2):
            manager.save(step, distributed_state(step, mesh), {"world": world}, metric=step)
            dist.barrier()  # the training's own collectives, while the background writes
        manager.wait()
    elif job == "load":
        path = manager.find_latest()
        state = {n: torch.zeros_like(t) for n, t in distributed_state(0, mesh).items()}
        assert manager.restore(path, state) == {"world": 2}
        for name, tensor in distributed_state(2, mesh).items():
            full = state[name].full_tensor() if isinstance(tensor, DTensor) else state[name]
            assert torch.equal(full, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor), name
    else:  # one rank cannot write: all of them hear of it
        with pytest.raises(ValueError, match="not reduced yet"):
            manager.save(3, {"model.x": DTensor.from_local(torch.ones(2), mesh, [Partial()])}, {})
        if rank == 1:
            manager_module.write_shard = lambda path, chunks: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space"))
        manager.save(3, distributed_state(3, mesh), {})
        with pytest.raises(CheckpointError, match="No space"):
            manager.wait()
        assert manager.find_latest().name == "step-00000002"
    dist.barrier()
    dist.destroy_process_group()


def spawn(world, job, folder, store):
    collectives.shutdown()  # a group of one that an earlier test in this process left: forked, it would be inherited
    torch.multiprocessing.start_processes(
        on_rank, args=(world, store, job, folder), nprocs=world, start_method="fork", join=True
    )


def test_two_ranks_save_three_and_one_load(tmp_path):
    folder = tmp_path / "checkpoints"
    spawn(2, "save", folder, tmp_path / "a")
    latest = folder / "step-00000002"
    assert len(list(latest.glob("shard-*-of-00002.safetensors"))) == 2
    stored = 0
    for file in latest.glob("*.safetensors"):
        with safe_open(file, "pt") as f:
            stored += sum(f.get_tensor(name).numel() for name in f.keys())  # noqa: SIM118
            json.loads(f.metadata()["DCP_SHARDING_INFO"])
    state = make_state(2) | {"model.small": torch.tensor([1.0, 2.0])}
    assert stored == sum(t.numel() for t in state.values())  # each value once
    spawn(3, "load", folder, tmp_path / "b")
    restored = zeros_like(state)
    CheckpointManager(folder).restore(latest, restored)  # no process group at all
    assert_equal(restored, state)
    spawn(2, "full", folder, tmp_path / "c")
