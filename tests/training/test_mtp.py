"""The MTP block's loss: the same number as a whole training run's, and gradients for the block alone."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ds4jax
from ds4jax import Config, InputError, LanguageModel
from ds4jax.model.forward import score
from ds4jax.model.mtp import MTP_PARAMETERS
from ds4jax.model.transformer import Transformer
from ds4jax.training.loss import mtp_parts
from ds4jax.training.mtp import mtp_loss, teacher
from ds4jax.training.tiny import tiny_config
from pallas_kernels.formats import Quantized

DRAWN = 24


def configured(fields: dict) -> Config:
    return dataclasses.replace(tiny_config(300), **(fields | {"compress_ratios": tuple(fields["compress_ratios"])}))


@pytest.fixture(scope="module")
def model(micro: dict) -> Transformer:
    return Transformer(configured(micro), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def window() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, 300, DRAWN), jnp.int32)


@pytest.mark.slow
def test_is_the_loss_of_a_whole_run(model: Transformer, window: jax.Array) -> None:
    loss, parts = jax.jit(mtp_loss, static_argnames="distill")(model, window, distill=0.25)
    logits, mtp = jax.jit(score)(model, window[:-1])
    expected = mtp_parts(logits, mtp, window, 0.25)
    np.testing.assert_allclose(loss, expected["mtp_loss"], rtol=1e-5)
    np.testing.assert_allclose(parts["mtp_nll"], expected["mtp_nll"], rtol=1e-5)
    assert parts["agreement"] == expected["agreement"]


@pytest.mark.long
def test_only_the_block_has_a_gradient(model: Transformer, window: jax.Array) -> None:
    floats = nnx.All(nnx.Param, lambda path, leaf: jnp.issubdtype(leaf.get_value().dtype, jnp.floating))
    gradient = jax.jit(nnx.grad(lambda model: mtp_loss(model, window)[0], argnums=nnx.DiffState(0, floats)))(model)
    trained = 0
    for path, leaf in nnx.to_flat_state(gradient):
        value, name = np.asarray(leaf.get_value()), ".".join(map(str, path))
        assert np.isfinite(value).all(), name
        # The router's bias decides a choice, which has no gradient.
        if path[0] != "mtp" or name.endswith("gate.bias"):
            assert not value.any(), name
        else:
            trained += bool(value.any())
    assert trained > 20


@pytest.mark.slow
def test_with_a_teacher_that_is_known(model: Transformer, window: jax.Array) -> None:
    known = jax.jit(teacher)(model, window)
    assert known.h_TND.shape[0] == known.logits_TV.shape[0] == DRAWN - 1
    loss = jax.jit(lambda model, known: mtp_loss(model, window, known=known)[0])(model, known)
    np.testing.assert_allclose(loss, jax.jit(mtp_loss)(model, window)[0], rtol=1e-5)


def test_a_model_without_the_block(micro: dict, window: jax.Array) -> None:
    bare = Transformer(configured(micro | {"n_mtp": 0}), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="^the model has no MTP block, so there is no MTP loss$"):
        mtp_loss(bare, window)
    language = LanguageModel(bare, None)
    with pytest.raises(InputError, match="^with_mtp_of: "):
        language.with_mtp_of(bare)


@pytest.mark.long
def test_float_model_has_the_same_values() -> None:
    """What quantised weights stand for, in float32, and tables as they are."""
    shipped = ds4jax.load()
    floats = dict(nnx.to_flat_state(nnx.state(shipped.float_model())))
    for path, leaf in nnx.to_flat_state(shipped.weights):
        stored, value = leaf.get_value(), floats[path].get_value()
        if isinstance(stored, Quantized):
            stored = stored.dequantize()
        assert value.dtype == (jnp.int32 if stored.dtype == jnp.int32 else jnp.float32)
        np.testing.assert_array_equal(value, stored)


@pytest.mark.slow
def test_another_block_drafts_and_changes_nothing(model: Transformer) -> None:
    plain = LanguageModel(model, None, max_draft=1)
    graph, mtp, rest = nnx.split(model, MTP_PARAMETERS, ...)
    other = nnx.merge(graph, jax.tree.map(lambda leaf: leaf + jnp.float32(0.5), mtp), rest)
    tuned = plain.with_mtp_of(other)
    before = plain.generate([5, 6, 7], max_new_tokens=12, ignore_eos=True)
    after = tuned.generate([5, 6, 7], max_new_tokens=12, ignore_eos=True)
    assert after.ids == before.ids
    ids = np.arange(5, 25)
    assert np.abs(tuned.logits(ids, mtp=True)["mtp_logits"] - plain.logits(ids, mtp=True)["mtp_logits"]).max() > 0.1
    np.testing.assert_array_equal(tuned.logits(ids)["logits"], plain.logits(ids)["logits"])
