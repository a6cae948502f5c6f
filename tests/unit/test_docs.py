"""The pages say what is true: commands use keys, presets and names that exist, and links lead somewhere.

Blocks marked `<!-- run -->` are also run, by tests/e2e/test_readme.py.
"""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from moltron.checkpoint.download import REPOSITORIES
from moltron.cli.main import COMMANDS
from moltron.config.compose import preset_names, schema_fields
from moltron.config.schema import TrainConfig

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
KEYS = {name: {key for key, _ in schema_fields(command.schema)} for name, command in COMMANDS.items()}
LATER = {"pretrain_prott5_small", "pretrain_megamolbart_xsmall_span_aug"}  # presets of issue 4, named as such
GROUPS = {"model", "optim", "objective"}  # `model=esm2_8M`: a group of the configuration


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(command, arguments) of each `moltron …` in code, whole lines only, continued ones joined."""
    found = []
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    blocks += re.findall(r"`(moltron [^`\n]+)`", text)
    blocks += re.findall(r"^    (.*moltron \w+ .*)$", text, re.MULTILINE)
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            match = re.search(r"(?:^|[\s→])(?:python )?(?:-m )?moltron (\w+)((?: .*)?)$", line)
            if match and match[1] in COMMANDS:
                found.append((match[1], shlex.split(match[2].replace("\\|", "|"), comments=True)))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_use_keys_and_presets_that_exist(page: Path):
    for command, arguments in commands(page.read_text()):
        presets = [b for a, b in pairwise(arguments) if a == "--config-name"]
        for preset in presets:
            assert preset in preset_names() or preset in LATER or preset.startswith("my_"), (page.name, preset)
        for argument in arguments:
            key, equals, _ = argument.partition("=")
            if equals and not key.startswith("-"):
                known = key in KEYS[command] or key in GROUPS or key.startswith("model.")
                assert known, f"{page.name}: moltron {command} has no key {key}"


def test_the_pages_hold_commands():
    assert sum(len(commands(page.read_text())) for page in PAGES) >= 25


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "add_a_model.md"], ids=lambda page: page.name)
def test_keys_in_the_text_exist(page: Path):
    """`train.seed` and its like: dotted names that begin with a section of the configuration."""
    sections = {key.split(".")[0] for key in KEYS["train"] if "." in key}
    text = page.read_text()
    if page.name == "coming_from_bionemo.md":  # its first column is v1's
        text = "\n".join("|".join(line.split("|")[2:]) for line in text.splitlines() if line.startswith("|"))
    fields = {key for key, _ in schema_fields(TrainConfig)}
    nodes = fields | {".".join(key.split(".")[:i]) for key in fields for i in range(1, 4)}
    for name in re.findall(r"`([a-z]\w*(?:\.\w+)+)[=`]", text):
        if name.split(".")[0] in sections - {"model"} and not re.search(
            r"\.(py|arrow|fasta|safetensors|sbatch)$", name
        ):
            assert name in nodes or name.removesuffix(".") in nodes, f"{page.name}: no key {name}"


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "examples/data/README.md"], ids=lambda page: page.parent.name + page.name
)
def test_links_lead_somewhere(page: Path):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?://", target):
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            assert file.exists(), f"{page.name}: {target}"
            if anchor:
                heads = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
                slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
                assert anchor in slugs, f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_run_marks_stand_before_code(page: Path):
    text = page.read_text()
    marks = len(re.findall(r"^<!-- run -->", text, re.MULTILINE))
    assert marks == len(re.findall(r"^<!-- run -->\n```(?:bash|python)\n", text, re.MULTILINE))


def test_the_model_page_states_the_counts_of_the_presets():
    """Parameter counts: the comment in configs/model/*.yaml, checked against the built model elsewhere."""
    page = (ROOT / "docs/models.md").read_text()
    for file in sorted((ROOT / "src/moltron/configs/model").glob("*.yaml")):
        count = re.match(r"# ([\d,]+) parameters", file.read_text())
        assert count and re.search(rf"`{file.stem}`.*\b{count[1]}\b", page), file.stem


def test_the_model_page_names_every_download():
    page = (ROOT / "docs/models.md").read_text()
    assert [name for name in REPOSITORIES if f"`{name}`" not in page] == []
