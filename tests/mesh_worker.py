"""A process with several devices: one model on some of them. Prints what it computed as JSON.

Usage: mesh_worker.py NAME PARTS DEVICES[/GROUPS]...; NAME is a name in `RANDOM` or `FILES`, PARTS are names in `PARTS` with
commas between.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from cuda import exchanging
from gguf_files import MAIN, MTP
from numerics import GOLDEN

from ds4jax import runtime
from ds4jax.bounds import SHIPPED
from ds4jax.config import Config
from ds4jax.decode import loop, slots
from ds4jax.decode.depth import Policy
from ds4jax.decode.loop import Limits
from ds4jax.decode.masks import Mask, words
from ds4jax.decode.sampling import Filters, Sampling
from ds4jax.engine.engine import Engine
from ds4jax.engine.session import Session
from ds4jax.engine.shape import Shape, fresh, shapes
from ds4jax.language_model import LanguageModel, from_checkpoint, restore
from ds4jax.loading import open_checkpoint
from ds4jax.loading.checkpoint import Checkpoint
from ds4jax.random_models import checkpoint as synthetic
from ds4jax.random_models.layouts import SMALL_Q2, with_dspark

# Eight heads and groups, so that eight devices divide all that can be cut.
SMALL = dataclasses.replace(
    SMALL_Q2, n_layers=2, n_hash_layers=1, compress_ratios=(0, 4, 0), n_heads=8, o_groups=8, max_context=256
)
NO_MTP = dataclasses.replace(SMALL, n_layers=3, compress_ratios=(0, 4, 128), n_mtp=0)
RANDOM: dict[str, tuple[Config, str]] = {
    "mtp": (SMALL, "small-q2"),
    # One layer, without drafts: the fewest programs.
    "layer": (dataclasses.replace(SMALL, n_layers=1, compress_ratios=(4,), n_mtp=0), "small-q2"),
    # Four devices do not divide the two groups, so attention is whole on each.
    "whole-heads": (dataclasses.replace(SMALL, n_heads=4, o_groups=2), "small-ud-iq3-xxs"),
    "dspark": (with_dspark(NO_MTP, noise_id=5, rank=32), "small-0731-q2"),
}
FILES: dict[str, tuple[Path, Path | None]] = {
    "tiny": (SHIPPED, None),
    "hub": (GOLDEN / "hub", None),
    "gguf": (MAIN, MTP),
    "mxfp4": (GOLDEN / "mainline" / "mxfp4_moe.gguf", None),
}
LENGTH, NEW_TOKENS = 44, 8
EXCHANGES = ("all_gather", "all_reduce", "reduce_scatter", "all_to_all", "collective_permute", "collective_broadcast")


def opened(name: str) -> Checkpoint:
    """The checkpoint of a case."""
    return synthetic.checkpoint(*RANDOM[name]) if name in RANDOM else open_checkpoint(*FILES[name])


def bits(array: Any) -> str:
    """All bits of an array as text."""
    return np.ascontiguousarray(array).tobytes().hex()


def prompt(model: LanguageModel) -> np.ndarray:
    """Token ids int32 [LENGTH]."""
    return (np.arange(LENGTH, dtype=np.int32) * 7 + 5) % model.config.vocab_size


def logits(model: LanguageModel, folder: Path) -> dict[str, Any]:
    """Logits of a prefill and of two decode steps, strict and not."""
    return {
        f"strict {strict}": bits(model.logits(prompt(model), decode_from=LENGTH - 2, strict=strict)["logits"])
        for strict in (False, True)
    }


def tokens(model: LanguageModel, folder: Path) -> dict[str, Any]:
    """Tokens and fingerprints of greedy continuations, by mode and depth."""
    options = {"max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    made = {}
    for strict in (False, True):
        for draft in range(model.max_draft + 1):
            result = model.generate(prompt(model), strict=strict, draft=draft, **options)
            made[f"strict {strict}, draft {draft}"] = [list(result.ids), bits(result.fingerprints)]
    return made


def engine(model: LanguageModel, folder: Path) -> list[Any]:
    """Tokens and fingerprints of four requests at once, two of them sampled."""
    ids, options = prompt(model), {"max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    samplings = [Sampling(), Sampling(temperature=1.0, seed=3), Sampling(), Sampling(temperature=0.7, seed=4)]
    with Engine(model, slots=4, context=128, chunk=64) as made:
        requests = [made.submit(np.roll(ids, i), sampling=sampling, **options) for i, sampling in enumerate(samplings)]
        results = [request.result() for request in requests]
    return [made.fingerprint, *([list(result.ids), bits(result.fingerprints)] for result in results)]


def slots_of_groups(model: LanguageModel, folder: Path) -> dict[str, Any]:
    """Nine requests for four slots, strict and not: drawn and greedy, of every depth, masked, scored, cancelled.

    They begin alike, so that all but the first find their beginning in the prefix cache, which another group has computed.
    """
    ids = np.tile(prompt(model), 2)[:80]
    allowed = np.full(words(model.config.vocab_size), 0x5555_5555, np.uint32)
    drafts = [*range(model.max_draft + 1), *(["auto"] if model.max_draft else [])]
    made: dict[str, Any] = {}
    for strict in (False, True):
        wishes: list[dict[str, Any]] = [
            {"max_new_tokens": 4 + 2 * i, "draft": drafts[i % len(drafts)], "sampling": Sampling(0.8 * (i % 2), seed=i)}
            for i in range(9)
        ]
        wishes[2]["logprobs"] = 3
        wishes[5]["constraint"] = lambda ids: allowed if len(ids) < 3 else None
        with Engine(model, slots=4, context=128, chunk=32, strict=strict) as one:
            requests = [one.submit(ids[: 70 + i], ignore_eos=True, **wish) for i, wish in enumerate(wishes)]
            one.submit(ids, max_new_tokens=40).cancel()
            results = [request.result() for request in requests]
            state = one._scheduler._slots.state
            empty = fresh(model, one.shape)
        same = [bits(used) == bits(new) for used, new in zip(*map(jax.tree.leaves, (state, empty)), strict=True)]
        found = [[list(one.ids), bits(one.fingerprints), repr(one.logprobs)] for one in results]
        made[f"strict {strict}"] = [found, [one.reused for one in results], all(same)]
    return made


def session(model: LanguageModel, folder: Path) -> list[Any]:
    """A session that the first number of devices saves after half of its tokens: the other half."""
    path, half = folder / "session", NEW_TOKENS // 2
    if not path.exists():
        begun = Session(model, ignore_eos=True, max_new_tokens=half)
        begun.stream(prompt(model)).advance(half)
        begun.save(path)
    stream = restore(path, model).resume()
    stream.advance(half)
    result = stream.result()
    return [list(result.ids), bits(result.fingerprints)]


PARTS: dict[str, Callable[[LanguageModel, Path], Any]] = {
    "logits": logits,
    "tokens": tokens,
    "engine": engine,
    "slots": slots_of_groups,
    "session": session,
}


def lowered(model: LanguageModel) -> dict[str, int]:
    """Exchanges and reductions over devices in the text of the decode loop at depth 0, jitted layers counted once."""
    alone = model.with_max_draft(0)
    policy = Policy(np.zeros(1, np.int32), np.ones(1, np.float32))
    state, limits = alone.state_shapes(256, None), Limits.of([0], [0], [[0]])
    options = {"drafter": None, "max_draft": 0, "strict": False}
    text = loop.lower_run(alone.graph, alone.arrays, state, limits, Filters.of([Sampling()]), policy, **options).as_text()
    return {word: text.count(f'"stablehlo.{word}"') for word in EXCHANGES}


def lowered_call(model: LanguageModel) -> dict[str, Any]:
    """The exchanges in the text of a call of four slots, and the devices that take part in each of them."""
    shape = Shape.of(model, slots=4, context=128)[0]
    asked, mask = slots.Asked.none(4, (1.0,) * (1 + model.max_draft)), Mask.none(4, model.config.vocab_size)
    options = {"drafter": shape.drafter, "max_draft": model.max_draft, "strict": False}
    text = slots.lower_call(model.graph, model.arrays, shapes(model, shape), asked, mask, **options).as_text()
    return {"counts": {word: text.count(f'"stablehlo.{word}"') for word in EXCHANGES}, "members": sorted(exchanging(text))}


def nbytes(arrays: Any, count: int) -> list[int]:
    """Bytes that each of the first devices holds of some arrays."""
    held = dict.fromkeys(jax.devices()[:count], 0)
    for array in jax.tree.leaves(arrays):
        for shard in array.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return list(held.values())


def measured(name: str, parts: list[str], layout: str, folder: Path) -> dict[str, Any]:
    """All that is compared between numbers of devices and groups, and the bytes that each device holds."""
    count, groups = map(int, (*layout.split("/"), 1)[:2])
    model = from_checkpoint(opened(name), devices=count, groups=groups)
    equal = {"fingerprint": model.fingerprint} | {part: PARTS[part](model, folder) for part in parts}
    found = {"held": nbytes(model.arrays, count), "equal": equal, "lowered": lowered(model) if count > 1 else {}}
    if "slots" in parts:
        found |= {"state": nbytes(fresh(model, Shape.of(model, slots=4, context=128)[0]), count), "call": lowered_call(model)}
    return found


def main(name: str, parts: str, layouts: list[str]) -> None:
    """Measure on each number of devices and print one object; the session is saved on the first."""
    runtime.configure()
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({layout: measured(name, parts.split(","), layout, Path(folder)) for layout in layouts}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
