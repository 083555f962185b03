"""`python -m pallas_kernels.tuning.tune`: measure tiles for the products of V4-Flash on this GPU and write the fastest.

The benchmarks use the launches, random data, compilation and times that are defined here.
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

from pallas_kernels.core import batches, tiles, timing
from pallas_kernels.core.arithmetic import LANES
from pallas_kernels.core.limits import STEP_ROWS
from pallas_kernels.formats import BLOCK, HALF, Q8_0, WORDS
from pallas_kernels.linear.activation import Activation
from pallas_kernels.linear.q8_matmul import NAME, Tile, q8_matmul
from pallas_kernels.tuning.shapes import FLASH, Product

# Six times the L2 cache of an H100, so a weight has left the cache before it is read again.
ROTATION_BYTES = 300_000_000
SAMPLES = 40
THREADS = 8
POWERS = (1, 2, 4, 8)
TUNED_ROWS = (1, 2, 3, 4, 8)
# Maximum registers of a lane for weights in flight, nine per block, and accumulators. With more, registers spill.
MAX_REGISTERS = 200
BAR = 40


@dataclasses.dataclass(frozen=True)
class Launch:
    """One product with M rows and a tile; the key of a compiled program and its times."""

    product: Product
    m: int
    tile: Tile


def copies(product: Product) -> int:
    """Number of weight sets that are used in rotation, at least two."""
    return max(2, -(-ROTATION_BYTES // product.weight_bytes))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random_weight(key: jax.Array, n: int, k: int) -> Q8_0:
    for_words, for_scales = jax.random.split(key)
    words = jax.random.bits(for_words, (2, n, k // BLOCK, HALF), jnp.uint32)
    scales = jax.random.uniform(for_scales, (n, k // BLOCK), jnp.float32, 0.001, 0.01)
    return Q8_0(jax.lax.bitcast_convert_type(words, jnp.int32), scales.astype(jnp.float16))


class Data:
    """Random weights of one product, generated on the device, and random activations.

    Attributes:
        weights: `sets` sets of the launch's weights, by default `copies(product)`.
    """

    def __init__(self, product: Product, seed: int = 0, sets: int | None = None):
        sets = sets or copies(product)
        keys = iter(jax.random.split(jax.random.key(seed), sets * len(product.sizes)))
        heights = [product.groups * n for n in product.sizes]
        self.weights = [[_random_weight(next(keys), n, product.k) for n in heights] for _ in range(sets)]
        blocks, rng = product.k // BLOCK, np.random.default_rng(seed)
        self._words = rng.integers(-(2**31), 2**31, (STEP_ROWS, product.groups, 2, blocks, HALF)).astype(np.int32)
        self._scales = rng.uniform(0.001, 0.02, (STEP_ROWS, product.groups, blocks)).astype(np.float32)

    def rows(self, m: int, first: int = 0) -> Activation:
        """M of the rows of activations, from row `first`."""
        return Activation(jnp.asarray(self._words[first : first + m]), jnp.asarray(self._scales[first : first + m]))


def program(launch: Launch, *, interpret: bool = False) -> Any:
    """A jitted function of activations and weight sets that launches the kernel once per set."""
    # The inner jit is traced and lowered once for all sets.
    one = jax.jit(functools.partial(q8_matmul, tile=launch.tile, groups=launch.product.groups, interpret=interpret))
    return jax.jit(lambda x, sets: [one(x, weights) for weights in sets])


def job(launch: Launch) -> tuple[Any, tuple[Any, ...]]:
    """The program of a launch and the shapes of its arguments, for `compile_all`."""
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
    """Compile jitted functions for argument shapes in threads.

    Args:
        jobs: for each key a function and the shapes of its arguments.
        done: called after each compilation.

    Returns:
        The compiled programs, and the errors of the others, by key.
    """
    programs, failed = {}, {}
    with ThreadPoolExecutor(THREADS) as pool:
        futures = {
            pool.submit(lambda function, shapes: function.lower(*shapes).compile(), function, shapes): key
            for key, (function, shapes) in jobs.items()
        }
        for future in as_completed(futures):
            # Compilation can fail in many ways. One tile that fails must not stop the others.
            error = future.exception()
            if isinstance(error, Exception):
                failed[futures[future]] = error
            else:
                programs[futures[future]] = future.result()
            done()
    return programs, failed


def times(programs: Mapping[Launch, Any], data: Data) -> dict[Launch, list[float]]:
    """Times (µs) of every launch of each program of one product, in one trace."""
    calls = len(data.weights)
    runs = [functools.partial(compiled, data.rows(launch.m), data.weights) for launch, compiled in programs.items()]
    measured = timing.kernel_times(runs, NAME, calls, repeats=max(3, -(-SAMPLES // calls)))
    return dict(zip(programs, measured, strict=True))


def candidates(product: Product, m: int) -> list[Tile]:
    """Tiles to measure for M rows: within the product's rows and chunks, and within the registers."""
    chunks, heights = -(-product.k // (BLOCK * LANES)), max(product.sizes)
    return [
        Tile(rows, unroll, chained)
        for rows in POWERS
        for unroll in POWERS
        for chained in (False, True)
        if rows <= heights and unroll < 2 * chunks and rows * (unroll * (WORDS + 1) + batches.rows_of(m)) <= MAX_REGISTERS
    ]


def best(medians: Mapping[Launch, float]) -> dict[int, Tile]:
    """The fastest tile for each M; of equally fast tiles the smaller."""
    fastest: dict[int, Tile] = {}
    for launch in sorted(medians, key=lambda launch: (medians[launch], dataclasses.astuple(launch.tile))):
        fastest.setdefault(launch.m, launch.tile)
    return fastest


def short_name(product: Product) -> str:
    """A product's name in the --shapes option: `q_a-kv` for "q_a + kv"."""
    return re.sub(r"\W+", "-", product.name)


def select(names: str) -> tuple[Product, ...]:
    """The products of a comma-separated list of short names; an argparse type."""
    known = {short_name(product): product for product in FLASH}
    unknown = [name for name in names.split(",") if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown shape {unknown[0]!r}; known: {', '.join(known)}")
    return tuple(known[name] for name in dict.fromkeys(names.split(",")))


def row_counts(numbers: str) -> tuple[int, ...]:
    """A comma-separated list of numbers of rows; an argparse type."""
    found = {int(number) if number.isdecimal() else 0 for number in numbers.split(",")}
    if not all(1 <= number <= STEP_ROWS for number in found):
        raise argparse.ArgumentTypeError(f"{numbers!r} must be numbers from 1 to {STEP_ROWS}, separated by commas")
    return tuple(sorted(found))


class _Bar:
    """A progress bar on stderr if it is a terminal. `ds4jax.cli.progress` cannot be imported here."""

    def __init__(self, total: int):
        self.total, self.count = total, 0

    def tick(self) -> None:
        self.count += 1
        if sys.stderr and sys.stderr.isatty():
            filled = BAR * self.count // self.total
            end = "\n" if self.count == self.total else ""
            print(f"\r[{'#' * filled}{'.' * (BAR - filled)}] {self.count}/{self.total}", end=end, file=sys.stderr, flush=True)


def tune(products: Sequence[Product], counts: Sequence[int], tick: Callable[[], None]) -> dict[str, dict[int, Tile]]:
    """Measure every candidate for every product, and print a line for each M.

    Args:
        counts: numbers of rows M, ascending.
        tick: called after each compilation and after each product.

    Returns:
        The fastest tiles by shape key and M.

    Raises:
        RuntimeError: no tile of a product compiles for some M.
    """
    chosen = {}
    print("µs per tile (rows x unroll, c for chained), fastest first")
    for product in products:
        launches = [Launch(product, m, tile) for m in counts for tile in candidates(product, m)]
        programs, failed = compile_all({launch: job(launch) for launch in launches}, tick)
        if {launch.m for launch in programs} != set(counts):
            raise RuntimeError(f"{product.key}: no tile compiles: {next(iter(failed.values()))}")
        medians = {launch: statistics.median(us) for launch, us in times(programs, Data(product)).items()}
        chosen[product.key] = best(medians)
        for m in counts:
            order = sorted((launch for launch in medians if launch.m == m), key=medians.__getitem__)
            cells = "  ".join(f"{launch.tile} {medians[launch]:.2f}" for launch in order)
            print(f"{product.key:16} M={m}  {cells}" + ("  (some failed)" if len(order) < len(candidates(product, m)) else ""))
        tick()
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0 if the table was written, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.tuning.tune", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--device-table", type=Path, default=tiles.TABLE, metavar="FILE", help="the table to write (the one in the package)"
    )
    parser.add_argument(
        "--shapes", type=select, default=FLASH, metavar="NAME,...", help="measure only these products, such as q_b,head (all)"
    )
    parser.add_argument(
        "--rows", type=row_counts, default=TUNED_ROWS, metavar="M,...",
        help=f"measure only these rows of activations; the others keep their tiles ({','.join(map(str, TUNED_ROWS))})",
    )  # fmt: skip
    options = parser.parse_args(argv)
    if jax.default_backend() != "gpu":
        print(f"tune: jax runs on {jax.default_backend()} here; tiles are measured on a GPU", file=sys.stderr)
        return 2
    bar = _Bar(sum(1 + sum(len(candidates(product, m)) for m in options.rows) for product in options.shapes))
    chosen = tune(options.shapes, options.rows, bar.tick)
    device = jax.devices()[0].device_kind
    tiles.write(options.device_table, device, chosen)
    print(f"{options.device_table.name}: {len(chosen)} shapes of {device}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
