"""`moltron plan`."""

from __future__ import annotations

from collections.abc import Sequence

from moltron.config import compose, schema


def training(model: str, overrides: Sequence[str] = ()) -> tuple[schema.TrainConfig, list[str]]:
    """What `moltron train` would be given, and the arguments that say so. model: a preset of training or a model's."""
    presets = [name for name in compose.preset_names() if name == model or name.startswith(f"pretrain_{model}")]
    base: list[str] = []
    if not presets:
        base = [f"model={model}"]
    named = ["run_dir=run", "data.path=store"]
    config = compose.load_config(schema.TrainConfig, [*base, *named, *overrides], presets[0] if presets else None)
    if not presets and not any(o.startswith("objective") for o in overrides):
        from moltron.models.registry import get_spec

        base.append(f"objective={get_spec(config.model['family']).objectives[0]}")
        config = compose.load_config(schema.TrainConfig, [*base, *named, *overrides])
    return config, ["--config-name", presets[0]] if presets else base


def predict(config: schema.TrainConfig, world: int, device: str = "cuda"):
    """The footprint of a training on GPUs (device="cpu": of one without compilation, in fp32)."""
    import torch

    from moltron.models.registry import build_model, get_spec, make_config
    from moltron.objectives import get_objective
    from moltron.parallel.footprint import Work, footprint
    from moltron.parallel.mesh import mesh_shape
    from moltron.parallel.precision import resolve_precision
    from moltron.tokenizers import get_tokenizer

    architecture = dict(config.model)
    family = architecture.pop("family")
    made, precision = make_config(family, architecture), resolve_precision(config.train.precision, torch.device(device))
    objective = get_objective(config.objective, get_tokenizer(made.tokenizer), 0)
    tokens = config.batch.streams(objective.streams)
    _, copies, shards, _, _ = mesh_shape(config.parallel, world)
    can_compile = device == "cuda" and precision != "fp32" and getattr(made, "trains_compiled", True)
    work = Work(
        tokens=tokens,
        targets=objective.num_targets(tokens[0]) if hasattr(objective, "num_targets") else tokens[-1],
        packs=config.batch.packs // (copies * shards),
        width=4 if precision == "fp32" else 2,
        compiled=can_compile if config.train.compile is None else config.train.compile,
        muon=config.optim.name == "muon",
        length=max(config.data.limits(objective.streams)),
    )
    return footprint(build_model(family, architecture), get_spec(family).plan, config.parallel, world, work)
