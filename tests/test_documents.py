"""What the documents say: links lead somewhere, and the README's example prints what stands below it."""

from __future__ import annotations

import dataclasses
import re
import string
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import ds4jax
from ds4jax.cli import main as cli
from ds4jax.config import Config
from ds4jax.evaluation.trace import LAYER, MODEL

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = ("README.md", "GLOSSARY.md", "CONTRIBUTING.md", "CHANGELOG.md")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links(name: str) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text())
    local = [link for link in links if not link.startswith("http")]
    assert [link for link in local if not (ROOT / link).exists()] == []


@pytest.mark.long
def test_first_example_prints_what_the_readme_says(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
    first = next(i for i, (kind, _) in enumerate(blocks) if kind == "python")
    assert blocks[first + 1][0] == "text"
    exec(blocks[first][1], {})
    printed = capsys.readouterr().out
    assert [line.rstrip() for line in printed.splitlines()] == [line.rstrip() for line in blocks[first + 1][1].splitlines()]


def first_command() -> tuple[str, str]:
    """The prompt of the README's first command, and the text below it."""
    found = re.search(r'```console\n\$ pip install -e \. && ds4jax generate "([^"]*)"\n(.*?)```', README, re.DOTALL)
    assert found
    return found[1], found[2]


def test_the_first_command_prints_what_the_readme_says(capsys: pytest.CaptureFixture[str]) -> None:
    prompt, text = first_command()
    assert cli.main(["generate", prompt]) == 0
    assert capsys.readouterr().out.rstrip() == text.rstrip()


@pytest.mark.slow
def test_no_token_of_the_examples_nearly_ties() -> None:
    """Another CPU rounds in other ways, by hundredths: with a gap below the likeliest token it prints the same text."""
    model = ds4jax.load()
    from_python = re.search(r'generate\("([^"]*)", max_new_tokens=(\d+)\)', README)
    assert from_python
    for prompt, tokens in (first_command()[0], 128), (from_python[1], int(from_python[2])):
        result = model.generate(prompt, max_new_tokens=tokens)
        known = len(result.prompt_ids)
        logits_TV = model.logits(result.prompt_ids + result.ids, strict=True)["logits"][known - 1 : -1]
        own_T = np.take_along_axis(logits_TV, np.array(result.ids)[:, None], axis=1)[:, 0]
        np.put_along_axis(logits_TV, np.array(result.ids)[:, None], -np.inf, axis=1)
        assert len(result.ids) == tokens
        assert (own_T - logits_TV.max(axis=1)).min() > 0.06


def test_glossary_has_every_axis_letter() -> None:
    """All letters of a trace's axes, and V4-Flash's sizes as `Config` has them."""
    rows = re.findall(r"^\| ([A-Z]) \|[^|]*\|([^|]*)\|", (ROOT / "GLOSSARY.md").read_text(), re.MULTILINE)
    letters = dict(rows)
    used = {letter for axes, _ in (MODEL | LAYER).values() for letter in axes if letter in string.ascii_uppercase}
    assert used <= set(letters)
    fields = {"D": "dim", "N": "hc_mult", "H": "n_heads", "Q": "head_dim", "R": "rope_dim", "E": "n_experts", "K": "n_active"}
    fields |= {"F": "moe_dim", "V": "vocab_size", "L": "n_layers"}
    expected = dataclasses.asdict(Config())
    assert {letter: letters[letter].strip() for letter in fields} == {k: str(expected[v]) for k, v in fields.items()}


def test_picture_is_well_formed() -> None:
    picture = ElementTree.parse(ROOT / "docs" / "dataflow.svg").getroot()
    assert picture.get("viewBox")
    assert [node.tag for node in picture.iter() if node.tag.endswith(("script", "image"))] == []
