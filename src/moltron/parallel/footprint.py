"""What a layout costs: the memory of one GPU at its peak, and what it sends in a step. Nothing is built or run.

    model on meta, the plan's words ──_kept──> what a block keeps for its backward ────────────┐
    parameters of a rank ──> masters, optimizer state, half-precision copies, gradients ───────┴──> Footprint

The peak is where the backward begins: every block still holds what it kept. What that is follows from the operators,
compiled or not (torch's partitioner recomputes nothing that a matrix product reads): a norm keeps its input and two
numbers a token, a matrix product its input, attention the projections as written, their rotated copy, its output and a
logarithm a head, an activation function its input. Knows nothing of families and of measurements.

T tokens of a stream (packed), b bytes of a number in the precision of training
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from moltron.config.schema import ParallelConfig
from moltron.models.spec import ParallelPlan
from moltron.parallel.mesh import AXES, mesh_shape
from moltron.parallel.pipeline import in_order, matches, num_stages, share_out


class Work(NamedTuple):
    """What is trained. tokens: of a pack, of each stream; targets: of a pack. packs: of a rank in a step.

    width: bytes of a number in the blocks: 2 or 4. compiled: blocks and loss. muon: for the hidden matrices.
    length: tokens of the longest sequence, which matters for relative positions alone.
    """

    tokens: tuple[int, ...]
    targets: int
    packs: int
    width: int = 2
    compiled: bool = True
    muon: bool = False
    length: int = 1024


@dataclass(frozen=True)
class Footprint:
    """Bytes. memory: of the fullest GPU at its peak, by what they are for; sent: by a GPU in a step, by axis."""

    memory: dict[str, float]
    sent: dict[str, float]

    @property
    def peak(self) -> float:
        return sum(self.memory.values())


class _Kept(NamedTuple):
    """Bytes that a block keeps. all: without recomputing; now: as recompute has it; sent: by tp, by cp in a pass."""

    all: float
    now: float
    widest: float
    sent: tuple[float, float]


def footprint(model: nn.Module, plan: ParallelPlan, config: ParallelConfig, world: int, work: Work) -> Footprint:
    """model: whole, on the meta device. Raises ValueError where the axes do not make `world`."""
    shape = dict(zip(AXES, mesh_shape(config, world), strict=True))
    names = in_order(model, plan.stages)
    shares = share_out(names, plan.units, num_stages(config))
    ranks = []
    for rank in range(config.pp):
        own = [name for share in shares[rank :: config.pp] for name in share]
        ranks.append(_of_rank(model, plan, config, shape, work, rank, own))
    return max(ranks, key=lambda found: found.peak)


def _of_rank(
    model: Any,
    plan: ParallelPlan,
    config: ParallelConfig,
    shape: dict[str, int],
    work: Work,
    rank: int,
    own: list[str],
) -> Footprint:
    """own: the modules of this rank of the pipeline."""
    b, tp, pp, packs = work.width, shape["tp"], shape["pp"], work.packs
    shards, copies = shape["dp_shard"] * shape["cp"], shape["dp_replicate"]
    is_alone, is_last = shards * copies * tp * pp == 1, rank == pp - 1
    words = {n: w for glob, w in plan.tensor.items() for n, _ in model.named_modules() if matches(n, [glob])}
    sizes = {name: _parameters(model.get_submodule(name), name, words, tp) for name in own}
    names = [name for name in own if matches(name, plan.units)]
    streams = {n: next(i for i, glob in enumerate(plan.units) if matches(n, [glob])) for n in names}
    blocks = [_block(model, name, words, config, shape, work, streams[name], i) for i, name in enumerate(names, 1)]
    weights, largest = sum(sizes.values()), max(sizes[name] for name in names)
    in_blocks = sum(sizes[name] for name in names)
    hidden, vocabulary = model.config.hidden_size, model.embed.weight.shape[0]

    syncs = packs if config.reshard_after_forward and pp == 1 else 1
    if is_alone:
        halves, gradients = (b * weights if b == 2 else 0), (4 * weights if work.compiled or packs > 1 else 0)
    else:
        whole = not config.reshard_after_forward or pp > 1  # a pipeline holds its weights for the whole step
        halves = b * (weights if whole else weights - in_blocks + 2 * largest)
        gradients = 0 if packs == 1 else 4 * weights / shards if syncs > 1 else 4 * weights
    in_flight = 1.0 if pp == 1 else _in_flight(config, packs, rank)
    streams_T = [tokens / (tp * (1 if i else shape["cp"])) for i, tokens in enumerate(work.tokens)]
    state = sum(hidden * b * T for T in streams_T)  # between blocks
    kept = in_flight * sum(block.now for block in blocks)
    kept += sum(2 * hidden * b * T for T in work.tokens[:-1])  # the memory, and what its norm read
    ends = (rank > 0) + (not is_last)
    buffers = packs * ends * state + (in_flight * state if pp > 1 else 0)
    logits = 2 * b if work.compiled else 2 * b + 12
    around = 6 * hidden * b if hasattr(model.head, "dense") else 0  # its input and what dense, GELU and norm keep
    head = 2 * hidden * b * work.tokens[-1] + work.targets * (vocabulary * logits + around)
    backward = max(block.widest + block.all - block.now for block in blocks)
    working = max(backward, head if is_last else 0)
    working += 0 if is_alone else (b + 4) * largest  # gathered or reduced meanwhile
    if halves + gradients + kept < 4 * weights / shards:  # little is kept: the peak is where the backward ends
        halves, gradients, kept = 0, 4 * weights / shards, max(block.now for block in blocks)
    memory = {
        "weights": 4 * weights / shards,
        "optimizer state": (8 * weights - (4 * in_blocks if work.muon else 0)) / shards,
        "gradients": gradients,
        "half-precision weights" if b == 2 else "gathered weights": halves,
        "activations": kept,
        "workspace": working,
        "messages": buffers,
    }
    gathers = packs * (2 if config.reshard_after_forward else 1) if pp == 1 else 1
    sent = {
        "pp": packs * ends * state * (num_stages(config) / pp),
        "dp_replicate": syncs * 2 * 4 * weights / shards * (copies - 1) / copies,
        "dp_shard": weights * (b * gathers + 4 * syncs) * (shards - 1) / shards,
        "cp": packs * sum(block.sent[1] for block in blocks),
        "tp": packs * sum(block.sent[0] for block in blocks),
    }
    return Footprint(memory, {axis: sent[axis] for axis in AXES if shape[axis] > 1})


def _parameters(module: nn.Module, name: str, words: dict[str, str], tp: int) -> float:
    return sum(
        p.numel() / (tp if words.get(f"{name}.{sub}", "").startswith(("column", "row")) else 1)
        for sub, m in module.named_modules()
        for p in m.parameters(recurse=False)
    )


def _in_flight(config: ParallelConfig, packs: int, rank: int) -> float:
    """Packs whose activations a rank of a pipeline holds at once, most of all."""
    if config.pp_schedule == "1f1b":
        return min(packs, config.pp - rank)
    chunks = (config.pp_stages - 1) * config.pp + 2 * (config.pp - rank - 1) + 1
    return min(packs, chunks / config.pp_stages)


def _block(
    model: Any,
    name: str,
    words: dict[str, str],
    config: ParallelConfig,
    shape: dict[str, int],
    work: Work,
    stream: int,
    number: int,
) -> _Kept:
    """number: of the block, from 1."""
    b, tp, cp = work.width, shape["tp"], 1 if stream else shape["cp"]
    T = work.tokens[stream] / cp
    block, hidden = model.get_submodule(name), model.config.hidden_size
    has_bias, turns = bool(getattr(block, "scale", None)), hasattr(model.config, "rotary_base")
    every = chosen = widest = 0.0
    passes = sent_cp = 0.0
    for sub, module in block.named_modules():
        word, parent = words.get(f"{name}.{sub}", ""), block.get_submodule(sub.rpartition(".")[0])
        if word == "norm":
            every += 8 * T / tp
            chosen += hidden * b * T / tp
        if word == "column of memory":
            chosen += module.out_features * b * work.tokens[0] / tp
        if word == "column":
            every += hidden * b * T
            own = module.out_features * b * T / tp
            if cp > 1 and sub == "attention.qkv":
                own, sent_cp = own / 3 * (1 + 2 * cp), own / 3 * 2 * (cp - 1)
            chosen += own if getattr(parent, "activation", "") != "relu" else 0
            chosen += hidden * b * T if tp > 1 else 0
        if word == "row":
            read = module.in_features * b * T / tp
            widest = max(widest, read)
            if hasattr(parent, "head_dim"):
                chosen += read + 4 * T * module.in_features / parent.head_dim / tp
                chosen += 2 * read if turns and cp == 1 and sub == "attention.out" else 0
                every += 0 if work.compiled else read
                every += module.in_features / parent.head_dim * work.length * b * T / tp if has_bias else 0
            else:
                every += read
        passes += word.startswith(("column", "row"))
    every += chosen
    x = hidden * b * T / tp
    again = config.recompute != "none" and number % config.recompute_every == 0
    now = every if not again else x if config.recompute == "full" else chosen
    times = 3 if again and config.recompute == "full" else 2
    sent_tp = passes * times * hidden * b * T * (tp - 1) / tp
    widest += x + (hidden * b * T if tp > 1 else 0)
    return _Kept(every, now, widest, (sent_tp, times * sent_cp))
