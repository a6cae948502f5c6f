"""Weights in and out: what a user names becomes a model, and a model becomes a folder that others can read.

    WHAT ──resolve──> (kind, path) ──load_pretrained──> Pretrained(spec, config, model, source)
    model ──save_pretrained──> config.json + model.safetensors, in our layout or that of `transformers`

Kinds: checkpoint (a training checkpoint of ours), moltron (our exchange folder: our names, family and configuration in
config.json), huggingface, fair-esm (.pt). What the names of other layouts mean is the families' affair (convert.py).
Tensors are read one at a time from mapped files into a model born without memory. Nothing is ever unpickled as code.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moltron.checkpoint.download import REPOSITORIES, fetch
from moltron.checkpoint.manager import MANIFEST, find_good, load_tensors, read_manifest
from moltron.common.manifest import read_json, staged_folder, write_json
from moltron.config.schema import ConvertConfig
from moltron.models.registry import FAMILIES, get_spec, make_config
from moltron.models.spec import ModelSpec
from moltron.tokenizers.residues import get_tokenizer

SHARD_BYTES = 5 * 10**9  # the most that one safetensors file of an exported model holds
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODEL_TYPE = "moltron"  # `model_type` of our own exchange folders
log = logging.getLogger(__name__)


@dataclass(eq=False)
class Pretrained:
    """source: the file or folder that was read. has_head: False for an encoder without a language-model head, which
    embeds, but raises ValueError when asked for logits.
    """

    spec: ModelSpec
    config: Any
    model: nn.Module
    source: str
    has_head: bool = True


class MissingHead(nn.Module):
    """Stands where weights brought no language-model head."""

    def __init__(self, source: str):
        super().__init__()
        self.source = source

    def forward(self, *_: Any) -> Tensor:
        raise ValueError(
            f"{self.source} has no language-model head (it is an encoder alone, EsmModel): it gives embeddings, but no "
            "logits or losses; use weights of EsmForMaskedLM"
        )


# ------------------------------------------------------------------------------------------------------------ resolve


def resolve(what: str | Path) -> tuple[str, Path]:
    """What a user's word stands for: (kind, path). A run folder becomes its best checkpoint, else its newest good one.

    Raises ValueError saying what was found instead, or which names there are.
    """
    path = Path(what).expanduser()
    if not path.exists():
        if str(what) in REPOSITORIES:
            return "huggingface", fetch(str(what))
        raise ValueError(f"{what}: no such file or folder, and no name for download ({', '.join(REPOSITORIES)})")
    if path.is_file():
        if path.suffix == ".pt":
            return "fair-esm", path
        raise ValueError(f"{path}: a model is a folder or a fair-esm .pt file")
    runs = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if any(runs.glob("step-*")):
        good = find_good(runs, best=True)
        if good is None:
            raise ValueError(f"{runs}: no checkpoint in it is whole")
        metric = read_manifest(good).metric
        log.info("%s: taking %s", path, good.name + ("" if metric is None else f", the best (metric {metric:.4f})"))
        return "checkpoint", good
    if (path / "config.json").is_file():
        return ("moltron" if _read_config(path).get("model_type") == MODEL_TYPE else "huggingface"), path
    if (path / MANIFEST).is_file():
        return "checkpoint", path
    raise ValueError(
        f"{path}: neither a run folder (checkpoints/), nor a checkpoint ({MANIFEST}), nor a model folder (config.json)"
    )


def _read_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'config.json'}: not a JSON object")
    return config


# ---------------------------------------------------------------------------------------------------------------- load


def load_pretrained(
    what: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Pretrained:
    """A model with its weights, in evaluation mode. what: see `resolve`. dtype: of all parameters; None: float32."""
    kind, path = resolve(what)
    make = partial(_make_model, device=device, dtype=dtype or torch.float32)
    if kind == "checkpoint":
        return _load_checkpoint(path, make)
    if kind == "fair-esm":
        return _load_fair(path, make)
    theirs, tensors = _read_config(path), _open_folder(path)
    if kind == "moltron":
        spec = get_spec(theirs.get("family", ""))
        config = make_config(spec.name, theirs.get("config", {}))
        return _fill(spec, config, tensors.items(), make, str(path))
    for spec in FAMILIES.values():
        if spec.convert.is_hf(theirs):
            config, weights = spec.convert.read_hf(theirs, tensors, str(path))
            _check_vocabulary(path, config)
            return _fill(spec, config, weights, make, str(path))
    what_it_is = {name: theirs.get(name) for name in ("model_type", "position_embedding_type")}
    raise ValueError(f"{path}/config.json: no family of moltron reads {what_it_is}")


def _make_model(spec: ModelSpec, config: Any, device: str | torch.device, dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        model = spec.model(config)
    return model.to(dtype).to_empty(device=device).eval()


def _fill(
    spec: ModelSpec, config: Any, weights: Iterable[tuple[str, Tensor]], make: Callable[..., nn.Module], source: str
) -> Pretrained:
    """Copy tensors into a new model; every parameter gets its value, unless the head or contact head is absent."""
    model = make(spec, config)
    left = dict(model.named_parameters())
    for name, tensor in weights:
        parameter = left.pop(name, None)
        if parameter is None or parameter.shape != tensor.shape:
            here = "no such parameter" if parameter is None else f"{list(parameter.shape)} by its configuration"
            raise ValueError(f"{source}: {name} has shape {list(tensor.shape)}, {here}")
        with torch.no_grad():
            parameter.copy_(tensor)
    contacts = [name for name in left if name.startswith("contact_head.")]
    for name in contacts:
        nn.init.zeros_(left.pop(name))
    if contacts:
        log.info("%s: no contact regression; predicted contacts mean nothing", source)
    has_head = not left
    if left and set(left) == {name for name, _ in model.named_parameters() if name.startswith("head.")}:
        model.head = MissingHead(source)
    elif left:
        raise ValueError(f"{source}: missing {', '.join(sorted(left))}")
    return Pretrained(spec, config, model, source, has_head)


def _load_checkpoint(path: Path, make: Callable[..., nn.Module]) -> Pretrained:
    try:
        described = read_manifest(path).meta["model"]
        spec = get_spec(described["family"])
        config = make_config(spec.name, described["config"])
    except KeyError as error:
        raise ValueError(f"{path}: this checkpoint does not say which model it holds ({error} is missing)") from error
    model = make(spec, config)
    load_tensors(path, {f"model.{name}": p for name, p in model.named_parameters()})
    return Pretrained(spec, config, model, str(path))


def _load_fair(path: Path, make: Callable[..., nn.Module]) -> Pretrained:
    checkpoint = dict(_load_pt(path))
    regression = path.with_name(f"{path.stem}-contact-regression.pt")
    if regression.is_file():
        checkpoint["model"] = {**checkpoint["model"], **_load_pt(regression)["model"]}
    for spec in FAMILIES.values():
        if "model" in checkpoint and spec.convert.is_fair(checkpoint):
            config, weights = spec.convert.read_fair(checkpoint, str(path))
            return _fill(spec, config, weights, make, str(path))
    raise ValueError(
        f"{path}: not a fair-esm checkpoint of ESM-1b or ESM-2; it holds {', '.join(map(str, checkpoint))}"
    )


def _load_pt(path: Path) -> Mapping[str, Any]:
    """A torch file of tensors and plain values; argparse.Namespace is the one class that is let in."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            try:
                loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # written before torch 1.6: cannot be mapped
                loaded = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"{path}: not a torch file of tensors and plain values alone: {error}") from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path}: holds a {type(loaded).__name__} instead of a dictionary")
    return loaded


