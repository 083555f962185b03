"""`ds4jax bench costs` and the package's table: what is taken from it, what is measured, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import pytest

from ds4jax.bench import costs as bench
from ds4jax.bounds import COSTS, SHIPPED
from ds4jax.cli import main as cli
from ds4jax.config import Config
from ds4jax.decode.drafters.ngram import NgramDrafter
from ds4jax.engine import cost_table, costs
from ds4jax.engine.cost_table import Entry
from ds4jax.engine.loaded import Loaded
from ds4jax.engine.warmup import without_weights
from ds4jax.errors import InputError
from ds4jax.loading import open_checkpoint
from ds4jax.random_models import checkpoint as synthetic

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "nvidia-h200-decode.json"


@functools.cache
def small(max_draft: int = 2, **changes: Any) -> Loaded:
    """A model without weights in the shapes of small-q2."""
    config: Config = dataclasses.replace(synthetic.config_of("small-q2"), **changes)
    return without_weights(synthetic.checkpoint(config, "small-q2"), max_draft=max_draft)


def entry(model: Loaded, *ms: float, **changes: Any) -> Entry:
    made = Entry(jax.devices()[0].device_kind, model.shape_key, "mtp", 2, False, "small-q2", ms, "ds4jax bench costs", None)
    return dataclasses.replace(made, **changes)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "costs", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1)
    return err


def test_a_key_tells_sizes_and_types_and_nothing_else() -> None:
    key = small().shape_key
    assert small(0).shape_key == small(rope_theta=1e6, max_context=2048, eos_id=7).shape_key == key
    others = [small(index_topk=16), small(n_experts=16), without_weights(open_checkpoint(SHIPPED))]
    whole = synthetic.checkpoint(synthetic.config_of("small-q2"), "small-q2")
    name = "layers.1.attn.wq_b.weight"
    tensors = tuple(dataclasses.replace(one, form="BF16") if one.name == name else one for one in whole.tensors)
    others.append(without_weights(dataclasses.replace(whole, tensors=tensors)))
    assert len({key, *(model.shape_key for model in others)}) == 5


def test_the_table_comes_before_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    known = entry(model, 3.0, 4.0, 5.0)
    monkeypatch.setattr(cost_table, "shipped", lambda: {known.place: known})
    monkeypatch.setattr(costs, "measured", lambda *given, **how: [(1.0, 2.0, 3.0)])
    assert costs.step_costs(model, 512, strict=False) == costs.engine_costs(model, strict=False) == (3.0, 4.0, 5.0)
    assert costs.source(model, strict=False) == f"the package's table for small-q2 on {known.device}"
    # Another mode, another drafter and another loop have no entry.
    for other, how in (
        (model, {"strict": True}),
        (model, {"strict": False, "drafter": NgramDrafter()}),
        (small(3), {"strict": False}),
    ):
        assert costs.step_costs(other, 512, **how) == (1.0, 2.0, 3.0)
        assert costs.engine_costs(other, **how) == pytest.approx([1 + 0.15 * depth for depth in range(1 + other.max_draft)])
        assert costs.source(other, **how) == "measured here, not in the package's table"
    model.costs.clear()


def test_the_shipped_table() -> None:
    entries = cost_table.read(COSTS)
    assert len({one.place for one in entries}) == len(entries)
    assert bench.entry(bench.from_result(RESULT)) in entries
    tiny = without_weights(open_checkpoint(SHIPPED, drafter="mtp"))
    for strict in (False, True):
        assert ("cpu", tiny.shape_key, "mtp", 2, strict) in {one.place for one in entries}


def test_a_result_becomes_an_entry(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    table, result = tmp_path / "costs.json", json.loads(RESULT.read_text())
    named = {row["name"]: row["ms_per_step"] for row in result["rows"]}
    times = tuple(named[name] for name in ("plain in max_draft 2", "draft 1 in max_draft 2", "draft 2 in max_draft 2"))
    cost_table.write(table, entry(small(), 1.0, 2.0, 3.0))
    for _ in range(2):
        assert (
            cli.main(["bench", "costs", "--from", str(RESULT), "--table", str(table), "--json", str(tmp_path / "made.json")]) == 0
        )
    said = f"draft 2: {times[2]:.3f} ms a step, {times[2] / times[0]:.3f} of a step without drafts"
    assert said in capsys.readouterr().out
    first, second = cost_table.read(table)
    assert (first.device, first.ms, first.drafter) == ("NVIDIA H200", times, "mtp")
    assert first.commit == result["commit"]
    assert second == entry(small(), 1.0, 2.0, 3.0)
    made = json.loads((tmp_path / "made.json").read_text())
    assert (made["key"], made["kernels_sha256"]) == (first.key, result["kernels_sha256"])
    # What the command wrote becomes an entry elsewhere.
    files = ["--from", tmp_path / "made.json", "--table", tmp_path / "other.json", "--note", "in a quiet hour"]
    assert cli.main(["bench", "costs", *map(str, files)]) == 0
    assert cost_table.read(tmp_path / "other.json") == [dataclasses.replace(first, note="in a quiet hour")]


def test_the_times_of_sampled_steps_are_not_taken(tmp_path: Path) -> None:
    result, path = json.loads(RESULT.read_text()), tmp_path / "result.json"
    greedy = [row for row in result["rows"] if not row["sampled"]]
    assert len(greedy) < len(result["rows"])
    slower = [row | {"sampled": True, "ms_per_step": 2 * row["ms_per_step"]} for row in greedy]
    path.write_text(json.dumps(result | {"rows": greedy + slower}))
    assert bench.from_result(path)["ms"] == bench.from_result(RESULT)["ms"]


def test_other_files_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result, path = json.loads(RESULT.read_text()), tmp_path / "result.json"
    for changes, says in (
        ({"slice": True}, "layout: is flash-q2, a slice; a table needs a whole layout"),
        ({"rows": result["rows"][:3]}, "is missing; run `ds4jax bench decode` with every depth"),
        ({"rows": [result["rows"][1], result["rows"][3]]}, "rows: draft 1 is missing"),
        ({"rows": 5}, "is no result of `ds4jax bench decode` or `bench costs`"),
    ):
        path.write_text(json.dumps(result | changes))
        assert says in refused(capsys, "--from", path)
    path.write_text("{")
    assert "is no result of `ds4jax bench decode` or `bench costs`" in refused(capsys, "--from", path)
    assert "is no table of costs" in refused(capsys, "--from", RESULT, "--table", path)
    wrong = dataclasses.asdict(entry(small(), 1.0, 2.0))
    path.write_text(json.dumps({"entries": [wrong]}))
    with pytest.raises(InputError, match="ms: small-q2 has 2 times for max_draft 2"):
        cost_table.read(path)
    assert "exclude each other" in refused(capsys, "--from", RESULT, "--synthetic", "small-q2")
    assert "drafter is dspark; small-q2 has mtp" in refused(capsys, "--synthetic", "small-q2", "--drafter", "dspark")


@pytest.mark.long
def test_a_loop_is_timed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "made.json"
    chosen = ["--synthetic", "small-q2", "--drafter", "ngram", "--max-draft", "1", "--runs", "2", "--json", str(path)]
    assert cli.main(["bench", "costs", *chosen]) == 0
    made = json.loads(path.read_text())
    assert (made["model"], made["drafter"], made["max_draft"], len(made["ms"])) == ("small-q2", "ngram", 1, 2)
    assert [len(times) for times in made["samples"]] == [2, 2]
    assert made["key"] == small().shape_key
    assert all(min(times) <= ms <= max(times) for ms, times in zip(made["ms"], made["samples"], strict=True))
    assert "small-q2 (" in capsys.readouterr().out
