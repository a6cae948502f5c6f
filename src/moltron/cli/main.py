"""`moltron COMMAND key=value …`: argument parsing and help; each command's work is one function in commands.py.

    argv ──argparse──> command, options, overrides ──compose.load_config──> dataclass ──commands.*──> exit code

Exit codes: 0 done; 1 failed; 2 wrong usage or configuration; 3 done, but some records were rejected;
75 training was asked to stop and has saved its state (run the same command again to go on); 141 nobody read its output.
"""

from __future__ import annotations

import argparse
import errno
import functools
import inspect
import os
import re
import select
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from operator import attrgetter
from typing import Any

import moltron
from moltron.cli import commands, plan
from moltron.config import compose, schema


def _load(schema: type, arguments: argparse.Namespace) -> Any:
    names = getattr(arguments, "config_name", None), getattr(arguments, "config_dir", None) or ()
    return compose.load_config(schema, arguments.overrides, *names)


@dataclass(frozen=True)
class Command:
    """presets: whether there is --config-name. model: whether a MODEL comes first. flags: keys that may be written
    `--key VALUE`. load: (schema, arguments) → what `run` takes. resumes: run again, it goes on where it was stopped."""

    schema: type
    run: Callable[[Any], int]
    summary: str
    example: str
    presets: bool = False
    model: bool = False
    flags: tuple[str, ...] = ()
    load: Callable[[type, argparse.Namespace], Any] = _load
    resumes: bool = False


