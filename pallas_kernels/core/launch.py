"""Several kernels in one launch, for different work on the same inputs.

A decode step of one token has hundreds of launches of a few microseconds. Each launch costs about two microseconds by itself.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

# Weight bytes that a launch reads, by name, for every launch traced in this process. Benchmarks compare them with its times.
TRAFFIC: dict[str, int] = {}

Body = Callable[[jax.Array, Sequence[Any], Sequence[Any]], None]


@dataclasses.dataclass(frozen=True)
class Part:
    """One kernel of a launch.

    Attributes:
        name: the name in profiles and lowered programs; letters, digits and underscores.
        programs: number of programs.
        body: function of a program's number, the input references and the output references.
        inputs, outputs: operands, and shapes of the results.
        aliases: input number → output number, for inputs that are updated in place.
        traffic: bytes of weights that one launch reads, as the kernel counts them; 0 if it reads none.
    """

    name: str
    programs: int
    body: Body
    inputs: tuple[jax.Array, ...]
    outputs: tuple[jax.ShapeDtypeStruct, ...]
    aliases: dict[int, int] = dataclasses.field(default_factory=dict)
    traffic: int = 0


@dataclasses.dataclass(frozen=True)
class _Work:
    """The static fields of a part. Equal for parts of equal shapes; arrays reach the kernel as references."""

    programs: int
    body: Body
    options: tuple[tuple[str, Any], ...]
    inputs: int
    outputs: tuple[jax.ShapeDtypeStruct, ...]

    @classmethod
    def of(cls, part: Part) -> _Work:
        """Separates the function from its options, because two partial functions are never equal."""
        body: Any = part.body
        options: dict[str, Any] = {}
        if isinstance(body, functools.partial):
            body, options = body.func, body.keywords
        return cls(part.programs, body, tuple(sorted(options.items())), len(part.inputs), part.outputs)


def _kernel(*refs: Any, works: Sequence[_Work]) -> None:
    program, first, given = pl.program_id(0), 0, 0
    made = sum(work.inputs for work in works)
    for work in works:
        outputs = len(work.outputs)
        arguments = program - first, refs[given : given + work.inputs], refs[made : made + outputs]
        given, made = given + work.inputs, made + outputs
        body = functools.partial(work.body, *arguments, **dict(work.options))
        if len(works) == 1:
            body()
        else:
            pl.when((program >= first) & (program < first + work.programs))(body)
        first += work.programs


def launch(parts: Sequence[Part], *, warps: int, interpret: bool) -> list[list[jax.Array]]:
    """Run kernels in one launch.

    Args:
        parts: the kernels; their programs have the same number of warps.
        warps: warps of a program.
        interpret: run in interpret mode, without a GPU.

    Returns:
        The results of each part, with the shapes of its `outputs`.
    """
    aliases: dict[int, int] = {}
    inputs = outputs = 0
    for part in parts:
        aliases |= {inputs + source: outputs + target for source, target in part.aliases.items()}
        inputs, outputs = inputs + len(part.inputs), outputs + len(part.outputs)
    name = "__".join(part.name for part in parts)
    TRAFFIC[name] = sum(part.traffic for part in parts)
    _find_dialect()
    made = _launched(
        *(array for part in parts for array in part.inputs),
        works=tuple(map(_Work.of, parts)),
        aliases=tuple(sorted(aliases.items())),
        warps=warps,
        interpret=interpret,
        name=name,
    )
    results, place = [], 0
    for part in parts:
        results.append(list(made[place : place + len(part.outputs)]))
        place += len(part.outputs)
    return results


@functools.partial(jax.jit, static_argnames=("works", "aliases", "warps", "interpret", "name"))
def _launched(
    *inputs: jax.Array, works: tuple[_Work, ...], aliases: tuple[tuple[int, int], ...], warps: int, interpret: bool, name: str
) -> list[jax.Array]:
    """Jitted, so that equal launches of different layers are traced and lowered once."""
    made: list[jax.Array] = pl.pallas_call(
        functools.partial(_kernel, works=works),
        out_shape=[shape for work in works for shape in work.outputs],
        grid=(sum(work.programs for work in works),),
        input_output_aliases=dict(aliases),
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name=name,
    )(*inputs)
    return made


@functools.cache
def _find_dialect() -> None:
    """Register the module of Triton's types under the name that MLIR's bindings import.

    For each value of a Triton type the bindings try to import `jaxlib.mlir.dialects.tt` and ignore a failure. The module that
    declares the types has another name. A kernel has hundreds of such values, and a failed import searches all of `sys.path`,
    which takes more than half of the lowering time.
    """
    from jaxlib.triton import dialect

    sys.modules.setdefault("jaxlib.mlir.dialects.tt", dialect)
