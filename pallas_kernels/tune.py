"""`python -m pallas_kernels.tune`: measure tiles for the products of V4-Flash on this machine's GPU and keep the best ones.

The benchmarks use the same launches: their random data, their compilation and their times are defined here.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
import statistics
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import tiles, timing
from pallas_kernels.activation import Activation
from pallas_kernels.arithmetic import LANES
from pallas_kernels.formats import BLOCK, HALF, Q8_0, WORDS
from pallas_kernels.q8_matmul import MOST_ROWS, NAME, Tile, q8_matmul
from pallas_kernels.shapes import FLASH, Product

# Six times the L2 of an H100, so that no weight is still there when its turn comes again.
ROTATION_BYTES = 300_000_000
SAMPLES = 40
THREADS = 8
POWERS = (1, 2, 4, 8)
TUNED_ROWS = (1, 2, 3, 4, 8)
# Registers of a lane for weights on their way, nine for a block, and for accumulators; with more of them values are spilt.
MOST_REGISTERS = 200
BAR = 40


@dataclasses.dataclass(frozen=True)
class Launch:
    """One product with M rows and a tile; names a compiled program and its times."""

    product: Product
    m: int
    tile: Tile


def copies(product: Product) -> int:
    """How many sets of weights take turns, at least two."""
    return max(2, -(-ROTATION_BYTES // product.weight_bytes))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random_weight(key: jax.Array, n: int, k: int) -> Q8_0:
    for_words, for_scales = jax.random.split(key)
    words = jax.random.bits(for_words, (2, n, k // BLOCK, HALF), jnp.uint32)
    scales = jax.random.uniform(for_scales, (n, k // BLOCK), jnp.float32, 0.001, 0.01)
    return Q8_0(jax.lax.bitcast_convert_type(words, jnp.int32), scales.astype(jnp.float16))


class Data:
    """Random weights of one product, made on the device, and random activations.

    Attributes:
        weights: `sets` sets of the launch's weights, `copies` when not given.
    """

    def __init__(self, product: Product, seed: int = 0, sets: int | None = None):
        sets = sets or copies(product)
        keys = iter(jax.random.split(jax.random.key(seed), sets * len(product.sizes)))
        heights = [product.groups * n for n in product.sizes]
        self.weights = [[_random_weight(next(keys), n, product.k) for n in heights] for _ in range(sets)]
        blocks, rng = product.k // BLOCK, np.random.default_rng(seed)
        self._words = rng.integers(-(2**31), 2**31, (MOST_ROWS, product.groups, 2, blocks, HALF)).astype(np.int32)
        self._scales = rng.uniform(0.001, 0.02, (MOST_ROWS, product.groups, blocks)).astype(np.float32)

    def rows(self, m: int, first: int = 0) -> Activation:
        """M of the 8 rows of activations, those from `first` on."""
        return Activation(jnp.asarray(self._words[first : first + m]), jnp.asarray(self._scales[first : first + m]))


def program(launch: Launch, *, interpret: bool = False) -> Any:
    """The jitted function of activations and sets of weights that launches the kernel once for each set."""
    # A function of its own is traced and lowered once for all the sets.
    one = jax.jit(functools.partial(q8_matmul, tile=launch.tile, groups=launch.product.groups, interpret=interpret))
    return jax.jit(lambda x, sets: [one(x, weights) for weights in sets])


def job(launch: Launch) -> tuple[Any, tuple[Any, ...]]:
    """A launch's program and the shapes of its arguments, for `compile_all`."""
    product, blocks = launch.product, launch.product.k // BLOCK

    def arguments() -> tuple[Activation, list[list[Q8_0]]]:
        words = jnp.zeros((launch.m, product.groups, 2, blocks, HALF), jnp.int32)
        x = Activation(words, jnp.zeros((launch.m, product.groups, blocks), jnp.float32))
        heights = [product.groups * n for n in product.sizes]
        weights = [Q8_0(jnp.zeros((2, n, blocks, HALF), jnp.int32), jnp.zeros((n, blocks), jnp.float16)) for n in heights]
        return x, [weights] * copies(product)

    return program(launch), jax.eval_shape(arguments)


def compile_all(
    jobs: Mapping[Hashable, tuple[Any, tuple[Any, ...]]], done: Callable[[], None] = lambda: None
) -> tuple[dict[Any, Any], dict[Any, Exception]]:
    """Compile jitted functions for shapes of arguments, several at a time; returns the programs, and what failed and why."""
    programs, failed = {}, {}
    with ThreadPoolExecutor(THREADS) as pool:
        futures = {
            pool.submit(lambda function, shapes: function.lower(*shapes).compile(), function, shapes): key
            for key, (function, shapes) in jobs.items()
        }
        for future in as_completed(futures):
            # A compiler fails in many ways, and one tile that it cannot take must not cost the others.
            error = future.exception()
            if isinstance(error, Exception):
                failed[futures[future]] = error
            else:
                programs[futures[future]] = future.result()
            done()
    return programs, failed


