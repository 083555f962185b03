"""Vocabulary, segmentations and windows."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from ds4jax.errors import InputError
from ds4jax.text.tokenizer import BYTE_OF
from ds4jax.training import data


@pytest.fixture(scope="module")
def vocabulary(text: str) -> data.Vocabulary:
    return data.train_vocabulary(text, 320)


@pytest.fixture(scope="module")
def segmenter(vocabulary: data.Vocabulary, text: str) -> data.Segmenter:
    return data.Segmenter(vocabulary, text)


def spelled(vocabulary: data.Vocabulary, ids: np.ndarray) -> str:
    return bytes(BYTE_OF[character] for i in ids for character in vocabulary.tokens[i]).decode()


def test_vocabulary_has_v4s_markers_at_both_ends_and_every_byte(vocabulary: data.Vocabulary, text: str) -> None:
    tokens = vocabulary.tokens
    assert len(tokens) == len(set(tokens)) == 320
    assert tokens[:3] == ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")
    assert tokens[-6:] == ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "｜DSML｜", "<｜latest_reminder｜>")
    assert set(BYTE_OF) <= set(tokens)
    assert len(vocabulary.merges) == 320 - 9 - 256
    assert data.train_vocabulary(text, 320) == vocabulary


def test_vocabulary_larger_than_the_text_allows_is_refused() -> None:
    with pytest.raises(InputError, match="--vocab-size"):
        data.train_vocabulary("a b\n\na c\n", 400)


def test_first_stream_is_what_encoding_gives_and_all_spell_the_text(
    vocabulary: data.Vocabulary, segmenter: data.Segmenter, text: str
) -> None:
    streams = segmenter.streams(3, 0.3, seed=1)
    rows = [np.asarray(row)[:size] for row, size in zip(streams.tokens, np.asarray(streams.sizes), strict=True)]
    np.testing.assert_array_equal(rows[0], data.encode(vocabulary.bpe(), text))
    assert [spelled(vocabulary, row) for row in rows] == [text] * 3
    assert len(rows[1]) > len(rows[0])
    assert not np.array_equal(rows[1], rows[2])


def test_lines_start_where_the_texts_lines_do(vocabulary: data.Vocabulary, segmenter: data.Segmenter, text: str) -> None:
    streams = segmenter.streams(2, 0.3, seed=1)
    lines = [line for line in text.split("\n") if line]
    for row, starts in zip(np.asarray(streams.tokens), np.asarray(streams.lines), strict=True):
        assert len(starts) == len(lines)
        row = row[row != data.PAD]
        for start, line in zip(starts[::7], lines[::7], strict=True):
            assert spelled(vocabulary, row[start : start + 60]).startswith(line)


def test_segmentations_follow_from_the_seed(segmenter: data.Segmenter) -> None:
    first, again, other = (np.asarray(segmenter.streams(2, 0.3, seed).tokens[1]) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert first.shape != other.shape or np.any(first != other)


def test_without_dropout_every_segmentation_is_the_first(segmenter: data.Segmenter) -> None:
    tokens = np.asarray(segmenter.streams(3, 0.0, seed=0).tokens)
    np.testing.assert_array_equal(tokens, np.broadcast_to(tokens[0], tokens.shape))


def windows_of(streams: data.Streams, step: int, batch: int = 64, **shares: float) -> np.ndarray:
    mixture = data.Mixture(**{"canonical": 0.5, "line_starts": 0.2, "bos": 0.5} | shares)
    key = jax.random.fold_in(jax.random.key(3), step)
    return np.asarray(data.sample_windows(key, streams, mixture, batch, 31))


def test_windows_follow_from_seed_and_step(segmenter: data.Segmenter) -> None:
    streams = segmenter.streams(3, 0.3, seed=1)
    np.testing.assert_array_equal(windows_of(streams, 7), windows_of(streams, 7))
    assert np.any(windows_of(streams, 7) != windows_of(streams, 8))


@pytest.mark.parametrize("canonical", [0.0, 1.0])
@pytest.mark.parametrize("line_starts", [0.0, 1.0])
@pytest.mark.parametrize("bos", [0.0, 1.0])
def test_every_window_is_a_piece_of_a_stream(
    vocabulary: data.Vocabulary, segmenter: data.Segmenter, text: str, canonical: float, line_starts: float, bos: float
) -> None:
    streams = segmenter.streams(3, 0.3, seed=1)
    rows = [np.asarray(row)[:size].astype("<i4").tobytes() for row, size in zip(streams.tokens, streams.sizes, strict=True)]
    allowed = rows[:1] if canonical else rows[1:]
    begins_with_bos = bool(line_starts or bos)
    for window in windows_of(streams, 0, canonical=canonical, line_starts=line_starts, bos=bos):
        assert (window[0] == data.BOS) == begins_with_bos
        piece = window[int(begins_with_bos) :].astype("<i4").tobytes()
        places = [row.find(piece) for row in allowed]
        assert any(place >= 0 and place % 4 == 0 for place in places)
        if line_starts:
            assert any(spelled(vocabulary, window[1:]).startswith(line[:20]) for line in text.split("\n"))


def test_windows_reach_both_ends_of_a_stream(segmenter: data.Segmenter) -> None:
    streams = segmenter.streams(1, 0.0, seed=0)
    short = data.Streams(streams.tokens[:, :36], streams.sizes * 0 + 36, streams.lines[:, :1])
    windows = windows_of(short, 0, batch=256, line_starts=0.0, bos=0.0)
    starts = {window.tobytes() for window in windows}
    expected = {np.asarray(streams.tokens[0, i : i + 32]).tobytes() for i in range(5)}
    assert starts == expected


@pytest.mark.parametrize("size", [8, 33, 10_000])
def test_evaluation_scores_every_token_once(vocabulary: data.Vocabulary, text: str, size: int) -> None:
    ids = data.encode(vocabulary.bpe(), text[:400])
    cut = data.evaluation_windows(vocabulary.bpe(), text[:400], size)
    targets = cut.windows[:, 1:][cut.scored > 0]
    np.testing.assert_array_equal(targets, ids)
    assert cut.windows[0, 0] == data.BOS
    assert cut.n_bytes == 400


def test_corpus_is_cut_by_chapters(text_file: Path, text: str) -> None:
    corpus = data.read_corpus(text_file, 2, 3)
    assert corpus.held_out.startswith("Book 11\n")
    assert corpus.validation.startswith("Book 8\n")
    assert "Book 7\n" in corpus.train
    assert "Book 8\n" not in corpus.train
    assert len(corpus.train + corpus.validation + corpus.held_out) == len(text) - 1


def test_corpus_says_what_is_wrong(text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="12 chapters"):
        data.read_corpus(text_file, 12, 0)
    with pytest.raises(InputError, match="No such file"):
        data.read_corpus(tmp_path / "none.txt", 1, 1)
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9\n\nb\n")
    with pytest.raises(InputError, match="not UTF-8 at byte 3"):
        data.read_corpus(tmp_path / "latin1.txt", 1, 0)
