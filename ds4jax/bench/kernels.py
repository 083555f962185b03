"""Times the kernels on the products of V4-Flash, and `jnp.dot` on dequantised weights for comparison."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax.bench import bits
from pallas_kernels.core import timing
from pallas_kernels.core.tiles import tile_for
from pallas_kernels.formats import BLOCK
from pallas_kernels.linear import activation
from pallas_kernels.tuning import tune
from pallas_kernels.tuning.shapes import Product
from pallas_kernels.tuning.tune import Launch

ROWS = (1, 2, 3, 4, 8, 16, 32)
ACTIVATION_WIDTHS = (4096, 8192)
ACTIVATION_ROWS = (1, 2, 3, 4)
ACTIVATION_CALLS = 16
DOT_ROWS = (1, 4)
DOT_TYPES = {"dot_bf16": jnp.bfloat16, "dot_f16": jnp.float16}
DOT_REPEATS = 4
# Sizes of weights that are compared with jnp.dot. The head is excluded: its dequantised weights take too long to make.
DOT_BYTES = range(35_000_000, 100_000_000)

Row = dict[str, Any]


@dataclasses.dataclass
class Result:
    """The result of a run.

    Attributes:
        rows: {shape, name, kind, m, us, gbps, fraction, samples}; share_warp rows also have weight_bytes. us is the median of the
            samples, in microseconds per call.
        bits: rows of `bits.check`.
        problems: one line for each part that could not be measured.
    """

    rows: list[Row] = dataclasses.field(default_factory=list)
    bits: list[Row] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Quantize:
    """Key of the compiled program that quantises [M, width] activations."""

    m: int
    width: int


@dataclasses.dataclass(frozen=True)
class Dot:
    """Key of the compiled program of one `jnp.dot` on dequantised weights."""

    product: Product
    m: int
    kind: str

    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of activations and weight. A grouped product has a leading axis of groups."""
        product, lead = self.product, (self.product.groups,) if self.product.groups > 1 else ()
        return (*lead, self.m, product.k), (*lead, sum(product.sizes), product.k)

    def traffic(self) -> int:
        """Bytes of the 16-bit weights and activations and of the float32 results."""
        product = self.product
        n = product.groups * sum(product.sizes)
        return 2 * (n * product.k + self.m * product.groups * product.k) + 4 * self.m * n


def per_call(events: Sequence[tuple[str, float]], calls: int) -> list[float]:
    """Microseconds of each call of a program, summed over its kernels.

    Raises:
        RuntimeError: the calls do not have equal numbers of events.
    """
    count, rest = divmod(len(events), calls)
    if rest or not count:
        raise RuntimeError(f"the trace holds {len(events)} kernels for {calls} equal calls")
    return [sum(us for _, us in events[i * count : (i + 1) * count]) for i in range(calls)]


def row(shape: str, name: str, kind: str, m: int, samples: Sequence[float], traffic: int, copy_gbps: float) -> Row:
    """One row of the result. `traffic` is the bytes of a call; the fraction is relative to the copy bandwidth."""
    us = statistics.median(samples)
    gbps = traffic / us / 1e3
    return {
        "shape": shape,
        "name": name,
        "kind": kind,
        "m": m,
        "us": round(us, 3),
        "gbps": round(gbps, 1),
        "fraction": round(gbps / copy_gbps, 4),
        "samples": [round(sample, 3) for sample in samples],
    }


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """x · wᵀ as a user would write it, per group in a grouped product."""
    if x.ndim == 2:
        return jnp.dot(x, w.T, preferred_element_type=jnp.float32)
    return jnp.einsum("gmk,gnk->gmn", x, w, preferred_element_type=jnp.float32)


def _quantize_all(xs: list[jax.Array]) -> list[activation.Activation]:
    one = jax.jit(activation.quantize)
    return [one(x) for x in xs]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(key, shape, dtype)


