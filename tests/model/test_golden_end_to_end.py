"""Golden set a end to end: prefill, decode, MTP, greedy tokens, and the simulated rounding."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numerics import arrays, assert_close, golden_model

from ds4jax.cache.capacity import PREFILL
from ds4jax.model.forward import score

# The width of the call before the decoded rows, so that it is no other program.
CHUNK = PREFILL[1]


@functools.cache
def scored(qat: bool = False, decode_from: int | None = None, chunk: int | None = CHUNK) -> dict[str, np.ndarray]:
    golden = arrays("golden")
    return golden_model(qat).logits(golden["qat_ids" if qat else "ids"], decode_from=decode_from, mtp=True, chunk=chunk)


@pytest.mark.parametrize("chunk", [CHUNK, pytest.param(None, marks=pytest.mark.long)])
def test_prefill_logits(chunk):
    assert_close(scored(chunk=chunk)["logits"], arrays("golden")["prefill_logits"])


@pytest.mark.parametrize("chunk", [CHUNK, pytest.param(None, marks=pytest.mark.long)])
def test_mtp_logits(chunk):
    assert_close(scored(chunk=chunk)["mtp_logits"], arrays("golden")["mtp_logits"])


def test_decode_logits():
    golden = arrays("golden")
    start, steps = int(golden["decode_start"]), len(golden["decode_logits"])
    decoded = scored(decode_from=start)
    assert_close(decoded["logits"][start : start + steps], golden["decode_logits"])
    assert_close(decoded["logits"], golden["prefill_logits"])
    assert_close(decoded["mtp_logits"], golden["mtp_logits"])


@pytest.mark.parametrize("strict", [True, pytest.param(False, marks=pytest.mark.long)])
def test_greedy_tokens(strict):
    golden = arrays("golden")
    options = {"max_new_tokens": len(golden["greedy_tokens"]), "ignore_eos": True, "strict": strict}
    result = golden_model().generate(golden["greedy_prompt"], **options)
    np.testing.assert_array_equal(result.ids, golden["greedy_tokens"])
    assert result.finish_reason == "length"


@pytest.mark.parametrize("decode_from", [None, pytest.param(40, marks=pytest.mark.long)])
def test_logits_with_simulated_rounding(decode_from):
    golden = arrays("golden")
    rounded = scored(qat=True, decode_from=decode_from)
    assert_close(rounded["logits"], golden["qat_logits"], 1e-3)
    assert_close(rounded["mtp_logits"], golden["qat_mtp_logits"], 1e-3)


@pytest.mark.long
def test_simulated_rounding_on_the_long_sequence():
    golden = arrays("golden")
    rows = golden["prefill_qat_positions"]
    actual = golden_model(qat=True).logits(golden["ids"], mtp=True, chunk=CHUNK)["logits"][rows]
    expected = golden["prefill_logits_qat"]
    assert np.abs(actual - expected).mean() < 1e-2
    assert (actual.argmax(-1) == expected.argmax(-1)).mean() >= 0.98


@functools.cache
def traced() -> tuple[jax.Array, dict[str, jax.Array]]:
    """Logits and named intermediates of the sequence; the MTP block's last row has no next token and is not compared."""
    model = golden_model()

    @jax.jit
    def run(weights: nnx.State, ids_T: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        tape: dict[str, jax.Array] = {}
        logits, _ = score(nnx.merge(model.graph, weights), ids_T, tape=tape)
        return logits, tape

    with jax.default_matmul_precision("highest"):
        return run(model.weights, jnp.asarray(arrays("golden")["ids"]))


@pytest.mark.long
def test_streams_after_every_block():
    golden = arrays("golden")
    rows = golden["short_positions"]
    logits, tape = traced()
    streams = [tape["embedded"]] + [tape[f"layers.{i}.streams"] for i in range(golden_model().config.n_layers)]
    assert_close(np.stack([np.asarray(h)[rows] for h in streams]), golden["short_hidden"])
    assert_close(logits[rows], golden["short_logits"])


@pytest.mark.long
def test_mtp_block_streams():
    golden = arrays("golden")
    _, tape = traced()
    assert_close(tape["mtp.0.input"][-5:-1], golden["mtp_block_in_last4"])
    assert_close(tape["mtp.0.streams"][-5:-1], golden["mtp_block_out_last4"])
