"""`moltron plan`: which layout and how many tokens a pack suit a model on given GPUs, and what that takes.

    MODEL, key=value ──load──> Request ──propose: meshes, the least talkative first──> Choice ──answer──> text

Meshes: at first sharding alone, in a node and with copies between nodes, then over all of them; then tensor and context
parallelism in a node; pipelines last. Of each the fastest is taken that fits, by what recomputing takes and what
gathering weights for packs of that size does, down to a quarter of the goal. When none fits, all are tried with smaller
packs. What is given stays: batch.tokens, batch.packs, and of parallel.* the whole layout as soon as one key is.
"""

from __future__ import annotations

import argparse
import copy
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import ceil
from typing import TYPE_CHECKING, Any

from moltron.config import compose, schema

if TYPE_CHECKING:
    from moltron.parallel.footprint import Footprint

GIB = 2**30
# Beside tensors; allowances, not predictions: CUDA's context and loaded kernels; NCCL's buffers, an axis of the mesh;
# what the allocator holds in pieces that do not fit
CONTEXT, NCCL, SLACK = 0.6 * GIB, 0.5 * GIB, 0.03
USABLE = 0.99  # of the GiB in a GPU's name
GOAL, LEAST_GOAL = 5e7, 2**14  # tokens of a pack times hidden size; tokens: about what the presets have
# What takes as long as so many tokens: a pack (gradients added up, small products), gathering weights and summing
# gradients over ranks. CHEAP / hidden size: what norms and activations take of a token. Of 15B on four and eight H200
PACK, GATHER, CHEAP = 500, 500, 50
OWN = ("gpus", "memory", "node")  # keys that `moltron train` does not have


@dataclass
class Request:
    """start: the arguments of `moltron train` that choose the preset; given: those of the user."""

    model: str
    config: schema.PlanConfig
    start: list[str]
    given: list[str]

    def gives(self, section: str) -> bool:
        return any(key.startswith(section) for key in self.given)


@dataclass
class Choice:
    config: schema.PlanConfig
    footprint: Footprint

    @property
    def extra(self) -> float:
        """Bytes beside the tensors."""
        p, axes = self.config.parallel, len(self.footprint.sent)
        in_a_node = self.config.gpus <= self.config.node * p.pp * p.dp_replicate
        return CONTEXT + NCCL * axes + SLACK * self.footprint.peak + self.footprint.shared * in_a_node

    @property
    def fits(self) -> bool:
        return self.footprint.peak + self.extra <= self.config.memory * USABLE * GIB


def load(kind: type, arguments: argparse.Namespace) -> Request:
    """Raises ConfigError."""
    flags = [f"{key}={value}" for key in OWN if (value := getattr(arguments, key)) is not None]
    config, start = training(arguments.model, [*arguments.overrides, *flags], kind)
    problems = [f"{key}={getattr(config, key)} must be greater than 0" for key in OWN if not getattr(config, key) > 0]
    if config.gpus > config.node > 0 and config.gpus % config.node:
        problems.append(f"gpus={config.gpus} must be a multiple of node={config.node}, the GPUs of one node")
    if problems:
        raise compose.ConfigError(problems)
    given = [override for override in arguments.overrides if override.partition("=")[0] not in OWN]
    return Request(arguments.model, config, start, given)


def training(model: str, given: Sequence[str], kind: type = schema.PlanConfig) -> tuple[Any, list[str]]:
    """What `moltron train` would be given, and the arguments that choose it. model: a preset, of a training or a
    model; that has a training's preset of its own as a rule."""
    names = compose.preset_names()
    preset = next((n for n in names if n in (model, f"pretrain_{model}") or n.startswith(f"pretrain_{model}_")), None)
    if preset is not None:
        return compose.load_config(kind, given, preset), ["--config-name", preset]
    start = [f"model={model}"]
    config = compose.load_config(kind, [*start, *given])
    if not any(key.startswith("objective") for key in given):
        from moltron.models.registry import FAMILIES

        start += [f"objective={FAMILIES[config.model['family']].objectives[0]}"]
    return compose.load_config(kind, [*start, *given]), start


def answer(request: Request) -> tuple[str, bool]:
    """What is proposed or predicted, and whether it fits. Raises ValueError where nothing does."""
    model, config = _model(request.config), request.config
    found = propose(request, config, model)
    if not found.fits and not request.gives("parallel."):
        sizes = [n for i in range(1, 11) if (n := config.gpus * 2**i) <= config.node or n % config.node == 0]
        gpus = next((n for n in sizes if propose(request, replace(config, gpus=n), model).fits), None)
        raise ValueError(
            f"{request.model} does not fit on {_gpus(config)}: the smallest peak found is "
            f"{found.footprint.peak / GIB:.1f} GiB of tensors ({' '.join(_keys(request, found.config))}). It needs "
            f"GPUs of {ceil((found.footprint.peak + found.extra) / USABLE / GIB)} GB"
            + (f", or {gpus} of these" if gpus else "")
        )
    return _describe(request, found, model), found.fits


