"""Programs of different drafters: the same greedy tokens and the same bits, "none" included."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dspark_files import unpack
from numerics import arrays, assert_bits_equal, golden_transformer

import ds4jax
from ds4jax.bench.programs import randomised
from ds4jax.cache import state as caches
from ds4jax.cache.state import LayerCache, Rows
from ds4jax.decode.loop import fingerprint
from ds4jax.decode.width import ROOM
from ds4jax.language_model import LanguageModel
from ds4jax.model import decode_kernels
from ds4jax.model.transformer import Transformer
from ds4jax.random_models import checkpoint as synthetic
from ds4jax.random_models import layouts

TOKENS = 48


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LanguageModel]:
    """One model, golden model a, opened with each drafter."""
    with_mtp = golden_transformer()
    made = {name: LanguageModel(with_mtp, None, drafter=name) for name in ("none", "mtp", "ngram")}
    made["dspark"] = ds4jax.load(unpack(tmp_path_factory.mktemp("dspark")).hub, qat=False)
    return made


@pytest.mark.long
@pytest.mark.parametrize("strict", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_greedy_tokens_and_bits_are_those_of_every_other_drafter(models: dict[str, LanguageModel], strict: bool) -> None:
    prompt = arrays("dspark/golden")["greedy_prompt"]
    results = {name: one.generate(prompt, max_new_tokens=TOKENS, ignore_eos=True, strict=strict) for name, one in models.items()}
    assert {name: one.drafter for name, one in results.items()} == {name: name for name in models}
    assert {name: one.ids for name, one in results.items()} == dict.fromkeys(models, results["none"].ids)
    for one in results.values():
        assert_bits_equal(one.fingerprints, results["none"].fingerprints)
    assert results["dspark"].steps < results["none"].steps == TOKENS


START = 255


def filled(config: Any, slack: int) -> tuple[LayerCache, ...]:
    """Caches of a sequence of 255 rows. Its rows are the same for every slack, at their places of longer or shorter rings."""
    shortest = randomised(caches.empty(config, 512, slack=1).layers, "rows")

    def placed(path: tuple, like: jax.Array, rows: jax.Array) -> jax.Array:
        if jax.tree_util.keystr(path).endswith(".rows"):
            # Compressed rows lie at position // ratio.
            return like.at[:, : rows.shape[1]].set(rows)
        position = np.arange(START - rows.shape[1], START)
        return like.at[:, position % like.shape[1]].set(rows[:, position % rows.shape[1]])

    return jax.tree_util.tree_map_with_path(placed, caches.empty(config, 512, slack=slack).layers, shortest)


@pytest.mark.gpu
@pytest.mark.parametrize("ratio", [0, 4, 128])
def test_kernels_give_a_row_the_same_bits_in_the_step_of_every_drafter(ratio: int) -> None:
    """The rows of none, MTP and DSpark, of which the first is live; one layer and the head.

    Not in interpret mode: there a CPU's code for these numbers of rows ends in other last bits.
    """
    config = dataclasses.replace(layouts.SMALL_Q2, n_layers=1, n_hash_layers=0, compress_ratios=(ratio, 0))
    model: Transformer = synthetic.synthetic(synthetic.checkpoint(config, "small-q2"))
    one_1ND = synthetic.spread_numbers((1, config.hc_mult, config.dim), jnp.dtype("float32"), 1.0, jnp.uint32(5))
    head = (part.get_value() for part in (model.head.weight, model.norm.weight))
    head_of = functools.partial(decode_kernels.logits, config, *head)
    fn, scale, base = (getattr(model, f"hc_head_{name}").get_value() for name in ("fn", "scale", "base"))

    def step(max_draft: int) -> tuple[jax.Array, jax.Array]:
        width = 1 + max_draft
        rows = Rows.step(jnp.array([START]), width, jnp.ones(1, jnp.int32))
        ids, h_TND = jnp.full(width, 77, jnp.int32), jnp.repeat(one_1ND, width, axis=0)
        held = filled(config, ROOM)
        h_TND, _, _ = decode_kernels.layers(config, list(model.layers), h_TND, ids, rows, held)
        return h_TND[0], fingerprint(head_of(fn=fn, scale=scale, base=base, h_TND=h_TND))[0]

    with jax.default_matmul_precision("highest"):
        plain = step(0)
        for max_draft in (2, 5):
            for made, expected in zip(step(max_draft), plain, strict=True):
                assert_bits_equal(made, expected)
