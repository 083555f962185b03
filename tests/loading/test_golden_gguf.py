"""The golden GGUF set: values to the bit, logits of the strict path, greedy tokens."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
from gguf_files import MAIN, MTP, SHARED, needs_main
from numerics import arrays, assert_bits_equal, assert_close
from quantized import as_float

import ds4jax
from ds4jax.language_model import LanguageModel
from ds4jax.loading import open_checkpoint
from ds4jax.loading.checkpoint import Checkpoint
from ds4jax.loading.gguf_header import Header, read_header
from ds4jax.loading.gguf_names import slots
from ds4jax.loading.gguf_values import reading
from pallas_kernels.formats import Quantized

EXPERTS = 8
QAT = 1e-3


def expected(name: str) -> np.ndarray:
    return arrays("gguf/expected")[name]


def plain(header: Header, name: str) -> np.ndarray:
    value = reading(header, header.tensors[name], EXPERTS).value()
    found = np.asarray(as_float(value) if isinstance(value, Quantized) else value)
    return found.astype(np.float32) if found.dtype == np.float16 else found


@functools.cache
def checkpoint() -> Checkpoint:
    return open_checkpoint(MAIN, MTP)


@functools.cache
def model(qat: bool) -> LanguageModel:
    """The MTP file is the one beside the model."""
    return ds4jax.load(MAIN, qat=qat)


def assert_values(path: Path) -> int:
    """Samples equal to the bit, sums and squares of every tensor within the set's limits; returns the number of tensors."""
    header = read_header(path)
    names = expected("checksum_names").tolist()
    for name, info in header.tensors.items():
        place = names.index(name)
        assert info.type == expected("checksum_type")[place]
        values = plain(header, name)
        exact = values.astype(np.float64)
        sums, squares = expected("checksum_sum")[place], expected("checksum_sumsq")[place]
        assert abs(exact.sum() - sums) <= 1e-9 * np.sqrt(exact.size * squares), name
        assert abs((exact * exact).sum() - squares) <= 1e-9 * squares, name
        if f"dequant/{name}" in arrays("gguf/expected"):
            sample = expected(f"dequant/{name}")
            assert_bits_equal(values[tuple(slice(size) for size in sample.shape)], sample)
    return len(header.tensors)


def test_values_of_the_mtp_file() -> None:
    assert assert_values(MTP) == 32


@needs_main
def test_values_of_the_model() -> None:
    assert assert_values(MAIN) == 178


@needs_main
def test_the_model_and_its_mtp_file_are_one_checkpoint() -> None:
    opened = checkpoint()
    assert (opened.drafter_path, opened.no_mtp, opened.ignored, opened.config.n_mtp) == (MTP, "", (), 1)
    assert opened.config.compress_ratios == (0, 0, 4, 128, 4, 128, 0)
    assert opened.config.qat
    assert {tensor.name for tensor in opened.tensors} == {slot.name for slot in slots(opened.config)}
    kinds = {name: [tensor.stored for tensor in opened.tensors if f"layers.{layer}.ffn.experts" in tensor.name]
             for name, layer in (("q2", 4), ("q4", 5))}  # fmt: skip
    assert kinds == {"q2": ["IQ2_XXS", "IQ2_XXS", "Q2_K"], "q4": ["Q4_K"] * 3}
    assert open_checkpoint(MAIN).drafter_path == SHARED / "mtp.gguf"
    experts = [tensor for tensor in opened.tensors if ".experts." in tensor.name]
    assert all(tensor.device_nbytes <= 1.25 * tensor.nbytes for tensor in experts)


@pytest.mark.slow
@needs_main
def test_prefill_and_mtp() -> None:
    found = model(qat=False).logits(expected("ids"), mtp=True, strict=True)
    assert_close(found["logits"], expected("prefill_logits"))
    assert_close(found["mtp_logits"][expected("mtp_positions")], expected("mtp_logits"))


@pytest.mark.long
@needs_main
def test_decode() -> None:
    start, logits = int(expected("decode_start")), expected("decode_logits")
    ids = expected("ids")[: start + len(logits)]
    found = model(qat=False).logits(ids, decode_from=start, mtp=True, strict=True)
    assert_close(found["logits"][start:], logits)
    positions = expected("mtp_positions")
    kept = positions < len(found["mtp_logits"])
    assert_close(found["mtp_logits"][positions[kept]], expected("mtp_logits")[kept])


@needs_main
@pytest.mark.slow
def test_quantised_decode_resembles_the_float_one() -> None:
    """With a loose tolerance: rounding the KV rows alone moves the logits of this random model by 0.34."""
    start, logits = int(expected("decode_start")), expected("decode_logits")
    found = model(qat=False).logits(expected("ids")[: start + len(logits)], decode_from=start)["logits"][start:]
    assert 1e-3 < np.abs(found - logits).mean() < 0.6
    assert np.corrcoef(found.reshape(-1), logits.reshape(-1))[0, 1] > 0.95


@needs_main
@pytest.mark.slow
def test_greedy_tokens() -> None:
    tokens = expected("greedy_tokens")
    options = {"max_new_tokens": len(tokens), "ignore_eos": True, "strict": True}
    result = model(qat=False).generate(expected("greedy_prompt"), **options)
    np.testing.assert_array_equal(result.ids, tokens)


@needs_main
@pytest.mark.parametrize("decode_from", [None, 20])
@pytest.mark.slow
def test_simulated_rounding(decode_from: int | None) -> None:
    found = model(qat=True).logits(expected("qat_ids"), decode_from=decode_from, mtp=True, strict=True)
    assert_close(found["logits"], expected("qat_logits"), QAT)
    rows = np.arange(0, 2 * len(expected("qat_mtp_logits")), 2)
    assert_close(found["mtp_logits"][rows], expected("qat_mtp_logits"), QAT)


@needs_main
@pytest.mark.slow
def test_simulated_rounding_on_the_long_sequence() -> None:
    found = model(qat=True).logits(expected("ids"), strict=True)["logits"][expected("prefill_qat_positions")]
    logits = expected("prefill_logits_qat")
    assert np.abs(found - logits).mean() < 3e-2
    assert (found.argmax(-1) == logits.argmax(-1)).mean() >= 0.95
