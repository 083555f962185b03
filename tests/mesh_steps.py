"""Decode steps of V4-Flash's shapes, cut over a mesh of GPUs that need not be there."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from cuda import gpus, lowered_for_cuda
from jax.sharding import NamedSharding

from ds4jax.config import Config
from ds4jax.decode import loop as decode
from ds4jax.decode.depth import Policy
from ds4jax.decode.drafter import Drafter
from ds4jax.decode.groups import GROUPS
from ds4jax.decode.loop import Limits
from ds4jax.decode.module import MAIL_SPECS, Graph, flat
from ds4jax.decode.sampling import Filters, Sampling
from ds4jax.loading.cuts import cut_names
from ds4jax.loading.mailboxes import places
from ds4jax.loading.placement import Placement
from ds4jax.model.parameters import build
from ds4jax.random_models import checkpoint as synthetic
from pallas_kernels.linear.cut import AXIS

# A layer of each kind, so that each jitted layer stands once in the text.
FLASH = dataclasses.replace(Config(), n_layers=3, n_hash_layers=1, compress_ratios=(0, 4, 128), n_mtp=0)


def cut_model(devices: int, config: Config = FLASH, *, mail: bool = False, in_groups: int = 1) -> tuple[Graph, tuple[Any, ...]]:
    """The model over a mesh that needs no devices, with mailboxes or without; so many devices in each of so many groups."""
    axes = {GROUPS: in_groups, AXIS: devices} if in_groups > 1 else {AXIS: devices}
    placement = Placement(gpus(**axes), cut_names(config, devices))
    tensors = synthetic.checkpoint(config, "flash-0731-q2" if config.n_dspark else "flash-q2").tensors
    model = build(config, ((tensor.name, placement.abstract(tensor.name, tensor.abstract)) for tensor in tensors))
    graph, weights = Graph.split(model, words=places(config, devices) if mail else 0)
    arrays = [
        jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(placement.mesh, spec))
        for shape, spec in zip(((devices, 2), (devices,)), MAIL_SPECS, strict=True)
    ]
    return graph, flat(weights, tuple(arrays) if mail else ())


def step_of(
    devices: int, config: Config = FLASH, *, mail: bool, drafter: Drafter | None = None, drafts: int = 0, sequences: int = 1,
    strict: bool = False,
) -> tuple[tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    """Arguments of a step of a model that was cut."""
    graph, weights = cut_model(devices, config, mail=mail)
    how: dict[str, Any] = {"drafter": drafter, "max_draft": drafts}
    state = jax.eval_shape(lambda: decode.start(config, 512, [0] * sequences, **how))
    policy = Policy(jnp.zeros(sequences, jnp.int32), jnp.ones(1 + drafts, jnp.float32))
    limits = Limits.of([1] * sequences, [1] * sequences, [[0]] * sequences)
    return (graph, weights, state, limits, Filters.of([Sampling()] * sequences), policy), how | {"strict": strict}


def lowered_step(*where: Any, **which: Any) -> str:
    """A step as text, see `step_of`."""
    arguments, how = step_of(*where, **which)
    return lowered_for_cuda(decode.run.__wrapped__, *arguments, **how)


def traced_step(*where: Any, **which: Any) -> Any:
    """A step that is traced and not lowered, see `step_of`."""
    arguments, how = step_of(*where, **which)
    return decode.run.__wrapped__.trace(*arguments, **how)
