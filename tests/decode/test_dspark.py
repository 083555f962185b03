"""The DSpark drafter: golden set a of DSpark, and drafting that changes no bit of what is said."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dspark_files import unpack
from flax import nnx
from numerics import arrays, assert_bits_equal, assert_close

import ds4jax
from ds4jax.cache import state as caches
from ds4jax.cache.capacity import capacity_for
from ds4jax.cache.state import Rows
from ds4jax.decode.drafters.dspark import DSparkDrafter, DSparkState, empty
from ds4jax.decode.scoring import extend
from ds4jax.language_model import LanguageModel
from ds4jax.precision import precise

QAT = 1e-3
CONFIDENCE = 1e-4
PLAIN = {"ignore_eos": True, "strict": True}


@functools.cache
def golden() -> dict[str, np.ndarray]:
    return arrays("dspark/golden")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return unpack(tmp_path_factory.mktemp("dspark")).hub


@pytest.fixture(scope="module")
def model(checkpoint: Any) -> LanguageModel:
    return ds4jax.load(checkpoint, qat=False)


@pytest.fixture(scope="module")
def scored(model: LanguageModel) -> dict[str, np.ndarray]:
    return model.logits(golden()["ids"], strict=True, draft_at=golden()["anchors"].tolist())


def test_a_model_with_dspark_drafts_its_whole_block(model):
    assert (model.drafter_name, model.max_draft, model.drafter(None)) == ("dspark", 5, DSparkDrafter())
    with pytest.raises(ds4jax.InputError, match="max-draft is 6; the dspark drafter makes at most 5"):
        model.with_max_draft(6)


def test_blocks_after_every_anchor(scored):
    expected = golden()
    np.testing.assert_array_equal(scored["draft_at"], expected["anchors"])
    np.testing.assert_array_equal(scored["draft_anchor"], expected["anchor_ids"])
    assert_close(scored["draft_logits"], expected["logits"])
    assert_close(scored["draft_base_logits"][expected["whole_of"]], expected["base_logits"])
    assert_close(scored["draft_confidence"], expected["confidence"], CONFIDENCE)
    np.testing.assert_array_equal(scored["draft_tokens"], expected["drafts"])


@pytest.mark.long
def test_blocks_of_a_model_with_simulated_rounding(checkpoint):
    expected = golden()
    anchors = expected["qat_anchors"].tolist()
    scored = ds4jax.load(checkpoint, qat=True).logits(expected["qat_ids"], strict=True, draft_at=anchors)
    np.testing.assert_array_equal(scored["draft_anchor"], expected["qat_anchor_ids"])
    assert_close(scored["draft_logits"], expected["qat_logits"], QAT)
    np.testing.assert_array_equal(scored["draft_tokens"], expected["qat_drafts"])


@pytest.fixture(scope="module")
def means(model: LanguageModel) -> list[jax.Array]:
    """Means of the tapped layers at every position of `ids`, [T, D] each."""
    ids = golden()["ids"]
    cache = caches.empty(model.config, capacity_for(len(ids), model.config.max_context))
    numbers = np.int32(len(ids)), np.int32(0)
    found = extend(
        model.graph, model.arrays, cache, None, ids, ids, *numbers, strict=True, want_logits=True, taps=model.config.dspark_layers
    )
    return found.means


def state_after(model: LanguageModel, means: list[jax.Array], count: int) -> DSparkState:
    """The rings after the first `count` rows, which are committed in calls of unlike sizes."""
    module, drafter = nnx.merge(model.graph, model.weights), DSparkDrafter()
    state, start = empty(model.config, model.config.dspark_block, 1), 0
    for width in (count // 3, 1, count):
        width = min(width, count - start)
        if width:
            rows = Rows.following(jnp.int32(start), width, width, strict=True)
            part = [mean[start : start + width] for mean in means]
            state = drafter.commit(module, state, jnp.zeros(()), jnp.zeros(()), rows, part)
            start += width
    return state


@pytest.mark.long
@precise
def test_rings_hold_rows_made_of_the_main_model(model, means):
    expected = golden()
    positions, window = expected["row_positions"], model.config.window
    assert_close(np.concatenate(means, axis=1)[positions], expected["main_hidden"])
    module = nnx.merge(model.graph, model.weights)
    assert_close(module.dspark.main_rows(means, strict=True)[positions], expected["main_x"])
    for count in (positions[3] + 1, len(expected["ids"])):
        held = [i for i, position in enumerate(positions) if count - window <= position < count]
        for stage, ring in enumerate(state_after(model, means, int(count)).rings):
            size = ring.window.shape[1]
            assert_close(ring.window[0, positions[held] % size], expected["ring"][stage, held])


@precise
def test_streams_of_every_stage(model, means):
    """One anchor, beyond a full window; its block sees rows that a row's own window does not reach."""
    expected = golden()
    which = len(expected["whole_of"]) - 1
    position = int(expected["anchors"][expected["whole_of"][which]])
    module = nnx.merge(model.graph, model.weights)
    size, state = model.config.dspark_block, state_after(model, means, position + 1)
    rows = Rows.step(jnp.array([position + 1], jnp.int32), size, jnp.array([size], jnp.int32), strict=True)
    rows = dataclasses.replace(rows, both_ways=True)
    token = jnp.asarray(expected["anchor_ids"][expected["whole_of"][which]])
    ids_T = module.dspark.block_ids(token[None])[0]
    assert_close(module.embed(ids_T), expected["block_in"][which])
    h_TND = jnp.broadcast_to(module.embed(ids_T)[:, None], (size, model.config.hc_mult, model.config.dim))
    for stage, (block, ring) in enumerate(zip(module.dspark.stages, state.rings, strict=True)):
        h_TND, _, _ = module.through([block], h_TND, ids_T, rows, (ring,), "dspark")
        assert_close(h_TND, expected["streams"][which, stage])
    assert_close(module.dspark.collapsed(h_TND), expected["x"][expected["whole_of"][which]])


