"""Runs one training run from start or resume to its end: compiles the programs, runs the steps, evaluates, saves."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax.errors import InputError
from ds4jax.evaluation import count_model
from ds4jax.training import checkpoint, data
from ds4jax.training.checkpoint import Run
from ds4jax.training.export import as_stored
from ds4jax.training.loop import EVALUATION_BATCH, METRICS, evaluate, initial_state, make_scorer, make_steps
from ds4jax.training.network import Network, Weights
from ds4jax.training.optimizer import make_optimizer
from ds4jax.training.recipe import Recipe, phases
from ds4jax.training.report import Report
from ds4jax.training.stopping import Stopping

# More compressed rows than any window has, so the indexer chooses all of them.
ALL_ROWS = 2**30
EVALUATION_WINDOW = 1024


@dataclasses.dataclass(frozen=True)
class Pace:
    """How often a run saves, evaluates and reports, and when it stops. Nothing here changes the result.

    Attributes:
        save_every, evaluate_every, steps_per_call: in steps.
        report_seconds: time between two lines of the report.
        time_limit: seconds after which the run stops cleanly; None for no limit.
    """

    save_every: int = 500
    evaluate_every: int = 250
    steps_per_call: int = 10
    report_seconds: float = 10.0
    time_limit: float | None = None


class Session:
    """A run in progress.

    Attributes:
        run: the run's description.
        state: weights, optimiser state and step.
        tables: tables of the hash-routed layers.
    """

    def __init__(self, folder: Path, run: Run, corpus: data.Corpus, pace: Pace, started: float, *, resume: bool):
        self.folder, self.run, self.pace, self.corpus = folder, run, pace, corpus
        self._started = started
        self._stopping = Stopping(started, pace.time_limit)
        self._network = Network.of(run.recipe.model_config())
        self.tables = self._network.tables(run.recipe.seed)
        self._optimizer = make_optimizer(run.recipe, self._network.shapes)
        if resume:
            template = jax.eval_shape(lambda params: initial_state(params, self._optimizer), self._network.shapes)
            self.state = checkpoint.load_state(folder, template)
        else:
            scales = {"embedding": run.recipe.embedding_scale, "output": run.recipe.output_scale}
            params = self._network.initial(run.recipe.seed, **scales)
            self.state = initial_state(params, self._optimizer)
        bpe = run.vocabulary.bpe()
        size = min(EVALUATION_WINDOW, run.recipe.model_config().max_context)
        self._texts = {"held_out": data.evaluation_windows(bpe, corpus.held_out, size)}
        if corpus.validation:
            self._texts["validation"] = data.evaluation_windows(bpe, corpus.validation, size)

    def train(self, report: Report) -> None:
        """Run the remaining steps, then evaluate and save. A signal or the time limit also ends with evaluation and save."""
        recipe = self.run.recipe
        step = int(self.state.step)
        planned = [phase for phase in phases(recipe) if phase.end > step]
        with ThreadPoolExecutor(len(planned) + 1) as compilers, self._stopping, jax.default_matmul_precision(_precision(recipe)):
            streams = data.Segmenter(self.run.vocabulary, self.corpus.train).streams(
                recipe.segmentations, recipe.bpe_dropout, recipe.seed
            )
            sizes = np.asarray(streams.sizes)
            longest = max(phase.context for phase in planned) if planned else 0
            if sizes.min() <= longest + 1:
                raise InputError(f"{recipe.text}: {sizes.min()} training tokens; windows of {longest} tokens need a longer text")
            bytes_per_token = len(self.corpus.train.encode()) / float(np.mean(sizes))
            programs = [self._compile_steps(compilers, phase, streams) for phase in planned]
            scorer = self._compile_scorer(compilers)
            for phase, program in zip(planned, programs, strict=True):
                steps = program.result()
                while step < phase.end and not self._must_stop():
                    step = self._group(steps, streams, step, phase.end, phase.batch * phase.context, bytes_per_token, report)
                    if step % self.pace.evaluate_every == 0 and "validation" in self._texts:
                        report.entry(step, _named("validation", self._measure(scorer.result(), "validation", self.state.average)))
                    if step % self.pace.save_every == 0 and step < recipe.steps:
                        self._save(report)
            if step < recipe.steps:
                report.say(f"stopped at step {step} of {recipe.steps}; continue with --resume {self.folder}")
            self._finish(scorer.result(), report)

    def _group(
        self, steps: Callable, streams: data.Streams, step: int, end: int, tokens: int, bytes_per_token: float, report: Report
    ) -> int:
        """Run the steps up to the next evaluation, save or report in one call. Returns the step reached."""
        events = (self.pace.steps_per_call, self.pace.evaluate_every, self.pace.save_every)
        count = min(end - step, *(event - step % event for event in events))
        begun = time.monotonic()
        self.state, sums = steps(self.state, streams, self.tables, jnp.int32(count))
        figures = {name: float(sums[name]) / count for name in METRICS}
        seconds = time.monotonic() - begun
        if not np.isfinite(figures["loss"]):
            raise FloatingPointError(f"the loss is {figures['loss']} near step {step + count}; lower --learning-rate")
        bits = 1 / np.log(2) / bytes_per_token
        report.entry(
            step + count,
            figures
            | {
                "train_bits_per_byte": figures["nll"] * bits,
                "mtp_bits_per_byte": figures["mtp_nll"] * bits,
                "tokens_per_second": tokens * count / seconds,
                "seconds": time.monotonic() - self._started,
            },
        )
        return step + count

    def _finish(self, scorer: Callable, report: Report) -> None:
        """Evaluate the averaged weights as the exported file holds them, record the figures and save."""
        stored = as_stored(self._network.config, self.state.average | self.tables)
        params = {name: stored[name] for name in self.state.average}
        figures: dict[str, float] = {}
        for text in self._texts:
            figures |= _named(text, self._measure(scorer, text, params))
        learned = self.corpus.train + self.corpus.validation
        figures["baseline_bits_per_byte"] = count_model.bits_per_byte(learned.encode(), self.corpus.held_out.encode())
        self.run = dataclasses.replace(self.run, step=int(self.state.step), figures=figures)
        self._save(report)
        for name, value in figures.items():
            report.say(f"{name.replace('_', ' ')}: {value:.4f}")

    def _measure(self, scorer: Callable, text: str, params: Weights) -> dict[str, float]:
        return evaluate(scorer, params, self.tables, self._texts[text])

    def _save(self, report: Report) -> None:
        self.run = dataclasses.replace(self.run, step=int(self.state.step))
        checkpoint.save(self.folder, self.run, self.state, self.tables)
        report.draw()

    def _compile_steps(self, compilers: ThreadPoolExecutor, phase: Any, streams: data.Streams) -> Future:
        """Trace in this thread, one program after the other, and compile in the background."""
        config = self._network.config
        network = Network.of(dataclasses.replace(config, index_topk=ALL_ROWS)) if phase.dense else self._network
        steps = make_steps(network, self.run.recipe, phase, self._optimizer)
        lowered = jax.jit(steps, donate_argnums=0).lower(self.state, streams, self.tables, jnp.int32(1))
        return compilers.submit(lowered.compile)

    def _compile_scorer(self, compilers: ThreadPoolExecutor) -> Future:
        size = self._texts["held_out"].scored.shape[1]
        windows = jax.ShapeDtypeStruct((EVALUATION_BATCH, size + 1), jnp.int32)
        scored = jax.ShapeDtypeStruct((EVALUATION_BATCH, size), jnp.float32)
        lowered = jax.jit(make_scorer(self._network)).lower(self.state.params, self.tables, windows, scored)
        return compilers.submit(lowered.compile)

    def _must_stop(self) -> bool:
        return self._stopping.asked


def _precision(recipe: Recipe) -> str | None:
    return None if recipe.precision == "default" else recipe.precision


def _named(text: str, figures: dict[str, float]) -> dict[str, float]:
    return {f"{text}_{name}": value for name, value in figures.items()}


def begin(recipe: Recipe, corpus: data.Corpus, command: str) -> Run:
    """Start a run: train its vocabulary on the training chapters, and return its description at step 0."""
    return Run(recipe, data.train_vocabulary(corpus.train, recipe.vocab_size), 0, corpus.sha256, command)
