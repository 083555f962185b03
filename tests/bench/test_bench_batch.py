"""`bench batch`: a whole run with a toy, start states, comparison of bits, and what cannot be measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from numerics import assert_bits_equal

from ds4jax.bench import batch, traffic
from ds4jax.bench.programs import Program, arguments, filled
from ds4jax.cli import main as cli
from ds4jax.decode.sampling import Sampling
from ds4jax.errors import InputError
from ds4jax.loading.plan import plan
from ds4jax.random_models import checkpoint as synthetic

SLICE = synthetic.config_of("small-q2", 1)


def silent(message: str) -> None:
    """For notes that nobody reads."""


@pytest.mark.long
def test_a_whole_run(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    """Eight sequences are sampled, too. A CPU has no kernel times, and its modules promise no bits."""
    file, picture = tmp_path / "batch.json", tmp_path / "batch.png"
    options = ["--layers", "2", "--sequences", "1,8", "--context", "64", "--long", "600", "--steps", "4"]
    assert cli.main(["bench", "batch", "--synthetic", "small-q2", *options, "--json", str(file), "--plot", str(picture)]) == 0
    content = json.loads(file.read_text())
    rows = [(row["sequences"], row["context"], row["sampled"]) for row in content["rows"]]
    assert rows == [(1, 64, False), (8, 64, False), (8, 64, True), (8, 600, False)]
    assert all(row["tokens_per_second"] > 0 and row["fraction"] is None for row in content["rows"])
    assert content["rows"][2]["over_greedy"] > 0
    assert [(row["sequences"], row["beside"], row["tokens"]) for row in content["bits"]] == [(1, 8, 4)]
    assert (content["profiles"], content["problems"], content["promised"]) == ([], [], False)
    text = " ".join(capsys.readouterr().out.split())
    assert "no profile: kernels are timed on a GPU" in text
    assert "a SLICE of 2 of 6 layers" in text
    assert picture.stat().st_size > 10_000


def test_a_sequence_starts_alike_beside_any_others() -> None:
    alone, two, four = (filled(SLICE, Program(0, sequences=count), 64, 512) for count in (1, 2, 4))
    for one, some, all_of_them in zip(*map(jax.tree.leaves, (alone, two, four)), strict=True):
        assert_bits_equal(one, all_of_them[:1])
        assert_bits_equal(some, all_of_them[:2])
    window = np.asarray(four.cache.layers[0].window)
    assert len({row.tobytes() for row in window}) == len(set(np.asarray(four.last).tolist())) == 4


def test_each_sequence_draws_with_its_own_seed() -> None:
    _, filters, _ = arguments(Program(0, sequences=3), 4, 0, Sampling(1.0, top_p=0.95, seed=7))
    keys = np.asarray(jax.random.key_data(filters.key))
    assert len({key.tobytes() for key in keys}) == 3
    assert_bits_equal(keys[2:], np.asarray(jax.random.key_data(Sampling(seed=9).arrays().key))[None])
    assert filters.top_p.tolist() == pytest.approx([0.95] * 3)


def test_bytes_of_many_sequences_are_those_of_as_many_rows() -> None:
    """Eight sequences read what seven drafts of one sequence read, apart from the drafter."""
    config = synthetic.config_of("flash-q2")
    planned = plan(synthetic.checkpoint(config, "flash-q2"), 2048)
    assert traffic.step_bytes(planned, config, 0, 8) == traffic.step_bytes(planned, config, 7) - 7 * planned.draft
    assert traffic.step_bytes(planned, config, 0, 1) == planned.token
    assert [traffic.distinct_experts(config, rows) for rows in (8, 16, 32)] == pytest.approx([44, 81, 136], abs=0.6)


def result(tokens: int, sequences: int) -> batch.Result:
    marks = np.arange(2 * sequences * tokens, dtype=np.uint32).reshape(sequences, tokens, 2)
    return np.ones((sequences, tokens), np.int32), marks


def compared(results: dict[int, batch.Result]) -> tuple[list[dict[str, Any]], list[str]]:
    problems: list[str] = []
    return batch._compared(results, problems, silent), problems


def test_a_differing_bit_is_found_in_any_shared_sequence() -> None:
    found, problems = compared({1: result(4, 1), 2: result(4, 2), 4: result(4, 4)})
    assert [(row["sequences"], row["equal"]) for row in found] == [(1, True), (2, True)]
    assert not problems
    tokens, marks = result(4, 2)
    marks[1, 3, 0] ^= 1
    found, _ = compared({1: result(4, 1), 2: (tokens, marks), 4: result(4, 4)})
    assert [(row["equal"], row["differing_fingerprints"]) for row in found] == [(True, 0), (False, 1)]
    content = {"problems": [], "promised": True, "bits": found}
    assert not batch.good(content)
    assert batch.good({**content, "promised": False})


def test_one_number_of_sequences_compares_nothing() -> None:
    found, problems = compared({4: result(4, 4)})
    assert (found, problems) == ([], ["bits: one number of sequences has nothing to compare with"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"context": 4096}, "context is 4096 and steps 64; small-q2 ends at 4096"),
        ({"long_context": 8000}, "long_context is 8000 and steps 64; small-q2 ends at 4096"),
        ({"sequences": (1, 65)}, "sequences is 65; a step has at most 64"),
    ],
)
def test_what_does_not_fit_is_named(fields: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        batch.Options("small-q2", **fields)


def test_a_long_context_is_measured_where_it_fits() -> None:
    assert batch.Options("small-q2").long_context == 0
    assert batch.Options().long_context == 32768
