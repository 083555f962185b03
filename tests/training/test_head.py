"""Training a draft head alone by the command: its file, its model, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import ds4jax
from ds4jax import InputError
from ds4jax.bounds import SHIPPED
from ds4jax.cli.main import main
from ds4jax.loading.gguf_split import open_set
from ds4jax.model.parameters import values
from ds4jax.training.continuations import lengths, text_windows
from ds4jax.training.data import read_corpus
from ds4jax.training.export import export_gguf
from ds4jax.training.head_file import HeadFile
from ds4jax.training.head_recipe import HeadRecipe
from ds4jax.training.head_run import HeadTraining, Lesson
from ds4jax.training.heads import HEAD, prepared
from ds4jax.training.network import Network
from ds4jax.training.recipe import Recipe
from ds4jax.training.session import begin


def run(*words: object) -> int:
    return main(["train", *map(str, words)])


def test_windows_are_of_the_text() -> None:
    ids, rng = np.arange(100, 200, dtype=np.int32), np.random.default_rng(0)
    windows = text_windows(ids, 50, 40, 7, rng)
    assert windows.shape == (50, 40)
    assert np.all(windows[:, 0] == 7)
    assert np.all(np.diff(windows[:, 1:]) == 1)
    assert windows[:, 1:].min() >= 100
    assert windows.max() <= 199
    assert len(np.unique(windows[:, 1])) > 10
    some = lengths(50, 40, rng)
    assert 5 <= some.min() < 10
    assert 20 < some.max() <= 25


@pytest.mark.long
def test_a_new_head_is_written_and_read_again(tmp_path: Path) -> None:
    """Before any step. The stages begin as the MTP block, and the last tap goes through the projection."""
    opened = ds4jax.load(max_draft=0)
    assert opened.tokenizer is not None
    recipe = HeadRecipe(stages=2, block=4, rank=32)
    model = prepared("dspark", opened.float_model(), opened.tokenizer, recipe)
    training = HeadTraining(HEAD["dspark"], model, recipe, *[Lesson(jnp.zeros((1, 32), jnp.int32), ())] * 2)
    path = tmp_path / "dspark-new.gguf"
    HeadFile(path, "dspark", SHIPPED, "a command", recipe, "0" * 64).write(training, {"loss": 1.5})
    read = ds4jax.load(drafter_file=path)
    config = read.config
    assert (config.n_dspark, config.dspark_block, config.dspark_rank, config.dspark_layers) == (2, 4, 32, (3, 4, 5))
    assert config.dspark_noise_id == opened.tokenizer.marker_id("<｜▁pad▁｜>")
    assert (read.drafter_name, read.max_draft) == ("dspark", 4)
    before, after = values(training.model), values(read.float_model())
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_allclose(after[name], value, atol=np.abs(value).max() / 127 + 1e-6, err_msg=name)
    block = values(opened.float_model())
    for stage in range(2):
        np.testing.assert_array_equal(before[f"dspark.stages.{stage}.attn.wkv.weight"], block["mtp.0.attn.wkv.weight"])
    np.testing.assert_array_equal(before["dspark.main_proj.weight"][:, -config.dim :], np.eye(config.dim))


@pytest.mark.long
def test_an_mtp_block_is_written_and_read_again(tmp_path: Path) -> None:
    opened = ds4jax.load(max_draft=0)
    assert opened.tokenizer is not None
    recipe = HeadRecipe()
    model = prepared("mtp", opened.float_model(), opened.tokenizer, recipe)
    training = HeadTraining(HEAD["mtp"], model, recipe, *[Lesson(jnp.zeros((1, 32), jnp.int32), ())] * 2)
    path = tmp_path / "mtp-new.gguf"
    HeadFile(path, "mtp", SHIPPED, "a command", recipe, "0" * 64).write(training, {})
    read = ds4jax.load(drafter_file=path)
    stored, again = (values_of_mtp(model) for model in (opened, read))
    assert stored.keys() == again.keys()
    for name, value in stored.items():
        np.testing.assert_allclose(again[name], value, atol=np.abs(value).max() / 2000, err_msg=name)


def values_of_mtp(model: ds4jax.LanguageModel) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in values(model.float_model()).items() if name.startswith("mtp.")}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--anchors", 4), "--anchors: counts only with --head; leave it out"),
        (("--model", SHIPPED), "--model: counts only with --head; leave it out"),
        (("--head", "dspark"), "--export: with --head, give the file to write"),
        (("--head", "dspark", "--vocab-size", 300), "--vocab-size: does not count with --head; leave it out"),
        (("--head", "mtp", "--out", "folder"), "--out: a run with --head has no folder; give the file to write with --export"),
    ],
)
def test_options_that_do_not_belong_together(words: tuple, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*words)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"ds4jax: error: {message}\n"


def test_out_of_range() -> None:
    with pytest.raises(InputError, match="^--rank: 10 is no multiple of 32, the block of Q8_0$"):
        HeadRecipe(rank=10)
    with pytest.raises(InputError, match="^--written: 2 is too large; it must be at most 1.0$"):
        HeadRecipe(written=2)


@pytest.fixture(scope="module")
def micro_model(micro: dict, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of the smallest model that has every part, with random weights."""
    recipe = Recipe(text=str(text_file), held_out_chapters=2, validation_chapters=2, vocab_size=300, config=json.dumps(micro),
                    context=48, long_share=0.0)  # fmt: skip
    run = begin(recipe, read_corpus(text_file, 2, 2), "")
    network = Network.of(recipe.model_config())
    weights = {name: np.asarray(value) for name, value in (network.initial(0) | network.tables(0)).items()}
    path = tmp_path_factory.mktemp("micro") / "micro.gguf"
    export_gguf(run, weights, path, {})
    return path


@pytest.mark.slow
def test_a_head_from_a_text_to_drafts(micro_model: Path, text_file: Path, tmp_path: Path) -> None:
    """Twice the same bytes; the head drafts, and no token changes. A further run goes on from the file."""
    size = ("--context", 48, "--batch", 2, "--windows", 8, "--anchors", 2, "--stages", 1, "--block", 3, "--rank", 32)
    split = ("--held-out-chapters", 2, "--validation-chapters", 2, "--text", text_file, "--model", micro_model)
    command = ("--head", "dspark", *split, *size, "--steps", 3, "--evaluate-every", 3)
    first, second, further = (tmp_path / f"dspark-{name}.gguf" for name in ("first", "second", "further"))
    assert run(*command, "--export", first) == 0
    assert run(*command, "--export", second) == 0
    assert first.read_bytes() == second.read_bytes()
    said = {key: entry.value for key, entry in open_set(first).metadata.items()}
    assert said["general.architecture"] == "dflash"
    assert said["ds4jax.training_steps"] == 3
    assert said["ds4jax.trained_with"].startswith("ds4jax train --head dspark --model micro.gguf --text text.txt ")
    model = ds4jax.load(micro_model, drafter_file=first)
    assert model.drafter_name == "dspark"
    options = {"max_new_tokens": 24, "ignore_eos": True, "strict": True}
    drafted, plain = (model.generate([5, 6, 7], draft=depth, **options) for depth in (3, 0))
    assert drafted.ids == plain.ids
    assert run(*command, "--drafter-file", first, "--export", further) == 0
    assert further.read_bytes() != first.read_bytes()