class Bench:
    """One run over some products: compile everything first, several programs at a time, then measure product by product."""

    def __init__(self, products: Sequence[Product], rows: Sequence[int], copy_gbps: float, *, check_bits: bool):
        self.products, self.rows, self.copy_gbps, self.check_bits = products, rows, copy_gbps, check_bits
        self.result = Result()

    def launches(self, product: Product) -> list[Launch]:
        """The programs of one product, one for each number of rows, with the same tile as in the model."""
        device = jax.devices()[0].device_kind
        every = dict.fromkeys([*self.rows, *(bits.EVERY_M if self.check_bits else ())])
        sizes = product.sizes, product.k, product.groups
        return [Launch(product, m, tile_for(*sizes, m, device)) for m in every]

    def jobs(self) -> dict[Any, tuple[Any, tuple[Any, ...]]]:
        """All programs to compile, the slow ones first."""
        jobs: dict[Any, tuple[Any, tuple[Any, ...]]] = {}
        for product in self.products:
            if product.weight_bytes in DOT_BYTES:
                for kind, dtype in DOT_TYPES.items():
                    for dot in (Dot(product, m, kind) for m in DOT_ROWS):
                        shapes = tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in dot.shapes())
                        jobs[dot] = (jax.jit(_dot), shapes)
        for product in self.products:
            jobs |= {launch: tune.job(launch) for launch in self.launches(product)}
        for width in ACTIVATION_WIDTHS:
            for m in ACTIVATION_ROWS:
                x = jax.ShapeDtypeStruct((m, width), jnp.float32)
                jobs[Quantize(m, width)] = (jax.jit(_quantize_all), ([x] * ACTIVATION_CALLS,))
        return jobs

    def share_warp(self, product: Product, programs: Mapping[Launch, Any]) -> None:
        """Measure times and bits of one product."""
        data = tune.Data(product)
        samples = {launch.m: us for launch, us in tune.times(programs, data).items()}
        for m in self.rows:
            if m in samples:
                traffic = product.traffic(m)
                made = row(product.key, product.name, "share_warp", m, samples[m], traffic, self.copy_gbps)
                self.result.rows.append({"weight_bytes": product.weight_bytes, **made})
        if self.check_bits:
            self.result.bits += bits.check(product, {launch.m: run for launch, run in programs.items()}, data)

    def quantization(self, programs: Mapping[Quantize, Any]) -> None:
        """Measure times of the activation kernel and the bits of its rows."""
        runs, results = [], {}
        for named, run in programs.items():
            # The same rows for each M, so that a row can be compared with itself among other rows.
            rows = np.random.default_rng(0).standard_normal((ACTIVATION_CALLS, max(ACTIVATION_ROWS), named.width), np.float32)
            runs.append(functools.partial(run, [jnp.asarray(x) for x in rows[:, : named.m]]))
        measured = timing.kernel_times(runs, "q8_activation", ACTIVATION_CALLS)
        for named, run, samples in zip(programs, runs, measured, strict=True):
            traffic = named.m * named.width * (4 * BLOCK + BLOCK + 4) // BLOCK
            made = row(f"activation {named.width}", "activation", "activation", named.m, samples, traffic, self.copy_gbps)
            self.result.rows.append(made)
            results[named] = [np.asarray(array) for quantized in run() for array in (quantized.quants, quantized.scales)]
        for named, arrays in results.items():
            largest = results.get(Quantize(max(ACTIVATION_ROWS), named.width))
            if self.check_bits and largest and named.m < max(ACTIVATION_ROWS):
                count = bits.differing(arrays, [array[: named.m] for array in largest])
                found = {"shape": f"activation {named.width}", "m": named.m, "against": "its rows among 4", "differing": count}
                self.result.bits.append(found)

    def dots(self, product: Product, kind: str, programs: Mapping[Dot, Any]) -> None:
        """Measure times of `jnp.dot` on one product's weights, dequantised to one type."""
        (_, shape), dtype = next(iter(programs)).shapes(), DOT_TYPES[kind]
        sets = -(-tune.ROTATION_BYTES // (2 * int(np.prod(shape))))
        weights = [_normal(key, shape, dtype) for key in jax.random.split(jax.random.key(0), sets)]
        for dot, run in programs.items():
            x = jnp.ones(dot.shapes()[0], dtype)
            jax.block_until_ready(run(x, weights[0]))

            def calls(run: Any = run, x: jax.Array = x) -> object:
                return [run(x, weight) for _ in range(DOT_REPEATS) for weight in weights]

            samples = per_call(timing.device_events(calls), DOT_REPEATS * sets)
            self.result.rows.append(row(product.key, product.name, kind, dot.m, samples, dot.traffic(), self.copy_gbps))

    def run(self, note: Callable[[str], None]) -> Result:
        """Compile and measure everything. A part that fails becomes a problem of the result; the other parts continue."""
        jobs = self.jobs()
        note(f"compiling {len(jobs)} programs")
        compiled, failed = tune.compile_all(jobs)
        self.result.problems += [f"{key}: {_first_line(error)}" for key, error in failed.items()]
        # In the order of the jobs; `compiled` has the order in which they finished.
        programs = {key: compiled[key] for key in jobs if key in compiled}
        for product in self.products:
            launches = {key: run for key, run in programs.items() if isinstance(key, Launch) and key.product == product}
            self._part(note, product.name, functools.partial(self.share_warp, product, launches))
        quantizers = {key: run for key, run in programs.items() if isinstance(key, Quantize)}
        self._part(note, "activations", functools.partial(self.quantization, quantizers))
        dots: dict[tuple[Product, str], dict[Dot, Any]] = {}
        for key, run in programs.items():
            if isinstance(key, Dot):
                dots.setdefault((key.product, key.kind), {})[key] = run
        for (product, kind), group in dots.items():
            self._part(note, f"{product.name}, {kind}", functools.partial(self.dots, product, kind, group))
        return self.result

    def _part(self, note: Callable[[str], None], name: str, measure: Callable[[], None]) -> None:
        note(name)
        try:
            measure()
        except Exception as error:
            # GPU time is short: keep the measurements so far. The run still fails.
            self.result.problems.append(f"{name}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