class _TensorFiles(Mapping):
    """The tensors of safetensors files by name, read when asked for."""

    def __init__(self, files: Iterable[Path]):
        self.where = {}
        for file in files:
            try:
                opened = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file}: not readable as safetensors ({error}); fetch or write it again") from error
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                if name in self.where:
                    raise ValueError(f"{file}: {name} is in another file too")
                self.where[name] = opened

    def __getitem__(self, name: str) -> Tensor:
        return self.where[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def __len__(self) -> int:
        return len(self.where)


def _open_folder(folder: Path) -> Mapping[str, Tensor]:
    """The weights of a model folder: safetensors if there are any, else pytorch_model.bin; one file or an index."""
    for name, is_torch in (("model.safetensors", False), ("pytorch_model.bin", True)):
        index = folder / f"{name}.index.json"
        if index.is_file():
            names = sorted(set(read_json(index)["weight_map"].values()))
            files = [folder / Path(n).name for n in names]
        elif (folder / name).is_file():
            files = [folder / name]
        else:
            continue
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise ValueError(f"{folder}: {index.name} names files that are not there: {', '.join(absent)}")
        if is_torch:
            return {name: tensor for file in files for name, tensor in _load_pt(file).items()}
        return _TensorFiles(files)
    raise ValueError(f"{folder}: no model.safetensors (nor an index of several, nor pytorch_model.bin)")


def _check_vocabulary(folder: Path, config: Any) -> None:
    file = folder / "vocab.txt"
    if file.is_file():
        pieces = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        ours = get_tokenizer(config.tokenizer).pieces
        if pieces != ours:
            first = next((i for i, (a, b) in enumerate(zip(pieces, ours)) if a != b), min(len(pieces), len(ours)))
            raise ValueError(f"{file}: differs from the vocabulary of {config.tokenizer} from line {first + 1} on")


# ---------------------------------------------------------------------------------------------------------------- save


def save_pretrained(
    model: nn.Module,
    spec: ModelSpec,
    config: Any,
    folder: str | Path,
    format: str = "moltron",
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
) -> Path:
    """Write a model folder. format: "moltron", or "huggingface" (`transformers`) where the family is known there.

    The folder appears at once and whole. Raises ValueError if it is there already and `overwrite` is False.
    """
    folder = Path(folder).expanduser()
    if format not in ("moltron", "huggingface"):
        raise ValueError(f"format={format!r} must be huggingface or moltron")
    head = getattr(model, "head", None)
    if isinstance(head, MissingHead):
        raise ValueError(f"{head.source} has no language-model head: it cannot be written as a masked LM")
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    weights: Iterable[tuple[str, Tensor]] = state.items()
    if format == "huggingface":
        theirs, weights = spec.convert.write_hf(config, state)
    else:
        theirs = {"model_type": MODEL_TYPE, "family": spec.name, "config": dataclasses.asdict(config)}
    with staged_folder(folder, marker="config.json", overwrite=overwrite) as stage:
        _save_weights(weights, stage, dtype)
        write_json(stage / "config.json", theirs | {"dtype": str(dtype).removeprefix("torch.")})
        if format == "huggingface":
            _write_tokenizer(stage, config)
    return folder


def _save_weights(weights: Iterable[tuple[str, Tensor]], folder: Path, dtype: torch.dtype) -> None:
    """One file, or several with an index as `transformers` has them; one file's worth in memory at a time."""
    files: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        if shard:
            save_file(shard, folder / f"{len(files)}.part", metadata={"format": "pt"})
            files.append(list(shard))
            shard.clear()

    for name, tensor in weights:
        kept = torch.float32 if name.endswith("inv_freq") else dtype
        tensor = tensor.to(device="cpu", dtype=kept).contiguous()
        if size + tensor.nbytes > SHARD_BYTES:
            flush()
            size = 0
        shard[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    weight_map = {}
    for i, names in enumerate(files):
        name = "model.safetensors" if len(files) == 1 else f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        os.rename(folder / f"{i}.part", folder / name)
        weight_map |= dict.fromkeys(names, name)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def _write_tokenizer(folder: Path, config: Any) -> None:
    """What transformers' AutoTokenizer needs to make an EsmTokenizer."""
    pieces = get_tokenizer(config.tokenizer).pieces
    (folder / "vocab.txt").write_text("\n".join(pieces), encoding="utf-8")
    special = {f"{name}_token": f"<{name}>" for name in ("cls", "pad", "eos", "unk", "mask")}
    write_json(folder / "special_tokens_map.json", special)
    limit = {"model_max_length": config.max_positions}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "EsmTokenizer", **special, **limit})


# ------------------------------------------------------------------------------------------------------------- convert


def convert(config: ConvertConfig) -> Path:
    """`moltron convert`: any WHAT → a folder in `format`; returns it."""
    if config.dtype not in DTYPES:
        raise ValueError(f"dtype={config.dtype!r} must be one of {', '.join(DTYPES)}")
    source, output = Path(config.input).expanduser(), Path(config.output).expanduser()
    if source.exists() and output.exists() and output.samefile(source):
        raise ValueError(f"output={config.output} is the input itself")
    dtype = DTYPES[config.dtype]
    loaded = load_pretrained(config.input)
    folder = save_pretrained(
        loaded.model, loaded.spec, loaded.config, config.output, config.format, dtype, config.overwrite
    )
    log.info("%s (%s) written to %s as %s, %s", loaded.source, loaded.spec.name, folder, config.format, config.dtype)
    return folder
