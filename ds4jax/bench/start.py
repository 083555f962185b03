"""Measures the time from the start of a process to its first token, with an empty and with a filled compilation cache.

Each run is a separate process that works like `generate`, with the tiny model or with random weights made on the device. Making
the weights counts as load, and totals are also given without it, because loading has its own benchmark. After its first token
each process goes on, and all must have the same bits: a warm process runs programs that another one compiled.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ds4jax import timing as startup
from ds4jax.errors import InputError

if TYPE_CHECKING:
    from ds4jax.language_model import LanguageModel

SCHEMA = 1
RUNS = ("cold", "warm", "warm again")
NEW_TOKENS = 64
# Events of JAX.
COUNTED = {"traced": "/jax/core/compile/jaxpr_trace_duration", "compiled": "/jax/core/compile/backend_compile_duration"}

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Options:
    """The model and the prompt of a start.

    Attributes:
        layout, layers: as in `ds4jax.bench.decode.Options`; without a layout, the model is the one in the package.
        prompt: length of the prompt in tokens.
        max_draft: maximum number of drafts per step of the loop.
    """

    layout: str | None = None
    layers: int | None = None
    prompt: int = 512
    max_draft: int = 0


def measure(options: Options, note: Callable[[str], None]) -> Row:
    """Run the processes one after the other, the first with an empty compilation cache.

    Returns:
        The options and `runs`: for each of `RUNS` the seconds of `ds4jax.timing.PARTS`, their total, and `without_load`; `cpu`,
        the seconds of all cores; how many programs were `traced`, and `compiled` or read from JAX's cache; and the `fingerprint`
        of the logits of its `NEW_TOKENS` tokens.

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


def same_bits(content: Mapping[str, Any]) -> bool:
    """Whether the processes agree in the logits of all tokens."""
    return len({run["fingerprint"] for run in content["runs"].values()}) == 1


def show(content: Mapping[str, Any]) -> None:
    """Print a line on stdout for each process."""
    layout = content["layout"] or "the tiny model"
    print(f"{content['device']}, jax {content['jax']}: {layout}, a prompt of {content['prompt']} tokens")
    for name, seconds in content["runs"].items():
        parts = ", ".join(f"{part} {seconds[part]:.2f}" for part in startup.PARTS)
        print(f"  {name:<11} first token after {seconds['total']:.2f} s, {seconds['without_load']:.2f} without load: {parts}")
        counts = f"{seconds['traced']:.0f} programs traced, {seconds['compiled']:.0f} compiled or read from JAX's cache"
        print(f"  {'':<11} CPU time {seconds['cpu']:.2f} s; {counts}")
    equal = "the same" if same_bits(content) else "not the same: FAILED"
    print(f"  bits of {NEW_TOKENS} tokens in all processes: {equal}")


def _once(options: Options) -> Row:
    """Seconds of the parts of this process's start, and what it computed. Making the weights counts as load."""
    startup.watch()
    from ds4jax import runtime

    runtime.process_of_a_command = True
    runtime.configure()
    import jax
    import numpy as np

    from ds4jax.language_model import load as load_file

    events: Counter[str] = Counter()
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: events.update([event]))
    startup.begin("load")
    model = _synthetic(options) if options.layout else load_file(max_draft=options.max_draft)
    jax.block_until_ready(model.weights)
    # Compilations for making the weights count as load.
    load = startup.current().seconds()
    startup.begin("prefill")
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, options.prompt)
    generation = model.stream(ids, max_new_tokens=NEW_TOKENS, ignore_eos=True, progress=lambda done, total: None)
    startup.begin("decode")
    generation.advance(1)
    found = startup.current().seconds()
    found |= {"compile": found["compile"] - load["compile"], "load": found["load"] + load["compile"]}
    found |= {"cpu": time.process_time(), **{name: events[event] for name, event in COUNTED.items()}}
    generation.advance(NEW_TOKENS)
    return {part: round(seconds, 4) for part, seconds in found.items()} | {"fingerprint": generation.result().fingerprint}


def _synthetic(options: Options) -> LanguageModel:
    """A model of random weights."""
    from ds4jax.language_model import LanguageModel
    from ds4jax.random_models import checkpoint as synthetic

    config, layout = synthetic.config_of(str(options.layout), options.layers), str(options.layout)
    return LanguageModel(synthetic.synthetic(synthetic.checkpoint(config, layout)), None, max_draft=options.max_draft)


if __name__ == "__main__":
    print(json.dumps(_once(Options(**json.loads(sys.argv[1])))))
