"""`ds4jax warmup`: the programs that it compiles are those that are used, and no weight is read for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from gguf_files import SMALL, write_small
from numerics import GOLDEN

from ds4jax.bounds import SHIPPED
from ds4jax.cache.capacity import capacities
from ds4jax.cli import main as cli
from ds4jax.engine.warmup import programs, without_weights
from ds4jax.loading import open_checkpoint

HUB = GOLDEN / "hub"
# Names of the large programs in JAX's cache, and the least size of one that is kept to be found without tracing.
LARGE, LARGE_BYTES = ("jit_prefill-", "jit_run-"), 100_000
GENERATE = """
import sys
import jax
from ds4jax.cli.main import main

missed = []
jax.monitoring.register_event_listener(lambda event, **_: missed.append(event) if event.endswith("/cache_misses") else None)
code = main(sys.argv[1:])
print(len(missed), file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize(("path", "dense"), [(SHIPPED, None), (HUB, None), (HUB, "q8_0"), (HUB, "bf16")])
def test_shapes_from_headers_are_those_of_values(path: Path, dense: str | None) -> None:
    checkpoint = open_checkpoint(path, None, dense=dense)
    read = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), {tensor.name: tensor.read() for tensor in checkpoint.tensors})
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), {t.name: t.abstract for t in checkpoint.tensors}) == read


def test_sizes_of_caches() -> None:
    assert capacities(1, 4096) == capacities(512, 4096) == [512]
    assert capacities(513, 4096) == capacities(1024, 4096) == [512, 1024]
    assert capacities(4096, 4096) == [512, 1024, 2048, 4096]
    assert capacities(300, 300) == [300]
    assert capacities(1025, 1100) == [512, 1024, 1100]


def test_every_call_of_a_prompt_that_fits_has_its_program() -> None:
    model = without_weights(open_checkpoint(SHIPPED, None), max_draft=0)
    names = [program.name for program in programs(model, 1000, strict=False, chunk=4096)]
    assert names == [
        "prefill of 32 rows, cache of 512",
        "prefill of 128 rows, cache of 512",
        "prefill of 512 rows, cache of 512",
        "decode, cache of 512",
        "prefill of 32 rows, cache of 1024",
        "prefill of 128 rows, cache of 1024",
        "prefill of 512 rows, cache of 1024",
        "decode, cache of 1024",
    ]
    wide = [program.name for program in programs(model, 4096, strict=False, chunk=4096)]
    assert "prefill of 4096 rows, cache of 2048" in wide
    assert "prefill of 4096 rows, cache of 1024" not in wide, "two calls of 512 rows take less time"


def large(folder: Path) -> set[str]:
    """The large programs in a folder."""
    cached = {path.name for path in folder.glob("*-cache") if path.name.startswith(LARGE)}
    return cached | {path.name for path in folder.glob("programs/*") if path.stat().st_size > LARGE_BYTES}


@pytest.mark.long
def test_what_was_warmed_up_is_not_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command is a process of its own, and the second text is longer than the first."""
    model, kept = tmp_path / "small.gguf", tmp_path / "programs"
    write_small(model)
    environment = os.environ | {"DS4JAX_CACHE": str(kept)}

    def run(*line: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", GENERATE, *line, "--max-draft", "0", "--chunk", "32", "--json"]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment)

    told = json.loads(run("warmup", str(model), "--context", "512").stdout)
    made = large(kept)
    assert [program["name"] for program in told["programs"]] == ["prefill of 32 rows, cache of 512", "decode, cache of 512"]
    assert not any(program["kept"] for program in told["programs"])
    assert told["folder"] == str(kept)
    generate = ("generate", "--model", str(model), "--max-new-tokens", "3", "--ignore-eos")
    run(*generate, "In the beginning")
    assert large(kept) == made
    assert len(made) == 2
    again = run(*generate, "And it came to pass in those days that there went out a decree")
    assert again.stderr.splitlines()[-1] == "0"


def test_warmup_reads_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "small.gguf"
    write_small(path)
    monkeypatch.setattr("ds4jax.engine.warmup.warm", lambda programs, note: iter(()))
    monkeypatch.setattr("ds4jax.loading.checkpoint.Tensor.read", lambda *_: pytest.fail("a tensor was read"))
    assert cli.main(["warmup", str(path), "--context", "600"]) == 0
    assert "0 programs in " in capsys.readouterr().err


def test_a_context_that_the_model_does_not_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "small.gguf"
    write_small(path)
    with pytest.raises(SystemExit):
        cli.main(["warmup", str(path), "--context", "5000"])
    most = SMALL.max_context
    assert capsys.readouterr().err == f"ds4jax: error: {path}: context is 5000; it must be 1 to {most}\n"


@pytest.mark.slow
def test_the_second_start_of_the_tiny_model_takes_less_than_four_seconds() -> None:
    """From the process's start to the first token, on a CPU that has nothing else to do."""
    command = [sys.executable, "-m", "ds4jax", "generate", "In the beginning", "--max-new-tokens", "1", "--json", "--stats"]
    starts = [json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["start"] for _ in range(3)]
    assert min(start["total"] for start in starts[1:]) < 4, starts
