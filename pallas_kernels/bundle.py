"""Several kernels in one launch: work of different kinds that waits for the same inputs starts together and ends together.

A step of one token is hundreds of launches, each of a few microseconds; a launch more costs about two of them, whatever it does.
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

# Bytes of weights that a launch of a name reads, of all that this process has traced; benchmarks lay them beside its times.
TRAFFIC: dict[str, int] = {}

Body = Callable[[jax.Array, Sequence[Any], Sequence[Any]], None]


@dataclasses.dataclass(frozen=True)
class Part:
    """One kernel of a launch.

    Attributes:
        name: as profiles and lowered programs show it; letters, digits and underscores.
        programs: how many there are.
        body: what one does, given its number and the references of the inputs and outputs.
        inputs, outputs: operands, and shapes of the results.
        aliases: outputs that are inputs updated in place, by the input's number.
        traffic: bytes of weights that one launch reads, by the kernel's own count; 0 where it reads none.
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
    """What of a part the kernel has to know: its arrays reach it as references. Equal for parts of equal shapes."""

    programs: int
    body: Body
    options: tuple[tuple[str, Any], ...]
    inputs: int
    outputs: tuple[jax.ShapeDtypeStruct, ...]

    @classmethod
    def of(cls, part: Part) -> _Work:
        """Options apart from the function, since two partial functions are never equal."""
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
    """Run kernels whose programs have the same number of warps; returns the results of each."""
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
    """A jitted function, so that the launches of all layers that look alike are traced and lowered once."""
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
    """Name the module of Triton's types where MLIR's bindings look for it.

    Whenever they meet such a type they import `jaxlib.mlir.dialects.tt`, and go on when there is none; the module that declares
    the types has another name. A kernel has hundreds of them, and a failed import searches the whole path: more than half of
    the time in which kernels are lowered.
    """
    from jaxlib.triton import dialect

    sys.modules.setdefault("jaxlib.mlir.dialects.tt", dialect)
