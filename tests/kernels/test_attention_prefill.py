"""Attention of a prefill: the kernel against its meaning."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.harness import check_lowers

from pallas_kernels.attention import meaning
from pallas_kernels.attention.prefill import NAME, attend_prefill
from pallas_kernels.attention.split import Chosen, Leading

# Weights and outputs are rounded to float16: half of a unit of 2⁻¹⁰ each.
CLOSE = 2.0**-10


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of `t` rows after `start`, over `leading` or `chosen` compressed rows."""

    t: int = 5
    start: int = 3
    heads: int = 4
    dim: int = 64
    rope: int = 64
    window: int = 40
    leading: int = 0
    chosen: int = 0

    def operands(self, normal: Any = None) -> dict[str, Any]:
        """Operands of the kernel, their floats random or what `normal` makes of a shape."""
        random = np.random.default_rng(self.t + self.start)
        normal = normal or functools.partial(random.standard_normal, dtype=np.float32)
        stored = self.leading or 4 * self.chosen
        compressed: Leading | Chosen | None = None
        rows = normal((1, stored, self.dim)).astype(np.float16)
        visible = random.integers(0, (self.leading or self.chosen) + 1, self.t, np.int32)
        visible[0] = 0
        angles = random.uniform(-3.0, 3.0, (self.t, self.rope // 2))
        if self.leading:
            compressed = Leading(rows, visible)
        if self.chosen:
            index = random.integers(0, stored, (self.t, self.chosen), np.int32)
            compressed = Chosen(rows, np.where(np.arange(self.chosen) < visible[:, None], index, np.int32(-1)))
        return {
            "q": normal((self.t, self.heads, self.dim)),
            "cos": np.cos(angles, dtype=np.float32),
            "sin": np.sin(angles, dtype=np.float32),
            "keys": normal((self.window + self.t, self.dim)).astype(np.float16),
            "start": np.full(1, self.start, np.int32),
            "sink": normal(self.heads),
            "compressed": compressed,
            "visible": visible if self.chosen else None,
        }

    @property
    def options(self) -> dict[str, Any]:
        """Static arguments."""
        return {"window": self.window, "scale": 3 * self.dim**-0.5, "eps": 1e-6}


CASES = {
    "window alone, from the first position": Case(start=0),
    "the past is longer than the window": Case(start=100, heads=20),
    "leading": Case(leading=70),
    "chosen": Case(chosen=48, dim=256, window=128),
}
FLASH = {
    "window": Case(t=4096, heads=64, dim=512, window=128),
    "leading": Case(t=512, heads=64, dim=512, window=128, leading=1024),
    "chosen": Case(t=4096, heads=64, dim=512, window=128, chosen=512),
}


@functools.partial(jax.jit, static_argnames=("window", "scale", "eps"))
def _meaning(**operands: Any) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        return meaning.prefill(**operands)


def assert_close(out: jax.Array, wanted: jax.Array, what: str) -> None:
    worst = np.max(np.abs(np.asarray(out, np.float32) - np.asarray(wanted)))
    largest = np.max(np.abs(np.asarray(wanted)))
    assert worst <= CLOSE * largest, f"{what}: {worst:.2e} of {largest:.2e}"


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == "chosen" else pytest.mark.long) for name in CASES])
def test_interpreted_like_jnp(name: str) -> None:
    case = CASES[name]
    operands = case.operands()
    out = jax.jit(functools.partial(attend_prefill, **case.options, interpret=True))(**operands)
    assert_close(out, _meaning(**operands, **case.options), name)


@pytest.mark.long
def test_outputs_are_rounded_to_the_type_that_is_asked_for() -> None:
    case = Case(start=0)
    wide, narrow = (
        jax.jit(functools.partial(attend_prefill, **case.options, dtype=dtype, interpret=True))(**case.operands())
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert np.array_equal(narrow, wide.astype(jnp.bfloat16))


@pytest.mark.long
def test_rows_before_the_sequence_are_not_looked_at() -> None:
    case = Case(start=3)
    operands = case.operands()
    run = jax.jit(functools.partial(attend_prefill, **case.options, interpret=True))
    poisoned = operands | {"keys": operands["keys"].copy()}
    poisoned["keys"][: case.window - case.start] = np.nan
    assert np.array_equal(run(**operands), run(**poisoned))


@pytest.mark.long
@pytest.mark.parametrize("name", FLASH)
def test_lowers_for_cuda_at_full_shape(name: str) -> None:
    case = FLASH[name]
    shapes = jax.eval_shape(functools.partial(case.operands, jnp.zeros))
    check_lowers(functools.partial(attend_prefill, **case.options), (), {NAME: 1}, **shapes)


def test_wrong_shapes() -> None:
    case = Case()
    operands = case.operands()
    with pytest.raises(ValueError, match="keys are float16"):
        attend_prefill(**operands | {"keys": operands["keys"][1:]}, **case.options)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FLASH)
def test_compiled_like_jnp(name: str) -> None:
    case = dataclasses.replace(FLASH[name], t=48)
    operands = case.operands()
    run = jax.jit(functools.partial(attend_prefill, **case.options))
    assert_close(run(**operands), _meaning(**operands, **case.options), name)
