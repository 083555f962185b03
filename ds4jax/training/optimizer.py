"""The optimiser: groups of weights, the learning rate and the update rule."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import optax
from optax import contrib

from ds4jax.training.recipe import BaseRecipe

MUON_RMS = 0.2
OUTER = ("embed.", "head.", "dspark.markov_w", "dspark.confidence.")
DROPPED_NORMS = ("attn_norm.weight", "ffn_norm.weight", "mtp.0.enorm.weight", "mtp.0.hnorm.weight", "mtp.0.norm.weight")


def is_matrix(name: str, ndim: int) -> bool:
    """Whether weight decay applies: to matrices and stacks of matrices.

    It does not apply to norms, biases, sinks, position biases and hyper-connections.
    """
    return ndim >= 2 and name.endswith(".weight")


def is_hidden_matrix(name: str, ndim: int) -> bool:
    """Whether Muon updates this weight: a matrix between hidden vectors, so no table of tokens, no head and no router."""
    outer = name.startswith(OUTER) or name.endswith(("gate.weight", "weights_proj.weight"))
    return is_matrix(name, ndim) and not outer


def is_dropped_matrix(name: str, ndim: int) -> bool:
    """Whether weight dropout applies: to attention projections, experts and the MTP block's input matrices."""
    return is_hidden_matrix(name, ndim) and ".compressor." not in name and ".indexer." not in name


def is_dropped_norm(name: str) -> bool:
    """Whether channel dropout applies: to the norms before a sub-layer or a head."""
    return name == "norm.weight" or name.endswith(DROPPED_NORMS)


def learning_rate(recipe: BaseRecipe) -> optax.Schedule:
    """Learning rate by step: a linear warm-up, then a cosine decay to the final share at the last step."""
    warmup = min(recipe.warmup, max(recipe.steps - 1, 0))
    return optax.warmup_cosine_decay_schedule(
        0.0 if warmup else recipe.learning_rate,
        recipe.learning_rate,
        warmup,
        max(recipe.steps, warmup + 1),
        recipe.learning_rate * recipe.final_learning_rate,
    )


def make_optimizer(recipe: BaseRecipe, params: Mapping[str, jax.Array | jax.ShapeDtypeStruct]) -> optax.GradientTransformation:
    """The optimiser: clipped AdamW with decay on matrices only, or Muon on hidden matrices and AdamW on the others.

    The router biases have no gradient, so this does not update them.
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
