"""What the metadata of a model and of its drafter's file say of each other."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from ds4jax.config import Config
from ds4jax.errors import InputError
from ds4jax.loading.dspark_names import DFLASH, Dspark
from ds4jax.loading.gguf_config import FIELDS, NEXTN, PREFIX, RATIOS, VOCABULARY, read_config, real, vocab_size
from ds4jax.loading.gguf_header import Header, shown
from ds4jax.loading.mtp_file import ARCHITECTURE as MTP_ARCHITECTURE
from ds4jax.loading.mtp_names import MtpBlock
from ds4jax.text.tokenizer import TOKENS_KEY

# Keys of the model that a drafter's file may repeat, with equal values.
_SHARED = {key for _, key, _ in FIELDS} - {"context_length"} | {VOCABULARY}
# And that a DSpark drafter has for its own layers.
_OF_STAGES = {"hash_layer_count"}
_ONE_BLOCK = (NEXTN, "mtp_layer_count")
# Before a key of the model in a drafter's file.
_PREFIXES = (f"{MTP_ARCHITECTURE}.", PREFIX, f"{DFLASH}.")


def with_dspark(config: Config, found: Dspark) -> Config:
    """The configuration of a model with a DSpark drafter.

    Raises:
        InputError: the drafter's numbers do not go with the model.
    """
    try:
        return dataclasses.replace(config, **found.numbers.fields)
    except ValueError as error:
        raise InputError(f"{found.header.path}: {error}") from error


def difference(model: Header, drafter: MtpBlock | Dspark) -> str:
    """A phrase that names the first key in which a drafter's metadata contradicts the model's; empty where none does."""
    shared = _SHARED - (_OF_STAGES if isinstance(drafter, Dspark) else set())
    for key, value in drafter.header.metadata.items():
        name = next((key.removeprefix(prefix) for prefix in _PREFIXES if key.startswith(prefix)), key)
        ours = model.metadata.get(PREFIX + name)
        if name in _ONE_BLOCK and isinstance(drafter, MtpBlock) and real(value) != 1:
            return f"{key}: is {shown(str(value.value))}; one block can be used"
        if name in shared and ours is not None and not math.isclose(real(value), real(ours), rel_tol=1e-6):
            return f"{key}: is {shown(str(value.value))}, and {ours.value} in {model.path.name}"
    ratios = drafter.header.metadata.get(f"{DFLASH}.{RATIOS}")
    if ratios is not None and np.any(np.asarray(ratios.value)):
        return f"{DFLASH}.{RATIOS}: is {shown(str(list(ratios.value)))}; the stages of a DSpark drafter have no compression"
    tokens = drafter.header.metadata.get(TOKENS_KEY)
    if tokens is not None and tokens.type == "str[]" and len(tokens.value) != vocab_size(model):
        return f"{TOKENS_KEY}: {len(tokens.value)} entries, and {vocab_size(model)} in {model.path.name}"
    return ""


def other_ratios(model: Header, mtp: Header) -> str:
    """A phrase about compression ratios that show that an MTP block was made for other weights; empty where none do.

    Weights with a DSpark drafter have more entries than one for each layer and an MTP block.
    """
    config = read_config(model)
    ours, needed = list(config.compress_ratios), config.n_layers + 1
    value = mtp.metadata.get(PREFIX + RATIOS)
    theirs = value.value.tolist() if value is not None and value.type in ("i32[]", "u32[]") else ours[:needed]
    if ours == theirs:
        return ""
    if len(ours) > needed:
        layers = f"{config.n_layers} layers and an MTP block make {needed}"
        return f"{PREFIX}{RATIOS}: has {len(ours)} entries in {model.path.name}; {layers}"
    if len(theirs) > needed or theirs[: len(ours)] != ours[: len(theirs)]:
        return f"{PREFIX}{RATIOS}: has {len(theirs)} entries, and others than in {model.path.name}"
    return ""


def dspark_ratios(model: Header, drafter: Dspark) -> str:
    """A phrase about compression ratios that show that a DSpark drafter was made for other weights; empty where none do.

    Weights with a DSpark drafter have an entry of 0 for each of its stages, and those with an MTP block one for that.
    """
    config, stages = read_config(model), drafter.numbers.stages
    own = config.compress_ratios[config.n_layers :]
    if not own or own == (0,) * stages:
        return ""
    layers = f"{config.n_layers} layers and {stages} DSpark stages make {config.n_layers + stages}, the last {stages} of them 0"
    return f"{PREFIX}{RATIOS}: has {len(config.compress_ratios)} entries in {model.path.name}; {layers}"
