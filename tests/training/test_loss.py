"""The parts of the loss, the noise in it, and which weights each rule is for."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ds4jax.model.forward import score
from ds4jax.training import loss
from ds4jax.training.network import Network, Weights
from ds4jax.training.optimizer import is_dropped_matrix, is_dropped_norm, is_hidden_matrix, is_matrix, make_optimizer
from ds4jax.training.recipe import Recipe


@pytest.fixture(scope="module")
def recipe(micro: dict[str, object]) -> Recipe:
    return Recipe(vocab_size=300, config=json.dumps(micro), context=48, long_share=0.0, steps=10, warmup=0)


@pytest.fixture(scope="module")
def network(recipe: Recipe) -> Network:
    return Network.of(recipe.model_config())


@pytest.fixture(scope="module")
def weights(network: Network) -> tuple[Weights, Weights]:
    return network.initial(0), network.tables(0)


@pytest.mark.long
def test_matrices_alone_are_decayed(weights: tuple[Weights, Weights]) -> None:
    params, _ = weights
    for name, value in params.items():
        part = name.split(".")[-2] if name.endswith((".weight", ".bias")) else name.split(".")[-1]
        spared = "norm" in part or part.startswith(("hc_", "attn_sink", "ape")) or name.endswith(".bias")
        assert is_matrix(name, value.ndim) == (not spared), name


def test_muon_takes_hidden_matrices_alone(weights: tuple[Weights, Weights]) -> None:
    params, _ = weights
    hidden = {name for name, value in params.items() if is_hidden_matrix(name, value.ndim)}
    matrices = {name for name, value in params.items() if is_matrix(name, value.ndim)}
    outer = matrices - hidden
    assert {"embed.weight", "head.weight", "layers.1.ffn.gate.weight", "layers.1.attn.indexer.weights_proj.weight"} <= outer
    assert {"layers.0.attn.wq_a.weight", "layers.2.ffn.experts.w2.weight", "mtp.0.h_proj.weight"} <= hidden
    dropped = {name for name, value in params.items() if is_dropped_matrix(name, value.ndim)}
    assert dropped < hidden
    assert not any("compressor" in name or "indexer" in name for name in dropped)
    norms = {name for name in params if is_dropped_norm(name)}
    assert {"norm.weight", "layers.0.attn_norm.weight", "mtp.0.hnorm.weight", "mtp.0.ffn_norm.weight"} <= norms
    assert not any("q_norm" in name or "kv_norm" in name or "compressor" in name for name in norms)


@pytest.mark.parametrize("kind", ["adamw", pytest.param("muon", marks=pytest.mark.long)])
def test_without_a_gradient_only_decay_moves_weights(recipe: Recipe, weights: tuple[Weights, Weights], kind: str) -> None:
    params, _ = weights
    optimizer = make_optimizer(dataclasses.replace(recipe, optimizer=kind, learning_rate=0.5, weight_decay=0.1), params)

    @jax.jit
    def step(params: Weights) -> Weights:
        updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
        return optax.apply_updates(params, updates)

    with jax.numpy_dtype_promotion("standard"):
        moved = step(params)
    for name, value in params.items():
        factor = 0.95 if is_matrix(name, value.ndim) else 1.0
        np.testing.assert_allclose(moved[name], factor * value, rtol=1e-5, atol=1e-7, err_msg=name)


def test_initial_scales_are_for_the_embedding_and_what_writes_to_the_streams(
    network: Network, weights: tuple[Weights, Weights]
) -> None:
    params, _ = weights
    scaled = network.initial(0, embedding=4.0, output=0.5)
    writers = {name for name in params if np.any(np.asarray(scaled[name]) != np.asarray(params[name]))} - {"embed.weight"}
    ends = ("attn.wo_b.weight", "ffn.experts.w2.weight", "ffn.shared_experts.w2.weight")
    assert writers == {name for name in params if name.endswith(ends)}
    np.testing.assert_array_equal(scaled["embed.weight"], 4.0 * params["embed.weight"])
    np.testing.assert_array_equal(scaled["layers.1.attn.wo_b.weight"], 0.5 * params["layers.1.attn.wo_b.weight"])


def test_index_divergence_is_that_of_the_rows_attended_to() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(5, 7)).astype(np.float32)
    mass = rng.random((5, 2, 7)).astype(np.float32)
    visible = np.arange(7) < np.arange(5)[:, None] + 1
    visible[0] = False
    mass *= visible[:, None, :]
    expected = 0.0
    for t in range(1, 5):
        p = mass[t].mean(0)[visible[t]].astype(np.float64)
        p /= p.sum()
        q = np.exp(scores[t][visible[t]].astype(np.float64))
        q /= q.sum()
        expected += np.sum(p * np.log(p / q)) / 5
    shown = jnp.where(visible, scores, -jnp.inf)
    value, gradient = jax.value_and_grad(loss.index_divergence)(shown, jnp.asarray(mass))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert np.all(np.isfinite(gradient))
    assert np.all(np.asarray(gradient)[~visible] == 0)
    assert np.any(np.asarray(gradient)[visible] != 0)


def test_dropping_switches_off_the_share_and_keeps_the_mean(weights: tuple[Weights, Weights]) -> None:
    params, _ = weights
    dropped = loss.drop_weights(jax.random.key(1), params, 0.25)
    for name, value in params.items():
        if not is_dropped_matrix(name, value.ndim):
            assert dropped[name] is value
            continue
        off = np.asarray(dropped[name]) == 0
        np.testing.assert_allclose(np.asarray(dropped[name])[~off], np.asarray(value)[~off] / 0.75, rtol=1e-6)
    first, second = (np.asarray(dropped[f"layers.{i}.ffn.experts.w1.weight"]) == 0 for i in (0, 1))
    assert abs(first.mean() - 0.25) < 0.03
    assert np.any(first != second)
    assert loss.drop_weights(jax.random.key(1), params, 0.0) is params


def test_each_window_has_its_own_channels(recipe: Recipe, weights: tuple[Weights, Weights]) -> None:
    params, _ = weights
    dropped, axes = loss.drop_channels(jax.random.key(1), params, 0.5, 4)
    mapped = {name for name, axis in axes.items() if axis == 0}
    assert mapped == {name for name in params if is_dropped_norm(name)}
    masks = np.asarray(dropped["norm.weight"])
    assert masks.shape == (4, recipe.model_config().dim)
    assert set(np.unique(masks)) == {0.0, 2.0}
    assert len({row.tobytes() for row in masks}) == 4


def test_replaced_tokens_are_ordinary_and_as_many_as_asked() -> None:
    ids = jnp.full((50, 101), 7, jnp.int32)
    replaced = np.asarray(loss.replace_tokens(jax.random.key(0), ids, jnp.float32(0.2), 300))
    assert np.all(replaced[:, 0] == 7)
    assert abs((replaced[:, 1:] != 7).mean() - 0.2) < 0.02
    assert replaced.min() >= 3
    assert replaced.max() < 300 - 6


def test_router_biases_move_towards_equal_load() -> None:
    params = {"a.gate.bias": jnp.zeros(4), "other": jnp.ones(2)}
    moved = loss.move_router_biases(params, {"a.gate.bias": jnp.array([9.0, 3.0, 6.0, 6.0])}, jnp.float32(0.5))
    np.testing.assert_array_equal(moved["a.gate.bias"], [-0.5, 0.5, 0.0, 0.0])
    assert moved["other"] is params["other"]


@pytest.mark.long
def test_loss_is_that_of_the_models_own_logits(recipe: Recipe, network: Network, weights: tuple[Weights, Weights]) -> None:
    """Without noise: next-token loss of row t against t+1, MTP loss of row t against t+2 and the main model's row t+1."""
    params, tables = weights
    plain = dataclasses.replace(
        recipe, dropout=0.0, weight_dropout=0.0, token_noise=0.0, mtp_weight=0.5, mtp_distill=0.25, index_weight=0.1
    )
    windows = jnp.asarray(np.random.default_rng(0).integers(3, 294, (2, 33)), jnp.int32)
    objective = jax.jit(loss.Objective(network, plain))
    total, (parts, loads) = objective(params, tables, windows, jnp.float32(0), jax.random.key(0))

    model = network.model(params, tables)
    nll, hard, soft = [], [], []
    for window in np.asarray(windows):
        logits, mtp_logits = (np.asarray(part, np.float64) for part in score(model, jnp.asarray(window[:-1])))
        logp, guess = (part - np.log(np.exp(part).sum(-1, keepdims=True)) for part in (logits, mtp_logits))
        nll.append(-np.mean([logp[t, window[t + 1]] for t in range(32)]))
        hard.append(-np.mean([guess[t, window[t + 2]] for t in range(31)]))
        soft.append(-np.mean([np.sum(np.exp(logp[t + 1]) * guess[t]) for t in range(31)]))
    np.testing.assert_allclose(parts["nll"], np.mean(nll), rtol=1e-5)
    np.testing.assert_allclose(parts["mtp_nll"], np.mean(hard), rtol=1e-5)
    expected = np.mean(nll) + 0.5 * (0.75 * np.mean(hard) + 0.25 * np.mean(soft)) + 0.1 * parts["index"]
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert loads.keys() == {"layers.1.ffn.gate.bias", "layers.2.ffn.gate.bias", "mtp.0.ffn.gate.bias"}
    for load in loads.values():
        assert float(jnp.sum(load)) == 2 * 32 * recipe.model_config().n_active
    assert float(parts["index"]) > 0
