"""Names and shapes of parameters, and models made of loaded values."""

from __future__ import annotations

from collections.abc import Iterable

import jax
from flax import nnx

from ds4jax.config import Config
from ds4jax.model.transformer import Transformer
from pallas_kernels.formats import Quantized

Value = jax.Array | Quantized


def abstract(config: Config) -> Transformer:
    """The model with shapes in place of values; nothing is allocated or traced."""
    return Transformer(config, rngs=None)


def _dotted(path: tuple) -> str:
    return ".".join(str(part) for part in path)


def values(module: nnx.Module) -> dict[str, Value]:
    """Parameters of a module by name."""
    return {_dotted(path): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param))}


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by its name in the published checkpoint; the experts of a layer are stacked, [E, ...]."""
    state = nnx.state(abstract(config), nnx.Param)
    return {_dotted(path): tuple(leaf.get_value().shape) for path, leaf in nnx.to_flat_state(state)}


def build(config: Config, tensors: Iterable[tuple[str, Value]]) -> Transformer:
    """Make a model of loaded values; `tensors` yields names and values one at a time.

    Raises:
        ValueError: a name that the model lacks, a shape that differs, or a parameter without a value.
    """
    model = abstract(config)
    wanted = {_dotted(path): leaf for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    variables = {_dotted(path): leaf for path, leaf in nnx.iter_graph(model) if isinstance(leaf, nnx.Param)}
    for name, value in tensors:
        if name not in wanted:
            raise ValueError(f"{name}: the model has no such parameter, or it was given twice")
        expected = tuple(wanted.pop(name).get_value().shape)
        if tuple(value.shape) != expected:
            raise ValueError(f"{name}: shape {list(value.shape)}, the model needs {list(expected)}")
        variables[name].set_value(value)
    if wanted:
        raise ValueError(f"{min(wanted)}: no value given ({len(wanted)} parameters are missing)")
    return model
