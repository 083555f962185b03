"""The golden GGUF set through the command line, strictly: what a user types against what the reference computed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gguf_files import MAIN, MTP, needs_main
from numerics import arrays, assert_close

from ds4jax.cli import main as cli

QAT = 1e-3

pytestmark = needs_main


def expected(name: str) -> np.ndarray:
    return arrays("gguf/expected")[name]


def command(folder: Path, name: str, ids: np.ndarray, *arguments: str) -> None:
    """Run a command strictly on the set's model and its MTP file, with these token ids."""
    np.save(folder / "ids.npy", ids)
    files = ("--model", str(MAIN), "--mtp-file", str(MTP), "--ids", str(folder / "ids.npy"))
    assert cli.main([name, *files, "--strict", *arguments]) == 0


def logits(folder: Path, ids: np.ndarray, *arguments: str) -> dict[str, np.ndarray]:
    """What `ds4jax logits --strict --mtp` writes."""
    out = folder / "logits.npz"
    command(folder, "logits", ids, "--mtp", "--out", str(out), *arguments)
    with np.load(out) as file:
        return {key: file[key] for key in file.files}


@pytest.mark.long
def test_prefill(tmp_path: Path) -> None:
    found = logits(tmp_path, expected("ids"), "--no-qat")
    np.testing.assert_array_equal(found["ids"], expected("ids"))
    assert_close(found["logits"], expected("prefill_logits"))
    assert_close(found["mtp_logits"][expected("mtp_positions")], expected("mtp_logits"))


@pytest.mark.slow
def test_decode(tmp_path: Path) -> None:
    start, rows = int(expected("decode_start")), expected("decode_logits")
    found = logits(tmp_path, expected("ids")[: start + len(rows)], "--no-qat", "--decode-from", str(start))
    assert_close(found["logits"][start:], rows)
    assert_close(found["logits"], expected("prefill_logits")[: start + len(rows)])
    kept = expected("mtp_positions") < len(found["mtp_logits"])
    assert_close(found["mtp_logits"][expected("mtp_positions")[kept]], expected("mtp_logits")[kept])


@pytest.mark.long
@pytest.mark.parametrize(
    "decode_from", [(), pytest.param(("--decode-from", "20"), marks=pytest.mark.slow)], ids=["prefill", "decode"]
)
def test_simulated_rounding(decode_from: tuple[str, ...], tmp_path: Path) -> None:
    """On by default: the file says so."""
    found = logits(tmp_path, expected("qat_ids"), *decode_from)
    assert_close(found["logits"], expected("qat_logits"), QAT)
    assert_close(found["mtp_logits"][0 : 2 * len(expected("qat_mtp_logits")) : 2], expected("qat_mtp_logits"), QAT)


@pytest.mark.parametrize("draft", [pytest.param("0", marks=pytest.mark.slow), "2"])
@pytest.mark.long
def test_greedy_tokens(draft: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = expected("greedy_tokens")
    options = ("--max-new-tokens", str(len(tokens)), "--max-draft", "2", "--draft", draft)
    command(tmp_path, "generate", expected("greedy_prompt"), "--no-qat", "--ignore-eos", "--json", *options)
    told = json.loads(capsys.readouterr().out)
    assert told["tokens"] == tokens.tolist()
    assert (told["strict"], told["draft"], told["finish_reason"]) == (True, int(draft), "length")
