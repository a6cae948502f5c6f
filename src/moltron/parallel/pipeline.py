"""Pipeline parallelism: ranks share the blocks of a model, and the packs of a step pass through them one after another.

    names in the forward's order ──share_out──> names of each stage ──split──> Stage(model of these modules alone) …
    packs ──Pipeline.backward: torch's schedule──> hidden states to the next stage, gradients back ──> losses
    pack  ──Pipeline.forward──> logits on every rank

All ranks of a pipeline build the same packs, so each knows the layouts and only hidden states travel. A module that
several stages read (a tied embedding) has a copy on each: equal to begin with, equal gradients after every step. Knows
nothing of families: what comes first and last is in the plan.

P packs of a step, S stages, D width
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from moltron.config.schema import ParallelConfig
from moltron.models.batch import Output, PackedBatch
from moltron.models.spec import ParallelPlan
from moltron.parallel.tensor import local

SCHEDULES: dict[str, Any] = {
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}
Loss = Callable[[Any, PackedBatch], tuple[Tensor, Tensor]]


def matches(name: str, globs: Sequence[str]) -> bool:
    return any(name.count(".") == glob.count(".") and fnmatchcase(name, glob) for glob in globs)


def num_stages(config: ParallelConfig) -> int:
    return config.pp * {"1f1b": 1, "zbv": 2}.get(config.pp_schedule, config.pp_stages)


def rank_of(stage: int, config: ParallelConfig) -> int:
    """Which rank of a pipeline has a stage: they go round, or, in a V, there and back."""
    turn, index = divmod(stage, config.pp)
    return config.pp - 1 - index if config.pp_schedule == "zbv" and turn else index


def splits_backward(config: ParallelConfig) -> bool:
    """Whether gradients of weights wait for idle time, when those of the inputs have long been sent (zero bubble)."""
    return config.pp > 1 and config.pp_schedule in ("zero_bubble", "zbv")


def share_out(names: Sequence[str], units: Sequence[str], copied: Mapping[str, str], stages: int) -> list[list[str]]:
    """Modules of each stage: equally many blocks (matches of `units`), what stands around them in `names`, and
    `copied`: modules, each with the glob of those that read it.
    """
    blocks, shares = sum(matches(name, units) for name in names), [[] for _ in range(stages)]
    done = 0
    for name in names:
        done += matches(name, units)
        shares[max(done - 1, 0) * stages // blocks].append(name)
    for module, readers in copied.items():
        for share in shares:
            if module not in share and any(matches(name, [readers]) for name in share):
                share.append(module)
    return shares


def in_order(model: nn.Module, globs: Sequence[str]) -> list[str]:
    """The modules that the globs name, glob by glob; one that the model does not have is passed over."""
    return [name for glob in globs for name, _ in model.named_modules() if matches(name, [glob])]


def shares_of(model: nn.Module, plan: ParallelPlan, stages: int) -> list[list[str]]:
    """`share_out` by a plan, which must have a place for every parameter."""
    copied = {name: plan.copied[name] for name in in_order(model, [*plan.copied])}
    shares = share_out(in_order(model, plan.stages), plan.units, copied, stages)
    placed = tuple(f"{name}." for share in shares for name in share)
    if homeless := [name for name, _ in model.named_parameters() if not name.startswith(placed)]:
        raise ValueError(f"the plan's stages have no place for {', '.join(homeless)}")
    return shares


def keep(model: nn.Module, shares: Sequence[Sequence[str]], kept: Sequence[str]) -> nn.Module:
    """In place: of the modules in `shares` only those in `kept` stay."""
    for name in {name for share in shares for name in share} - set(kept):
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        if isinstance(owner, nn.ModuleDict):
            del owner[child]
        else:
            setattr(owner, child, None)
    return model


class Stage(nn.Module):
    """Hidden states in, hidden states out; from the last stage logits, or the loss of a pack, (1,).

    packs: those that it will be called with, in their order. loss: what the last stage makes of its logits.
    losses: what it gave. splits: the backward is split, and torch detaches what is handed on, which others may read.
    """

    def __init__(self, model: nn.Module, splits: bool):
        super().__init__()
        self.model, self.splits = model, splits
        self.prepare([])

    def prepare(self, packs: list[PackedBatch], loss: Loss | None = None) -> None:
        self.packs, self.loss = iter(packs), loss
        self.losses: list[Tensor] = []

    def forward(self, *streams: Tensor, number: Tensor) -> tuple[Tensor, ...] | Tensor:
        """number: of the pack, (1,); not read, but FSDP2 of torch 2.11 fails on CUDA where nothing is passed."""
        batch = next(self.packs)
        output: Output = self.model(batch, (), streams)
        if output.logits is None:
            return tuple(x.clone() for x in output.streams) if self.splits else output.streams
        if self.loss is None:
            return output.logits
        loss = torch.stack((self.loss(output, batch)[0],))
        self.losses.append(loss.detach())
        return loss


class Pipeline:
    """The stages of this rank, and what they do together with those of the other ranks.

    model: all modules of this rank under their own names; calling it runs `forward`. copies: names of parameters that
    an earlier stage of another rank holds as well, and answers for.
    """

    def __init__(
        self, whole: nn.Module, plan: ParallelPlan, config: ParallelConfig, mesh: DeviceMesh, dtype: torch.dtype
    ):
        """whole: on the meta device; becomes `model`. mesh: of one axis. dtype: of hidden states."""
        self.plan, self.config, self.dtype, self.group = plan, config, dtype, mesh.get_group()
        self.num_stages, ranks = num_stages(config), dist.get_process_group_ranks(self.group)
        self.rank_of = [ranks[rank_of(i, config)] for i in range(self.num_stages)]
        self.shares = shares_of(whole, plan, self.num_stages)
        own = [i for i, rank in enumerate(self.rank_of) if rank == dist.get_rank()]
        splits = splits_backward(config)
        self.stages = {i: Stage(keep(copy.deepcopy(whole), self.shares, self.shares[i]), splits) for i in own}
        self.model = keep(whole, self.shares, [name for i in own for name in self.shares[i]])
        for i in reversed(own):  # of several copies the first stage's is the model's
            for name in self.shares[i]:
                self.model.set_submodule(name, self.stages[i].model.get_submodule(name))
        self.model.forward = self.forward  # type: ignore[method-assign]
        self.model.pipeline = self  # type: ignore[assignment]
        self.schedule: Any = None
        self.scale: Tensor | None = None
        self.copies: set[str] = set()
        self.copied: list[tuple[list[nn.Module], list[int]]] = []  # of this rank, and the ranks that have some
        for name in plan.copied:
            holders = [i for i, share in enumerate(self.shares) if name in share]
            here = [self.stages[i].model.get_submodule(name) for i in holders if i in self.stages]
            if here:
                self.copied.append((here, sorted({self.rank_of[i] for i in holders})))
            if here and holders[0] not in self.stages:
                self.copies |= {f"{name}.{p}" for p, _ in here[0].named_parameters()}

    def backward(self, packs: list[PackedBatch], scale: Tensor, loss: Loss) -> Tensor:
        """Gradients of a step's packs, of their losses times `scale`, added up; returns the losses, (P,) float64."""
        self.scale = scale
        self.schedule = self.schedule or self._schedule(packs)
        self._equal_copies()
        for stage in self.stages.values():
            stage.prepare(packs, loss)
        numbers = torch.arange(len(packs))
        self.schedule.step(number=numbers, target=numbers, return_outputs=False)
        for copies, ranks in self.copied:
            for parameters in zip(*(module.parameters() for module in copies), strict=True):
                self._add_gradients(parameters, ranks)
        losses_P = torch.zeros(len(packs), dtype=torch.float64, device=scale.device)
        for stage in self.stages.values():
            if stage.losses:
                losses_P += torch.cat(stage.losses)
        dist.broadcast(losses_P, self.rank_of[-1], self.group)
        return losses_P

    @torch.no_grad()
    def forward(self, batch: PackedBatch) -> Output:
        """Logits at the batch's targets, on every rank; hidden states stay where they are."""
        assert batch.targets is not None
        self._equal_copies()
        device, left = batch.ids.device, None
        config: Any = self.model.config
        shape = (len(batch.targets), config.vocab_size)
        result: Any = torch.empty(shape, dtype=self.dtype, device=device)
        for i, stage in self.stages.items():
            streams: Any = left
            if i - 1 not in self.stages:
                streams = [torch.empty_like(x, device=device) for x in self._enter(i, batch)]
                for x in streams:
                    dist.recv(x, self.rank_of[i - 1], self.group)
            stage.prepare([batch])
            left = stage(*streams, number=torch.zeros(1))
            if i == self.num_stages - 1:
                result = left.contiguous()  # type: ignore[union-attr]
            elif i + 1 not in self.stages:
                for x in left:
                    dist.send(x, self.rank_of[i + 1], self.group)
        dist.broadcast(result, self.rank_of[-1], self.group)
        return Output(result.new_empty(0), result, {})

    def _equal_copies(self) -> None:
        """What this rank has several times has the values of the first, which is the one that is trained."""
        for (first, *others), _ in self.copied:
            for other in others:
                for p, q in zip(first.parameters(), other.parameters(), strict=True):
                    local(q.data).copy_(local(p.data))

    def _add_gradients(self, parameters: Sequence[Tensor], ranks: list[int]) -> None:
        """Of one parameter's copies: the first one here gets the sum of all gradients, added up alike on all `ranks`.

        These send them to each other: a group that only they make would put the names of their later ones out of step
        with what the ranks between them count.
        """
        first, *others = parameters
        here = torch.stack([local(torch.zeros_like(p) if p.grad is None else p.grad) for p in parameters]).sum(0)
        there = {rank: torch.empty_like(here) for rank in ranks if rank != dist.get_rank()}
        ops = [dist.P2POp(dist.isend, here, rank, self.group) for rank in there]
        ops += [dist.P2POp(dist.irecv, part, rank, self.group) for rank, part in there.items()]
        for work in dist.batch_isend_irecv(ops) if ops else ():
            work.wait()
        for p in others:
            p.grad = None
        first.grad = torch.zeros_like(first) if first.grad is None else first.grad
        local(first.grad).copy_(torch.stack([there.get(rank, here) for rank in ranks]).sum(0))

    def total_norm(self, norm: Tensor) -> Tensor:
        """From the norm of what this rank's stages answer for, that of all stages."""
        square = norm.double().square()
        dist.all_reduce(square, group=self.group)
        return square.sqrt().to(norm.dtype)

    def _schedule(self, packs: list[PackedBatch]) -> Any:
        device = packs[0].ids.device
        stages = [
            PipelineStage(
                stage,
                i,
                self.num_stages,
                device,
                self._enter(i, packs[0]),
                self._enter(i + 1, packs[0]),
                group=self.group,
            )
            for i, stage in self.stages.items()
        ]
        settings: Any = dict(loss_fn=lambda loss, _: loss * self.scale, scale_grads=False)
        schedule = SCHEDULES[self.config.pp_schedule]
        return schedule(stages[0] if schedule is Schedule1F1B else stages, len(packs), **settings)

    def _enter(self, i: int, batch: PackedBatch) -> tuple[Tensor, ...]:
        """The tensors, on the meta device, that stage `i` takes; nothing for the first. After the last: the loss.

        A stream in the midst of its blocks is shared by the ranks of tensor parallelism, the first of context
        parallelism as well; before and behind them it is whole.
        """
        if i == self.num_stages:
            dtype = torch.promote_types(torch.float32, self.dtype)
            return (torch.empty(1, dtype=dtype, device="meta", requires_grad=True),)
        tokens = [len(ids) for ids in (batch.ids, batch.decoder_ids) if ids is not None] if i else []
        for stream, glob in enumerate(self.plan.units[: len(tokens)]):
            if matches(self.shares[i][0], [glob]) and not self.shares[i][0].endswith(".0"):
                tokens[stream] //= self.config.tp * (1 if stream else self.config.cp)
        config: Any = self.model.config
        settings: Any = dict(dtype=self.dtype, device="meta", requires_grad=True)
        return tuple(torch.empty(count, config.hidden_size, **settings) for count in tokens)


def pipeline_of(model: nn.Module) -> Pipeline | None:
    """None where one rank has all blocks."""
    return getattr(model, "pipeline", None)
