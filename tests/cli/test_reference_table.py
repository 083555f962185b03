"""`ds4jax bench reference`: the table, its verdicts, and that they can fail."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import pytest
from gguf_files import SMALL, write_small

from ds4jax.bench import reference_table
from ds4jax.cli import main as cli
from ds4jax.engine.compile import programs
from ds4jax.engine.generation import Generation
from ds4jax.engine.options import Result

HUB = Path(__file__).parents[1] / "golden" / "hub"
NAMES = ["MTP", "strict MTP", "plain", "strict plain", "plain, --max-draft 0"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of random weights."""
    path = tmp_path_factory.mktemp("models") / "small.gguf"
    write_small(path)
    return path


def refused(capsys: pytest.CaptureFixture[str], model: Path) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "reference", "--model", str(model)])
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1)
    return err


@pytest.mark.long
def test_json_of_the_shipped_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "reference", "--max-new-tokens", "24", "--json"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert err == ""
    assert (told["equal"], told["prompt"], told["jax"]) == (True, "knight", jax.__version__)
    assert told["device"] == jax.devices()[0].device_kind
    rows = told["rows"]
    assert [row["name"] for row in rows] == NAMES
    assert [(row["draft"], row["max_draft"], row["strict"]) for row in rows] == [
        (2, 2, False),
        (2, 2, True),
        (0, 2, False),
        (0, 2, True),
        (0, 0, False),
    ]
    for row in rows:
        assert (row["tokens"], row["equal"], row["difference"]) == (24, True, None)
        assert (row["tokens_per_step"] > 1.2) is (row["draft"] > 0)
        assert len(row["acceptance"]) == row["draft"]
        # The last step may commit more than is asked for, and all that was committed counts.
        assert row["tokens_per_second"] == pytest.approx(1e3 * row["tokens_per_step"] / row["ms_per_step"], rel=0.01)


@pytest.mark.slow
def test_nothing_is_compiled_while_the_clock_runs(monkeypatch: pytest.MonkeyPatch, small: Path) -> None:
    import ds4jax

    said, sizes = [], []
    result = Generation.result

    def counted(generation: Generation) -> Result:
        sizes.append(programs())
        return result(generation)

    monkeypatch.setattr(Generation, "result", counted)
    rows = reference_table.measure(ds4jax.load(small), 12, said.append)
    assert [row.way.name for row in rows] == NAMES
    assert len(sizes) == reference_table.RUNS * len(NAMES)
    assert len(set(sizes)) == 1
    assert said[: len(NAMES)] == [f"compiling: {name}" for name in NAMES]
    assert said[-1] == "run 3 of 3: plain, --max-draft 0"


@pytest.mark.slow
def test_a_difference_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, small: Path) -> None:
    line = ["bench", "reference", "--model", str(small), "--max-new-tokens", "12"]
    assert cli.main(line) == 0
    good = capsys.readouterr().out
    assert f'"knight", 12 new tokens, {jax.devices()[0].device_kind}, jax {jax.__version__}' in good
    assert [row for name in NAMES for row in good.splitlines() if row.startswith(f"  {name}  ")] == good.splitlines()[4:9]
    assert "NO" not in good
    assert all(note in good for note in reference_table.NOTES)
    result = Generation.result

    def wrong(generation: Generation) -> Result:
        found = result(generation)
        return dataclasses.replace(found, ids=(*found.ids[:-1], 5)) if found.draft and found.strict else found

    monkeypatch.setattr(Generation, "result", wrong)
    assert cli.main(line) == 1
    told = capsys.readouterr().out
    (row,) = (row for row in told.splitlines() if "NO: " in row)
    assert row.startswith("  strict MTP  ")
    assert "NO: new token 12 is 5, not " in row


def test_what_it_cannot_compare(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "plain.gguf"
    write_small(path, dataclasses.replace(SMALL, n_mtp=0, compress_ratios=SMALL.compress_ratios[: SMALL.n_layers]))
    assert f"{path}: mtp: these weights have no MTP block" in refused(capsys, path)
    assert "tokenizer: none in these files" in refused(capsys, HUB)
