"""What the documents say: links lead somewhere, and the README's example prints what stands below it."""

from __future__ import annotations

import dataclasses
import re
import string
from pathlib import Path
from xml.etree import ElementTree

import pytest

from ds4jax.config import Config
from ds4jax.trace import LAYER, WHOLE

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "GLOSSARY.md", "CONTRIBUTING.md", "CHANGELOG.md")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links(name: str) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text())
    local = [link for link in links if not link.startswith("http")]
    assert [link for link in local if not (ROOT / link).exists()] == []


@pytest.mark.long
def test_first_example_prints_what_the_readme_says(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    first = next(i for i, (kind, _) in enumerate(blocks) if kind == "python")
    assert blocks[first + 1][0] == "text"
    exec(blocks[first][1], {})
    printed = capsys.readouterr().out
    assert [line.rstrip() for line in printed.splitlines()] == [line.rstrip() for line in blocks[first + 1][1].splitlines()]


def test_readme_keeps_its_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert '$ pip install -e . && ds4jax generate "In the beginning"\n' in text
    assert '$ pip install -e ".[test]" && pytest ' in text


def test_glossary_has_every_axis_letter() -> None:
    """All letters of a trace's axes, and V4-Flash's sizes as `Config` has them."""
    rows = re.findall(r"^\| ([A-Z]) \|[^|]*\|([^|]*)\|", (ROOT / "GLOSSARY.md").read_text(), re.MULTILINE)
    letters = dict(rows)
    used = {letter for axes, _ in (WHOLE | LAYER).values() for letter in axes if letter in string.ascii_uppercase}
    assert used <= set(letters)
    fields = {"D": "dim", "N": "hc_mult", "H": "n_heads", "Q": "head_dim", "R": "rope_dim", "E": "n_experts", "K": "n_active"}
    fields |= {"F": "moe_dim", "V": "vocab_size", "L": "n_layers"}
    expected = dataclasses.asdict(Config())
    assert {letter: letters[letter].strip() for letter in fields} == {k: str(expected[v]) for k, v in fields.items()}


def test_picture_is_well_formed() -> None:
    picture = ElementTree.parse(ROOT / "docs" / "dataflow.svg").getroot()
    assert picture.get("viewBox")
    assert [node.tag for node in picture.iter() if node.tag.endswith(("script", "image"))] == []
