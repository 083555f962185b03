"""Times the expert kernels of a decode step at the shapes of V4-Flash, for the formats of files that fit on one GPU."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax.bench.kernels import Row, row
from ds4jax.config import Config
from ds4jax.random_models.checkpoint import random_weight
from pallas_kernels.core import timing
from pallas_kernels.core.launch import launch
from pallas_kernels.experts import many_rows
from pallas_kernels.experts.decode import DOWN, ExpertTile, down_part, gate_up
from pallas_kernels.experts.many_rows import GATE_UP
from pallas_kernels.formats import FORMATS, Quantized
from pallas_kernels.linear.activation import Activation
from pallas_kernels.linear.activation_k import ActivationK
from pallas_kernels.linear.lane_row import quantize_for
from pallas_kernels.tuning import tune

NAMES = ("IQ2_XXS", "Q2_K", "IQ2_S", "IQ3_XXS", "MXFP4")
# Rows of a step, six experts each: 6, 18 and 48 pairs.
ROWS = (1, 3, 8)
# Ways to cut the work: one row of gate and of up a program with no load ahead, and the default.
TILES = (ExpertTile(1, 2, 0), ExpertTile())
REPEATS = 5


@dataclasses.dataclass(frozen=True)
class Product:
    """One product of the routed experts: gate and up in one launch, or down.

    Attributes:
        kernel: `GATE_UP` or `DOWN`.
        name: name of the format.
        experts, active, dim, hidden: E, K, D and F.
    """

    kernel: str
    name: str
    experts: int = Config.n_experts
    active: int = Config.n_active
    dim: int = Config.dim
    hidden: int = Config.moe_dim

    @property
    def format(self) -> type[Quantized]:
        """The format of the stacks."""
        return FORMATS[self.name]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of a stack."""
        n, k = (self.hidden, self.dim) if self.kernel == GATE_UP else (self.dim, self.hidden)
        return self.experts, n, k

    @property
    def stacks(self) -> int:
        """Stacks that a launch reads."""
        return 2 if self.kernel == GATE_UP else 1

    def by_many_rows(self, rows: int) -> bool:
        """Whether a step of M rows takes the kernel of many rows, which is cut in one way."""
        return self.kernel == GATE_UP and many_rows.serves(rows, self.format, self.shape)

    def calls(self, rows: int) -> int:
        """Launches of a run. No two of them read the same expert, so that no weight is in the cache."""
        return self.experts // (rows * self.active)

    def activations(self, rows: int, interpret: bool) -> Activation | ActivationK:
        """Quantised activations of a step with M rows: M of gate and up, M·K of down."""
        rows, width = rows if self.kernel == GATE_UP else rows * self.active, self.shape[-1]
        x = jnp.sin(jax.lax.iota(jnp.float32, rows * width)).reshape(rows, width)
        return quantize_for(x, self.format, interpret=interpret)

    def launched(
        self, x: Activation | ActivationK, chosen: jax.Array, share: jax.Array, stacks: Sequence[Quantized],
        *, tile: ExpertTile, interpret: bool,
    ) -> jax.Array:  # fmt: skip
        """The result of a launch for chosen experts [M, K]."""
        if self.kernel == GATE_UP:
            return gate_up(x, chosen, share, *stacks, limit=10.0, tile=tile, interpret=interpret)
        [[y]] = launch([down_part(x, chosen, *stacks, tile=tile, interpret=interpret)], warps=1, interpret=interpret)
        return y


@dataclasses.dataclass(frozen=True)
class Launch:
    """Key of a compiled program: `Product.calls` launches with M rows."""

    product: Product
    rows: int
    tile: ExpertTile


def program(key: Launch, *, interpret: bool = False) -> Any:
    """A jitted function of the chosen experts [calls, M, K], routing weights [M, K] and the stacks."""

    def run(chosen: jax.Array, share: jax.Array, stacks: Sequence[Quantized]) -> list[jax.Array]:
        x = key.product.activations(key.rows, interpret)
        launched = functools.partial(key.product.launched, x, tile=key.tile, interpret=interpret)
        return [launched(one, share, stacks) for one in chosen]

    return jax.jit(run)


