"""The shipped model: real sizes of window and blocks, and the file itself."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from numerics import assert_bits_equal, assert_close

import ds4jax
from ds4jax.bounds import SHIPPED
from ds4jax.language_model import LanguageModel
from ds4jax.loading import open_checkpoint

ASSETS = Path(ds4jax.__file__).parent / "assets"
STEPS, FEW = 3, 256

# Around each of: blocks of 4, the window and the blocks of 128, the indexer's choice of 32 rows, every prefill bucket. Most need
# a program of their own.
LONG = (4, 127, 128)
BOUNDARIES = sorted({n + d for n in (4, 32, 64, 128, 256, 384, 512, 640) for d in (-1, 0, 1)})


@functools.cache
def model() -> LanguageModel:
    return ds4jax.load()


@functools.cache
def ids() -> np.ndarray:
    text = (ASSETS / "heldout.txt").read_text()
    return model().encode(text[:4000])[: BOUNDARIES[-1] + STEPS]


@functools.cache
def whole(length: int = BOUNDARIES[-1] + STEPS) -> dict[str, np.ndarray]:
    return model().logits(ids()[:length], mtp=True, strict=True)


def marked(n: int) -> Any:
    return pytest.param(n, marks=pytest.mark.long if n in LONG else pytest.mark.slow)


@pytest.mark.parametrize("n", [marked(n) for n in BOUNDARIES])
def test_prefill_then_decode(n):
    split = model().logits(ids()[: n + STEPS], decode_from=n, mtp=True, strict=True)
    # In a cache of the same size, so that it is no further program.
    expected = whole(FEW) if n + STEPS <= FEW else whole()
    assert_close(split["logits"], expected["logits"][: n + STEPS])
    assert_close(split["mtp_logits"], expected["mtp_logits"][: n + STEPS - 1])


def test_every_part_of_the_architecture_is_there():
    config = model().config
    assert {0, 4, 128} <= set(config.layer_ratios)
    assert config.n_hash_layers >= 1
    assert config.hc_mult == 4
    assert config.n_mtp == 1
    assert config.n_layers <= 12
    assert not config.qat
    assert config.index_topk < 512 // 4, "the indexer leaves rows out within a training window"


def test_the_file_is_small_and_says_how_it_was_made():
    checkpoint = open_checkpoint(SHIPPED)
    assert SHIPPED.stat().st_size <= 10e6
    stored = {tensor.name: tensor.stored for tensor in checkpoint.tensors}
    assert stored["layers.0.ffn.experts.w1.weight"] == stored["layers.0.attn.wq_b.weight"] == stored["head.weight"] == "Q8_0"
    said = checkpoint.metadata["ds4jax.trained_with"]
    assert said.startswith("python -m ds4jax.train")
    assert "/" not in said, "a path of the machine that trained it"


@pytest.mark.slow
def test_quantised_decode_stays_close_to_the_float_product():
    """Activations in int8 change logits a little and the most likely token rarely."""
    fast = model().logits(ids()[:200], decode_from=0)["logits"]
    strict = whole()["logits"][:200]
    assert 0 < np.abs(fast - strict).mean() < 0.1
    assert (fast.argmax(-1) == strict.argmax(-1)).mean() > 0.95


@pytest.mark.long
def test_it_continues_a_text_it_knows():
    """A verse that recurs through the training text: the model has learned English, not noise."""
    result = model().generate("And it came to", max_new_tokens=1)
    assert result.text == " pass"


@pytest.mark.long
def test_greedy_text_is_the_argmax_of_its_own_logits():
    prompt = ids()[:100]
    result = model().generate(prompt, max_new_tokens=20, ignore_eos=True, strict=True)
    logits = model().logits([*prompt, *result.ids], strict=True)["logits"]
    np.testing.assert_array_equal(logits[99:-1].argmax(-1), result.ids)


@pytest.mark.gpu
def test_the_shipped_model_says_on_the_gpu_what_it_says_on_the_cpu():
    """Strict float32 within rounding of the CPU's; fast decode close to it, and the same bits run after run."""
    here = ds4jax.load()
    ids = here.encode("And it came to pass, when the king heard it, that he rent his clothes, and went into the house.")
    gpu = here.logits(ids, decode_from=0, strict=True)["logits"]
    with jax.default_device(jax.devices("cpu")[0]):
        cpu = ds4jax.load().logits(ids, decode_from=0, strict=True)["logits"]
    np.testing.assert_allclose(gpu, cpu, rtol=0, atol=2e-2)
    fast = here.logits(ids, decode_from=0)["logits"]
    assert np.abs(fast - gpu).mean() < 0.1
    assert_bits_equal(here.logits(ids, decode_from=0)["logits"], fast)
