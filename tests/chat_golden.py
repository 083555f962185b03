"""The golden conversations and replies of V4's chat format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gguf_files import vocabulary

from ds4jax.text.tokenizer import Tokenizer, build_bpe

FOLDER = Path(__file__).parent / "golden" / "chat"
RENDER = json.loads((FOLDER / "render.json").read_text("utf-8"))
PARSE = json.loads((FOLDER / "parse.json").read_text("utf-8"))
OFFICIAL = json.loads((FOLDER / "official" / "ids.json").read_text("utf-8"))


def official(number: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None, str]:
    """Messages, tools and text of one of DeepSeek's own conversations."""
    given = json.loads((FOLDER / "official" / f"test_input_{number}.json").read_text("utf-8"))
    text = (FOLDER / "official" / f"test_output_{number}.txt").read_bytes().decode()
    return (given, None, text) if isinstance(given, list) else (given["messages"], given.get("tools"), text)


def small_tokenizer(folder: Path) -> Tokenizer:
    """The golden vocabulary of 640 tokens, through a file in a folder."""
    words = vocabulary()
    specials = [token for token, kind in zip(words["tokens"], words["token_types"], strict=True) if kind != 1]
    build_bpe(words["tokens"], words["merges"], specials).save(str(folder / "tokenizer.json"))
    return Tokenizer.from_file(folder / "tokenizer.json")


def options(case: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the parser for a golden reply."""
    return {
        "think": case["thinking"],
        "tools": PARSE["tools"].get(case["tools"]),
        "tool_choice": case.get("tool_choice"),
        "stop": case.get("stop", ()),
    }
