"""Decode with 2-bit and 4-bit experts: the golden model against its arithmetic in float64, and against the error that rounding
activations causes.

Every examined step starts from the cache of the real decode, so that differences do not accumulate.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_files import MAIN, needs_main
from numerics import arrays, assert_close

import ds4jax
from ds4jax.cache import state as caches
from ds4jax.cache.capacity import MIN_CAPACITY, padded
from ds4jax.cache.state import Cache
from ds4jax.decode.scoring import extend
from ds4jax.language_model import LanguageModel
from pallas_kernels import ops
from pallas_kernels.experts import meaning
from pallas_kernels.formats import Q8_0, Quantized

ROWS = 32
# Ten times the largest measured difference, of float32 sums in another order.
TIGHT = 4e-5
# Activations [..., K], a weight multiplied out [..., N, K] and its format, to [..., N]; leading axes as they are or 1.
Product = Callable[[jax.Array, jax.Array, type[Quantized]], jax.Array]

pytestmark = needs_main


def expected(name: str) -> np.ndarray:
    return arrays("gguf/expected")[name]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return ds4jax.load(MAIN, qat=False)


def step(model: LanguageModel) -> Callable[..., tuple[Cache, np.ndarray]]:
    """A function from a cache and a token to the cache after it and its logits [V]; its program is traced afresh."""
    traced = extend.__wrapped__.__wrapped__

    def fresh(*arguments: object, **options: object) -> tuple:
        return traced(*arguments, **options)

    jitted = jax.jit(fresh, static_argnums=0, static_argnames=("strict", "want_logits"))

    def run(cache: Cache, ids: np.ndarray, *, count: int = 1, width: int = 1, strict: bool = False) -> tuple[Cache, np.ndarray]:
        ids_T = padded(ids, 0, width)
        one = (model.graph, model.weights, cache, None, ids_T, ids_T, jnp.int32(count), jnp.int32(0))
        with jax.default_matmul_precision("highest"):
            scored = jitted(*one, strict=strict, want_logits=True)
        return scored.cache, np.asarray(scored.logits)[count - 1]

    return run


@pytest.fixture(scope="module")
def decoded(model: LanguageModel) -> list[tuple[Cache, np.ndarray, np.ndarray]]:
    """For each row of the golden decode: the cache before it, its token [1], and the logits of the unchanged program."""
    start, ids = int(expected("decode_start")), expected("ids")
    cache, _ = step(model)(caches.empty(model.config, MIN_CAPACITY), ids[:start], count=start, width=128)
    run, found = step(model), []
    for token in ids[start : start + ROWS, None]:
        after, logits = run(cache, token)
        found.append((cache, token, logits))
        cache = after
    return found


@pytest.fixture
def replace() -> Iterator[Callable[[Product], None]]:
    """A function that replaces every product with rounded activations by another."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield functools.partial(_replace, monkeypatch)
    jax.clear_caches()


def _replace(monkeypatch: pytest.MonkeyPatch, product: Product) -> None:
    # Traced blocks keep the products of their trace.
    jax.clear_caches()

    def dense(x_MCK: jax.Array, weights: tuple[Q8_0, ...]) -> tuple[jax.Array, ...]:
        groups, k = x_MCK.shape[1:]
        return tuple(product(x_MCK, weight.dequantize().reshape(groups, -1, k), Q8_0) for weight in weights)

    def expert(x: jax.Array, weight: Quantized, *, add_up: bool = False) -> jax.Array:
        y = product(x, weight.dequantize(), type(weight))
        return jnp.sum(y, axis=-2) if add_up else y

    monkeypatch.setattr(ops, "_quantized", dense)
    monkeypatch.setattr(meaning, "expert_dot", expert)