@pytest.fixture(scope="module")
def prompt() -> np.ndarray:
    """Its first draft is the golden loop's first."""
    return np.append(golden()["greedy_prompt"], golden()["greedy_tokens"][0])


@pytest.mark.long
def test_the_loop_drafts_where_the_golden_loop_drafts(model, prompt):
    expected = golden()
    drafted = model.generate(prompt, max_new_tokens=64, draft=5, **PLAIN)
    assert drafted.ids == tuple(expected["greedy_tokens"][1:65].tolist())
    assert drafted.steps == len(expected["loop_anchors"])
    stand = expected["greedy_stand"][expected["loop_anchors"] - len(expected["greedy_prompt"]) + 1]
    share = [(stand > i).sum() / (stand >= i).sum() for i in range(5)]
    np.testing.assert_allclose(drafted.acceptance, share, atol=0.1)


@pytest.mark.long
def test_no_depth_changes_a_bit(model, prompt):
    """Neither a depth nor the confidence, which cuts drafts of automatic depths."""
    plain = model.generate(prompt, max_new_tokens=40, draft=0, **PLAIN)
    steps = {0: plain.steps}
    for draft in (1, 2, 3, 4, 5, "auto"):
        drafted = model.generate(prompt, max_new_tokens=40, draft=draft, **PLAIN)
        assert drafted.ids == plain.ids, draft
        assert_bits_equal(drafted.fingerprints, plain.fingerprints)
        steps[draft] = drafted.steps
    assert steps[5] < steps[1] < steps[0]


@pytest.mark.long
def test_a_session_goes_on_in_the_middle_of_a_block(model, prompt, tmp_path):
    """Fork, rewind, save and restore: the same tokens and bits as without them, since rings hold committed rows alone."""
    whole = model.generate(prompt, max_new_tokens=40, **PLAIN)
    session = ds4jax.Session(model, **PLAIN, max_new_tokens=40)
    generation = session.stream(prompt)
    generation.advance(7)
    fork = session.fork()
    session.save(tmp_path / "session.safetensors")
    restored = ds4jax.restore(tmp_path / "session.safetensors", model)
    for one in (session, fork, restored):
        rest = one.resume()
        rest.advance(33)
        assert rest.result().ids == whole.ids
        assert_bits_equal(rest.result().fingerprints, whole.fingerprints)
