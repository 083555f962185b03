"""The narrow cache: the same bits as the float32 cache on the golden set, and configurations that it refuses."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from numerics import arrays, assert_bits_equal, golden_config, golden_model, short_model

import ds4jax
from ds4jax.cache import state as caches
from ds4jax.config import Config
from ds4jax.engine.options import Result
from ds4jax.errors import InputError
from pallas_kernels.attention.stored_rows import NarrowKeys, NarrowRows

KINDS = ("float32", "narrow")


@pytest.mark.long
def test_the_golden_sequence_says_the_same() -> None:
    golden = arrays("golden")
    # With the MTP block, as the test of the float32 cache has it.
    wide, narrow = (golden_model(True, kind).logits(golden["qat_ids"], mtp=True)["logits"] for kind in KINDS)
    assert_bits_equal(narrow, wide)
    np.testing.assert_allclose(narrow, golden["qat_logits"], rtol=0, atol=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("draft", [0, 2])
def test_continuations_have_the_same_bits(draft: int) -> None:
    """Cached decode after a prefill, plain and with drafts."""

    def said(kind: str) -> Result:
        return short_model(True, kind).generate(arrays("golden")["qat_ids"], max_new_tokens=24, draft=draft, ignore_eos=True)

    wide, narrow = map(said, KINDS)
    np.testing.assert_array_equal(narrow.ids, wide.ids)
    np.testing.assert_array_equal(narrow.fingerprints, wide.fingerprints)


def test_rows_and_keys_are_narrow() -> None:
    config = golden_config(True, "narrow")
    wide, narrow = (jax.eval_shape(lambda kind=kind: caches.empty(golden_config(True, kind), 512, slack=3)) for kind in KINDS)
    for layer, expected, ratio in zip(narrow.layers, wide.layers, config.layer_ratios, strict=True):
        if ratio:
            assert isinstance(layer.compressor.rows, NarrowRows)
            assert layer.compressor.rows.shape == expected.compressor.rows.shape
        if ratio == 4:
            assert isinstance(layer.indexer.rows, NarrowKeys)
            assert layer.indexer.rows.shape == expected.indexer.rows.shape


def test_what_a_narrow_cache_cannot_be_used_with() -> None:
    with pytest.raises(InputError, match=r"tiny\.gguf: cache is narrow, but qat is off: .*; turn qat on or use float32$"):
        ds4jax.load(cache="narrow")
    with pytest.raises(InputError, match=r"tiny\.gguf: cache is narrow, but head_dim - rope_dim \(32\) is no multiple of 64 "):
        ds4jax.load(cache="narrow", qat=True)
    with pytest.raises(InputError, match=r"tiny\.gguf: cache is 'wide'; it must be one of float32, narrow"):
        ds4jax.load(cache="wide")
    with pytest.raises(ValueError, match=r"index_dim \(16\) none of 32"):
        dataclasses.replace(Config(), head_dim=80, rope_dim=16, index_dim=16, cache="narrow")
