"""`bench decode` over several contexts: a whole run with a toy, and what cannot be measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds4jax.bench import long, report
from ds4jax.cli import main as cli
from ds4jax.errors import InputError


@pytest.mark.slow
def test_decode_over_contexts_and_caches(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    content = long.bench(long.Options("small-q2", 3, ("float32", "narrow"), (64, 600), 4), lambda message: None)
    assert [(row["cache"], row["context"]) for row in content["rows"]] == [
        (cache, context) for cache in ("float32", "narrow") for context in (64, 600)
    ]
    assert long.good(content)
    assert content["rows"][0]["relative"] == 1
    wide, narrow = content["rows"][1], content["rows"][3]
    assert narrow["cache_bytes"] < wide["cache_bytes"]
    report.write(tmp_path / "long.json", content)
    long.show(content)
    assert "narrow" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: long.Options("small-q2", contexts=(1 << 20,)), "context is 1048576"),
    ],
)
def test_what_does_not_fit_is_named(make, field) -> None:
    with pytest.raises(InputError, match=field):
        make()


def test_several_contexts_are_plain_steps_alone(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "decode", "--synthetic", "small-q2", "--context", "64,128", "--strict"])
    assert "leave --plot, --strict, --acceptance and --per-step out" in capsys.readouterr().err
