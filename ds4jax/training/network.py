"""The model as a function of a flat dictionary of weights; gradients, optimiser and checkpoints use that dictionary."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ds4jax.config import Config
from ds4jax.model import parameters
from ds4jax.model.transformer import Transformer
from ds4jax.training.tiny import hash_table

Weights = dict[str, jax.Array]
WRITERS = ("attn.wo_b.weight", "experts.w2.weight")


def names_of(state: Any) -> list[str]:
    """Canonical names of a state's values, in the order of JAX's leaves."""
    names = {id(variable): ".".join(map(str, path)) for path, variable in nnx.to_flat_state(state)}
    return [names[id(variable)] for variable in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx.Variable))]


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """The structure of a model without its values. Equality is identity, so a jitted function can hold it.

    Attributes:
        names: canonical names in the order of the structure's leaves.
        shapes: shape and dtype of each trained parameter by name.
    """

    config: Config
    names: tuple[str, ...]
    shapes: dict[str, jax.ShapeDtypeStruct]
    structure: Any
    graph: Any

    @classmethod
    def of(cls, config: Config) -> Network:
        """The structure of a model with this configuration. Allocates nothing."""
        graph, state = nnx.split(parameters.abstract(config))
        names, leaves = names_of(state), jax.tree.leaves(state)
        shapes = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in zip(names, leaves, strict=True)}
        trained = {name: leaf for name, leaf in shapes.items() if jnp.issubdtype(leaf.dtype, jnp.floating)}
        return cls(config, tuple(names), trained, jax.tree.structure(state), graph)

    def model(self, params: Weights, tables: Weights) -> Transformer:
        """The model with these values. Works inside and outside a traced function."""
        leaves = [params[name] if name in params else tables[name] for name in self.names]
        model: Transformer = nnx.merge(self.graph, jax.tree.unflatten(self.structure, leaves))
        return model

    def initial(self, seed: int, *, embedding: float = 1.0, output: float = 1.0) -> Weights:
        """Random float32 parameters: the model's own initial values, scaled in two places.

        A sub-layer's output is far larger than the model's initial embedding, because its inputs are normed. At first it
        drowns the token in the streams after the first block.

        Args:
            embedding: factor of the embedding.
            output: factor of the matrices that write to the streams.
        """
        state = nnx.state(Transformer(self.config, rngs=nnx.Rngs(seed)))
        values = dict(zip(names_of(state), jax.tree.leaves(state), strict=True))
        factors = dict.fromkeys((name for name in values if name.endswith(WRITERS)), output) | {"embed.weight": embedding}
        return {name: values[name] * factors[name] if name in factors else values[name] for name in self.shapes}

    def tables(self, seed: int) -> Weights:
        """Tables int32 [V, K] of the hash-routed layers; they are not trained."""
        names = [name for name in self.names if name not in self.shapes]
        return {name: jnp.asarray(hash_table(self.config, seed + i)) for i, name in enumerate(sorted(names))}
