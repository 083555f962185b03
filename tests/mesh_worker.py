"""A process with several devices: one model of random weights on some of them. Prints what it computed as JSON.

Usage: mesh_worker.py NAME DEVICES...
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ds4jax import runtime
from ds4jax.config import Config
from ds4jax.decode import loop
from ds4jax.decode.depth import Policy
from ds4jax.decode.loop import Limits
from ds4jax.decode.sampling import Filters, Sampling
from ds4jax.engine.engine import Engine
from ds4jax.engine.session import Session
from ds4jax.language_model import LanguageModel, from_checkpoint, restore
from ds4jax.random_models import checkpoint as synthetic
from ds4jax.random_models.layouts import SMALL_Q2, with_dspark

DRAFTS = 2
# Eight heads and groups, so that eight devices divide all that can be cut.
SMALL = dataclasses.replace(
    SMALL_Q2, n_layers=2, n_hash_layers=1, compress_ratios=(0, 4, 0), n_heads=8, o_groups=8, max_context=256
)
NO_MTP = dataclasses.replace(SMALL, n_layers=3, compress_ratios=(0, 4, 128), n_mtp=0)
CONFIGS: dict[str, tuple[Config, str]] = {
    "mtp": (SMALL, "small-q2"),
    # Four devices do not divide the two groups, so attention is whole on each.
    "whole-heads": (dataclasses.replace(SMALL, n_heads=4, o_groups=2), "small-ud-iq3-xxs"),
    "dspark": (with_dspark(NO_MTP, noise_id=5, rank=32), "small-0731-q2"),
}
PROMPT = (np.arange(44) * 7 + 5) % SMALL.vocab_size


def bits(array: Any) -> str:
    """All bits of an array as text."""
    return np.ascontiguousarray(array).tobytes().hex()


def continued(model: LanguageModel) -> dict[str, Any]:
    """Tokens and fingerprints of greedy continuations, by mode and depth."""
    made = {}
    for strict in (False, True):
        for draft in (0, model.max_draft):
            result = model.generate(PROMPT, max_new_tokens=8, strict=strict, draft=draft, ignore_eos=True)
            made[f"strict {strict}, draft {draft}"] = [list(result.ids), bits(result.fingerprints)]
    return made


def batched(model: LanguageModel) -> list[Any]:
    """Tokens and fingerprints of two requests at once, with a sampled one."""
    with Engine(model, slots=2, context=128, chunk=64) as engine:
        options = {"max_new_tokens": 8, "ignore_eos": True}
        requests = [
            engine.submit(PROMPT, **options),
            engine.submit(PROMPT[::-1], sampling=Sampling(temperature=1.0, seed=3), **options),
        ]
        results = [request.result() for request in requests]
    return [[list(result.ids), bits(result.fingerprints)] for result in results]


def saved(model: LanguageModel, path: Path) -> None:
    """Save a session after half of its tokens."""
    session = Session(model, ignore_eos=True, max_new_tokens=4)
    stream = session.stream(PROMPT)
    stream.advance(4)
    session.save(path)


def resumed(model: LanguageModel, path: Path) -> list[Any]:
    """The other half."""
    stream = restore(path, model).resume()
    stream.advance(4)
    result = stream.result()
    return [list(result.ids), bits(result.fingerprints)]


def lowered(model: LanguageModel) -> dict[str, int]:
    """Exchanges and reductions over devices in the text of the decode loop at depth 0, jitted layers counted once."""
    alone = model.with_max_draft(0)
    policy = Policy(np.zeros(1, np.int32), np.ones(1, np.float32))
    state, limits = alone.state_shapes(256, None), Limits.of([0], [0], [[0]])
    options = {"drafter": None, "max_draft": 0, "strict": False}
    text = loop.lower_run(alone.graph, alone.arrays, state, limits, Filters.of([Sampling()]), policy, **options).as_text()
    words = ("all_gather", "all_reduce", "reduce_scatter", "all_to_all", "collective_permute", "collective_broadcast")
    return {word: text.count(f'"stablehlo.{word}"') for word in words}


def measured(name: str, count: int, folder: Path) -> dict[str, Any]:
    """All that is compared between numbers of devices, and the share of each device."""
    config, layout = CONFIGS[name]
    model = from_checkpoint(synthetic.checkpoint(config, layout), devices=count, max_draft=None if config.n_dspark else DRAFTS)
    held = dict.fromkeys(jax.devices()[:count], 0)
    for array in model.arrays:
        for shard in array.addressable_shards:
            held[shard.device] += shard.data.nbytes
    found: dict[str, Any] = {"held": list(held.values()), "fingerprint": model.fingerprint, "equal": {}}
    found["equal"]["logits"] = bits(model.logits(PROMPT, decode_from=42)["logits"])
    found["equal"]["continued"] = continued(model)
    if count > 1:
        found["lowered"] = lowered(model)
    if name == "mtp":
        found["equal"]["batched"] = batched(model)
        if count == 2:
            saved(model, folder / "session")
        if (folder / "session").exists():
            found["resumed"] = resumed(model, folder / "session")
    return found


def main(name: str, counts: list[int]) -> None:
    """Measure on each number of devices and print one object; the session is saved on the first."""
    runtime.configure()
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({count: measured(name, count, Path(folder)) for count in counts}))


if __name__ == "__main__":
    main(sys.argv[1], [int(word) for word in sys.argv[2:]])
