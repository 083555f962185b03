"""Which weights are treated how, and the update rule made of that."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import optax
from optax import contrib

from ds4jax.training.recipe import Recipe

MUON_RMS = 0.2
DROPPED_NORMS = ("attn_norm.weight", "ffn_norm.weight", "mtp.0.enorm.weight", "mtp.0.hnorm.weight", "mtp.0.norm.weight")


def is_matrix(name: str, ndim: int) -> bool:
    """A matrix or a stack of them: decayed. Norms, biases, sinks, position biases and hyper-connections are not."""
    return ndim >= 2 and name.endswith(".weight")


def is_hidden_matrix(name: str, ndim: int) -> bool:
    """A matrix between hidden vectors, which Muon updates: not the embedding, the head or a router."""
    outer = name.startswith(("embed.", "head.")) or name.endswith(("gate.weight", "weights_proj.weight"))
    return is_matrix(name, ndim) and not outer


def is_dropped_matrix(name: str, ndim: int) -> bool:
    """A matrix whose elements weight dropout switches off: attention projections, experts, the MTP block's inputs."""
    return is_hidden_matrix(name, ndim) and ".compressor." not in name and ".indexer." not in name


def is_dropped_norm(name: str) -> bool:
    """A norm in front of a sub-layer or a head, whose channels dropout switches off."""
    return name == "norm.weight" or name.endswith(DROPPED_NORMS)


def learning_rate(recipe: Recipe) -> optax.Schedule:
    """Linear warm-up, then a cosine down to the final share at the last step."""
    warmup = min(recipe.warmup, max(recipe.steps - 1, 0))
    return optax.warmup_cosine_decay_schedule(
        0.0 if warmup else recipe.learning_rate,
        recipe.learning_rate,
        warmup,
        max(recipe.steps, warmup + 1),
        recipe.learning_rate * recipe.final_learning_rate,
    )


def make_optimizer(recipe: Recipe, params: Mapping[str, jax.Array | jax.ShapeDtypeStruct]) -> optax.GradientTransformation:
    """Clipped AdamW with decay on matrices alone, or Muon on the hidden matrices and AdamW on the rest.

    The router biases get no gradient and so no update here.
    """
    rate = learning_rate(recipe)
    decayed = {name: is_matrix(name, value.ndim) for name, value in params.items()}
    adamw = optax.adamw(rate, recipe.beta1, recipe.beta2, weight_decay=recipe.weight_decay, mask=decayed)
    if recipe.optimizer == "adamw":
        return optax.chain(optax.clip_by_global_norm(recipe.clip), adamw)
    spec = contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)
    muon = contrib.muon(
        rate,
        weight_decay=recipe.weight_decay,
        muon_weight_dimension_numbers=lambda hidden: jax.tree.map(lambda _: spec, hidden),
        consistent_rms=MUON_RMS,
    )
    labels = {name: "muon" if is_hidden_matrix(name, value.ndim) else "adamw" for name, value in params.items()}
    return optax.chain(optax.clip_by_global_norm(recipe.clip), optax.partition({"muon": muon, "adamw": adamw}, labels))
