"""What a run may be, and the shape of the tiny model."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest

from ds4jax.errors import InputError
from ds4jax.loading.gguf_names import slots
from ds4jax.model import parameters
from ds4jax.training.data import Vocabulary
from ds4jax.training.export import file_size, stored_types
from ds4jax.training.recipe import Phase, Recipe, phases
from ds4jax.training.tiny import hash_table, tiny_config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch": 0}, "--batch: 0 is too small"),
        ({"dropout": 1.5}, "--dropout: 1.5 is too large"),
        ({"dropout": 1.0}, "--dropout: 1 would leave nothing"),
        ({"optimizer": "sgd"}, "--optimizer: 'sgd' is not one of adamw, muon"),
        ({"microbatches": 3}, "--microbatches: 3 does not divide"),
        ({"config": "{"}, "--config-json: not JSON"),
        ({"config": "[]"}, "--config-json: not a JSON object"),
        ({"config": '{"depth": 3}'}, "--config-json: depth is no field"),
        ({"config": '{"dim": -1}'}, "--config-json: dim is -1"),
        ({"context": 5000}, "--context: windows are longer"),
        ({"long_context": 5000}, "--context: windows are longer"),
    ],
)
def test_impossible_recipes_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        Recipe(**fields)


def test_phases_follow_each_other_and_keep_the_tokens_of_a_step() -> None:
    recipe = Recipe(steps=100, dense_share=0.2, long_share=0.3, batch=64, context=512, long_context=1024)
    assert phases(recipe) == (Phase(20, 512, 64, True), Phase(70, 512, 64, False), Phase(100, 1024, 32, False))
    assert phases(dataclasses.replace(recipe, dense_share=0.0, long_share=0.0)) == (Phase(100, 512, 64, False),)
    assert phases(dataclasses.replace(recipe, dense_share=1.0)) == (Phase(100, 512, 64, True),)
    assert phases(dataclasses.replace(recipe, steps=0)) == ()
    long = phases(dataclasses.replace(recipe, batch=6, microbatches=2, long_context=1000))[-1]
    assert long.batch == 2


def test_tiny_model_has_every_part_and_fits_the_file() -> None:
    config = tiny_config(1024)
    assert {0, 4, 128} == set(config.layer_ratios)
    assert (config.n_hash_layers, config.n_mtp, config.hc_mult, config.window) == (1, 1, 4, 128)
    assert 512 // 4 > config.index_topk
    assert not config.qat
    vocabulary = Vocabulary(("abcd",) * 1024, ("ab cd",) * 759)
    assert file_size(config, vocabulary) <= 9_500_000


def test_every_parameter_has_a_type_that_files_may_have() -> None:
    config = tiny_config(512)
    types = stored_types(config)
    assert types.keys() == parameters.shapes(config).keys()
    for slot in slots(config):
        assert types[slot.name] in slot.types
    assert types["embed.weight"] == types["layers.3.ffn.experts.w2.weight"] == types["mtp.0.e_proj.weight"] == "Q8_0"
    assert types["layers.1.attn.indexer.wq_b.weight"] == types["layers.1.hc_ffn_fn"] == "F16"
    assert types["layers.0.ffn.gate.tid2eid"] == "I32"


def test_matrix_that_q8_0_cannot_hold_is_refused() -> None:
    recipe = Recipe(config=json.dumps({"moe_dim": 48}))
    with pytest.raises(ValueError, match=r"w2.weight is .*multiple of 32"):
        file_size(recipe.model_config(), Vocabulary((), ()))


@pytest.mark.parametrize(("n_experts", "n_active"), [(8, 2), (5, 5), (4, 1), (1, 1)])
def test_hash_table_names_distinct_experts_evenly(n_experts: int, n_active: int) -> None:
    config = dataclasses.replace(tiny_config(1000), n_experts=n_experts, n_active=n_active)
    table = hash_table(config, seed=3)
    assert table.shape == (1000, n_active)
    assert table.dtype == np.int32
    assert all(len(set(row)) == n_active for row in table.tolist())
    for column in table.T:
        counts = np.bincount(column, minlength=n_experts)
        assert len(counts) == n_experts
        assert counts.max() - counts.min() <= n_experts
    np.testing.assert_array_equal(table, hash_table(config, seed=3))
    if n_experts > 1:
        assert np.any(table != hash_table(config, seed=4))
