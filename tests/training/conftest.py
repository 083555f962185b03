"""A text of the tests' own and a model small enough to train in a test."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

MICRO = {
    "dim": 32,
    "n_layers": 3,
    "n_heads": 2,
    "head_dim": 32,
    "rope_dim": 16,
    "q_lora_rank": 32,
    "o_groups": 1,
    "o_lora_rank": 32,
    "window": 16,
    "n_experts": 4,
    "moe_dim": 32,
    "compress_ratios": [0, 4, 16, 0],
    "index_heads": 2,
    "index_dim": 16,
    "index_topk": 4,
    "original_context": 32,
    "max_context": 128,
}
WORDS = "In the beginning was Word and with God light shineth darkness comprehended it not all things were made by him".split()


def text_of(chapters: int, seed: int) -> str:
    """Chapters of numbered headings and lines of random words; short of meaning, but with words and lines that repeat."""
    rng = np.random.default_rng(seed)
    parts = []
    for chapter in range(1, chapters + 1):
        lines = [" ".join(rng.choice(WORDS, rng.integers(4, 12))) + "." for _ in range(12)]
        parts.append(f"Book {chapter}\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


@pytest.fixture(scope="session")
def micro() -> dict[str, object]:
    """Fields of the smallest Config that has every part."""
    return MICRO


@pytest.fixture(scope="session")
def text() -> str:
    """12 chapters of about 500 characters."""
    return text_of(12, 0)


@pytest.fixture(scope="session")
def text_file(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text as a file."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(text)
    return path


@pytest.fixture(scope="session")
def micro_options(text_file: Path) -> list[str]:
    """Command line of a run of the smallest model that has every part, one program to compile."""
    options = {
        "text": text_file,
        "held-out-chapters": 2,
        "validation-chapters": 2,
        "vocab-size": 300,
        "config-json": json.dumps(MICRO),
        "batch": 4,
        "context": 48,
        "segmentations": 2,
        "dense-share": 0,
        "long-share": 0,
        "warmup": 5,
        "learning-rate": 0.01,
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]
