"""What MkDocs adds to the folder docs: root documents, the help of every command, and the files that pages link to.

Links in the documents are those of a checkout, so that they work there, too. A page shows a Python file or a folder; any other
file is copied.
"""

from __future__ import annotations

import json
import os
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
ROOT_DOCUMENTS = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "glossary.md": "GLOSSARY.md",
    "performance/ledger.md": "benchmarks/LEDGER.md",
}
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
HIDDEN = "---\nsearch:\n  exclude: true\n---\n\n"
AGES = "<!-- ages -->"


def _source_of(uri: str) -> str:
    """The file in the checkout that a page of the site is made of."""
    return ROOT_DOCUMENTS.get(uri, f"docs/{uri}")


def _linked(text: str, source: str) -> Iterator[tuple[str, str]]:
    """Links of a document to files of the checkout: as written, and from the root."""
    for found in LINK.finditer(text):
        if "://" not in found[2] and not found[2].startswith("mailto:"):
            yield found[2], os.path.normpath(os.path.join(os.path.dirname(source), found[2]))


def _place(target: str) -> str:
    """Where the site has a file of the checkout."""
    for uri, source in ROOT_DOCUMENTS.items():
        if source == target:
            return uri
    if target.startswith("docs/") and not target.endswith(".py"):
        return target.removeprefix("docs/")
    shown = target.endswith((".py", ".ipynb", ".md")) or (ROOT / target).is_dir()
    return f"source/{target}.md" if shown else f"source/{target}"


def _notebook(path: Path) -> str:
    """A notebook's cells and outputs as Markdown."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        text = "".join(cell["source"])
        parts.append(f"```python\n{text}\n```" if cell["cell_type"] == "code" else text)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f"![Output of the cell](data:image/png;base64,{data['image/png'].strip()})")
            elif printed := output.get("text") or data.get("text/plain"):
                parts.append(f"```text\n{''.join(printed).rstrip()}\n```")
    return "\n\n".join(parts)


def _shown(target: str) -> str:
    """A page that shows a file or a folder of the checkout."""
    path = ROOT / target
    if path.is_dir():
        names = sorted(f"* `{one.relative_to(ROOT)}`" for one in path.iterdir() if not one.name.startswith(("_", ".")))
        return f"{HIDDEN}# `{target}`\n\n" + "\n".join(names)
    if target.endswith(".ipynb"):
        return _notebook(path)
    if target.endswith(".md"):
        return HIDDEN + path.read_text()
    return f"{HIDDEN}# `{target}`\n\n````python\n{path.read_text()}````\n"


def _help() -> str:
    """The help of every command."""
    from ds4jax.cli.main import build_parser
    from ds4jax.cli.options import parsers

    os.environ["COLUMNS"] = "110"
    parts = [f"## {one.prog}\n\n```text\n{one.format_help()}```" for one in parsers(build_parser())]
    return "\n\n".join(["# Help of every command", "Made from the commands themselves when this site is built.", *parts])


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add root documents, the help, and all files that a document links to."""
    texts = {file.src_uri: file.content_string for file in files if file.src_uri.endswith(".md")}
    for uri, source in ROOT_DOCUMENTS.items():
        texts[uri] = (ROOT / source).read_text()
        files.append(File.generated(config, uri, content=texts[uri]))
    files.append(File.generated(config, "reference/cli.md", content=_help()))
    targets = {target for uri, text in texts.items() for _, target in _linked(text, _source_of(uri))}
    for target in sorted(targets):
        place = _place(target)
        if files.get_file_from_path(place) is not None or not (ROOT / target).exists():
            continue
        if place.endswith(".md"):
            files.append(File.generated(config, place, content=_shown(target)))
        else:
            files.append(File.generated(config, place, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links of the checkout into links of the site, and insert the ages of the results."""
    uri = page.file.src_uri
    if uri.startswith("source/"):
        return markdown
    if AGES in markdown:
        markdown = markdown.replace(AGES, runpy.run_path(str(ROOT / "benchmarks" / "figures.py"))["ages_table"]())
    places = {written: _place(target) for written, target in _linked(markdown, _source_of(uri))}

    def moved(found: re.Match[str]) -> str:
        place = places.get(found[2])
        if place is None or files.get_file_from_path(place) is None:
            return found[0]
        return f"{found[1]}{os.path.relpath(place, os.path.dirname(uri) or '.')}{found[3] or ''}{found[4]}"

    return LINK.sub(moved, markdown)
