"""The draft heads that can be trained alone: what each is made of, what it learns from, and its loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ds4jax.errors import InputError
from ds4jax.loading.mainline import PADDING
from ds4jax.model import parameters
from ds4jax.model.dspark import DSPARK_PARAMETERS, DSpark
from ds4jax.model.mtp import MTP_PARAMETERS
from ds4jax.model.transformer import Transformer
from ds4jax.text.tokenizer import Tokenizer
from ds4jax.training.dspark import dspark_loss, dspark_teacher
from ds4jax.training.head_recipe import HeadRecipe
from ds4jax.training.mtp import mtp_loss, teacher

# Layers that a new DSpark head taps: the last ones.
TAPS = 3
# What a new stage has in common with the block that it begins as.
_HEAD = ("norm.weight", "hc_head_fn", "hc_head_base", "hc_head_scale")

Loss = tuple[jax.Array, dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Head:
    """A draft head.

    Attributes:
        parameters: filter of `nnx.split` for its parameters.
        teacher: the frozen model's output for a window int32 [T].
        loss: loss and its parts, from a model, a window, what `teacher` gave for it, a key, the first position that counts, and
            the recipe.
    """

    parameters: Any
    teacher: Callable[[Transformer, jax.Array], Any]
    loss: Callable[[Transformer, jax.Array, Any, jax.Array, int, HeadRecipe], Loss]


def _dspark_loss(model: Transformer, ids_T: jax.Array, known: Any, key: jax.Array, first: int, recipe: HeadRecipe) -> Loss:
    end = ids_T.shape[0] - model.config.dspark_block - 1
    draft_at_S = jax.random.randint(key, (recipe.anchors,), first, end, jnp.int32)
    return dspark_loss(model, ids_T, draft_at_S, known=known, distill=recipe.distill, decay=recipe.decay)


def _mtp_loss(model: Transformer, ids_T: jax.Array, known: Any, key: jax.Array, first: int, recipe: HeadRecipe) -> Loss:
    return mtp_loss(model, ids_T, known=known, distill=recipe.distill)


HEAD = {"dspark": Head(DSPARK_PARAMETERS, dspark_teacher, _dspark_loss), "mtp": Head(MTP_PARAMETERS, teacher, _mtp_loss)}


def with_dspark(model: Transformer, recipe: HeadRecipe, noise_id: int) -> Transformer:
    """A model with a new DSpark head in place of its own drafter.

    A stage begins as a copy of a block of the model that predicts: the MTP block if there is one, else the last layer. The
    projection of the rings passes the last tap on. Tables, and what no block of the model has, are random.

    Args:
        model: has float32 weights.
        noise_id: token of the block's unknown rows.
    """
    config = dataclasses.replace(
        model.config, n_mtp=0, n_dspark=recipe.stages, dspark_block=recipe.block, dspark_rank=recipe.rank,
        dspark_layers=tuple(range(max(model.config.n_layers - TAPS, 0), model.config.n_layers)), dspark_noise_id=noise_id,
    )  # fmt: skip
    known = parameters.values(model)
    own = {f"dspark.{name}": value for name, value in parameters.values(DSpark(config, rngs=nnx.Rngs(recipe.seed))).items()}
    last = f"layers.{config.n_layers - 1}."
    source = "mtp.0." if model.config.n_mtp else last
    for name in own:
        stage, _, part = name.removeprefix("dspark.stages.").partition(".")
        if stage.isdigit() and source + part in known:
            own[name] = known[source + part]
    for name in _HEAD:
        own[f"dspark.{name}"] = known[("mtp.0." if model.config.n_mtp else "") + name]
    others = jnp.zeros((config.dim, (len(config.dspark_layers) - 1) * config.dim), jnp.float32)
    own["dspark.main_proj.weight"] = jnp.concatenate([others, jnp.eye(config.dim, dtype=jnp.float32)], axis=1)
    main = {name: value for name, value in known.items() if not name.startswith(("mtp.", "dspark."))}
    return parameters.build(config, (main | own).items())


def prepared(name: str, model: Transformer, tokenizer: Tokenizer, recipe: HeadRecipe) -> Transformer:
    """The model with the head of this name to train: its own, or a new DSpark head.

    Raises:
        InputError: the model has no MTP block to train, or a new DSpark head lacks a token for its unknown rows.
    """
    if name == "mtp":
        if not model.config.n_mtp:
            raise InputError("--head mtp: the model has no MTP block; give a model that has one")
        return model
    if model.dspark is not None:
        return model
    return with_dspark(model, recipe, tokenizer.marker_id(PADDING))