def times(programs: Mapping[Launch, Any], data: Data) -> dict[Launch, list[float]]:
    """Microseconds of every launch by each program of one product, traced together."""
    calls = len(data.weights)
    runs = [functools.partial(compiled, data.rows(launch.m), data.weights) for launch, compiled in programs.items()]
    measured = timing.kernel_times(runs, NAME, calls, repeats=max(3, -(-SAMPLES // calls)))
    return dict(zip(programs, measured, strict=True))


def candidates(product: Product, m: int) -> list[Tile]:
    """Tiles worth measuring for M rows: no more rows and chunks than there are, and no more than the registers hold."""
    chunks, heights = -(-product.k // (BLOCK * LANES)), max(product.sizes)
    return [
        Tile(rows, unroll, chained)
        for rows in POWERS
        for unroll in POWERS
        for chained in (False, True)
        if rows <= heights and unroll < 2 * chunks and rows * (unroll * (WORDS + 1) + m) <= MOST_REGISTERS
    ]


def best(medians: Mapping[Launch, float]) -> dict[int, Tile]:
    """The fastest tile for each M; the smaller of equals."""
    fastest: dict[int, Tile] = {}
    for launch in sorted(medians, key=lambda launch: (medians[launch], dataclasses.astuple(launch.tile))):
        fastest.setdefault(launch.m, launch.tile)
    return fastest


def short_name(product: Product) -> str:
    """A product's name as an option takes it: `q_a-kv` for "q_a + kv"."""
    return re.sub(r"\W+", "-", product.name)


def select(names: str) -> tuple[Product, ...]:
    """The products of a comma-separated list of short names. An argparse type."""
    known = {short_name(product): product for product in FLASH}
    unknown = [name for name in names.split(",") if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown shape {unknown[0]!r}; known: {', '.join(known)}")
    return tuple(known[name] for name in dict.fromkeys(names.split(",")))


class _Bar:
    """A progress bar on stderr where that is a terminal."""

    def __init__(self, total: int):
        self.total, self.count = total, 0

    def tick(self) -> None:
        self.count += 1
        if sys.stderr and sys.stderr.isatty():
            filled = BAR * self.count // self.total
            end = "\n" if self.count == self.total else ""
            print(f"\r[{'#' * filled}{'.' * (BAR - filled)}] {self.count}/{self.total}", end=end, file=sys.stderr, flush=True)


def tune(products: Sequence[Product], tick: Callable[[], None]) -> dict[str, dict[int, Tile]]:
    """Measure every candidate on every product, print a line for each M, and return the best tiles by shape key and M.

    Raises:
        RuntimeError: no tile of a product compiles for some M.
    """
    chosen = {}
    print("µs by tile, rows x unroll and c for chained, the best first")
    for product in products:
        launches = [Launch(product, m, tile) for m in TUNED_ROWS for tile in candidates(product, m)]
        programs, failed = compile_all({launch: job(launch) for launch in launches}, tick)
        if {launch.m for launch in programs} != set(TUNED_ROWS):
            raise RuntimeError(f"{product.key}: no tile compiles: {next(iter(failed.values()))}")
        medians = {launch: statistics.median(us) for launch, us in times(programs, Data(product)).items()}
        chosen[product.key] = best(medians)
        for m in TUNED_ROWS:
            order = sorted((launch for launch in medians if launch.m == m), key=medians.__getitem__)
            cells = "  ".join(f"{launch.tile} {medians[launch]:.2f}" for launch in order)
            print(f"{product.key:16} M={m}  {cells}" + ("  and some failed" if len(order) < len(candidates(product, m)) else ""))
        tick()
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 when the table was written, 2 where there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--device-table", type=Path, default=tiles.TABLE, metavar="FILE", help="the table to write (the shipped)")
    parser.add_argument("--shapes", type=select, default=FLASH, metavar="NAME,...", help="only these products, such as q_b,head")
    options = parser.parse_args(argv)
    if jax.default_backend() != "gpu":
        print(f"tune: jax runs on {jax.default_backend()} here; tiles are measured on a GPU", file=sys.stderr)
        return 2
    bar = _Bar(sum(1 + sum(len(candidates(product, m)) for m in TUNED_ROWS) for product in options.shapes))
    chosen = tune(options.shapes, bar.tick)
    device = jax.devices()[0].device_kind
    tiles.write(options.device_table, device, chosen)
    print(f"{options.device_table.name}: {len(chosen)} shapes of {device}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
