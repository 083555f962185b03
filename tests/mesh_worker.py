"""A process with several devices: one model on some of them. Prints what it computed as JSON.

Usage: mesh_worker.py NAME PARTS DEVICES...; NAME is one of `CASES`, PARTS are names of `PARTS` with commas between.
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
from gguf_files import MAIN, MTP
from numerics import GOLDEN

from ds4jax import runtime
from ds4jax.bounds import SHIPPED
from ds4jax.config import Config
from ds4jax.decode import loop
from ds4jax.decode.depth import Policy
from ds4jax.decode.loop import Limits
from ds4jax.decode.sampling import Filters, Sampling
from ds4jax.engine.engine import Engine
from ds4jax.engine.session import Session
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
    "session": session,
}


def lowered(model: LanguageModel) -> dict[str, int]:
    """Exchanges and reductions over devices in the text of the decode loop at depth 0, jitted layers counted once."""
    alone = model.with_max_draft(0)
    policy = Policy(np.zeros(1, np.int32), np.ones(1, np.float32))
    state, limits = alone.state_shapes(256, None), Limits.of([0], [0], [[0]])
    options = {"drafter": None, "max_draft": 0, "strict": False}
    text = loop.lower_run(alone.graph, alone.arrays, state, limits, Filters.of([Sampling()]), policy, **options).as_text()
    words = ("all_gather", "all_reduce", "reduce_scatter", "all_to_all", "collective_permute", "collective_broadcast")
    return {word: text.count(f'"stablehlo.{word}"') for word in words}


def measured(name: str, parts: list[str], count: int, folder: Path) -> dict[str, Any]:
    """All that is compared between numbers of devices, and the bytes that each device holds."""
    model = from_checkpoint(opened(name), devices=count)
    held = dict.fromkeys(jax.devices()[:count], 0)
    for array in model.arrays:
        for shard in array.addressable_shards:
            held[shard.device] += shard.data.nbytes
    equal = {"fingerprint": model.fingerprint} | {part: PARTS[part](model, folder) for part in parts}
    return {"held": list(held.values()), "equal": equal, "lowered": lowered(model) if count > 1 else {}}


def main(name: str, parts: str, counts: list[int]) -> None:
    """Measure on each number of devices and print one object; the session is saved on the first."""
    runtime.configure()
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({count: measured(name, parts.split(","), count, Path(folder)) for count in counts}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], [int(word) for word in sys.argv[3:]])
