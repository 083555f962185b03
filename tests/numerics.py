"""The one harness for numbers: golden models and arrays, and what counts as equal."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax.config import Config
from ds4jax.language_model import LanguageModel
from ds4jax.model.parameters import build, shapes
from ds4jax.model.transformer import Transformer

GOLDEN = Path(__file__).parent / "golden"
END_TO_END = 3e-4
COMPONENT = 2e-5


@functools.cache
def arrays(name: str) -> dict[str, np.ndarray]:
    """All arrays of tests/golden/`name`.npz."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def component(prefix: str) -> dict[str, np.ndarray]:
    """The component arrays whose names begin with `prefix` and a dot, without it."""
    found = {key.removeprefix(f"{prefix}."): value for key, value in arrays("components").items() if key.startswith(f"{prefix}.")}
    assert found, prefix
    return found


@functools.cache
def golden_config(qat: bool = False, cache: str = "float32") -> Config:
    """Shape of golden model a, from its own config.json."""
    raw = json.loads((GOLDEN / "config.json").read_text())
    renamed = {
        "moe_inter_dim": "moe_dim",
        "rope_head_dim": "rope_dim",
        "window_size": "window",
        "n_routed_experts": "n_experts",
        "n_activated_experts": "n_active",
        "original_seq_len": "original_context",
        "index_n_heads": "index_heads",
        "index_head_dim": "index_dim",
        "hc_sinkhorn_iters": "hc_iters",
        "n_mtp_layers": "n_mtp",
    }
    assert raw.pop("n_shared_experts") == 1
    assert raw.pop("score_func") == "sqrtsoftplus"
    fields = {renamed.get(key, key): value for key, value in raw.items()}
    fields["compress_ratios"] = tuple(fields["compress_ratios"])
    return Config(**fields, qat=qat, cache=cache, max_context=1024)


def golden_tensors(config: Config) -> Iterator[tuple[str, jax.Array]]:
    """Weights of golden model a under the canonical names."""
    weights = arrays("weights")
    for name in shapes(config):
        if ".experts." in name:
            layer, matrix = name.split(".experts.")
            yield name, jnp.asarray(np.stack([weights[f"{layer}.experts.{e}.{matrix}"] for e in range(config.n_experts)]))
        else:
            yield name, jnp.asarray(weights[name])


@functools.cache
def golden_transformer(qat: bool = False, cache: str = "float32") -> Transformer:
    """Golden model a as a module, with or without simulated rounding."""
    config = golden_config(qat, cache)
    return build(config, golden_tensors(config))


@functools.cache
def golden_model(qat: bool = False, cache: str = "float32") -> LanguageModel:
    """Golden model a, ready to run."""
    return LanguageModel(golden_transformer(qat, cache), None)


@functools.cache
def short_transformer(qat: bool = False, cache: str = "float32") -> Transformer:
    """Layers 1 to 3 of golden model a, one of each kind, and its MTP block: half the compiler's time of all layers.

    For what holds of any model; golden numbers are those of `golden_transformer`.
    """
    config = dataclasses.replace(golden_config(qat, cache), n_layers=3, n_hash_layers=1, compress_ratios=(0, 4, 16, 0))
    held = {name: value for name, value in golden_tensors(golden_config()) if not name.startswith("layers.0.")}
    for i in range(config.n_layers):
        held = {name.replace(f"layers.{i + 1}.", f"layers.{i}."): value for name, value in held.items()}
    return build(config, ((name, held[name]) for name in shapes(config)))


@functools.cache
def short_model(qat: bool = False, cache: str = "float32") -> LanguageModel:
    """The short model, ready to run."""
    return LanguageModel(short_transformer(qat, cache), None)


def assert_component(actual: jax.Array | np.ndarray, expected: np.ndarray) -> None:
    """Integers and infinities equal, the rest within 2e-5 of the largest finite expected value."""
    actual = np.asarray(actual)
    assert actual.shape == expected.shape
    if np.issubdtype(expected.dtype, np.integer):
        np.testing.assert_array_equal(actual, expected)
        return
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(actual[~finite], expected[~finite])
    limit = COMPONENT * np.abs(expected[finite]).max()
    np.testing.assert_allclose(actual[finite], expected[finite], rtol=0, atol=limit)


def assert_close(actual: jax.Array | np.ndarray, expected: np.ndarray, limit: float = END_TO_END) -> None:
    """Largest absolute difference within the golden set's limit for whole models."""
    assert np.asarray(actual).shape == expected.shape
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=limit)


def assert_bits_equal(actual: jax.Array | np.ndarray, expected: jax.Array | np.ndarray) -> None:
    """The same numbers to the last bit, the sign of zero included."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual.view(np.uint8), expected.view(np.uint8))