def rounded(x: np.ndarray, format: type[Quantized]) -> np.ndarray:
    """Activations as the format's product sees them, float64: integers and scales worked out in float32 as gguf.md §6 has it."""
    blocks = x.reshape(*x.shape[:-1], -1, format.BLOCK)
    place = np.abs(blocks).argmax(-1, keepdims=True)
    largest = np.take_along_axis(blocks, place, -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        if format is Q8_0:
            scale = np.abs(largest) / np.float32(127)
            inverse = np.float32(1) / scale
        else:
            inverse = np.float32(-127) / largest
            scale = np.float32(1) / inverse
        quants = np.clip(np.rint(blocks * inverse), -128, 127)
    return np.where(largest == 0, 0.0, quants.astype(np.float64) * scale).reshape(x.shape)


@pytest.mark.long
def test_every_step_is_its_arithmetic_in_float64(model, decoded, replace) -> None:
    """Weights multiplied out, integers of activations in float64: what differs is the order of float32 sums.

    An activation between two integers may round to either, with a large effect: a few rows may differ by more.
    """
    seen: Counter[str] = Counter()

    def exact(x: jax.Array, w: jax.Array, format: type[Quantized]) -> jax.Array:
        def on_host(x: np.ndarray, w: np.ndarray) -> np.ndarray:
            seen[format.__name__] += 1
            terms = rounded(np.asarray(x), format)[..., None, :] @ np.swapaxes(np.asarray(w, np.float64), -1, -2)
            return terms[..., 0, :].astype(np.float32)

        shape = (*np.broadcast_shapes(x.shape[:-1], w.shape[:-2]), w.shape[-2])
        return jax.pure_callback(on_host, jax.ShapeDtypeStruct(shape, jnp.float32), x, w)

    replace(exact)
    run = step(model)
    off = np.array([np.abs(run(cache, token)[1] - logits).max() for cache, token, logits in decoded])
    # Every quantised matrix of the file, once a step.
    assert seen == {"Q8_0": 49 * ROWS, "IQ2_XXS": 10 * ROWS, "Q2_K": 5 * ROWS, "Q4_K": 3 * ROWS}
    print(f"rows off by more than {TIGHT}: {(off > TIGHT).sum()} of {ROWS}; the others by at most {off[off <= TIGHT].max():.1e}")
    assert (off <= TIGHT).mean() >= 0.75
    assert off.max() < 1


@pytest.mark.slow
def test_rounding_costs_what_noise_of_a_step_costs(model, decoded, replace) -> None:
    """The difference from the strict step equals that of random changes of the activations within half a step.

    Compared by the median over rows: a few rows choose other experts or compressed rows and differ much more.
    """
    seen: Counter[str] = Counter()

    def moved(x: jax.Array, w: jax.Array, format: type[Quantized]) -> jax.Array:
        seen[format.__name__] += 1
        blocks = x.reshape(*x.shape[:-1], -1, format.BLOCK)
        key = jax.random.fold_in(jax.random.key(seen.total()), jnp.sum(jax.lax.bitcast_convert_type(x, jnp.uint32)))
        half = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True) / 254.0
        noisy = blocks + half * jax.random.uniform(key, blocks.shape, jnp.float32, -1.0, 1.0)
        return jnp.einsum("...k,...nk->...n", noisy.reshape(x.shape), w, precision="highest")

    exactly = step(model)
    strict = np.array([exactly(cache, token, strict=True)[1] for cache, token, _ in decoded])
    replace(moved)
    run = step(model)
    noisy = np.array([run(cache, token)[1] for cache, token, _ in decoded])
    assert seen.keys() == {"Q8_0", "IQ2_XXS", "Q2_K", "Q4_K"}
    real = np.array([logits for _, _, logits in decoded])
    rounding, noise = (np.median(np.sqrt(np.square(found - strict).mean(axis=1))) for found in (real, noisy))
    print(f"median over {ROWS} rows of the logits' deviation: {rounding:.3f} by rounding, {noise:.3f} by noise")
    assert 1 / 1.4 < rounding / noise < 1.4


@pytest.mark.slow
def test_a_long_prefill_rounds_nothing(model) -> None:
    found = model.logits(expected("ids"))["logits"]
    assert_close(found, expected("prefill_logits"))


@pytest.mark.slow
def test_drafting_changes_nothing(model) -> None:
    """Tokens and fingerprints of three-row steps against plain ones, by matrices of every format."""
    report = model.check(expected("greedy_prompt"), strict=False)
    assert report.equal, str(report)
