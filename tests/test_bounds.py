"""What options may be: numbers of Python, numpy and JAX alike, and one line that names the field for anything else."""

from __future__ import annotations

import fractions
import functools
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from numerics import golden_model

import ds4jax
from ds4jax import bounds
from ds4jax.engine.options import Options
from ds4jax.errors import InputError
from ds4jax.language_model import LanguageModel

IDS = [3, 1, 4, 1, 5]
INTEGERS: dict[str, tuple[Any, ...]] = {
    "max_new_tokens": (0, -1, 1.5, 3.0, "3", None, True, [3], np.float64(3), np.True_, np.array([3])),
    "chunk": (0, -1, 1.5, "32", False, np.float32(8), float("nan")),
    "draft": (-1, 8, 1.0, "deep", True, "", [1], np.array(["auto"]), np.float64(1)),
}
FLAGS = (None, "yes", 2, 1.0, [], np.int64(3), np.array([True]))
NUMBERS: dict[str, tuple[Any, ...]] = {
    "temperature": (-1, "1", None, float("inf"), float("nan"), True, 1j, [1.0], np.float32("nan"), 10**400),
    "top_k": (-1, 1.5, "3", None, True, 3.0),
    "top_p": (0, 1.5, "1", None, True, np.float64(0)),
    "min_p": (-0.1, 1.1, "0", None, False),
    "seed": (1.5, "a", True, 2**63, -(2**63) - 1, np.float64(1)),
}


@functools.cache
def model() -> LanguageModel:
    return golden_model()


def refused(field: str, action: Any, *arguments: Any, **options: Any) -> None:
    with pytest.raises(InputError) as raised:
        action(*arguments, **options)
    message = str(raised.value)
    assert message.startswith(f"{field.replace('_', '-')} is "), message
    assert "\n" not in message
    assert len(message) < 200


@pytest.mark.parametrize("field", INTEGERS)
def test_an_option_that_is_no_such_integer_is_named(field: str) -> None:
    for value in INTEGERS[field]:
        refused(field, Options, **{field: value})


@pytest.mark.parametrize("field", NUMBERS)
def test_sampling_that_is_no_such_number_is_named(field: str) -> None:
    for value in NUMBERS[field]:
        refused(field, ds4jax.Sampling, **{field: value})


def test_other_options_are_named() -> None:
    for value in FLAGS:
        refused("ignore_eos", Options, ignore_eos=value)
        refused("strict", Options, strict=value)
    for value in ({"temperature": 1}, None, 0.5, ds4jax.Sampling):
        refused("sampling", Options, sampling=value)
    for value in (5, "mtp", object()):
        refused("drafter", Options, drafter=value)


def test_numbers_of_numpy_and_jax_are_those_of_python() -> None:
    """Normalised, so that what is saved with them can be written down."""
    for make in (np.int64, np.uint8, np.array, jnp.int32):
        options = Options(
            max_new_tokens=make(3), chunk=make(32), draft=make(1), sampling=ds4jax.Sampling(seed=make(5), top_k=make(2))
        )
        assert options == Options(max_new_tokens=3, chunk=32, draft=1, sampling=ds4jax.Sampling(seed=5, top_k=2))
        found = [options.max_new_tokens, options.chunk, options.draft, options.sampling.seed, options.sampling.top_k]
        assert {type(value) for value in found} == {int}
    for half in (np.float32(0.5), np.float64(0.5), jnp.float32(0.5), fractions.Fraction(1, 2)):
        sampling = ds4jax.Sampling(temperature=half, top_p=half, min_p=half)
        assert sampling == ds4jax.Sampling(0.5, 0, 0.5, 0.5)
        assert {type(value) for value in (sampling.temperature, sampling.top_p, sampling.min_p)} == {float}
    assert type(ds4jax.Sampling(temperature=1).temperature) is float
    assert Options(strict=np.True_).strict is True


def test_a_long_value_is_shown_in_part() -> None:
    found = bounds.shown("word\n" * 100)
    assert (found[:12], found[-3:], len(found)) == ("'word\\nword\\", "...", 60)


def test_calls_of_a_model_name_what_they_cannot_take() -> None:
    for value in (1.5, "3", True, -1, 5, np.float64(2)):
        refused("max_draft", ds4jax.load, max_draft=value)
        refused("max_draft", model().with_max_draft, value)
    refused("qat", ds4jax.load, qat="yes")
    for value in (1.5, "3", True, -1, 9):
        refused("decode_from", model().logits, IDS, decode_from=value)
    for value in (1.5, "3", True, 0):
        refused("chunk", model().logits, IDS, chunk=value)
    refused("mtp", model().logits, IDS, mtp="yes")
    assert model().with_max_draft(np.int64(1)).max_draft == 1


@pytest.mark.parametrize("ids", [[[1], [2, 3]], [1, [2]], ["a", [2]], [1.5], [True], b"x", [2**70], {1: 2}, [None]])
def test_ids_that_are_no_list_of_integers(ids: Any) -> None:
    with pytest.raises(InputError, match="^token ids are ") as raised:
        model().checked(ids)
    assert "\n" not in str(raised.value)


def test_a_budget_is_a_number_of_tokens(tmp_path: Path) -> None:
    """And a session that was given numpy's numbers is saved."""
    options = {
        "max_new_tokens": np.int64(4),
        "draft": np.int32(1),
        "chunk": np.int64(32),
        "ignore_eos": np.True_,
        "strict": np.True_,
    }
    session = ds4jax.Session(model(), sampling=ds4jax.Sampling(temperature=np.float32(0.5), seed=np.int64(5)), **options)
    generation = session.stream(np.array(IDS, np.uint16))
    for budget in (1.5, "2", None, True):
        refused("budget", generation.advance, budget)
    assert generation.advance(-1) == []
    first = generation.advance(np.int64(2))
    assert len(first) == 2
    session.save(tmp_path / "kept")
    with pytest.raises(InputError, match="^draft is 3, but the model of .* was opened with max_draft 2$"):
        ds4jax.restore(tmp_path / "kept", draft=3)
    for name, value in (("sampling", None), ("chunk", 1.5), ("draft", 9), ("max_new_tokens", "3")):
        refused(name, ds4jax.restore, tmp_path / "kept", model(), **{name: value})
    assert ds4jax.restore(tmp_path / "kept", model(), draft=np.int64(1)).ids == tuple(first)


def test_drafts_that_a_model_was_not_opened_for_are_refused_before_a_prompt_is_read() -> None:
    with pytest.raises(InputError, match="^draft is 3, but the model was opened with max_draft 2$"):
        ds4jax.Session(model(), draft=3)
    with pytest.raises(InputError, match="^draft is auto, but the model was opened with max_draft 0$"):
        ds4jax.Session(model().with_max_draft(0), draft="auto")
    refused("sampling", ds4jax.Session, model(), sampling=None)