def propose(request: Request, config: schema.PlanConfig, model: Any) -> Choice:
    """The first that fits; else the one with the smallest peak. Raises ConfigError where no layout can work."""
    from moltron.train.validate import validate

    smallest, problems = None, []
    for is_large in (True, False):
        for layouts in [[config.parallel]] if request.gives("parallel.") else _layouts(config):
            ways = [(p, batch) for p in layouts for batch in _batches(request, config, p, is_large)]
            for parallel, batch in sorted(ways, key=lambda way: _time(config, *way)):
                tried = copy.copy(config)
                tried.parallel, tried.batch = parallel, batch
                wrong = [p for p in validate(tried, config.gpus) if not p.startswith(("data.path=", "run_dir="))]
                if wrong:
                    problems = problems or wrong
                    continue
                choice = Choice(tried, predict(tried, config.gpus, model=model))
                if choice.fits:
                    return choice
                if smallest is None or choice.footprint.peak < smallest.footprint.peak:
                    smallest = choice
    if smallest is None:
        raise compose.ConfigError(problems)
    return smallest


def _time(config: schema.PlanConfig, parallel: schema.ParallelConfig, batch: schema.BatchConfig) -> float:
    """Of a token, in that of one in an endless pack."""
    ranks = max(1, config.gpus // (parallel.pp * parallel.cp * parallel.tp))
    packs = batch.packs / ranks
    gathers = 0 if ranks * parallel.cp == 1 else packs if parallel.reshard_after_forward else 1
    more = (PACK * packs + GATHER * gathers) * parallel.cp / (packs * batch.tokens)
    again = {"none": 0, "selective": CHEAP / config.model["hidden_size"], "full": 1 / 4}
    return (1 + again[parallel.recompute]) * (1 + more)


def _layouts(config: schema.PlanConfig) -> Iterator[list[schema.ParallelConfig]]:
    """Of each mesh all layouts."""
    powers, node = [2**i for i in range(13)], min(config.node, config.gpus)
    cuts = [
        (1, 1, 1),
        *((1, 1, tp) for tp in powers[1:] if tp <= node),
        *((1, cp, 1) for cp in powers[1:] if cp <= node),
    ]
    cuts += [(pp, 1, tp) for pp, tp in product(powers[1:], powers) if tp <= node]
    for pp, cp, tp in cuts:
        ranks, left = config.gpus // (pp * cp * tp), config.gpus % (pp * cp * tp)
        if left or not ranks:
            continue
        inside = node // (cp * tp)  # ranks of a node that can share one copy of the weights
        copies = [ranks // inside, 1] if pp == 1 and ranks > inside and ranks % inside == 0 else [1]
        reshards = [False, True] if pp == 1 and config.gpus > 1 else [config.parallel.reshard_after_forward]
        for replicate in copies:
            axes = dict(pp=pp, dp_replicate=replicate, cp=cp, tp=tp)
            yield [
                replace(config.parallel, **axes, reshard_after_forward=reshard, recompute=recompute)
                for recompute, reshard in product(("none", "selective", "full"), reshards)
            ]


def _batches(
    request: Request, config: schema.PlanConfig, parallel: schema.ParallelConfig, is_large: bool
) -> Iterator[schema.BatchConfig]:
    """Packs of powers of two and half as much again, that make the preset's tokens a step, or a few more."""
    b, ranks = config.batch, max(1, config.gpus // (parallel.pp * parallel.cp * parallel.tp))
    a_step, share = b.tokens * b.packs, (b.decoder_tokens or b.tokens) / b.tokens
    least = max(config.data.max_length, (config.data.decoder_max_length or config.data.max_length) / share)
    goal = max(LEAST_GOAL, 2 ** int(GOAL / config.model["hidden_size"]).bit_length() // 2)
    each = ranks * (1 if parallel.pp == 1 else 4 * parallel.pp)  # packs: with fewer a pipeline waits
    sizes = [size for i in range(3, 25) for size in (2**i, 3 * 2 ** (i - 1)) if size >= least]
    sizes = [size for size in sizes if size <= min(goal, a_step / each) or size == sizes[0]]  # one sequence has to fit
    sizes = [size for size in sizes if (size >= goal / 4) == is_large]
    for tokens in [b.tokens] * is_large if request.gives("batch.tokens") else sizes:
        packs = max(each, round(a_step / tokens / each) * each)
        decoder = None if b.decoder_tokens is None else round(tokens * share)
        if request.gives("batch.decoder_tokens"):
            decoder = b.decoder_tokens
        yield schema.BatchConfig(tokens, decoder, b.packs if request.gives("batch.packs") else packs)


def predict(config: schema.TrainConfig, world: int, device: str = "cuda", model: Any = None) -> Footprint:
    """What a training takes. device="cpu": as one in fp32, without compilation. model: on the meta device."""
    import torch

    from moltron.models.registry import compiles, get_spec, make_config
    from moltron.objectives import get_objective
    from moltron.parallel.footprint import Work, footprint
    from moltron.parallel.mesh import mesh_shape
    from moltron.parallel.precision import TRAINED, resolve_precision
    from moltron.tokenizers import get_tokenizer

    spec = get_spec(config.model["family"])
    made = make_config(spec.name, {key: value for key, value in config.model.items() if key != "family"})
    precision = resolve_precision(config.train.precision, torch.device(device), TRAINED)
    objective = get_objective(config.objective, get_tokenizer(made.tokenizer), 0)
    tokens, compiled = config.batch.streams(objective.streams), config.train.compile
    if compiled is None:
        compiled = compiles(made, precision, device)
    _, copies, shards, _, _ = mesh_shape(config.parallel, world)
    work = Work(
        tokens,
        targets=objective.num_targets(tokens[0]) if objective.streams == 1 else tokens[1],  # type: ignore[attr-defined]
        packs=-(-config.batch.packs // (copies * shards)),
        width=4 if precision == "fp32" else 2,
        fp8=precision == "fp8",
        compiled=compiled,
        muon=config.optim.name == "muon",
        fp8_moments=config.optim.state == "fp8",
        length=max(config.data.limits(objective.streams)),
    )
    return footprint(model if model is not None else _model(config), spec.plan, config.parallel, world, work)


def _model(config: schema.TrainConfig) -> Any:
    from moltron.models.registry import build_model

    return build_model(config.model["family"], {k: v for k, v in config.model.items() if k != "family"})


# ---------------------------------------------------------------------------------------------------------------- text


def _describe(request: Request, found: Choice, model: Any) -> str:
    from moltron.models.spec import num_parameters
    from moltron.parallel.mesh import AXES, mesh_shape

    config, footprint, b = found.config, found.footprint, found.config.batch
    blocks, total = footprint.blocks, footprint.peak + found.extra
    shape: dict[str, int] = dict(zip(AXES, mesh_shape(config.parallel, config.gpus), strict=True))
    each = f"{min(blocks) / GIB:.2f}" + (f" to {max(blocks) / GIB:.2f}" if max(blocks) > 1.01 * min(blocks) else "")
    notes = {
        "weights": "fp32",
        "optimizer state": config.optim.name + (", fp8 moments" if config.optim.state == "fp8" else ""),
        "activations": f"{len(blocks)} blocks, {each} each, recompute={config.parallel.recompute}",
        "workspace": "of the block or head in its backward",
    }
    rows = [(part, size, notes.get(part, "")) for part, size in footprint.memory.items() if size]
    rows += [
        ("tensors", footprint.peak, "torch.cuda.max_memory_allocated"),
        ("context, NCCL, allocator", found.extra, ""),
        ("in all", total, f"of {config.memory * USABLE:.1f}" + ("" if found.fits else ": does not fit")),
    ]
    wanted = request.config.batch
    times = b.packs * b.tokens / (wanted.packs * wanted.tokens)
    lines = [
        f"{request.model}: {num_parameters(model):,} parameters, {_gpus(config)}",
        f"mesh: {' × '.join(f'{axis} {n}' for axis, n in shape.items() if n > 1) or 'one GPU'}; {b.packs} packs of "
        f"{b.tokens:,} tokens, {b.packs * b.tokens:,} a step"
        + (f", {times:.1f} × the preset's: each GPU wants a pack" if times > 1.1 else ""),
        "",
        "Peak of the fullest GPU, GiB",
        *(f"  {part:<26}{size / GIB:>8.2f}   {note}".rstrip() for part, size, note in rows),
    ]
    if footprint.sent:
        lines += ["", "Sent by a GPU in a step, GiB"]
        lines += [f"  {f'{axis} ({shape[axis]})':<26}{size / GIB:>8.2f}" for axis, size in footprint.sent.items()]
    return "\n".join([*lines, "", f"  {_command(request, config)}"])


def _keys(request: Request, config: schema.PlanConfig) -> list[str]:
    """What was given, and what of the choice differs from the preset."""
    keys = list(request.given)
    named = {key.partition("=")[0] for key in keys}
    for section in ("batch", "parallel"):
        for key, value in vars(getattr(config, section)).items():
            name = f"{section}.{key}"
            if name not in named and value != getattr(getattr(request.config, section), key):
                keys.append(f"{name}={str(value).lower()}")
    return keys


def _command(request: Request, config: schema.PlanConfig) -> str:
    train, nodes = ["moltron", "train", *request.start], -(-config.gpus // config.node)
    if nodes > 1:
        there = "--rdzv-backend c10d --rdzv-endpoint FIRST_NODE:29500"
        train = [f"torchrun --nnodes {nodes} --nproc-per-node {config.node} {there} -m", *train]
    elif config.gpus > 1:
        train = [f"torchrun --standalone --nproc-per-node {config.gpus} -m", *train]
    places = [place for place in ("data.path=store", "run_dir=run") if not request.gives(place.partition("=")[0])]
    return " ".join([*train, *places, *map(shlex.quote, _keys(request, config))])


def _gpus(config: schema.PlanConfig) -> str:
    return f"{config.gpus} GPU{'s' if config.gpus > 1 else ''} of {config.memory:g} GB"
