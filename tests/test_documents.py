"""What the documents say: links lead somewhere, code blocks run, and what stands below them is what they print."""

from __future__ import annotations

import collections
import dataclasses
import re
import shlex
import string
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from document_blocks import ADDRESS, ELSEWHERE, EXTRAS, PAGES, PIP, SERVER, agree, blocks, commands, differences, installed
from serving_process import Process, process

import ds4jax
from ds4jax.bounds import SHIPPED
from ds4jax.cli import main as cli
from ds4jax.config import Config
from ds4jax.evaluation.trace import LAYER, MODEL

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = (*PAGES, "GLOSSARY.md", "CHANGELOG.md", "benchmarks/LEDGER.md")
KINDS = {"python", "console", "bibtex"}
MOST_README_LINES = 200
MOST_PICTURE_BYTES = 150_000
# As `ds4jax serve` of the README and the tutorial.
SERVE = ("--slots", "2", "--context", "2048")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links(name: str) -> None:
    path = ROOT / name
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text())
    local = [link for link in links if not link.startswith(("http", "mailto:"))]
    assert [link for link in local if not (path.parent / link).exists() and link != "cli.md"] == []


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= MOST_README_LINES
    assert (ROOT / "docs" / "chat.png").stat().st_size < MOST_PICTURE_BYTES


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_of_a_known_kind(page: str) -> None:
    found = blocks(page)
    assert {block.kind for block in found} <= KINDS
    assert {block.needs for block in found} <= {"", SERVER, *ELSEWHERE}
    assert len(re.findall(r"^```", (ROOT / page).read_text(), re.MULTILINE)) == 2 * (
        len(found) + sum(block.wanted is not None for block in found)
    )


def test_most_blocks_run(record_property: pytest.RecordProperty) -> None:
    """Counts the blocks that CI runs, and the others by what they need."""
    counted = collections.Counter(
        block.needs or "nothing else" for page in PAGES for block in blocks(page) if block.kind in ("python", "console")
    )
    ran = counted["nothing else"] + counted[SERVER]
    others = ", ".join(f"{count} need {needs}" for needs, count in counted.most_common() if needs in ELSEWHERE)
    record_property("summary", f"code blocks of README and docs: {ran} run in CI; not there: {others}")
    assert ran > 1.5 * (counted.total() - ran)


def test_blocks_that_install_and_run_pytest_install_its_plugins() -> None:
    """The project's options of pytest need pytest-xdist, so a block that installs something has to name an extra with it."""
    with_it = {name for name, needed in EXTRAS.items() if any(one.startswith(("pytest-xdist", "ds4jax[test]")) for one in needed)}
    checked = 0
    for block in (block for page in PAGES for block in blocks(page) if block.kind == "console"):
        found = [PIP.match(command) for command, _ in commands(block)]
        extras = {extra for one in found if one for group in one.groups() if group for extra in group.split(",")}
        if any(found) and re.search(r"^\$ pytest\b", block.text, re.MULTILINE):
            assert extras & with_it, block.text
            checked += 1
    assert checked


def test_options_of_commands_that_do_not_run_exist() -> None:
    """Commands of blocks that CI cannot run are parsed, so that no document names an option that is gone."""
    refused = []
    for page in PAGES:
        for block in blocks(page):
            for command, _ in commands(block) if block.kind == "console" and block.needs else ():
                rest = re.sub(r"\s{2,}# .*$", "", installed(command)).removesuffix(" &").split("; ")[0]
                rest = re.sub(r"^(\w+=\S* )+", "", rest)
                rest = re.sub(r"(?<! --export )(?<=\s)\S+\.gguf", str(SHIPPED), rest)
                rest = re.sub(r"(?<=\s)\S+\.txt", str(ROOT / "LICENSE"), rest)
                if rest.startswith("ds4jax ") and "--version" not in rest:
                    try:
                        cli.build_parser().parse_args(shlex.split(rest)[1:])
                    except SystemExit:
                        refused.append(f"{page}: {command}")
    assert refused == []


RUNNING = [page for page in PAGES if any(not block.needs and block.kind in ("python", "console") for block in blocks(page))]
SERVED = [page for page in PAGES if any(block.needs == SERVER for block in blocks(page))]


@pytest.mark.long
@pytest.mark.parametrize("page", RUNNING)
def test_blocks_run_and_print_what_the_page_says(page: str, tmp_path: Path) -> None:
    assert differences(page, tmp_path) == []


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    for extra in ("starlette", "llguidance", "openai", "anthropic"):
        pytest.importorskip(extra, reason="needs the extra test")
    with process(tmp_path_factory.mktemp("server"), *SERVE) as one:
        yield one


@pytest.mark.long
@pytest.mark.parametrize("page", SERVED)
def test_blocks_run_against_a_server(page: str, tmp_path: Path, server: Process) -> None:
    assert differences(page, tmp_path, server=server.url) == []
    ready = next(line for line in server.log.read_text().splitlines() if "is ready" in line).replace(server.url, ADDRESS)
    shown = [
        (command, output)
        for block in blocks(page)
        if block.needs == SERVER and block.kind == "console"
        for command, output in commands(block)
        if installed(command).startswith("ds4jax serve")
    ]
    assert [shlex.split(installed(command))[2:] for command, _ in shown] == [list(SERVE)] * len(shown)
    assert [output for _, output in shown if not agree(output or "", ready, vary=False)] == []


def test_a_block_that_prints_something_else_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the kinds Python and console, with a command of this package and with one of the shell."""
    page = tmp_path / "page.md"
    wrong = ("```python\nprint(1)\n```\n\n```text\n2\n```\n", "```console\n$ echo 1 | cat\n2\n```\n")
    right = (
        "```python\nx = 3\nprint(x, 12)\n```\n\n```text\n3 ...\n```\n",
        "```console\n# numbers vary\n$ echo 5 6 | cat\n7 8\n```\n",
    )
    page.write_text("\n".join(wrong + right))
    monkeypatch.setattr("document_blocks.ROOT", tmp_path)
    assert len(blocks("page.md")) == 4
    assert len(differences("page.md", tmp_path)) == 2


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
