"""Measures the time from the start of a process to its first token, with an empty and with a filled compilation cache.

Each run is a separate process that works like `generate`, with random weights made on the device. Making the weights counts as
load, and totals are also given without it, because loading has its own benchmark.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from ds4jax import timing as startup
from ds4jax.errors import InputError

SCHEMA = 1
RUNS = ("cold", "warm", "warm again")
NEW_TOKENS = 64

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Options:
    """The model and the prompt of a start.

    Attributes:
        layout, layers: as in `ds4jax.bench.decode.Options`.
        prompt: length of the prompt in tokens.
        max_draft: maximum number of drafts per step of the loop.
    """

    layout: str = "flash-q2"
    layers: int | None = None
    prompt: int = 512
    max_draft: int = 0


def measure(options: Options, note: Callable[[str], None]) -> Row:
    """Run the processes one after the other, the first with an empty compilation cache.

    Returns:
        The options and `runs`: for each of `RUNS` the seconds of `ds4jax.timing.PARTS`, their total, and `without_load`.

    Raises:
        InputError: a process failed.
    """
    runs = {}
    with tempfile.TemporaryDirectory(prefix="ds4jax-start-") as folder:
        for name in RUNS:
            note(f"a process, {name}")
            done = subprocess.run(
                [sys.executable, "-m", __name__, json.dumps(dataclasses.asdict(options))],
                capture_output=True,
                text=True,
                env=os.environ | {"DS4JAX_CACHE": folder},
            )
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
                raise InputError(f"bench start: the process ended with {done.returncode}: {reason}")
            seconds = json.loads(done.stdout.strip().splitlines()[-1])
            runs[name] = seconds | {"without_load": round(seconds["total"] - seconds["load"], 4)}
    return {"schema": SCHEMA, **dataclasses.asdict(options), "runs": runs}


def show(content: Mapping[str, Any]) -> None:
    """Print a line on stdout for each process."""
    print(f"{content['device']}, jax {content['jax']}: {content['layout']}, a prompt of {content['prompt']} tokens")
    for name, seconds in content["runs"].items():
        parts = ", ".join(f"{part} {seconds[part]:.2f}" for part in startup.PARTS)
        print(f"  {name:<11} first token after {seconds['total']:.2f} s, {seconds['without_load']:.2f} without load: {parts}")


def _once(options: Options) -> dict[str, float]:
    """Seconds of the parts of this process's start. Making the weights counts as load."""
    startup.watch()
    from ds4jax import runtime

    runtime.configure()
    import jax
    import numpy as np

    from ds4jax.language_model import LanguageModel
    from ds4jax.random_models import checkpoint as synthetic

    startup.begin("load")
    config = synthetic.config_of(options.layout, options.layers)
    model = LanguageModel(synthetic.synthetic(synthetic.checkpoint(config, options.layout)), None, max_draft=options.max_draft)
    jax.block_until_ready(model.weights)
    # Compilations for making the weights count as load.
    load = startup.current().seconds()
    startup.begin("prefill")
    ids = np.random.default_rng(0).integers(0, config.vocab_size, options.prompt)
    generation = model.stream(ids, max_new_tokens=NEW_TOKENS, ignore_eos=True, progress=lambda done, total: None)
    startup.begin("decode")
    generation.advance(1)
    found = startup.current().seconds()
    found |= {"compile": found["compile"] - load["compile"], "load": found["load"] + load["compile"]}
    return {part: round(seconds, 4) for part, seconds in found.items()}


if __name__ == "__main__":
    print(json.dumps(_once(Options(**json.loads(sys.argv[1])))))
