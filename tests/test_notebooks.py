"""Notebooks come in pairs: the .py file is the source, the .ipynb file is generated from it and carries the outputs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
SOURCES = sorted(FOLDER.glob("*.py"))
MOST_BYTES = 500_000

Cells = list[tuple[str, str]]


def percent_cells(text: str) -> Cells:
    """Kind and source of the cells of a percent script, without its header."""
    header = re.match(r"# ---\n(#.*\n)*?# ---\n", text)
    assert header, "no jupytext header"
    cells: Cells = []
    for part in re.split(r"^# %%", text[header.end() :], flags=re.MULTILINE)[1:]:
        first, _, body = part.partition("\n")
        if "[markdown]" in first:
            lines = [re.sub(r"^# ?", "", line) for line in body.strip("\n").splitlines()]
            cells.append(("markdown", "\n".join(lines)))
        else:
            cells.append(("code", body.strip("\n")))
    return cells


def notebook_cells(notebook: dict) -> Cells:
    return [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]


def generated(source: Path) -> dict:
    """The notebook beside a source."""
    notebook: dict = json.loads(source.with_suffix(".ipynb").read_text())
    return notebook


def test_there_are_pairs() -> None:
    assert len(SOURCES) >= 8
    assert {path.stem for path in SOURCES} == {path.stem for path in FOLDER.glob("*.ipynb")}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_both_have_the_same_cells(source: Path) -> None:
    """Otherwise generate it again: CONTRIBUTING.md, "Notebooks"."""
    assert notebook_cells(generated(source)) == percent_cells(source.read_text())


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_outputs(source: Path) -> None:
    """Every cell has been run in order and none failed; there are pictures, and the file is small."""
    notebook = generated(source)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"] == []
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert source.with_suffix(".ipynb").stat().st_size < MOST_BYTES


def test_the_parser_sees_a_change() -> None:
    text = "# ---\n# jupyter:\n# ---\n\n# %% [markdown]\n# # Title\n#\n# Text.\n\n# %%\nx = 1\n\n# a comment\ny = 2\n\n# %%\nx\n"
    assert percent_cells(text) == [("markdown", "# Title\n\nText."), ("code", "x = 1\n\n# a comment\ny = 2"), ("code", "x")]
