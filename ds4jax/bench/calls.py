"""Measures the cost of a decode-loop call in addition to its steps, as it appears in `LanguageModel.stream`."""

from __future__ import annotations

import statistics
import time

import numpy as np

from ds4jax.bench.programs import FIRST_TOKEN
from ds4jax.bench.whole_model import Note, Row, WholeModel
from ds4jax.decode.module import merged
from ds4jax.engine.generation import Generation
from ds4jax.engine.pace import PIECES
from ds4jax.language_model import LanguageModel

BUDGETS = (1, 8, 32)
RUNS = 3


def measured(built: WholeModel, capacity: int, tokens: int, note: Note) -> Row:
    """Time calls of a few steps, and a text generated in pieces against one in a single call. Plain decode, depth 0.

    Args:
        capacity: rows of the cache, the same as in the benchmark's plain loop, so that the program is the same.
        tokens: length of each text; shorter if the cache is smaller.

    Returns:
        `advance`: milliseconds of calls for 1, 8 and 32 tokens. `call_ms` and `step_ms`: the line through them. `in_pieces` and
        `in_one_call`: tokens/s in pieces of 8 tokens and in one call.
    """
    model = LanguageModel(merged(built.graph, built.weights), None, max_draft=0)

    def stream() -> Generation:
        return model.stream([FIRST_TOKEN % model.config.vocab_size], max_new_tokens=capacity - 1, ignore_eos=True)

    generation = stream()
    for budget in BUDGETS:
        generation.advance(budget)
    samples: dict[int, list[float]] = {budget: [] for budget in BUDGETS}
    for _ in range(RUNS):
        for budget in BUDGETS:
            samples[budget].append(1e3 * _seconds(generation, budget, budget))
    advance = [{"tokens": budget, "ms": round(statistics.median(samples[budget]), 3)} for budget in BUDGETS]
    step_ms, call_ms = np.polyfit(BUDGETS, [row["ms"] for row in advance], 1)
    tokens = min(tokens, capacity - 1)
    made = {
        "advance": advance,
        "call_ms": round(float(call_ms), 3),
        "step_ms": round(float(step_ms), 4),
        "in_pieces": round(tokens / _seconds(stream(), tokens, PIECES[0]), 2),
        "in_one_call": round(tokens / _seconds(stream(), tokens, tokens), 2),
    }
    note(line(made))
    return made


def line(made: Row) -> str:
    """One line with the figures."""
    return (
        f"a call costs {made['call_ms']:.2f} ms in addition to steps of {made['step_ms']:.3f} ms; "
        f"{made['in_pieces']:.1f} tokens/s in pieces of {PIECES[0]} tokens, {made['in_one_call']:.1f} in one call"
    )


def _seconds(generation: Generation, tokens: int, budget: int) -> float:
    generation.prefill()
    began = time.perf_counter()
    while tokens > 0:
        tokens -= len(generation.advance(min(budget, tokens)))
    return time.perf_counter() - began
