"""A Flax module as arguments of compiled programs: a static part with a stored hash, and its arrays in one tuple.

A model of 43 layers has about 2,100 arrays. On every call, hashing an `nnx.GraphDef` of that size takes 17 ms and flattening an
`nnx.State` 6 ms. So the hash and the tuple are computed once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ds4jax.decode import groups
from ds4jax.decode.groups import WHOLE
from ds4jax.model.transformer import Transformer
from pallas_kernels.formats import Quantized
from pallas_kernels.linear.cut import AXIS, Cut
from pallas_kernels.linear.mailbox_gather import Mail

Weights = nnx.State | tuple[jax.Array, ...]
Program = TypeVar("Program", bound=Callable[..., Any])
# How the arrays of mailboxes lie on the mesh.
MAIL_SPECS = (WHOLE, PartitionSpec(AXIS))


@jax.tree_util.register_static
class Graph(nnx.GraphDef):
    """The static part of a module, hashed once; a static argument of compiled programs.

    Attributes:
        structure: the tree structure of the arrays in `nnx.State`.
        shapes: shape and type of each array, so that equal graphs have equal programs.
        mesh: the devices that the arrays lie on; None on one device.
        specs: which axis of each array is cut over them.
        words: places of a device in the mailboxes whose arrays follow the weights, see `flat`; 0 if there are none.
    """

    structure: jax.tree_util.PyTreeDef
    shapes: tuple[tuple[tuple[int, ...], str], ...]
    mesh: Mesh | AbstractMesh | None
    specs: tuple[PartitionSpec, ...]
    words: int
    _hash: int

    @classmethod
    def split(cls, module: Transformer, *, words: int = 0) -> tuple[Graph, nnx.State]:
        """The static part and the arrays of a module, like `nnx.split`; `words` as the attribute."""
        found, weights = nnx.split(module)
        graph = cls(found.nodes, found.attributes, found.num_leaves)
        leaves, structure = jax.tree.flatten(weights)
        shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)
        mesh, specs = _placed(leaves)
        fields = {"structure": structure, "shapes": shapes, "mesh": mesh, "specs": specs, "words": words}
        for name, value in (fields | {"_hash": hash((found, *fields.values()))}).items():
            # The base class is frozen.
            object.__setattr__(graph, name, value)
        return graph, weights

    @functools.cached_property
    def text(self) -> str:
        """All of the graph as text, equal in every process; computed once."""
        parts = f"{self.nodes!r}\n{self.attributes!r}\n{self.structure}\n{self.shapes}"
        return parts if self.mesh is None else f"{parts}\n{self.mesh!r}\n{self.specs}\n{self.words}"

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Graph) or self._hash != other._hash:
            return False
        ours, theirs = (
            (one.nodes, one.attributes, one.structure, one.shapes, one.mesh, one.specs, one.words) for one in (self, other)
        )
        return ours == theirs


def _placed(arrays: list[jax.Array]) -> tuple[Mesh | AbstractMesh | None, tuple[PartitionSpec, ...]]:
    """The mesh of a model's arrays, and how each is cut; no mesh if none is cut."""
    shardings = [getattr(array, "sharding", None) for array in arrays]
    specs = tuple(one.spec if isinstance(one, NamedSharding) else WHOLE for one in shardings)
    return next((one.mesh for one in shardings if isinstance(one, NamedSharding)), None), specs


def on_devices(program: Program, ins: Any = WHOLE, outs: Any = WHOLE) -> Program:
    """Run a program `(graph, weights, *arguments, **static)` of a cut model on every device of its mesh, under `jax.jit`.

    All devices of a group have the same arguments and results, and exchange what `pallas_kernels.linear.cut` gathers, so they
    make the same decisions. A model on one device runs `program` as it is.

    Args:
        ins, outs: how arguments and results lie on groups, as for `groups.over_groups`; read if there are any.
    """

    @functools.wraps(program)
    def run(graph: nnx.GraphDef, weights: Weights, *arguments: Any, **static: Any) -> Any:
        if not isinstance(graph, Graph) or graph.mesh is None:
            return program(graph, weights, *arguments, **static)

        def on_each(weights: tuple[jax.Array, ...], arguments: tuple[Any, ...]) -> Any:
            return program(graph, weights, *arguments, **static)

        arrays = flat(weights)
        specs = (*graph.specs, *MAIL_SPECS)[: len(arrays)]
        own, made = (ins, outs) if groups.count(graph.mesh) > 1 else (WHOLE, WHOLE)
        whole = jax.shard_map(on_each, mesh=graph.mesh, in_specs=(specs, own), out_specs=made, check_vma=False)
        return whole(arrays, arguments)

    return run  # type: ignore[return-value]


def flat(weights: Any, mail: tuple[jax.Array, ...] = ()) -> tuple[jax.Array, ...]:
    """The arrays of a tree in one tuple, in the order that `merged` expects, and after them those of mailboxes, if there are any.

    Args:
        mail: int32 [P, 2], the addresses, and int32 [P], each device's own number; see `Mail`.
    """
    return (*jax.tree.leaves(weights), *mail)


def mail_of(graph: nnx.GraphDef, weights: Weights) -> Mail | None:
    """The mailboxes among a program's arrays; None if there are none."""
    if not isinstance(graph, Graph) or not graph.words or not isinstance(weights, tuple):
        return None
    addresses, me = weights[graph.structure.num_leaves :]
    return Mail(addresses, me, graph.words)


def merged(graph: nnx.GraphDef, weights: Weights, mail: Mail | None = None) -> Transformer:
    """Rebuild the module while a program is traced.

    Args:
        graph: the static part; a `Graph` if `weights` is a tuple.
        weights: the `nnx.State`, or its arrays from `flat`; of a cut model, this device's part of each array.
        mail: mailboxes by which the module's outputs are gathered; None gathers them by collectives.
    """
    state = weights
    if isinstance(graph, Graph) and isinstance(weights, tuple):
        state = jax.tree.unflatten(graph.structure, weights[: graph.structure.num_leaves])
        state = _with_cuts(state, graph.mesh, iter(graph.specs), mail) if graph.mesh else state
    module: Transformer = nnx.merge(graph, state)
    return module


def _with_cuts(state: nnx.State, mesh: Mesh | AbstractMesh, specs: Iterator[PartitionSpec], mail: Mail | None) -> nnx.State:
    """The state with a `Cut` in place of each weight that is cut."""
    values, tree = jax.tree.flatten(state, is_leaf=lambda value: isinstance(value, Quantized))
    planes = [[next(specs) for _ in jax.tree.leaves(value)] for value in values]
    cut = [
        Cut(value, mesh.shape[AXIS], mail) if any(AXIS in spec for spec in of) else value
        for value, of in zip(values, planes, strict=True)
    ]
    made: nnx.State = jax.tree.unflatten(tree, cut)
    return made
