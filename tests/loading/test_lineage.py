"""What two files say about their origin."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds4jax.loading.gguf_header import Header, Value
from ds4jax.loading.lineage import other_lineage


def header(name: str, *keys: tuple[str, str]) -> Header:
    """A file that says this of itself."""
    return Header(Path(name), {key: Value("str", text) for key, text in keys}, {}, ())


NAME, BASE, VERSION = "general.name", "general.basename", "general.version"
SAME = [
    ((), ()),
    (((NAME, "DeepSeek V4 Flash"),), ((NAME, "DeepSeek-V4-Flash MTP support"),)),
    (((NAME, "tiny"), (BASE, "Synthetic")), ((NAME, "tiny MTP support"),)),
    (((BASE, "DeepSeek-V4-Flash"),), ((BASE, "Deepseek V4 Flash"),)),
    (((NAME, "Flash 0731"), (VERSION, "0731")), ((NAME, "Flash-0731 MTP"),)),
    (((NAME, "Flash"), ("general.quantized_by", "one")), ((NAME, "Flash"), ("general.quantized_by", "another"))),
    (((NAME, "Flash"), ("general.size_label", "256x22B")), ((NAME, "Flash"),)),
]


@pytest.mark.parametrize(("ours", "theirs"), SAME)
def test_nothing_differs(ours: tuple[tuple[str, str], ...], theirs: tuple[tuple[str, str], ...]) -> None:
    assert other_lineage(header("model.gguf", *ours), header("mtp.gguf", *theirs)) == ""


OTHER = [
    (((NAME, "Flash 0731"),), ((NAME, "Flash MTP"),), "general.name: its weights are of the first release, and of 0731 in"),
    (((NAME, "Flash"),), ((NAME, "Flash 0731"),), "general.name: its weights are of 0731, and of the first release in"),
    (((NAME, "Flash"), (VERSION, "0813")), ((NAME, "Flash 0731"),), "general.name: its weights are of 0731, and of 0813 in"),
    (((NAME, "Flash Vision Exp"),), ((NAME, "Flash"),), "its weights are of the first release, and of vision in"),
    (((BASE, "Flash"),), ((BASE, "Pro"),), "general.basename: is 'Pro', and 'Flash' in"),
    (((NAME, "tiny"),), ((NAME, "Large MTP"),), "general.name: is 'Large MTP', and 'tiny' in"),
    (
        (("general.base_model.0.name", "Flash"),),
        (("general.base_model.0.name", "Flash Base 2"),),
        "general.base_model.0.name: is 'Flash Base 2', and 'Flash' in",
    ),
    (
        (("general.source.revision", "6976c7ff"),),
        (("general.source.revision", "e31ba3ff"),),
        "general.source.revision: is 'e31ba3ff', and '6976c7ff' in",
    ),
]


@pytest.mark.parametrize(("ours", "theirs", "message"), OTHER)
def test_something_differs(ours: tuple[tuple[str, str], ...], theirs: tuple[tuple[str, str], ...], message: str) -> None:
    found = other_lineage(header("model.gguf", *ours), header("mtp.gguf", *theirs))
    assert found.endswith(" in model.gguf")
    assert message in found


def test_another_vocabulary() -> None:
    ours, theirs = header("model.gguf"), header("mtp.gguf")
    for one, tokens in ((ours, ["a", "b", "c"]), (theirs, ["a", "d", "c"])):
        one.metadata["tokenizer.ggml.tokens"] = Value("str[]", tokens)
    assert other_lineage(ours, theirs) == "tokenizer.ggml.tokens: token 1 is 'd', and 'b' in model.gguf"
    assert other_lineage(ours, ours) == other_lineage(ours, header("mtp.gguf")) == ""


def test_files_without_a_name_are_told_by_their_file_names() -> None:
    """ds4's files of two releases may have the same metadata."""
    model = header("DeepSeek-V4-Flash-IQ2XXS-w2Q2K-chat-v2-imatrix-0731.gguf", (NAME, "DeepSeek V4 Flash"))
    april = header("DeepSeek-V4-Flash-MTP-Q4K-Q8_0-F32.gguf", (NAME, "DeepSeek V4 Flash MTP support"))
    assert "its weights are of the first release, and of 0731 in" in other_lineage(model, april)
    assert other_lineage(model, header("DeepSeek-V4-Flash-0731-MTP.gguf")) == ""
    assert other_lineage(header("model.gguf"), header("mtp.gguf")) == ""
    assert other_lineage(header("flash-q2.gguf"), header("mtp-DeepSeek-V4-Flash-0731.gguf")) == ""
