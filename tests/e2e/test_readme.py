"""Every block that a page marks `<!-- run -->` is run, as a reader would: in order, in one folder a page.

Each page starts in a folder that holds `examples/`, a prepared `store` and a trained `run`, except README.md, which
makes them itself. To be quick, the examples are every twelfth protein and every fifth molecule only, and
`train.max_steps=…` becomes 2; nothing else is changed.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^<!-- run -->\n```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SETUP = """
moltron prepare input=examples/data/proteins.fasta output=store val_size=0.1
moltron train --config-name quickstart_esm2 data.path=store run_dir=run train.max_steps=2
"""


def add_examples(folder: Path) -> None:
    (folder / "examples/data").mkdir(parents=True)
    records = (ROOT / "examples/data/proteins.fasta").read_text().split(">")[1:]
    (folder / "examples/data/proteins.fasta").write_text("".join(">" + record for record in records[::12]))
    molecules = (ROOT / "examples/data/molecules.csv").read_text().splitlines(keepends=True)
    (folder / "examples/data/molecules.csv").write_text("".join([molecules[0], *molecules[1::5]]))
    shutil.copytree(ROOT / "examples/molecule", folder / "examples/molecule")


def blocks(page: Path) -> list[tuple[str, str]]:
    found = [(language, code) for language, code in BLOCK.findall(page.read_text())]
    return [(language, re.sub(r"train\.max_steps=\d+", "train.max_steps=2", code)) for language, code in found]


def run(language: str, code: str, folder: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    command = [sys.executable, "-"] if language == "python" else ["bash", "-euo", "pipefail", "-s"]
    result = subprocess.run(
        command, input=code, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, f"{code}\n--- output\n{result.stdout[-3000:]}\n{result.stderr[-5000:]}"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    add_examples(folder)
    run("bash", SETUP, folder)
    return folder


def test_the_pages_have_blocks_to_run():
    assert len(blocks(ROOT / "README.md")) >= 2
    assert sum(len(blocks(page)) for page in PAGES) >= 12


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_every_block_runs(page: Path, tmp_path: Path, request: pytest.FixtureRequest):
    if page.name == "README.md":
        add_examples(tmp_path)
    else:
        shutil.copytree(request.getfixturevalue("prepared"), tmp_path, dirs_exist_ok=True)
    for language, code in blocks(page):
        run(language, code, tmp_path)
