"""Readers of option values. They check a value before a model is opened, and do not import JAX.

Each function is an argparse `type`: it takes the word from the command line. For an invalid value it raises
`argparse.ArgumentTypeError`, which the parser prints as one line with the option's name.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ds4jax import bounds
from ds4jax.bounds import MAX_TOKENS, Integers, Numbers
from ds4jax.files import open_regular, temporary_name

if TYPE_CHECKING:
    import numpy as np


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parser and those of all its sub-commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from parsers(child)


def integer(allowed: Integers) -> Callable[[str], int]:
    """A reader of the allowed integers. Without a maximum, they must fit in 32 bits."""

    def read(word: str) -> int:
        try:
            value = int(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{word!r} is not an integer") from None
        if not allowed.holds(value):
            raise argparse.ArgumentTypeError(f"{word} is out of range; {allowed.rule}")
        if allowed.largest is None and value > MAX_TOKENS:
            raise argparse.ArgumentTypeError(f"{word} is out of range; it must fit in 32 bits")
        return value

    return read


def number(allowed: Numbers) -> Callable[[str], float]:
    """A reader of the allowed numbers."""

    def read(word: str) -> float:
        try:
            value = float(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{word!r} is not a number") from None
        if not allowed.holds(value):
            raise argparse.ArgumentTypeError(f"{word} is out of range; {allowed.rule}")
        return value

    return read


token_count = integer(bounds.NEW_TOKENS)
position = integer(bounds.POSITION)
top_k = integer(bounds.TOP_K)
seed = integer(bounds.SEED)
temperature = number(bounds.TEMPERATURE)
top_p = number(bounds.TOP_P)
min_p = number(bounds.MIN_P)

alternatives = integer(bounds.POSITION)
draft_count = integer(bounds.MAX_DRAFT)
_draft_or_auto = integer(bounds.DRAFT)
_device_count = integer(bounds.DEVICE_COUNT)


def positions(word: str) -> tuple[int, ...]:
    """Positions separated by commas."""
    return tuple(position(part) for part in word.split(","))


def draft(word: str) -> int | str:
    """A number of drafts per step, or the word auto."""
    return word if word == "auto" else _draft_or_auto(word)


def devices(word: str) -> int | str:
    """A number of devices, or the word all."""
    return word if word == "all" else _device_count(word)


def valid_text(word: str, name: str) -> str:
    """A text from valid UTF-8, so that tokens can encode it. Also decodes the bytes that an ASCII locale escaped."""
    try:
        word.encode()
        return word
    except UnicodeEncodeError:
        pass
    try:
        return os.fsencode(word).decode()
    except UnicodeError:
        raise argparse.ArgumentTypeError(f"{name} is not valid UTF-8") from None


def prompt(word: str) -> str:
    """A text to continue or score; not empty."""
    if not word:
        raise argparse.ArgumentTypeError("the prompt is empty; give at least one character")
    return valid_text(word, "the prompt")


def prompt_or_stdin(word: str) -> str:
    """A text to continue. `-` reads stdin to its end."""
    if word != "-":
        return prompt(word)
    return _checked(sys.stdin.buffer.read() if sys.stdin else b"", "stdin").decode()


def stop_text(word: str) -> str:
    """A stop text; not empty."""
    if not word:
        raise argparse.ArgumentTypeError("the text is empty; give at least one character")
    return valid_text(word, "the text")


def model_path(word: str) -> Path:
    """An existing GGUF file or checkpoint directory. The loader checks its content."""
    if not word or not os.path.exists(word):
        raise argparse.ArgumentTypeError(f"{word}: no such file or directory")
    return Path(word)


def session_file(word: str) -> Path:
    """An existing file. The session's reader checks its content."""
    if not os.path.exists(word):
        raise argparse.ArgumentTypeError(f"{word}: no such file")
    return existing_file(word)


def existing_file(word: str) -> Path:
    """An existing regular file. The command reads and checks its content."""
    with _opened(word):
        return Path(word)


def ids_file(word: str) -> np.ndarray:
    """Token ids int32 [T] from a .npy file.

    The file is memory-mapped. So a header that claims more data than the file has is refused, and so are pickled objects.
    """
    import numpy as np

    try:
        with _opened(word):
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
    minimum, maximum = int(array.min()), int(array.max())
    if minimum < 0 or maximum > MAX_TOKENS:
        raise argparse.ArgumentTypeError(f"{word}: token id {minimum if minimum < 0 else maximum} is outside any vocabulary")
    return array.astype(np.int32)


def text_file(word: str) -> bytes:
    """The bytes of a UTF-8 text file, with its line ends unchanged."""
    with _opened(word) as stream:
        return _checked(stream.read(), word)


def _opened(word: str) -> BinaryIO:
    """An existing regular file, open for reading."""
    try:
        return open_regular(word)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{word}: {error.strerror or error}") from None


def folder(word: str) -> Path:
    """An existing folder."""
    if not os.path.isdir(word):
        raise argparse.ArgumentTypeError(f"{word}: no such folder")
    return Path(word)


def _checked(data: bytes, name: str) -> bytes:
    """The bytes, if they are valid UTF-8 and not empty."""
    if not data:
        raise argparse.ArgumentTypeError(f"{name}: the file is empty")
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise argparse.ArgumentTypeError(f"{name}: not UTF-8 at byte {error.start}") from None
    return data


def output_file(word: str) -> Path:
    """A file that can be written. The check leaves no file behind and does not change an existing file."""
    path = Path(word).resolve()
    if path.exists() and not path.is_file():
        raise argparse.ArgumentTypeError(f"{word}: exists and is not a file")
    if path.exists() and not os.access(path, os.W_OK):
        raise argparse.ArgumentTypeError(f"{word}: the file is write-protected")
    trial = temporary_name(path)
    try:
        trial.touch(exist_ok=False)
        # A process that writes to `path` at this moment may remove the trial file as abandoned.
        trial.unlink(missing_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{word}: cannot be written: {error.strerror or error}") from None
    return path


def depths(word: str) -> tuple[int, ...]:
    """A comma-separated list of drafts per step, sorted without repeats."""
    return tuple(sorted({draft_count(part) for part in word.split(",")}))


def lengths(word: str) -> tuple[int, ...]:
    """A comma-separated list of token counts, sorted without repeats."""
    return tuple(sorted({token_count(part) for part in word.split(",")}))


def names(what: str, allowed: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """A reader of a comma-separated list of allowed names, in the given order without repeats; `what` is one of them in words."""

    def read(word: str) -> tuple[str, ...]:
        found = tuple(dict.fromkeys(word.split(",")))
        for name in found:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name!r} is not {what}; give some of {', '.join(allowed)}")
        return found

    return read


def shares(word: str) -> tuple[float, ...]:
    """A comma-separated list of shares, one for each draft in order."""
    read = number(Numbers(0, 1, "a share of drafts is 0 to 1"))
    return tuple(read(part) for part in word.split(","))


def counts_per_step(word: str) -> tuple[float, ...]:
    """A comma-separated list of tokens per step."""
    read = number(Numbers(1, 8, "a step commits 1 to 8 tokens"))
    return tuple(read(part) for part in word.split(","))


def new_folder(word: str) -> Path:
    """A folder; it is made if it does not exist."""
    path = Path(word)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{word}: {error.strerror or error}") from None
    return path


def plot_file(word: str) -> Path:
    """A PNG file that can be written."""
    if not word.endswith(".png"):
        raise argparse.ArgumentTypeError(f"{word}: the figure is a PNG; end the name with .png")
    return output_file(word)