COMMANDS: dict[str, Command] = {
    "prepare": Command(
        schema.PrepareConfig,
        commands.prepare,
        "FASTA, CSV or SMILES files → a memory-mapped store with splits",
        "moltron prepare input=proteins.fasta.gz output=store val_size=0.05",
    ),
    "train": Command(
        schema.TrainConfig,
        commands.train,
        "pre-train a model; run again with the same run_dir to resume",
        "moltron train --config-name pretrain_esm2_8M data.path=store run_dir=run train.max_steps=100",
        presets=True,
        resumes=True,
    ),
    "plan": Command(
        schema.PlanConfig,
        commands.plan,
        "how a model can be trained on given GPUs: layout, tokens, memory, messages, and the command line",
        "moltron plan esm2_650M --gpus 8 --memory 80",
        model=True,
        flags=plan.OWN,
        load=plan.load,
    ),
    "embed": Command(
        schema.EmbedConfig,
        commands.embed,
        "sequences → embeddings, hidden states, logits in a file",
        "moltron embed model=run input=proteins.fasta output=embeddings.h5 outputs=[embeddings,hiddens]",
        resumes=True,
    ),
    "evaluate": Command(
        schema.EvaluateConfig,
        commands.evaluate,
        "masked-LM loss and perplexity of a model on a file, as JSON",
        "moltron evaluate model=run input=store/val.arrow",
    ),
    "generate": Command(
        schema.GenerateConfig,
        commands.generate,
        "new molecules near given ones, or between them → a table, a picture, a report as JSON",
        "moltron generate model=run input=molecules.csv output=new.csv method=topkp-perturbate num_samples=10",
        resumes=True,
    ),
    "convert": Command(
        schema.ConvertConfig,
        commands.convert,
        "weights of ours, Hugging Face's or fair-esm's (read only) → a folder in our format or Hugging Face's",
        "moltron convert input=run output=my-esm2 format=huggingface",
    ),
    "download": Command(
        schema.DownloadConfig,
        commands.download,
        "fetch a published checkpoint from the Hugging Face hub, or a list of files",
        "moltron download name=esm2_8M",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    try:
        return _main(sys.argv[1:] if argv is None else argv)
    except BrokenPipeError:
        if not _unread():
            raise
        for number in _unread():  # Python flushes once more as it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        return 141


def _unread() -> list[int]:
    """Of standard output and error, what goes to a pipe that nobody reads on, as in `moltron plan … | head`."""
    poll = select.poll()
    for number in (1, 2):
        poll.register(number, 0)
    return [number for number, event in poll.poll(0) if event & select.POLLERR]


def _main(argv: Sequence[str]) -> int:
    try:
        parser = _parser(argv)
        try:
            arguments, others = parser.parse_known_args(argv)  # argparse stops collecting key=value at the first option
        finally:
            sys.stdout.flush()  # of --help
        if stray := [other for other in others if other.startswith("-") or "=" not in other]:
            parser.error(f"unrecognized arguments: {' '.join(stray)}")
        arguments.overrides += others
        command = COMMANDS[arguments.command]
        config = command.load(command.schema, arguments)
    except compose.ConfigError as error:
        print(f"moltron {argv[0]}: {error}", file=sys.stderr)
        return 2
    try:
        code = command.run(config)
        sys.stdout.flush()
        return code
    except (ValueError, OSError) as error:  # OSError: no such file, no permission, a full disk
        if os.environ.get("MOLTRON_DEBUG") or (isinstance(error, BrokenPipeError) and _unread()):
            raise
        print(f"moltron {arguments.command}: {error}{_advice(error, command, config)}", file=sys.stderr)
        return 2 if isinstance(error, compose.ConfigError) else 1
    except KeyboardInterrupt:
        return 130


def _advice(error: Exception, command: Command, config: Any) -> str:
    """On a full disk, of which the system seldom says which one it is."""
    key = next((key for key in ("output", "run_dir") if getattr(config, key, None)), None)
    if key is None or not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return ""
    then = ", which then goes on where it stopped" if command.resumes else ""
    return f": make room where {key}={getattr(config, key)} is to be written, and run the same command again{then}"


def _parser(argv: Sequence[str] = ()) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moltron",
        description="Train, run and convert biomolecular language models.",
        epilog="Docs: docs/README.md",
    )
    versions = f"moltron {moltron.__version__}, torch {metadata.version('torch')}"
    parser.add_argument("--version", action="version", version=versions)
    sub = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        one = sub.add_parser(
            name,
            help=command.summary,
            description=command.summary,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=f"example:\n  {command.example}\n\n{_describe_keys(command, argv)}",
        )
        if command.model:
            one.add_argument("model", metavar="MODEL", help="a preset of a model or of a training")
        for flag in command.flags:
            one.add_argument(f"--{flag}", metavar="N", help=f"the same as {flag}=N")
        one.add_argument("overrides", nargs="*", metavar="key=value", help="set a key, see below")
        if command.presets:
            names = ", ".join(n for n in compose.preset_names() if not n.startswith("_"))
            one.add_argument("--config-name", metavar="PRESET", help=f"a preset: {names}, or one of your own")
            one.add_argument(
                "--config-dir",
                action="append",
                metavar="DIR",
                help="folder of own presets; also $MOLTRON_CONFIG_PATH",
            )
    return parser


def _describe_keys(command: Command, argv: Sequence[str]) -> str:
    """One line a key: name, default, or its value in the preset that `argv` names, and the comment beside it."""
    root, title = command.schema, "default"
    values = root()
    if command.presets and {"-h", "--help"} & {*argv}:
        early = argparse.ArgumentParser(add_help=False)
        early.add_argument("--config-name")
        early.add_argument("--config-dir", action="append", default=[])
        chosen = early.parse_known_args(argv)[0]
        if chosen.config_name is not None:
            given = [f"{key}=required" for key, _ in compose.schema_fields(root) if attrgetter(key)(values) == "???"]
            values, title = compose.load_config(root, given, chosen.config_name, chosen.config_dir), chosen.config_name
    lines = [f"keys ({title}):"]
    for key, field in compose.schema_fields(root):
        owner = _owner(root, key)
        found = re.search(rf"^    {field.name}: .*?  # (.*)$", _source(owner), re.MULTILINE)
        value = attrgetter(key)(values)
        shown = "required" if value == "???" else str(value).lower() if isinstance(value, bool) else value
        text = f"  {key} ({shown})"
        lines.append(f"{text:<44} {found.group(1)}" if found else text)
    return "\n".join(lines).replace("%", "%%")


_source = functools.cache(inspect.getsource)


def _owner(root: type, key: str) -> type:
    import typing

    for part in key.split(".")[:-1]:
        root = typing.get_type_hints(root)[part]
    return root


if __name__ == "__main__":
    sys.exit(main())
