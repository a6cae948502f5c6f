"""What each command does with its configuration: call the room that does it, say what came of it, return an exit code.

Rooms are imported when their command runs: `moltron --help` does not wait for torch.
"""

from __future__ import annotations

import json
import sys

from moltron.cli.plan import Request, answer
from moltron.config.schema import (
    ConvertConfig,
    DownloadConfig,
    EmbedConfig,
    EvaluateConfig,
    GenerateConfig,
    PrepareConfig,
    TrainConfig,
)


def prepare(config: PrepareConfig) -> int:
    from moltron.common.logging import get_logger, setup_logging
    from moltron.data.prepare import prepare

    setup_logging()
    manifest, log = prepare(config), get_logger(__name__)
    for name, split in manifest["splits"].items():
        unit = "tokens" if "tokens" in split else "residues"
        clusters = f" in {split['clusters']:,} clusters" if "clusters" in split else ""
        log.info("%s: %s records%s, %s %s", name, f"{split['records']:,}", clusters, f"{split[unit]:,}", unit)
    for what in ("cleaning", "clusters", "rejects"):
        if counts := [f"{count:,} {name.replace('_', ' ')}" for name, count in manifest[what].items() if count]:
            log.info("%s: %s", what, ", ".join(counts))
    return 0


def train(config: TrainConfig) -> int:
    from moltron.train.loop import train

    return train(config).exit_code


def plan(request: Request) -> int:
    text, fits = answer(request)
    print(text)
    return 0 if fits else 1


def embed(config: EmbedConfig) -> int:
    from moltron.common.logging import setup_logging
    from moltron.infer.bulk import embed
    from moltron.parallel.collectives import rank

    setup_logging(rank())
    return 3 if embed(config).rejected else 0


def evaluate(config: EvaluateConfig) -> int:
    from moltron.common.logging import setup_logging
    from moltron.infer.evaluate import evaluate_file
    from moltron.parallel.collectives import rank

    setup_logging(rank())
    json.dump(evaluate_file(config), sys.stdout)
    print()
    return 0


def generate(config: GenerateConfig) -> int:
    from moltron.infer.molecules import generate

    report = generate(config)
    json.dump(report, sys.stdout)
    print()
    return 3 if report["rejected"] else 0


def convert(config: ConvertConfig) -> int:
    from moltron.checkpoint.weights import convert
    from moltron.common.logging import setup_logging

    setup_logging()
    convert(config)
    return 0


def download(config: DownloadConfig) -> int:
    from moltron.common.logging import setup_logging

    setup_logging()
    if config.urls is None and config.output is None:
        from moltron.checkpoint.download import download

        download(config)
    elif config.urls is None or config.output is None or config.name:
        raise ValueError("urls (a list of files) and output (a folder) belong together, and go without name")
    else:
        from moltron.data.prepare.url_list import fetch_list

        print(fetch_list(config.urls, config.output))
    return 0
