"""Pipeline parallelism: ranks share the blocks of a model, and the packs of a step pass through them one after another.

    names in the forward's order ──share_out──> names of each stage ──split──> Stage(model of these modules alone) …
    packs ──Pipeline.backward: torch's schedule──> hidden states to the next stage, gradients back ──> losses
    pack  ──Pipeline.forward──> logits on every rank

All ranks of a pipeline build the same packs, so each knows the layouts and only hidden states travel. A module that two
stages hold (a tied embedding) has two copies: equal to begin with, equal gradients after every step. Knows nothing of
families: what comes first and last is in the plan.

P packs of a step, S stages, D width
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.distributed.tensor import DTensor

from moltron.config.schema import ParallelConfig
from moltron.models.batch import Output, PackedBatch
from moltron.models.spec import ParallelPlan

SCHEDULES = ("1f1b", "interleaved")
Loss = Callable[[Any, PackedBatch], tuple[Tensor, Tensor]]


def matches(name: str, globs: Sequence[str]) -> bool:
    return any(name.count(".") == glob.count(".") and fnmatchcase(name, glob) for glob in globs)


def num_stages(config: ParallelConfig) -> int:
    return config.pp * (config.pp_stages if config.pp_schedule == "interleaved" else 1)


def share_out(names: Sequence[str], units: Sequence[str], stages: int) -> list[list[str]]:
    """Modules of each stage: equally many blocks (matches of `units`), and what stands around them in `names`."""
    blocks, shares = sum(matches(name, units) for name in names), [[] for _ in range(stages)]
    done = 0
    for name in names:
        done += matches(name, units)
        shares[max(done - 1, 0) * stages // blocks].append(name)
    return shares


def in_order(model: nn.Module, globs: Sequence[str]) -> list[str]:
    """The modules that the globs name, glob by glob; one that the model does not have is passed over."""
    return [name for glob in globs for name, _ in model.named_modules() if matches(name, [glob])]


def keep(model: nn.Module, names: Sequence[str], kept: Sequence[str]) -> nn.Module:
    """In place: of the modules `names` only those in `kept` stay."""
    for name in set(names) - set(kept):
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
    losses: what it gave.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.prepare([])

    def prepare(self, packs: list[PackedBatch], loss: Loss | None = None) -> None:
        self.packs, self.loss = iter(packs), loss
        self.losses: list[Tensor] = []

    def forward(self, *streams: Tensor) -> tuple[Tensor, ...] | Tensor:
        batch = next(self.packs)
        output: Output = self.model(batch, (), streams)
        if output.logits is None or self.loss is None:
            return output.streams if output.logits is None else output.logits
        loss = torch.stack((self.loss(output, batch)[0],))
        self.losses.append(loss.detach())
        return loss


class Pipeline:
    """The stages of this rank, and what they do together with those of the other ranks.

    model: all modules of this rank under their own names; calling it runs `forward`. copies: names of parameters that
    an earlier stage holds as well, and answers for.
    """

    def __init__(
        self, whole: nn.Module, plan: ParallelPlan, config: ParallelConfig, mesh: DeviceMesh, dtype: torch.dtype
    ):
        """whole: on the meta device; becomes `model`. mesh: of one axis. dtype: of hidden states."""
        self.plan, self.config, self.dtype, self.group = plan, config, dtype, mesh.get_group()
        self.ranks = dist.get_process_group_ranks(self.group)
        self.num_stages, names = num_stages(config), in_order(whole, plan.stages)
        homeless = [p for p, _ in whole.named_parameters() if not p.startswith(tuple(f"{name}." for name in names))]
        if homeless:
            raise ValueError(f"the plan's stages have no place for {', '.join(homeless)}")
        self.shares = share_out(names, plan.units, self.num_stages)
        own = range(mesh.get_local_rank(), self.num_stages, config.pp)
        self.stages = {i: Stage(keep(copy.deepcopy(whole), names, self.shares[i])) for i in own}
        self.model = keep(whole, names, [name for i in own for name in self.shares[i]])
        for i, stage in self.stages.items():
            for name in self.shares[i]:
                self.model.set_submodule(name, stage.model.get_submodule(name))
        self.model.forward = self.forward  # type: ignore[method-assign]
        self.model.pipeline = self  # type: ignore[assignment]
        self.schedule: Any = None
        self.scale: Tensor | None = None
        self._find_copies(sorted({name for name in names if names.count(name) > 1}))

    def _find_copies(self, names: list[str]) -> None:
        """names: of modules that two stages hold, on two ranks.

        These send each other their gradients: a group that only they make would put the names of their later ones out
        of step with what the ranks between them count.
        """
        self.copies: set[str] = set()
        self.shared: list[tuple[str, int]] = []  # and the rank that holds the other copy
        for name in names:
            first, last = (i for i, share in enumerate(self.shares) if name in share)
            if self.stages.keys() & {first, last}:
                held = [f"{name}.{p}" for p, _ in self.model.get_submodule(name).named_parameters()]
                other = self.ranks[(last if first in self.stages else first) % self.config.pp]
                self.shared += [(parameter, other) for parameter in held]
                self.copies |= set() if first in self.stages else set(held)

    def backward(self, packs: list[PackedBatch], scale: Tensor, loss: Loss) -> Tensor:
        """Gradients of a step's packs, of their losses times `scale`, added up; returns the losses, (P,) float64."""
        self.scale = scale
        self.schedule = self.schedule or self._schedule(packs)
        for stage in self.stages.values():
            stage.prepare(packs, loss)
        self.schedule.step(target=torch.arange(len(packs)), return_outputs=False)
        parameters = dict(self.model.named_parameters())
        for name, other in self.shared:
            gradient: Any = parameters[name].grad
            here = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            there = torch.empty_like(here)
            ops = [dist.P2POp(dist.isend, here, other, self.group), dist.P2POp(dist.irecv, there, other, self.group)]
            for work in dist.batch_isend_irecv(ops):
                work.wait()
            here += there
        losses_P = torch.zeros(len(packs), dtype=torch.float64, device=scale.device)
        for stage in self.stages.values():
            if stage.losses:
                losses_P += torch.cat(stage.losses)
        dist.broadcast(losses_P, self.ranks[-1], self.group)
        return losses_P

    @torch.no_grad()
    def forward(self, batch: PackedBatch) -> Output:
        """Logits at the batch's targets, on every rank; hidden states stay where they are."""
        assert batch.targets is not None
        pp, device = self.config.pp, batch.ids.device
        config: Any = self.model.config
        shape = (len(batch.targets), config.vocab_size)
        result: Any = torch.empty(shape, dtype=self.dtype, device=device)
        for i, stage in self.stages.items():
            streams = [torch.empty_like(x, device=device) for x in self._enter(i, batch)]
            for x in streams:
                dist.recv(x, self.ranks[(i - 1) % pp], self.group)
            stage.prepare([batch])
            left = stage(*streams)
            if i == self.num_stages - 1:
                result = left.contiguous()  # type: ignore[union-attr]
            for x in left if i < self.num_stages - 1 else ():
                dist.send(x, self.ranks[(i + 1) % pp], self.group)
        dist.broadcast(result, self.ranks[-1], self.group)
        return Output(result.new_empty(0), result, {})

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
        if self.config.pp_schedule == "1f1b":
            return Schedule1F1B(stages[0], len(packs), **settings)
        return ScheduleInterleaved1F1B([*stages], len(packs), **settings)

    def _enter(self, i: int, batch: PackedBatch) -> tuple[Tensor, ...]:
        """The tensors, on the meta device, that stage `i` takes; nothing for the first. After the last: the loss.

        A stream in the midst of its blocks is shared by the ranks of tensor parallelism, the first of context
        parallelism as well; before and behind them it is whole.
        """
        if i == self.num_stages:
            return (torch.empty(1, device="meta", requires_grad=True),)
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
