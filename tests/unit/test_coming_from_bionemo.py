"""docs/coming_from_bionemo.md leaves nothing of v1 out: each row of the specification's tables has a row there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = ROOT.parent / "shared/spec/commands.md"
STATES = re.compile(r"(here|issues? [\d, ]+\d|issue \d|planned, not filed|not offered)(, in part)?")


def rows(text: str) -> list[list[str]]:
    """The cells of all table rows below a header, without backticks; `\\|` in a cell is part of it."""
    found, in_table = [], False
    for line in text.splitlines():
        if not line.startswith("|"):
            in_table = False
        elif set(line) <= set("|-: "):
            in_table = True
        elif in_table:
            found.append([cell.strip().replace("`", "") for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return found


@pytest.fixture(scope="module")
def ours() -> list[list[str]]:
    return rows((ROOT / "docs/coming_from_bionemo.md").read_text())


def test_it_has_at_least_the_rows_it_had(ours):
    assert len({row[0] for row in ours if row[0]}) >= 100
    names = [row[0].split(" — ")[0] for row in ours]
    assert [name for name in names if re.fullmatch(r"R\d+", name)] == [f"R{i}" for i in range(1, 14)]
    assert [name for name in names if name.isdigit()] == [str(i) for i in range(1, 27)]


def test_every_row_says_when(ours):
    for row in ours:
        if len(row) == 3:
            assert all(STATES.fullmatch(part) for part in row[2].split("; ")), row
            assert row[1] or row[2] == "planned, not filed", row


@pytest.mark.skipif(not SPEC.exists(), reason="needs ../shared/spec/commands.md")
def test_every_row_of_the_specification_is_named(ours):
    names = {row[0].split(" — ")[0] for row in ours}
    wanted = [row[0].replace("**", "").replace("`", "") for row in rows(SPEC.read_text())]
    assert len(wanted) >= 66
    assert [name for name in wanted if name not in names] == []
