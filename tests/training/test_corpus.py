"""Chapters, and the texts that ship."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4jax.training.corpus import split_chapters

TEXT = "One 1\na\nb\n\nTwo 1\nc\n\n\nThree 1\nd\n"


@pytest.mark.parametrize(
    ("held_out", "heldout"), [(1, "Three 1\nd\n"), (2, "Two 1\nc\n\n\nThree 1\nd\n")], ids=["last", "last two"]
)
@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_splits_at_blank_lines(held_out, heldout, end):
    train, kept = split_chapters(TEXT + end, held_out)
    assert kept == heldout + end
    assert train + kept == TEXT + end


@given(
    chapters=st.lists(st.text("ab\n", min_size=1).map(lambda text: "#" + text.replace("\n\n", "")), min_size=2, max_size=6),
    data=st.data(),
)
def test_keeps_the_number_asked_for(chapters, data):
    held_out = data.draw(st.integers(1, len(chapters) - 1))
    chapters = [chapter.strip("\n") for chapter in chapters]
    train, kept = split_chapters("\n\n".join(chapters), held_out)
    assert train == "\n\n".join(chapters[:-held_out]) + "\n\n"
    assert kept == "\n\n".join(chapters[-held_out:])


@pytest.mark.parametrize(("held_out", "message"), [(3, "has 3 chapters"), (0, "at least one"), (-1, "at least one")])
def test_refuses(held_out, message):
    with pytest.raises(ValueError, match=message):
        split_chapters(TEXT, held_out)


def test_shipped_texts(root):
    extract = (root / "ds4jax/assets/train_extract.txt").read_bytes()
    heldout = (root / "ds4jax/assets/heldout.txt").read_bytes()
    assert extract.startswith(b"Genesis 1\nIn the beginning God created")
    assert len(extract) <= 200_000
    assert extract.count(b"\n\n") + 1 == 51
    assert heldout.startswith(b"Revelation 3\n")
    assert heldout.count(b"\n\n") + 1 == 20
    assert heldout.endswith(b"Amen.\n")


def test_shipped_texts_are_the_corpus(root):
    corpus = root.parent / "shared/corpus/kjv.txt"
    if not corpus.exists():
        pytest.skip(f"the whole corpus is not beside the checkout ({corpus.name})")
    text = corpus.read_bytes().decode("ascii")
    train, heldout = split_chapters(text)
    assert heldout == (root / "ds4jax/assets/heldout.txt").read_bytes().decode("ascii")
    extract = (root / "ds4jax/assets/train_extract.txt").read_bytes().decode("ascii")
    assert train.startswith(extract + "\n")
    # The next chapter would not have fitted.
    assert len(extract) + len(train[len(extract) + 1 :].split("\n\n")[0]) + 2 > 200_000
