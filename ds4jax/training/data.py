"""Turns a text into windows of tokens: chapters, vocabulary, varied segmentations, and the windows of each step."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from tokenizers import trainers

from ds4jax.errors import InputError
from ds4jax.evaluation import evaluate
from ds4jax.files import read_regular
from ds4jax.text.tokenizer import BOS as BOS_TOKEN
from ds4jax.text.tokenizer import BYTE_OF, build_bpe
from ds4jax.text.tokenizer import EOS as EOS_TOKEN
from ds4jax.training.corpus import split_chapters

FIRST_SPECIALS = (BOS_TOKEN, EOS_TOKEN, "<｜▁pad▁｜>")
LAST_SPECIALS = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "｜DSML｜", "<｜latest_reminder｜>")
BOS, EOS, PAD = range(3)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A text in three parts: for training, for the validation curve, and for the final evaluation."""

    train: str
    validation: str
    held_out: str
    sha256: str


def read_corpus(path: Path, held_out: int, validation: int) -> Corpus:
    """Read and split a UTF-8 text whose chapters are separated by blank lines.

    The last `held_out` chapters are held out; the `validation` chapters before them validate.

    Raises:
        InputError: the file cannot be read, is not UTF-8, or has too few chapters.
    """
    try:
        data = read_regular(path)
        text = data.decode()
        train, held_out_text = split_chapters(text, held_out)
        train, validation_text = split_chapters(train.rstrip("\n") + "\n", validation) if validation else (train, "")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; give the text to learn with --text") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}") from None
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    return Corpus(train, validation_text, held_out_text, hashlib.sha256(data).hexdigest())


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE vocabulary: tokens by id, merges by rank ("a b"), special tokens at both ends."""

    tokens: tuple[str, ...]
    merges: tuple[str, ...]

    @property
    def specials(self) -> tuple[str, ...]:
        """The special tokens, with the same strings as in V4."""
        return (*FIRST_SPECIALS, *LAST_SPECIALS)

    def bpe(self) -> tokenizers.Tokenizer:
        """The BPE encoder with V4's pre-tokenizer. It encodes special tokens in the text as ordinary text."""
        return build_bpe(self.tokens, self.merges, ())


def train_vocabulary(text: str, vocab_size: int) -> Vocabulary:
    """Learn a byte-level BPE vocabulary from a text.

    It includes all 256 bytes. Ids 0, 1, 2 are bos, eos, pad; the other special tokens come last.

    Raises:
        InputError: the text has too few distinct pieces for this vocabulary size.
    """
    learner = build_bpe(list(BYTE_OF), [], [])
    ordinary = vocab_size - len(FIRST_SPECIALS) - len(LAST_SPECIALS)
    trainer = trainers.BpeTrainer(vocab_size=ordinary, show_progress=False, special_tokens=[], initial_alphabet=list(BYTE_OF))
    learner.train_from_iterator(text.split("\n\n"), trainer)
    ids = learner.get_vocab()
    tokens = sorted(ids, key=ids.__getitem__)
    if len(tokens) != ordinary:
        raise InputError(f"--vocab-size: the text yields {len(tokens)} tokens and 9 special ones; {vocab_size} is too many")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    return Vocabulary((*FIRST_SPECIALS, *tokens, *LAST_SPECIALS), tuple(merges))


def encode(bpe: tokenizers.Tokenizer, text: str) -> np.ndarray:
    """Token ids int32 [T] of a text; special tokens count as ordinary text."""
    return np.asarray(bpe.encode(text, add_special_tokens=False).ids, np.int32)


