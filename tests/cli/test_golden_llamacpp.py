"""Files that llama.cpp's own quantiser wrote, through the command line, against llama.cpp's own logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numerics import GOLDEN

from ds4jax.cli import main as cli

HERE = GOLDEN / "llamacpp"
SHARED = Path(__file__).resolve().parents[3] / "shared" / "golden_llamacpp"
# Only one file is in the tests' folder, with the results that it needs.
NAMES = ("IQ2_XXS", "Q2_K", "IQ3_XXS", "IQ4_XS", "Q4_K_M", "MXFP4_MOE")
ALL = {name: f"{name}.gguf" for name in NAMES} | {"Q4_K_M split": "split/Q4_K_M-00001-of-00003.gguf"}
DECODE_FROM = 120


def place(name: str) -> Path:
    """The folder that holds a file and its results."""
    return HERE if (HERE / ALL[name]).exists() else SHARED


def cases(long: str = "") -> pytest.MarkDecorator:
    """Every file; all but the long one are slow, and those that are not here are skipped with the reason."""
    absent = pytest.mark.skipif(not SHARED.exists(), reason="llama.cpp's files (16 MB) lie beside the checkout only where shared")
    rows = []
    for name in ALL:
        marks = [pytest.mark.long if name == long else pytest.mark.slow]
        rows.append(pytest.param(name, marks=marks + [absent] * (place(name) is SHARED)))
    return pytest.mark.parametrize("name", rows)


def expected(name: str, array: str) -> np.ndarray:
    with np.load(place(name) / "expected.npz") as file:
        return file[array if array in file.files else f"{name.partition(' ')[0]}/{array}"]


def assert_agree(found: np.ndarray, theirs: np.ndarray) -> None:
    """Within the set's limits: llama.cpp's own float path is off by as much, and by more where the indexer's choice is close."""
    difference = np.abs(found - theirs).max(-1)
    assert np.median(difference) <= 5e-3
    assert (difference <= 2e-2).mean() >= 0.97
    assert_same_choice(found, theirs)


def assert_same_choice(found: np.ndarray, theirs: np.ndarray) -> None:
    """The same most likely token wherever the two best differ clearly."""
    best = np.sort(theirs, -1)
    clear = best[:, -1] - best[:, -2] > 0.05
    np.testing.assert_array_equal(found.argmax(-1)[clear], theirs.argmax(-1)[clear])


def logits(name: str, folder: Path, ids: np.ndarray, *arguments: str) -> np.ndarray:
    """What `ds4jax logits --strict --no-qat` writes."""
    np.save(folder / "ids.npy", ids)
    out = folder / "logits.npz"
    files = ("--model", str(place(name) / ALL[name]), "--ids", str(folder / "ids.npy"), "--out", str(out))
    assert cli.main(["logits", *files, "--strict", "--no-qat", *arguments]) == 0
    with np.load(out) as file:
        return file["logits"]


@cases(long="IQ2_XXS")
def test_prefill(name: str, tmp_path: Path) -> None:
    found = logits(name, tmp_path, expected(name, "ids"))
    assert_agree(found[expected(name, "positions")], expected(name, "exact"))


@cases()
def test_decode(name: str, tmp_path: Path) -> None:
    """Within the limits of llama.cpp's prefill, and the same choices as its decode.

    Its decode is no measure of last digits: its rows differ from those of its own prefill by a median of 3e-3 to 5e-3, and by up
    to 0.5 in single rows. Ours do by 1e-5.
    """
    start, theirs = DECODE_FROM, expected(name, "decode")
    end = start + len(theirs)
    found = logits(name, tmp_path, expected(name, "ids")[:end], "--decode-from", str(start))
    positions = expected(name, "positions")
    kept = (positions >= start) & (positions < end)
    assert_agree(found[positions[kept]], expected(name, "exact")[kept])
    assert_same_choice(found[start:], theirs)