def arguments(key: Launch) -> tuple[jax.Array, jax.Array, list[Quantized]]:
    """Random experts, routing weights and stacks, made on the device."""
    product, rows = key.product, key.rows
    order = np.random.default_rng(0).permutation(product.experts)[: product.calls(rows) * rows * product.active]
    chosen = jnp.asarray(order.reshape(-1, rows, product.active), jnp.int32)
    spread = product.shape[-1] ** -0.5
    stacks = [random_weight(product.format, product.shape, spread, jnp.uint32(i)) for i in range(product.stacks)]
    return chosen, jnp.full(chosen.shape[1:], 1 / product.active, jnp.float32), stacks


def traffic(product: Product, rows: int) -> int:
    """Bytes of weights that a launch reads."""
    _, n, k = product.shape
    return rows * product.active * product.stacks * n * k // product.format.BLOCK * product.format.DEVICE_BYTES


def programs(names: Sequence[str], rows: Sequence[int]) -> dict[Launch, tuple[Any, tuple[Any, ...]]]:
    """The function and the shapes of its arguments for each launch to time."""
    products = [Product(kernel, name) for kernel in (GATE_UP, DOWN) for name in names]
    keys = [
        Launch(product, m, tile)
        for product in products
        for m in rows
        for tile in (TILES[-1:] if product.by_many_rows(m) else TILES)
    ]
    return {key: (program(key), jax.eval_shape(functools.partial(arguments, key))) for key in keys}


def measure(copy_gbps: float, note: Callable[[str], None]) -> tuple[list[Row], list[str]]:
    """Compile and time everything.

    Returns:
        Rows {shape, name, kind, m, pairs, tile, weight_bytes, us, gbps, fraction, samples}, and a line for each failure.
    """
    jobs: dict[Any, tuple[Any, tuple[Any, ...]]] = programs(NAMES, ROWS)
    note(f"compiling {len(jobs)} expert programs")
    compiled, failed = tune.compile_all(jobs)
    rows, problems = [], [f"{key}: {str(error).splitlines()[0][:300]}" for key, error in failed.items()]
    for product in dict.fromkeys(key.product for key in jobs):
        note(f"{product.kernel}, {product.name}")
        mine = {key: compiled[key] for key in jobs if key in compiled and key.product == product}
        try:
            rows += timed(mine, copy_gbps)
        except Exception as error:
            # As for the other kernels: keep the measurements so far. The run still fails.
            problems.append(f"{product.kernel} {product.name}: {type(error).__name__}: {str(error).splitlines()[0][:300]}")
    return rows, problems


def timed(compiled: Mapping[Launch, Any], copy_gbps: float) -> list[Row]:
    """Time the programs of one product, with the same stacks."""
    stacks: list[Quantized] = []
    found = []
    for key, run in compiled.items():
        chosen, share, made = (*arguments(key)[:2], stacks) if stacks else arguments(key)
        stacks = made
        product, calls = key.product, key.product.calls(key.rows)
        [samples] = timing.kernel_times([functools.partial(run, chosen, share, stacks)], product.kernel, calls, REPEATS)
        shape, read = "x".join(map(str, product.shape[1:])), traffic(product, key.rows)
        role, height = ("gate + up", key.tile.gate_up) if product.kernel == GATE_UP else ("down", key.tile.down)
        cut = f"{many_rows.WARPS} warps" if product.by_many_rows(key.rows) else f"{height} rows, {key.tile.ahead} ahead"
        name = f"{role} {product.name}, {cut}"
        extra = {"pairs": key.rows * product.active, "tile": dataclasses.asdict(key.tile), "weight_bytes": read}
        made_row = row(f"{product.stacks}x{shape}", name, "experts", key.rows, samples, read, copy_gbps)
        found.append({**made_row, **extra})
    return found
