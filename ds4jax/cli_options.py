"""What option values may be. Everything here is checked before a model is opened and without importing JAX.

Each function is an argparse `type`: it takes the word from the command line and raises `argparse.ArgumentTypeError`, which the
parser prints as one line naming the option.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ds4jax.files import beside

MOST_TOKENS = 2**31 - 1
# Mirrors what the decode loop takes; importing it would import JAX.
MOST_DRAFTS = 4
DEFAULT_DRAFTS = 2


def integer(least: int, most: int, meaning: str) -> Callable[[str], int]:
    """A reader of whole numbers from `least` to `most`; `meaning` says what is allowed."""

    def read(word: str) -> int:
        try:
            value = int(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{word!r} is not an integer") from None
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{word} is out of range; {meaning}")
        return value

    return read


def number(allowed: Callable[[float], bool], meaning: str) -> Callable[[str], float]:
    """A reader of finite numbers for which `allowed` holds; `meaning` says which these are."""

    def read(word: str) -> float:
        try:
            value = float(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{word!r} is not a number") from None
        if not (math.isfinite(value) and allowed(value)):
            raise argparse.ArgumentTypeError(f"{word} is out of range; {meaning}")
        return value

    return read


token_count = integer(1, MOST_TOKENS, "it must be at least 1 and fit in 32 bits")
position = integer(0, MOST_TOKENS, "it must be at least 0 and fit in 32 bits")
top_k = integer(0, MOST_TOKENS, "it must be at least 0 (0 keeps all tokens) and fit in 32 bits")
seed = integer(-(2**63), 2**63 - 1, "it must fit in 64 bits")
temperature = number(lambda value: value >= 0, "it must be finite and at least 0 (0 takes the most likely token)")
top_p = number(lambda value: 0 < value <= 1, "it must be above 0 and at most 1")
min_p = number(lambda value: 0 <= value <= 1, "it must be between 0 and 1")

alternatives = integer(0, MOST_TOKENS, "it must be at least 0 and fit in 32 bits")
draft_count = integer(0, MOST_DRAFTS, f"it must be 0 to {MOST_DRAFTS}")


def draft(word: str) -> int | str:
    """Drafts a step, or the word auto."""
    return word if word == "auto" else draft_count(word)


def valid_text(word: str, name: str) -> str:
    """A text that tokens can spell: one that was not made of bytes that are no UTF-8."""
    try:
        word.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{name} is not valid UTF-8") from None
    return word


def prompt(word: str) -> str:
    """A text to continue or score, with something in it."""
    if not word:
        raise argparse.ArgumentTypeError("the prompt is empty; give at least one character")
    return valid_text(word, "the prompt")


def prompt_or_stdin(word: str) -> str:
    """A text to continue; `-` reads all of stdin."""
    if word != "-":
        return prompt(word)
    return _checked(sys.stdin.buffer.read() if sys.stdin else b"", "stdin").decode()


def stop_text(word: str) -> str:
    """A text that ends a continuation."""
    if not word:
        raise argparse.ArgumentTypeError("an empty text is everywhere; give at least one character")
    return valid_text(word, "the text")


def model_path(word: str) -> Path:
    """A GGUF file or a checkpoint directory that is there; what is inside is the loader's to judge."""
    if not word or not os.path.exists(word):
        raise argparse.ArgumentTypeError(f"{word}: no such file or directory")
    return Path(word)


def session_file(word: str) -> Path:
    """A file that is there; whether it holds a session is the reader's to judge."""
    if not os.path.isfile(word):
        raise argparse.ArgumentTypeError(f"{word}: no such file")
    return Path(word)


def ids_file(word: str) -> np.ndarray:
    """Token ids from a .npy file, int32 [T].

    The file is mapped before it is read, so that neither a header that promises more than the file holds nor pickled objects
    get anywhere.
    """
    try:
        array = np.lib.format.open_memmap(word, mode="r")
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{word}: {error.strerror or error}") from None
    except (ValueError, EOFError, SyntaxError) as error:
        raise argparse.ArgumentTypeError(f"{word}: not a .npy file of integers: {error}") from None
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise argparse.ArgumentTypeError(
            f"{word}: holds {array.dtype}{list(array.shape)}; token ids are integers in one dimension"
        )
    if array.size == 0:
        raise argparse.ArgumentTypeError(f"{word}: the prompt is empty; give at least one token")
    least, most = int(array.min()), int(array.max())
    if least < 0 or most > MOST_TOKENS:
        raise argparse.ArgumentTypeError(f"{word}: token id {least if least < 0 else most} is outside any vocabulary")
    return array.astype(np.int32)


def text_file(word: str) -> bytes:
    """The bytes of a UTF-8 text file, line ends as they are."""
    try:
        data = Path(word).read_bytes()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{word}: {error.strerror or error}") from None
    return _checked(data, word)


def folder(word: str) -> Path:
    """A folder that is there."""
    if not os.path.isdir(word):
        raise argparse.ArgumentTypeError(f"{word}: no such folder")
    return Path(word)


def _checked(data: bytes, name: str) -> bytes:
    """Bytes that are UTF-8, with something in them."""
    if not data:
        raise argparse.ArgumentTypeError(f"{name}: the file is empty")
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise argparse.ArgumentTypeError(f"{name}: not UTF-8 at byte {error.start}") from None
    return data


def output_file(word: str) -> Path:
    """A file that can be written: nothing is left behind by asking, and a file that is there stays as it is."""
    path = Path(word).resolve()
    if path.exists() and not path.is_file():
        raise argparse.ArgumentTypeError(f"{word}: exists and is not a file")
    if path.exists() and not os.access(path, os.W_OK):
        raise argparse.ArgumentTypeError(f"{word}: the file is write-protected")
    trial = beside(path)
    try:
        trial.touch(exist_ok=False)
        trial.unlink()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{word}: cannot be written: {error.strerror or error}") from None
    return path
