"""Weights in and out: what a user names becomes a model, and a model becomes a folder that others can read.

    WHAT ──resolve──> (kind, path) ──find_source──> Source(spec, config, weights not read yet)
    Source ──fill──> parameters, whole or shards     WHAT ──load_pretrained──> Pretrained(spec, config, model, source)
    model ──save_pretrained──> config.json + model.safetensors, in our layout or that of `transformers`

Kinds: checkpoint (a training checkpoint of ours), moltron (our exchange folder: our names, family and configuration in
config.json), huggingface, fair-esm (.pt). What the names of other layouts mean is the families' affair (convert.py).
Files are mapped; a tensor is read as it is copied into a model born without memory. Nothing is unpickled as code.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import logging
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from moltron.checkpoint.download import REPOSITORIES, fetch
from moltron.checkpoint.manager import MANIFEST, find_good, load_tensors, problem_of, read_manifest
from moltron.common.manifest import read_json, staged_folder, write_json
from moltron.config.schema import ConvertConfig
from moltron.models.encoder import MissingHead, copy_value
from moltron.models.registry import FAMILIES, get_spec, make_config
from moltron.models.spec import ModelSpec
from moltron.tokenizers import get_tokenizer

SHARD_BYTES = 5 * 10**9  # the most that one safetensors file of an exported model holds
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODEL_TYPE = "moltron"  # `model_type` of our own exchange folders
log = logging.getLogger(__name__)


@dataclass(eq=False)
class Source:
    """Described, not read yet. path: the file or folder.

    weights: our names and tensors, mapped, to be read once; None: a training checkpoint's, read in place.
    """

    spec: ModelSpec
    config: Any
    weights: Iterable[tuple[str, Tensor]] | None
    path: Path


@dataclass(eq=False)
class Pretrained:
    """source: the file or folder that was read. Where it brought no head, `model.head` is a MissingHead: the model
    embeds, but raises ValueError for logits."""

    spec: ModelSpec
    config: Any
    model: nn.Module
    source: str


def resolve(what: str | Path) -> tuple[str, Path]:
    """What a user's word stands for: (kind, path). A run folder becomes its best checkpoint, else its newest good one.

    Raises ValueError saying what was found instead, or which names there are.
    """
    path = Path(what).expanduser()
    if not path.exists():
        if str(what).partition("@")[0] in REPOSITORIES:  # name or name@revision
            return "huggingface", fetch(str(what))
        near = difflib.get_close_matches(str(what), REPOSITORIES, n=2)
        names = f"did you mean {' or '.join(near)}?" if near else f"names for download: {', '.join(REPOSITORIES)}"
        raise ValueError(f"{what}: no such file or folder; {names}")
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
        return ("moltron" if read_json(path / "config.json").get("model_type") == MODEL_TYPE else "huggingface"), path
    if any(path.glob("*.arrow")):
        raise ValueError(f"{path} is a data folder of `moltron prepare`, not a model: give a run folder or a model's")
    if (path / MANIFEST).is_file():
        if problem := problem_of(path):
            raise ValueError(f"Checkpoint refused: {problem}")
        return "checkpoint", path
    raise ValueError(
        f"{path}: neither a run folder (checkpoints/), nor a checkpoint ({MANIFEST}), nor a model folder (config.json)"
    )


def find_source(what: str | Path) -> Source:
    """What a user names, see `resolve`: which model it is, and where its weights are."""
    kind, path = resolve(what)
    reader = {"checkpoint": _checkpoint, "moltron": _ours, "huggingface": _huggingface, "fair-esm": _fair}[kind]
    return Source(*reader(path), path)


def load_pretrained(what: str | Path) -> Pretrained:
    """A model with its weights, in evaluation mode, float32 on the host. what: see `resolve`."""
    source = find_source(what)
    model = _skeleton(source.spec, source.config).float().to_empty(device="cpu").eval()
    if why := fill(source, dict(model.named_parameters())):
        model.head = MissingHead(why)
    return Pretrained(source.spec, source.config, model, str(source.path))


@torch.no_grad()
def fill(
    source: Source,
    parameters: Mapping[str, nn.Parameter],
    assign: Callable[[nn.Parameter, Tensor], None] = copy_value,
    restore: Callable[[Path, Mapping[str, Tensor]], Any] = load_tensors,
) -> str | None:
    """Give parameters their values, one tensor at a time: all of the model's, or those that a pipeline's rank has.

    The contact head may be absent, and the head: then the sentence that says so is returned. restore: see
    `load_tensors`.
    """
    if source.weights is None:
        restore(source.path, {f"model.{name}": p for name, p in parameters.items()})
        return None
    left = dict(_skeleton(source.spec, source.config).named_parameters())
    head = {name for name in left if name.startswith("head.")}

    def give(name: str, tensor: Tensor) -> None:
        whole = left.pop(name, None)
        if whole is None or whole.shape != tensor.shape:
            here = "no such parameter" if whole is None else f"{list(whole.shape)} by its configuration"
            raise ValueError(f"{source.path}: {name} has shape {list(tensor.shape)}, {here}")
        if name in parameters:
            assign(parameters[name], tensor)

    for name, tensor in source.weights:
        give(name, tensor)
    if contacts := [name for name in left if name.startswith("contact_head.")]:
        log.info("%s: no contact regression, so no predicted contacts", source.path)
    for name in contacts:
        give(name, torch.zeros(left[name].shape))
    if left and set(left) != head:
        raise ValueError(f"{source.path}: missing {', '.join(sorted(left))}")
    publishers = "EsmForMaskedLM and T5ForConditionalGeneration do"
    return f"{source.path} has no language-model head (weights of {publishers})" if left else None


def _skeleton(spec: ModelSpec, config: Any) -> nn.Module:
    """The model without memory."""
    with torch.device("meta"):
        return spec.model(config)


Found = tuple[ModelSpec, Any, Iterable[tuple[str, Tensor]] | None]  # family, configuration, our names and tensors


def _checkpoint(path: Path) -> Found:
    """Without tensors: they are read in place, from any number of shards."""
    return *_described(read_manifest(path).meta.get("model", {}), path), None


def _ours(path: Path) -> Found:
    return *_described(read_json(path / "config.json"), path), _read_folder(path).items()


def _described(model: dict[str, Any], path: Path) -> tuple[ModelSpec, Any]:
    if not {"family", "config"} <= set(model):
        raise ValueError(f"{path} does not say which model it holds (family and config)")
    return get_spec(model["family"]), make_config(model["family"], model["config"])


def _huggingface(path: Path) -> Found:
    theirs = read_json(path / "config.json")
    for spec in FAMILIES.values():
        if spec.convert.is_hf(theirs):
            config, weights = spec.convert.read_hf(theirs, _read_folder(path), str(path))
            _check_vocabulary(path, config)
            return spec, config, weights
    what_it_is = {name: theirs.get(name) for name in ("model_type", "position_embedding_type")}
    raise ValueError(f"{path}/config.json: no family of moltron reads {what_it_is}")


def _fair(path: Path) -> Found:
    checkpoint = _load_pt(path)
    regression = path.with_name(f"{path.stem}-contact-regression.pt")
    if regression.is_file():
        checkpoint["model"] = {**checkpoint["model"], **_load_pt(regression)["model"]}
    for spec in FAMILIES.values():
        if "model" in checkpoint and spec.convert.is_fair(checkpoint):
            return spec, *spec.convert.read_fair(checkpoint, str(path))
    raise ValueError(f"{path}: no fair-esm checkpoint of ESM-1b or ESM-2; it holds {', '.join(map(str, checkpoint))}")


def _load_pt(path: Path) -> dict[str, Any]:
    """A torch file of tensors and plain values; argparse.Namespace is the one class that is let in."""
    mmap = zipfile.is_zipfile(path)  # what was written before torch 1.6 is none, and cannot be mapped
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=mmap))
    except Exception as error:
        raise ValueError(f"{path}: not a torch file of tensors and plain values alone: {error}") from error


def _read_folder(folder: Path) -> dict[str, Tensor]:
    """The weights of a model folder: safetensors if there are any, else pytorch_model.bin; one file or an index."""
    for name, read_file in (("model.safetensors", _load_safetensors), ("pytorch_model.bin", _load_pt)):
        index = folder / f"{name}.index.json"
        names = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else [name]
        files = [folder / Path(n).name for n in names]
        absent = [file.name for file in files if not file.is_file()]
        if not absent:
            return {name: tensor for file in files for name, tensor in read_file(file).items()}
        if index.is_file():
            raise ValueError(f"{folder}: {index.name} names files that are not there: {', '.join(absent)}")
    raise ValueError(f"{folder}: no model.safetensors (nor an index of several, nor pytorch_model.bin)")


def _load_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not readable as safetensors ({error}); fetch or write it again") from error


def _check_vocabulary(folder: Path, config: Any) -> None:
    file = folder / "vocab.txt"
    if file.is_file():
        pieces = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        ours = get_tokenizer(config.tokenizer).pieces
        if pieces != ours:
            first = next(i for i, (a, b) in enumerate(zip_longest(pieces, ours)) if a != b)
            raise ValueError(f"{file}: differs from the vocabulary of {config.tokenizer} from line {first + 1} on")


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
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if isinstance(model.head, MissingHead) and set(state) != {n for n, _ in _skeleton(spec, config).named_parameters()}:
        raise ValueError(f"{model.head.why}: it cannot be written, for a head is part of this architecture")
    theirs = {"model_type": MODEL_TYPE, "family": spec.name, "config": dataclasses.asdict(config)}
    if format == "huggingface":
        theirs, state = spec.convert.write_hf(config, state)
    state = {name: t.to("cpu", torch.float32 if name.endswith("inv_freq") else dtype) for name, t in state.items()}
    with staged_folder(folder, marker="config.json", overwrite=overwrite) as stage:
        try:
            save_torch_state_dict(state, stage, max_shard_size=SHARD_BYTES)
        except SafetensorError as error:  # its name for the disk's errors too
            raise ValueError(f"{folder}: cannot be written ({error})") from error
        for file in stage.iterdir():
            file.chmod(stage.stat().st_mode & 0o666)  # safetensors' files are the owner's alone: as the umask has it
        write_json(stage / "config.json", theirs | {"dtype": str(dtype).removeprefix("torch.")})
        if format == "huggingface":
            _write_tokenizer(stage, config)
    return folder


def _write_tokenizer(folder: Path, config: Any) -> None:
    """What transformers' AutoTokenizer needs to make an EsmTokenizer; a T5's is a SentencePiece file, not written."""
    if config.tokenizer != "esm2":
        return
    pieces = get_tokenizer(config.tokenizer).pieces
    (folder / "vocab.txt").write_text("\n".join(pieces), encoding="utf-8")
    special = {f"{name}_token": f"<{name}>" for name in ("cls", "pad", "eos", "unk", "mask")}
    write_json(folder / "special_tokens_map.json", special)
    limit = {"model_max_length": config.max_positions}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "EsmTokenizer", **special, **limit})


def convert(config: ConvertConfig) -> Path:
    """`moltron convert`: any WHAT → a folder in `format`; returns it."""
    if config.dtype not in DTYPES:
        raise ValueError(f"dtype={config.dtype!r} must be one of {', '.join(DTYPES)}")
    source, output = Path(config.input).expanduser(), Path(config.output).expanduser()
    if source.exists() and output.exists() and output.samefile(source):
        raise ValueError(f"output={config.output} is the input itself")
    if output.suffix in (".pt", ".bin", ".safetensors"):
        raise ValueError(
            f"output={config.output}: a folder is written, not a file: give a name without {output.suffix}"
        )
    dtype = DTYPES[config.dtype]
    it = load_pretrained(config.input)
    folder = save_pretrained(it.model, it.spec, it.config, config.output, config.format, dtype, config.overwrite)
    log.info("%s (%s) written to %s as %s, %s", it.source, it.spec.name, folder, config.format, config.dtype)
    return folder
