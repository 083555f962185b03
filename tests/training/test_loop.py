"""A batch in parts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax.training.loop import batch_gradients


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    """With a small function in the place of the model's loss; it draws nothing at random."""

    def objective(params: dict, tables: dict, windows: jax.Array, noise: jax.Array, key: jax.Array) -> tuple:
        losses = jnp.mean((params["a"] * windows.astype(jnp.float32) - tables["b"] - noise) ** 2, axis=1)
        return jnp.mean(losses), ({"nll": jnp.mean(windows.astype(jnp.float32))}, {"load": jnp.sum(windows, axis=0)})

    gradient = jax.value_and_grad(objective, has_aux=True)
    params, tables = {"a": jnp.arange(5.0)}, {"b": jnp.ones(5)}
    windows = jnp.asarray(np.random.default_rng(0).integers(0, 9, (6, 5)), jnp.int32)
    results = [batch_gradients(gradient, n, params, tables, windows, jnp.float32(0.5), jax.random.key(0)) for n in (1, 2, 3)]
    for result in results[1:]:
        jax.tree.map(lambda whole, part: np.testing.assert_allclose(part, whole, rtol=1e-5), results[0], result)
    np.testing.assert_array_equal(results[0][2]["load"], np.sum(windows, axis=0))


def test_each_part_has_its_own_random_numbers() -> None:
    def objective(params: dict, tables: dict, windows: jax.Array, noise: jax.Array, key: jax.Array) -> tuple:
        drawn = jax.random.randint(key, (), 0, 1000, jnp.int32)
        return params["a"], (
            {},
            {"first": jnp.where(windows[0, 0] == 0, drawn, 0), "second": jnp.where(windows[0, 0] == 1, drawn, 0)},
        )

    gradient = jax.value_and_grad(objective, has_aux=True)
    windows = jnp.asarray([[0], [1]], jnp.int32)
    _, _, drawn, _ = batch_gradients(gradient, 2, {"a": jnp.float32(1)}, {}, windows, jnp.float32(0), jax.random.key(0))
    assert drawn["first"] != drawn["second"]
