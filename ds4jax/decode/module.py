"""A Flax module as arguments of compiled programs: a static part with a stored hash, and its arrays in one tuple.

A model of 43 layers has about 2,100 arrays. On every call, hashing an `nnx.GraphDef` of that size takes 17 ms and flattening an
`nnx.State` 6 ms. So the hash and the tuple are computed once.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from flax import nnx

from ds4jax.model.transformer import Transformer

Weights = nnx.State | tuple[jax.Array, ...]


@jax.tree_util.register_static
class Graph(nnx.GraphDef):
    """The static part of a module, hashed once; a static argument of compiled programs.

    Attributes:
        structure: the tree structure of the arrays in `nnx.State`.
        shapes: shape and type of each array, so that equal graphs have equal programs.
    """

    structure: jax.tree_util.PyTreeDef
    shapes: tuple[tuple[tuple[int, ...], str], ...]
    _hash: int

    @classmethod
    def split(cls, module: Transformer) -> tuple[Graph, nnx.State]:
        """The static part and the arrays of a module, like `nnx.split`."""
        found, weights = nnx.split(module)
        graph = cls(found.nodes, found.attributes, found.num_leaves)
        leaves, structure = jax.tree.flatten(weights)
        shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)
        for name, value in (("structure", structure), ("shapes", shapes), ("_hash", hash((found, structure, shapes)))):
            # The base class is frozen.
            object.__setattr__(graph, name, value)
        return graph, weights

    @functools.cached_property
    def text(self) -> str:
        """All of the graph as text, equal in every process; computed once."""
        return f"{self.nodes!r}\n{self.attributes!r}\n{self.structure}\n{self.shapes}"

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Graph) or self._hash != other._hash:
            return False
        ours, theirs = ((one.nodes, one.attributes, one.structure, one.shapes) for one in (self, other))
        return ours == theirs


def flat(weights: Any) -> tuple[jax.Array, ...]:
    """The arrays of a tree in one tuple, in the order that `merged` expects."""
    return tuple(jax.tree.leaves(weights))


def merged(graph: nnx.GraphDef, weights: Weights) -> Transformer:
    """Rebuild the module while a program is traced.

    Args:
        graph: the static part; a `Graph` if `weights` is a tuple.
        weights: the `nnx.State`, or its arrays from `flat`.
    """
    state = jax.tree.unflatten(graph.structure, weights) if isinstance(graph, Graph) and isinstance(weights, tuple) else weights
    module: Transformer = nnx.merge(graph, state)
    return module
