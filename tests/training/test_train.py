"""The command: fifty steps, interruption and resumption, export, and what it refuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import ds4jax
from ds4jax.cli.main import main
from ds4jax.training import checkpoint, data
from ds4jax.training.loop import initial_state, make_steps
from ds4jax.training.network import Network
from ds4jax.training.optimizer import make_optimizer
from ds4jax.training.recipe import phases


def read_log(path: Path) -> list[dict[str, Any]]:
    """Matplotlib comes with the module: collecting tests must not wait for it."""
    from ds4jax.training import report

    return report.read_log(path)


def run(*words: object) -> int:
    return main(["train", *map(str, words)])


@pytest.fixture(scope="module")
def trained(micro_options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 50 steps with an export beside it."""
    folder = tmp_path_factory.mktemp("trained")
    pace = ("--steps", 50, "--evaluate-every", 20, "--save-every", 20, "--report-seconds", 1000)
    assert run(*micro_options, *pace, "--out", folder / "run", "--export", folder / "model.gguf") == 0
    return folder


@pytest.mark.long
def test_fifty_steps_lower_the_loss_and_leave_everything_behind(trained: Path) -> None:
    log = read_log(trained / "run" / "log.jsonl")
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    validations = [entry["validation_bits_per_byte"] for entry in log if "validation_bits_per_byte" in entry]
    assert len(validations) == 2
    assert validations[1] < validations[0]
    assert (trained / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not list(trained.glob("**/*unfinished*"))


@pytest.mark.long
def test_exported_file_is_the_model_that_was_measured(trained: Path, text: str) -> None:
    loaded, weights = checkpoint.load_weights(trained / "run")
    model = ds4jax.load(trained / "model.gguf")
    assert model.config == loaded.recipe.model_config()
    held_out = text[text.index("Book 11\n") :]
    from ds4jax.evaluation.evaluate import evaluate

    score = evaluate(model, held_out)
    np.testing.assert_allclose(score.bits_per_byte, loaded.figures["held_out_bits_per_byte"], rtol=1e-4)
    np.testing.assert_allclose(score.mtp_agreement, loaded.figures["held_out_agreement"], atol=0.01)
    assert model.tokenizer is not None
    assert model.tokenizer.decode(model.tokenizer.encode(held_out)) == held_out
    table = weights["layers.0.ffn.gate.tid2eid"]
    assert np.all(table[:, 0] != table[:, 1])


@pytest.mark.long
def test_exported_file_says_how_it_was_made(trained: Path) -> None:
    from ds4jax.loading import open_checkpoint

    said = open_checkpoint(trained / "model.gguf").metadata
    assert said["general.name"] == "ds4jax tiny"
    assert said["ds4jax.qat"] is False
    assert said["ds4jax.training_steps"] == 50
    assert said["ds4jax.trained_with"].startswith("ds4jax train --text ")
    assert len(said["ds4jax.corpus_sha256"]) == 64
    assert 0 < said["ds4jax.baseline_bits_per_byte"] < 8
    assert 0 < said["ds4jax.validation_bits_per_byte"] < 8


@pytest.mark.long
def test_export_from_weights_alone_gives_the_same_file(trained: Path, tmp_path: Path) -> None:
    for path in (trained / "run").glob("weights-*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert run("--resume", tmp_path, "--steps", 0, "--export", tmp_path / "again.gguf") == 0
    assert (tmp_path / "again.gguf").read_bytes() == (trained / "model.gguf").read_bytes()


@pytest.mark.long
def test_size_is_foretold(trained: Path) -> None:
    from ds4jax.training.export import file_size

    loaded = checkpoint.load_run(trained / "run")
    actual = (trained / "model.gguf").stat().st_size
    assert abs(file_size(loaded.recipe.model_config(), loaded.vocabulary) - actual) < 4000


@pytest.mark.long
def test_stopped_and_resumed_run_ends_with_the_same_bits(
    trained: Path, micro_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at step 7, between any other pauses of the uninterrupted run."""
    from ds4jax.training import session

    monkeypatch.setattr(session.Session, "_must_stop", lambda self: int(self.state.step) >= 7)
    words = (*micro_options, "--steps", 50, "--steps-per-call", 7, "--report-seconds", 1000)
    assert run(*words, "--out", tmp_path / "run") == 0
    assert checkpoint.load_run(tmp_path / "run").step == 7
    monkeypatch.undo()
    assert run("--resume", tmp_path / "run", "--steps-per-call", 13, "--report-seconds", 1000) == 0
    whole, resumed = (load_file(folder / "run" / checkpoint.STATE) for folder in (trained, tmp_path))
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(resumed[name], value, err_msg=name)
    steps = [entry["step"] for entry in read_log(tmp_path / "run" / "log.jsonl") if "loss" in entry]
    assert steps == [7, 13, 26, 39, 50]


@pytest.mark.skipif(os.name != "posix", reason="signals are sent the POSIX way")
@pytest.mark.slow
def test_request_to_terminate_saves_and_ends(micro_options: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "ds4jax", "train", *micro_options, "--steps", "50", "--out", str(folder)]
    # Every step is told, which says that the run listens to signals, and evaluated, which leaves time to send one.
    command += ["--report-seconds", "0.001", "--steps-per-call", "1", "--evaluate-every", "1"]
    environment = os.environ | {"JAX_PLATFORMS": jax.default_backend()}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        seen: list[str] = []
        for line in process.stderr:
            if line.startswith("step ") and not any(other.startswith("step ") for other in seen):
                process.send_signal(signal.SIGTERM)
            seen.append(line)
    assert process.returncode == 0, seen
    assert any("continue with --resume" in line for line in seen)
    assert 1 <= checkpoint.load_run(folder).step < 50


@pytest.mark.slow
def test_average_follows_the_weights_and_routers_are_steered(trained: Path, text_file: Path) -> None:
    loaded = checkpoint.load_run(trained / "run")
    recipe, network = loaded.recipe, Network.of(loaded.recipe.model_config())
    params, tables = network.initial(recipe.seed), network.tables(recipe.seed)
    optimizer = make_optimizer(recipe, params)
    before = initial_state(params, optimizer)
    corpus = data.read_corpus(text_file, recipe.held_out_chapters, recipe.validation_chapters)
    streams = data.Segmenter(loaded.vocabulary, corpus.train).streams(recipe.segmentations, recipe.bpe_dropout, recipe.seed)
    steps = jax.jit(make_steps(network, recipe, phases(recipe)[0], optimizer), donate_argnums=0)
    start = {name: np.asarray(value) for name, value in params.items()}
    later, sums = steps(before, streams, tables, jnp.int32(2))
    assert int(later.step) == 2
    assert np.isfinite(float(sums["loss"]))
    moved = {name for name, value in start.items() if np.any(value != np.asarray(later.params[name]))}
    assert moved == set(start)
    # Two steps of the warm-up of five: the learning rate was 0 and then a fifth of the highest.
    bias = np.asarray(later.params["layers.1.ffn.gate.bias"])
    np.testing.assert_allclose(np.abs(bias[bias != 0]), recipe.balance_rate / 5, rtol=1e-5)
    # The first step left all as it was; the average of the second keeps 2/11 of that.
    end, average = np.asarray(later.params["embed.weight"]), np.asarray(later.average["embed.weight"])
    np.testing.assert_allclose(average, 2 / 11 * start["embed.weight"] + 9 / 11 * end, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--text", "none.txt"], "none.txt: No such file"),
        (["--steps", "many"], "--steps: invalid int value"),
        (["--step", "5"], "unrecognized arguments"),
        (["--resume", "."], "no checkpoint.safetensors and no weights"),
        (["--resume", ".", "--out", "."], "--out: a resumed run stays"),
        (["--vocab-size", "100"], "--vocab-size: 100 is too small"),
        (["--time-limit", "0"], "--time-limit: 0 is out of range"),
    ],
)
def test_wrong_input_is_one_line(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        run(*words)
    assert exit_info.value.code == 2
    line = capsys.readouterr().err
    assert said in line
    assert line.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_folder_with_a_run_is_not_overwritten(
    tmp_path: Path, micro_options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / checkpoint.STATE).write_bytes(b"hours of work")
    with pytest.raises(SystemExit):
        run(*micro_options, "--out", tmp_path)
    assert "already holds a run" in capsys.readouterr().err
    assert (tmp_path / checkpoint.STATE).read_bytes() == b"hours of work"


@pytest.mark.parametrize("name", ["text", checkpoint.STATE])
def test_an_export_never_replaces_what_training_reads(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_bytes(b"words")
    (tmp_path / checkpoint.STATE).write_bytes(b"hours of work")
    os.link(tmp_path / name, tmp_path / "link")
    with pytest.raises(SystemExit) as ended:
        run("--text", tmp_path / "text", "--resume", tmp_path, "--steps", 0, "--export", tmp_path / "link")
    assert ended.value.code == 2
    assert f"--export {tmp_path / 'link'}: is {tmp_path / name}, an input of the training" in capsys.readouterr().err
    assert (tmp_path / name).read_bytes() in (b"words", b"hours of work")


def test_file_of_something_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / checkpoint.STATE).write_bytes(b"not safetensors at all")
    with pytest.raises(SystemExit):
        run("--resume", tmp_path)
    assert "not a file of a training run" in capsys.readouterr().err
