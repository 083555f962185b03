"""The golden set of llama.cpp's flavour through the command line, strictly: whole, split, with its MTP block in a side file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from numerics import GOLDEN, arrays, assert_close

from ds4jax.cli import main as cli

QAT = 1e-3
HERE = GOLDEN / "mainline"
SPLIT = Path(__file__).resolve().parents[3] / "shared" / "golden_mainline" / "split"
SIDE = HERE / "mtp-mxfp4_moe.gguf"
needs_split = pytest.mark.skipif(
    not SPLIT.exists(), reason="the split files (2.2 MB) lie beside the checkout only where they were shared"
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its MTP block's file if it is given, and the names of its arrays in the set."""

    model: Path
    prefix: str = "mxfp4"
    side: Path | None = None
    mtp: str = "mtp"

    def expected(self, name: str) -> np.ndarray:
        """An array of the set; "mtp_*" are those of this case's block."""
        return arrays("mainline/expected")[f"{self.prefix}/{name.replace('mtp_logits', f'{self.mtp}_logits')}"]


CASES = {
    "whole": Case(HERE / "mxfp4_moe.gguf"),
    "side file": Case(HERE / "mxfp4_moe.gguf", side=SIDE, mtp="mtp_sidecar"),
    "split, tensors first": Case(SPLIT / "tensors_first-00001-of-00003.gguf"),
    "split, metadata first": Case(SPLIT / "metadata_first-00001-of-00004.gguf", side=SIDE, mtp="mtp_sidecar"),
    "mixed": Case(HERE / "ud_mixed.gguf", prefix="ud", mtp=""),
}


def cases(long: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    """Every case; all but the long ones are slow."""
    rows = []
    for name in CASES:
        marks = [pytest.mark.long if name in long else pytest.mark.slow]
        rows.append(pytest.param(name, marks=marks + [needs_split] * name.startswith("split")))
    return pytest.mark.parametrize("name", rows)


def command(case: Case, folder: Path, name: str, ids: np.ndarray, *arguments: str) -> None:
    """Run a command strictly on a case's model with these token ids."""
    np.save(folder / "ids.npy", ids)
    files = ("--model", str(case.model), "--ids", str(folder / "ids.npy"))
    side = ("--drafter-file", str(case.side)) if case.side else ()
    assert cli.main([name, *files, *side, "--strict", *arguments]) == 0


def logits(case: Case, folder: Path, ids: np.ndarray, *arguments: str) -> dict[str, np.ndarray]:
    """What `ds4jax logits --strict` writes, with --mtp where the case has a block."""
    out = folder / "logits.npz"
    command(case, folder, "logits", ids, *(("--mtp",) if case.mtp else ()), "--out", str(out), *arguments)
    with np.load(out) as file:
        return {key: file[key] for key in file.files}


@cases(long=("whole", "split, metadata first", "mixed"))
def test_prefill(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    found = logits(case, tmp_path, case.expected("ids"), "--no-qat")
    assert_close(found["logits"][case.expected("positions")], case.expected("prefill_logits"))
    if case.mtp:
        assert_close(found["mtp_logits"][case.expected("mtp_positions")], case.expected("mtp_logits"))


@cases(long=("whole",))
def test_decode(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    start, rows = int(case.expected("decode_start")), case.expected("decode_logits")
    found = logits(case, tmp_path, case.expected("ids")[: start + len(rows)], "--no-qat", "--decode-from", str(start))
    assert_close(found["logits"][start:], rows)
    if case.mtp:
        kept = case.expected("mtp_positions") < len(found["mtp_logits"])
        assert_close(found["mtp_logits"][case.expected("mtp_positions")[kept]], case.expected("mtp_logits")[kept])


@cases()
def test_simulated_rounding(name: str, tmp_path: Path) -> None:
    """On by default: files of this flavour do not say otherwise."""
    case = CASES[name]
    found = logits(case, tmp_path, case.expected("qat_ids"))
    assert_close(found["logits"], case.expected("qat_logits"), QAT)
    if case.mtp:
        rows = case.expected("qat_mtp_logits")
        assert_close(found["mtp_logits"][0 : 2 * len(rows) : 2], rows, QAT)


@cases()
def test_greedy_tokens(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = CASES[name]
    tokens, draft = case.expected("greedy_tokens"), "2" if case.mtp else "0"
    options = ("--max-new-tokens", str(len(tokens)), "--max-draft", draft, "--draft", draft)
    command(case, tmp_path, "generate", case.expected("greedy_prompt"), "--no-qat", "--ignore-eos", "--json", *options)
    told = json.loads(capsys.readouterr().out)
    assert told["tokens"] == tokens.tolist()
    assert (told["strict"], told["draft"], told["finish_reason"]) == (True, int(draft), "length")
