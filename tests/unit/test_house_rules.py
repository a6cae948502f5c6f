"""The linters bite: every contract of the house is broken once, on a copy, and must be reported."""

import ast
import io
import os
import shutil
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
ROOMS = [
    "cli",
    "train",
    "infer",
    "data",
    "checkpoint",
    "objectives",
    "parallel",
    "models",
    "layers",
    "tokenizers",
    "config",
    "common",
]


def lint_imports(folder: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(folder / "src")}
    command = [BIN / "lint-imports", "--config", folder / "pyproject.toml", "--no-cache"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy of the rooms, empty but for their package files, so that only the planted line can break a contract."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for room in ROOMS:
        package = tmp_path / "src/moltron" / room
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
    (tmp_path / "src/moltron/__init__.py").touch()
    return tmp_path


def test_a_house_in_order_is_clean(house: Path):
    result = lint_imports(house)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "3 kept, 0 broken" in result.stdout


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("data", "import moltron.train"),
        ("common", "import moltron.models"),
        ("models", "from moltron import parallel"),
        ("data", "import moltron.checkpoint"),
        ("objectives", "import moltron.parallel"),
        ("layers", "from moltron import tokenizers"),
        ("train", "import hydra"),
        ("cli", "from omegaconf import OmegaConf"),
        ("models", "import transformers"),
        ("checkpoint", "from esm import pretrained"),
        ("attic", "import moltron.common"),  # a room without a floor
    ],
)
def test_a_broken_contract_is_reported(house: Path, room: str, line: str):
    package = house / "src/moltron" / room
    package.mkdir(exist_ok=True)
    (package / "__init__.py").write_text(line + "\n")
    result = lint_imports(house)
    assert result.returncode == 1 and "1 broken" in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("file", "allowed"),
    [("src/moltron/train/loop.py", False), ("src/moltron/models/x.py", False), ("src/moltron/parallel/mesh.py", True)],
)
def test_collectives_are_banned_outside_their_rooms(file: str, allowed: bool):
    code = "import torch.distributed as dist\n\ndist.barrier()\n"
    command = [BIN / "ruff", "check", "--no-cache", "--stdin-filename", ROOT / file, "-"]
    result = subprocess.run(command, cwd=ROOT, input=code, capture_output=True, text=True)
    assert ("TID251" not in result.stdout) == allowed, result.stdout + result.stderr


def test_every_room_has_a_floor_and_is_kept_from_hydra():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    floors, hydra, _ = config["contracts"]
    rooms = {path.parent.name for path in (ROOT / "src/moltron").glob("*/__init__.py")}
    placed = {room.strip() for layer in floors["layers"] for room in layer.split("|")}
    assert rooms == placed
    assert {source.removeprefix("moltron.") for source in hydra["source_modules"]} == rooms - {"config"}


def test_no_pickle_is_ever_loaded():
    """The one kind of bug that a linter for style does not know: code hidden in weights."""
    for path in sorted((ROOT / "src").rglob("*.py")):
        text = path.read_text()
        assert "pickle.load" not in text, f"{path}: pickle.load"
        for call in text.split("torch.load(")[1:]:
            assert "weights_only=True" in call.split("\n\n")[0], f"{path}: torch.load without weights_only=True"


SOURCES = {path: path.read_text() for path in sorted((ROOT / "src").rglob("*.py"))}


def test_files_and_functions_are_short():
    files = [f"{path}: {n} lines" for path, text in SOURCES.items() if (n := text.count("\n")) > 500]
    functions = [
        f"{path}:{node.lineno} {node.name}"
        for path, text in SOURCES.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (node.end_lineno or 0) - node.lineno >= 80
    ]
    assert files + functions == []


def code_lines(text: str) -> int:
    """Lines that hold code: no blank ones, comments and docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            docstrings.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.string.strip() and token.type != tokenize.COMMENT:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def test_the_core_is_not_too_large():
    """The core: what a model and its numbers pass through. Around it: commands, their keys, the making of stores."""
    assert code_lines('"""Docs."""\n\n# why\nx = """a\nb"""\n\n\ndef f():\n    """Docs."""\n    return x  # so\n') == 4
    around = ("cli/", "config/", "data/prepare/")
    core = {path: text for path, text in SOURCES.items() if not any(f"moltron/{room}" in str(path) for room in around)}
    assert sum(map(code_lines, core.values())) <= 8200  # about 8,000
