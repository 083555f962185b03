"""The DSpark block's loss: gradients for the block alone, what the drafter computes, and a block that learns."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ds4jax import Config
from ds4jax.cache.state import Rows
from ds4jax.decode.drafters.dspark import DSparkDrafter, slots
from ds4jax.model.dspark import DSPARK_PARAMETERS
from ds4jax.model.transformer import Transformer
from ds4jax.training.dspark import DSparkTeacher, dspark_loss, dspark_teacher
from ds4jax.training.tiny import tiny_config

TOKENS, BLOCK = 40, 3
DRAFT_AT = (0, 2, 17, 30, TOKENS - BLOCK - 2)
FLOATS = nnx.All(nnx.Param, lambda path, leaf: jnp.issubdtype(leaf.get_value().dtype, jnp.floating))


def configured(micro: dict) -> Config:
    fields = {"n_layers": 1, "compress_ratios": (0,), "n_mtp": 0, "n_dspark": 1, "dspark_block": BLOCK, "dspark_layers": (0,)}
    return dataclasses.replace(tiny_config(300), **(micro | fields | {"dspark_noise_id": 2, "dspark_rank": 8}))


@pytest.fixture(scope="module")
def model(micro: dict) -> Transformer:
    return Transformer(configured(micro), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def window() -> jax.Array:
    """A period of seven tokens, which a block can learn in a few steps."""
    return jnp.asarray(np.arange(TOKENS) % 7 + 40, jnp.int32)


@pytest.fixture(scope="module")
def known(model: Transformer) -> DSparkTeacher:
    """Random values, which need no program."""
    rng = np.random.default_rng(1)
    means, logits = (jnp.asarray(rng.standard_normal((TOKENS - 1, size)), jnp.float32) for size in (model.config.dim, 300))
    return DSparkTeacher((means,), logits)


@pytest.fixture(scope="module")
def gradients(window: jax.Array, known: DSparkTeacher):
    """Loss, its parts and the gradient of every float parameter, as one program of the model."""

    def loss(model: Transformer) -> tuple[jax.Array, dict[str, jax.Array]]:
        return dspark_loss(model, window, jnp.asarray(DRAFT_AT), known=known, distill=0.0)

    return jax.jit(nnx.value_and_grad(loss, argnums=nnx.DiffState(0, FLOATS), has_aux=True))


def test_only_the_block_has_a_gradient(model: Transformer, gradients) -> None:
    (_, parts), gradient = gradients(model)
    assert parts["agreement"].shape == (BLOCK,)
    assert 0 <= parts["accepted"] <= BLOCK
    trained = 0
    for path, leaf in nnx.to_flat_state(gradient):
        value, name = np.asarray(leaf.get_value()), ".".join(map(str, path))
        assert np.isfinite(value).all(), name
        # The router's bias decides a choice, which has no gradient.
        if path[0] != "dspark" or name.endswith("gate.bias"):
            assert not value.any(), name
        else:
            assert value.any(), name
            trained += 1
    assert trained > 25


@pytest.mark.long
def test_the_loss_falls(model: Transformer, gradients) -> None:
    graph, head, rest = nnx.split(model, DSPARK_PARAMETERS, ...)
    optimizer = optax.adam(1e-2)
    state, losses = optimizer.init(head), []
    for _ in range(25):
        (loss, parts), gradient = gradients(nnx.merge(graph, head, rest))
        # optax mixes floats with int32 counts.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(nnx.filter_state(gradient, DSPARK_PARAMETERS), state, head)
        head = optax.apply_updates(head, updates)
        losses.append((float(loss), float(parts["nll"])))
    assert losses[-1][0] < 0.5 * losses[0][0]
    assert losses[-1][1] < 0.3 * losses[0][1]


@pytest.mark.long
def test_blocks_are_the_drafters(model: Transformer, window: jax.Array, known: DSparkTeacher) -> None:
    """The drafter fills its rings by committing the window up to each position. Its slots give the same loss."""
    drafter, count = DSparkDrafter(), TOKENS - 1

    @jax.jit
    def nll(last: jax.Array) -> jax.Array:
        empty = drafter.init(model.config, TOKENS, BLOCK + 1, 1)
        rows = Rows.following(jnp.int32(0), count, last + 1)
        state = drafter.commit(model, empty, jnp.zeros((count, 4, 32)), window[1:], rows, list(known.means))
        follow = last + 2 + jnp.arange(BLOCK)
        start = (window[last + 1][None], (last + 1)[None], jnp.ones(1, bool), BLOCK)
        made = slots(model, state, *start, lambda i, logits: (window[follow[i]][None], logits), strict=False)
        chosen = [jax.nn.log_softmax(slot.logits[0])[window[place]] for slot, place in zip(made, follow, strict=True)]
        return -jnp.mean(jnp.stack(chosen))

    _, parts = jax.jit(dspark_loss)(model, window, jnp.asarray(DRAFT_AT), known=known)
    np.testing.assert_allclose(parts["nll"], np.mean([nll(jnp.int32(last)) for last in DRAFT_AT]), rtol=1e-5)


@pytest.mark.long
def test_every_position_and_a_teacher_of_its_own(model: Transformer, window: jax.Array) -> None:
    known = jax.jit(dspark_teacher)(model, window)
    assert [mean.shape for mean in known.means] == [(TOKENS - 1, model.config.dim)]
    loss, _ = jax.jit(dspark_loss)(model, window)
    every = jnp.arange(TOKENS - BLOCK - 1)
    np.testing.assert_allclose(loss, jax.jit(dspark_loss)(model, window, every, known=known)[0], rtol=1e-5)


def test_a_model_without_the_block(micro: dict, window: jax.Array) -> None:
    bare = Transformer(dataclasses.replace(configured(micro), n_dspark=0), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="^the model has no DSpark block, so there is no DSpark loss$"):
        dspark_loss(bare, window)