class Segmenter:
    """Segments one text into tokens in several random ways: BPE-dropout with a seed.

    Words repeat often, so a few segmentations are drawn for each word, and each occurrence picks one.
    Source: Provilkov et al., "BPE-Dropout" (arXiv 1910.13267), algorithm 1.
    """

    def __init__(self, vocabulary: Vocabulary, text: str):
        bpe = vocabulary.bpe()
        pieces = bpe.pre_tokenizer.pre_tokenize_str(text)
        words: dict[str, int] = {}
        self._word = np.array([words.setdefault(word, len(words)) for word, _ in pieces], np.int64)
        self._words = list(words)
        # A line starts at the start of the text and after each line end. Blank lines belong to the line end before them.
        starts = np.array([begin for _, (begin, _) in pieces], np.int64)
        self._line_starts = np.flatnonzero([begin == 0 or text[begin - 1] == "\n" for begin in starts])
        self._ids = {token: i for i, token in enumerate(vocabulary.tokens)}
        self._ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(vocabulary.merges)}

    def segment(self, word: str, dropout: float, random: Callable[[], float]) -> list[int]:
        """Token ids of one pre-tokenised word. Each round skips each possible merge with probability `dropout`."""
        symbols = list(word)
        while len(symbols) > 1:
            best, place = None, -1
            for i in range(len(symbols) - 1):
                rank = self._ranks.get((symbols[i], symbols[i + 1]))
                if rank is not None and (best is None or rank < best) and (not dropout or random() >= dropout):
                    best, place = rank, i
            if best is None:
                break
            symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
        return [self._ids[symbol] for symbol in symbols]

    def streams(self, count: int, dropout: float, seed: int) -> Streams:
        """The text as `count` token streams. The first is the regular encoding; dropout varies the others."""
        rng = np.random.default_rng(seed)
        samples = 1 if count == 1 else 1 + count
        draws = rng.random(1 << 16).tolist()
        position = [0]

        def random() -> float:
            position[0] = (position[0] + 1) % len(draws)
            if not position[0]:
                draws[:] = rng.random(len(draws)).tolist()
            return draws[position[0]]

        pieces = [self.segment(w, dropout if sample else 0.0, random) for w in self._words for sample in range(samples)]
        length = np.array([len(piece) for piece in pieces], np.int64)
        begin = np.concatenate([[0], np.cumsum(length)[:-1]])
        flat = np.concatenate([np.asarray(piece, np.int32) for piece in pieces])
        tokens, lines = [], []
        for stream in range(count):
            sample = rng.integers(1, samples, len(self._word)) if stream else 0
            piece = self._word * samples + sample
            lengths = length[piece]
            ends = np.cumsum(lengths)
            source = np.repeat(begin[piece] - (ends - lengths), lengths) + np.arange(ends[-1])
            tokens.append(flat[source])
            lines.append((ends - lengths)[self._line_starts].astype(np.int32))
        sizes = np.array([len(ids) for ids in tokens], np.int32)
        padded = np.full((count, sizes.max()), PAD, np.int32)
        for row, ids in zip(padded, tokens, strict=True):
            row[: len(ids)] = ids
        return Streams(jnp.asarray(padded), jnp.asarray(sizes), jnp.asarray(np.stack(lines)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Streams:
    """One text in several segmentations.

    Attributes:
        tokens: int32 [streams, longest], padded.
        sizes: int32 [streams].
        lines: int32 [streams, lines], the index of the first token of each line.
    """

    tokens: jax.Array
    sizes: jax.Array
    lines: jax.Array


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Shares of the windows by kind.

    Attributes:
        canonical: share from the first stream.
        line_starts: share that begins with bos and the start of a line.
        bos: share of the other windows that begins with bos.
    """

    canonical: jax.Array | float
    line_starts: float
    bos: float


def sample_windows(key: jax.Array, streams: Streams, mixture: Mixture, batch: int, context: int) -> jax.Array:
    """Windows at random places, int32 [batch, context + 1]: the inputs and, shifted by one, their targets.

    The windows depend on the key alone, so a resumed run sees the same ones as an uninterrupted run. Every stream must have
    more tokens than a window.
    """
    count, width = streams.tokens.shape[0], context + 1
    integer_key, share_key = jax.random.split(key)
    # 31 bits, so that the remainder of a division is practically uniform.
    variant, line, place = jax.random.bits(integer_key, (3, batch), jnp.uint32) >> jnp.uint32(1)
    first_stream, at_line, starts_with_bos = jax.random.uniform(share_key, (3, batch))

    def below(number: jax.Array, limit: jax.Array | int) -> jax.Array:
        return number.astype(jnp.int32) % jnp.asarray(limit, jnp.int32)

    varied = min(1, count - 1) + below(variant, max(1, count - 1))
    stream = jnp.where(first_stream < mixture.canonical, jnp.int32(0), varied)
    last_start = streams.sizes[stream] - width
    from_line = at_line < mixture.line_starts
    has_bos = from_line | (starts_with_bos < mixture.bos)
    fitting = jnp.sum((streams.lines <= streams.sizes[:, None] - context).astype(jnp.int32), axis=1)
    line_start = streams.lines[stream, below(line, fitting[stream])]
    start = jnp.where(from_line, line_start, below(place, last_start + 1))
    offset = jnp.arange(width, dtype=jnp.int32)
    index = jnp.maximum(start[:, None] + offset - has_bos[:, None].astype(jnp.int32), 0)
    windows = streams.tokens[stream[:, None], index]
    return jnp.where(has_bos[:, None] & (offset == 0), jnp.int32(BOS), windows)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A text in the overlapping windows of `ds4jax eval`: each token is scored once.

    Attributes:
        windows: int32 [n, size + 1]. The first begins with bos; a text shorter than a window is padded.
        scored: float32 [n, size], 1 where the prediction of the next token counts.
        n_bytes: size of the text in bytes.
    """

    windows: np.ndarray
    scored: np.ndarray
    n_bytes: int


def evaluation_windows(bpe: tokenizers.Tokenizer, text: str, size: int) -> Evaluation:
    """Cut a text for evaluation into windows of `size` inputs."""
    ids = np.concatenate([np.array([BOS], np.int32), encode(bpe, text)])
    cuts = list(evaluate.windows(len(ids) - 1, size))
    windows = np.full((len(cuts), size + 1), PAD, np.int32)
    scored = np.zeros((len(cuts), size), np.float32)
    for row, (start, stop, first) in enumerate(cuts):
        windows[row, : stop + 1 - start] = ids[start : stop + 1]
        scored[row, first - start : stop - start] = 1
    return Evaluation(windows, scored, len(text.encode()))
