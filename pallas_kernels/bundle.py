"""Several kernels in one launch: work of different kinds that waits for the same inputs starts together and ends together.

A step of one token is hundreds of launches, each of a few microseconds; a launch more costs about two of them, whatever it does.
"""

from __future__ import annotations

import dataclasses
import functools
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
    """What of a part the kernel has to know: its arrays reach it as references."""

    programs: int
    body: Body
    inputs: int
    outputs: int


def _kernel(*refs: Any, works: Sequence[_Work]) -> None:
    program, first, given = pl.program_id(0), 0, 0
    made = sum(work.inputs for work in works)
    for work in works:
        inputs, outputs = refs[given : given + work.inputs], refs[made : made + work.outputs]
        given, made = given + work.inputs, made + work.outputs
        body = functools.partial(work.body, program - first, inputs, outputs)
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
    made = pl.pallas_call(
        functools.partial(
            _kernel, works=[_Work(part.programs, part.body, len(part.inputs), len(part.outputs)) for part in parts]
        ),
        out_shape=[shape for part in parts for shape in part.outputs],
        grid=(sum(part.programs for part in parts),),
        input_output_aliases=aliases,
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name=name,
    )(*(array for part in parts for array in part.inputs))
    results, place = [], 0
    for part in parts:
        results.append(list(made[place : place + len(part.outputs)]))
        place += len(part.outputs)
    return results
