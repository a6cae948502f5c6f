"""What a layout costs: the memory of the fullest GPU at its peak, and what a GPU sends in a step. Nothing is run.

    model on meta, the plan's words ──_block──> what each block keeps for its backward ──────────┐
    parameters of a rank ──> masters, optimizer state, half-precision copies, gradients ─────────┴─rank─> Footprint

The peak is where the backward begins and every block still holds what it kept. That follows from the operators, and is
the same compiled or not, for torch's partitioner computes nothing again that a matrix product reads: a norm keeps its
input and two numbers a token; a matrix product its input; attention what its projections wrote, q and k turned, its
output and a logarithm a head; an activation function its input. Knows nothing of families, of measurements, and of how
much of a GPU is free.

T tokens of a stream on this rank, b bytes of a number in the blocks
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from moltron.config.schema import ParallelConfig
from moltron.models.spec import ParallelPlan
from moltron.parallel.mesh import AXES, mesh_shape
from moltron.parallel.pipeline import matches, num_stages, shares_of
from moltron.parallel.precision import BLOCK, fits_fp8

CUBLAS = 2 * 2**25  # 32 MiB of workspace on each of two streams (Hopper)


class Work(NamedTuple):
    """What is trained. tokens: of a pack, of each stream. targets: of a pack. packs: of a rank in one step.

    width: bytes of a number in the blocks, 2 or 4. compiled: blocks and loss. muon: for matrices in the blocks.
    fp8_moments: AdamW's, of matrices.
    fp8: compiled, a block then computes again what its products read: only casts of that go into them.
    length: tokens of the longest sequence; matters where positions are relative.
    """

    tokens: tuple[int, ...]
    targets: int
    packs: int
    width: int = 2
    compiled: bool = True
    muon: bool = False
    fp8_moments: bool = False
    fp8: bool = False
    length: int = 1024


@dataclass(frozen=True)
class Footprint:
    """Bytes. memory: by what it is for; blocks: what each keeps of one pack; sent: in a step, by axis.

    shared: beside memory, buffers that GPUs of one host read of each other, see peers.
    """

    memory: dict[str, float]
    blocks: list[float]
    sent: dict[str, float]
    shared: float

    @property
    def peak(self) -> float:
        return sum(self.memory.values())


def footprint(model: Any, plan: ParallelPlan, config: ParallelConfig, world: int, work: Work) -> Footprint:
    """model: whole, on the meta device. Raises ValueError where the axes do not make `world`."""
    layout = _Layout(model, plan, config, world, work)
    shares = shares_of(model, plan, num_stages(config))
    ranks = [layout.rank(i, [name for share in shares[i :: config.pp] for name in share]) for i in range(config.pp)]
    return max(ranks, key=lambda found: found.peak)


class _Block(NamedTuple):
    """parameters: their number. Bytes: everything: kept without recomputing; kept: as it is; widest: of what the
    backward needs beside; sent: by tensor and by context parallelism for one pack.
    """

    parameters: float
    everything: float
    kept: float
    widest: float
    sent: tuple[float, float]


class _Layout:
    def __init__(self, model: Any, plan: ParallelPlan, config: ParallelConfig, world: int, work: Work):
        self.model, self.plan, self.config, self.work = model, plan, config, work
        self.shape, self.hidden = dict(zip(AXES, mesh_shape(config, world), strict=True)), model.config.hidden_size

    def rank(self, rank: int, names: list[str]) -> Footprint:
        """names: modules that this rank of the pipeline has."""
        b, packs, config, shape = self.work.width, self.work.packs, self.config, self.shape
        pp, tp, copies, shards = config.pp, config.tp, config.dp_replicate, shape["dp_shard"] * shape["cp"]
        units = {name: i for name in names for i, glob in enumerate(self.plan.units) if matches(name, [glob])}
        inner = self._inner() if self.work.fp8 and self.work.compiled else ()
        kinds = [(u, i % config.recompute_every == 0, name in inner) for i, (name, u) in enumerate(units.items(), 1)]
        known = {kind: self._block(name, *kind) for kind, name in dict(zip(kinds, units)).items()}
        blocks = [known[kind] for kind in kinds]
        in_blocks, largest = sum(block.parameters for block in blocks), max(block.parameters for block in blocks)
        weights = in_blocks + sum(self._parameters(name) for name in {*names} - {*units})
        moments = 8 * weights - (4 * in_blocks if self.work.muon else 0)
        if self.work.fp8_moments:  # two numbers of 4 bytes become two of 1, and two scales a block
            by_adam = {*names} - {*(units if self.work.muon else ())}
            moments -= (6 - 8 / BLOCK) * sum(self._parameters(name, fits_fp8) for name in by_adam)
        reshards = config.reshard_after_forward
        reduces_each = reshards and pp == 1  # of a step's packs, not their sum
        in_flight = self._in_flight(rank)

        ends = (rank > 0) + (rank < pp - 1)
        cuts = [tokens / (tp * (1 if i else config.cp)) for i, tokens in enumerate(self.work.tokens)]
        message = self.hidden * b * sum(cuts)  # hidden states between two blocks
        kept = in_flight * sum(block.kept for block in blocks)
        kept += 2 * self.hidden * b * sum(self.work.tokens[:-1])  # the memory, and what its norm read
        if shards * copies * pp == 1:
            halves = b * weights if b == 2 or tp > 1 else 0
            gradients = 4 * weights if self.work.compiled or packs > 1 else 0
            working = 0.0
        else:
            halves = b * (weights - in_blocks + 2 * largest if reshards else weights)
            gradients = (4 * weights / (shards if reduces_each else 1)) if packs > in_flight else 0
            working = max(0, (b + 4) * largest - min(block.kept for block in blocks))  # a block's gradients, reduced
        if halves + gradients + kept < 4 * weights / shards:  # then the peak is where the backward ends
            halves, gradients, kept = 0, 4 * weights / shards, max(block.kept for block in blocks)
        backward = max(block.widest + block.everything - block.kept for block in blocks)
        memory = {
            "weights": 4 * weights / shards,
            "optimizer state": moments / shards,
            "gradients": gradients,
            "weights to compute with": halves,
            "activations": kept,
            "workspace": working + max(backward, self._head() if rank == pp - 1 else 0) + CUBLAS,
            "pipeline": message * (packs * ends + in_flight) if pp > 1 else 0,  # torch has a buffer for every pack
        }
        gathers = 2 * packs if reshards else 1
        sums = packs if reduces_each else 1
        sent = {
            "pp": packs * ends * message * num_stages(config) / pp,
            "dp_replicate": sums * 8 * weights / shards * (copies - 1) / copies,
            "dp_shard": weights * (b * gathers + 4 * sums) * (shards - 1) / shards,
            "cp": packs * sum(block.sent[1] for block in blocks),
            "tp": packs * sum(block.sent[0] for block in blocks),
        }
        sizes = {block.parameters for block in blocks} | {weights - in_blocks}
        shared = 2 * sum(sizes) * (b / shards + (b if reduces_each else 4)) if shards > 1 else 0
        return Footprint(memory, [x.kept for x in blocks], {a: sent[a] for a in AXES if shape[a] > 1}, shared)

    def _inner(self) -> set[str]:
        """All blocks but the first and the last of each stack."""
        stacks = [[n for n, _ in self.model.named_modules() if matches(n, [glob])] for glob in self.plan.units]
        return {name for stack in stacks for name in stack[1:-1]}

    def _block(self, name: str, stream: int, again: bool, fp8: bool) -> _Block:
        """again: whether it is one of those that `recompute` is for."""
        b, tp, block = self.work.width, self.config.tp, self.model.get_submodule(name)
        cp = 1 if stream else self.config.cp
        T = self.work.tokens[stream] / cp
        x, gathered, products = self.hidden * b * T / tp, self.hidden * b * T, 0
        turns = hasattr(self.model.config, "rotary_base")
        dear, cheap, widest, keys = 0.0, 0.0, 0.0, 0.0  # dear: what recompute=selective keeps
        for sub, module in block.named_modules():
            word, parent = self._word(f"{name}.{sub}"), block.get_submodule(sub.rpartition(".")[0])
            products += word.startswith(("column", "row"))
            if word == "norm":
                dear, cheap = dear + x, cheap + 8 * T / tp
            elif word.startswith("column of"):  # the memory
                dear += module.out_features * b * self.work.tokens[0] / tp
            elif word == "column":
                written = module.out_features * b * T / tp
                if cp > 1 and sub == "attention.qkv":  # queries of its own (not turned: a view of all three), all keys
                    third, keys = written / 3, written / 3 * 2 * (cp - 1)
                    written = third * (2 * cp + (1 if turns else 3))
                dear += written if getattr(parent, "activation", "") != "relu" else 0
                if tp > 1:  # nothing is gathered again: kept as it came, or cast
                    dear += gathered / b if fp8 else gathered
                else:
                    cheap += 0 if fp8 else gathered
            elif word == "row" and hasattr(parent, "head_dim"):
                read, heads = module.in_features * b * T / tp, module.in_features / parent.head_dim / tp
                dear += read * (3 if turns and cp == 1 else 1) + 4 * heads * T
                cheap += 0 if self.work.compiled else read  # sequences' outputs, put together
                dear += heads * self.work.length * b * T if getattr(block, "scale", None) else 0  # biases, of each pair
            elif word == "row":
                cheap += 0 if fp8 else module.in_features * b * T / tp
                widest = module.in_features * b * T / tp + x + (gathered if tp > 1 else 0)
        mode = self.config.recompute if again else "none"
        kept = {"none": dear + cheap, "selective": dear, "full": x}[mode]
        times = 3 if mode == "full" else 2
        sent = times * products * gathered * (tp - 1) / tp, times * keys
        return _Block(self._parameters(name), dear + cheap, kept, widest, sent)

    def _head(self) -> float:
        """What is kept between the last block and the loss, with the logits' gradient."""
        b, padded_vocab = self.work.width, len(self.model.embed.weight)
        a_target = padded_vocab * (2 * b if self.work.compiled else 2 * b + 12)  # 12: three times in fp32
        a_target += 6 * self.hidden * b if hasattr(self.model.head, "dense") else 0
        return 2 * self.hidden * b * self.work.tokens[-1] + a_target * self.work.targets

    def _word(self, name: str) -> str:
        return next((word for glob, word in self.plan.tensor.items() if matches(name, [glob])), "")

    def _parameters(self, name: str, counts: Callable[[torch.Size], bool] = bool) -> float:
        """On this rank, of tensor parallelism; FSDP2 shares them out further. counts: which do, by their shapes."""
        modules = [(self._word(f"{name}.{sub}"), m) for sub, m in self.model.get_submodule(name).named_modules()]
        sizes = [(word, p.numel()) for word, m in modules for p in m.parameters(recurse=False) if counts(p.shape)]
        return sum(size / (self.config.tp if word.startswith(("column", "row")) else 1) for word, size in sizes)

    def _in_flight(self, rank: int) -> float:
        """Packs whose activations a rank holds at once."""
        pp, v = self.config.pp, self.config.pp_stages
        if pp == 1 or self.config.pp_schedule == "1f1b":
            return min(self.work.packs, pp - rank)
        return min(self.work.packs, ((v - 1) * pp + 2 * (pp - rank - 1) + 1) / v)
