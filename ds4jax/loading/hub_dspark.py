"""The DSpark drafter of a checkpoint directory: three layers and small heads under `mtp.`, and keys of `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds4jax.config import Config
from ds4jax.errors import InputError
from ds4jax.loading.dspark_names import Numbers, hub_name, stages_in
from ds4jax.loading.hub_read import Entry
from ds4jax.loading.limits import MAX_STAGES

KEYS = {
    "dspark_block": "dspark_block_size",
    "dspark_layers": "dspark_target_layer_ids",
    "dspark_noise_id": "dspark_noise_token_id",
    "dspark_rank": "dspark_markov_rank",
}


def read_dspark(where: Path, config: Config, raw: Mapping[str, Any], index: Path, entries: Mapping[str, Entry]) -> Numbers:
    """The drafter's own numbers, from the directory's config and tensors.

    The number of stages is that of the tensors; `num_nextn_predict_layers` is 1 in these checkpoints and means nothing.

    Args:
        where, raw: `config.json` and its content.
        index, entries: the file that lists the tensors, and all of them by name.

    Raises:
        InputError: a key that is missing or not usable, or no Markov table in the last stage.

    Source: `config.json` and tensors of the published 0731 checkpoint.
    """
    stages = stages_in(name for name in entries if name.startswith("mtp."))
    if stages > MAX_STAGES:
        raise InputError(f"{index}: mtp.{stages - 1}: its tensors make {stages} stages; at most {MAX_STAGES} are supported")
    layers = raw.get(KEYS["dspark_layers"])
    if not isinstance(layers, list) or not layers:
        raise InputError(f"{where}: {KEYS['dspark_layers']}: missing or not a list; the DSpark drafter of these weights needs it")
    own = config.compress_ratios[config.n_layers :]
    if own and own != (0,) * stages:
        made = f"{config.n_layers} layers and {stages} DSpark stages make {config.n_layers + stages}, the last {stages} of them 0"
        raise InputError(f"{where}: compress_ratios: has {len(config.compress_ratios)} entries; {made}")
    table = hub_name("dspark.markov_w1.weight", stages)
    if table not in entries or len(entries[table].shape) != 2:
        raise InputError(f"{index}: {table}: missing or not a matrix; a DSpark drafter needs it")
    key = KEYS["dspark_rank"]
    return Numbers(
        stages=stages,
        block=_require(where, KEYS["dspark_block"], raw.get(KEYS["dspark_block"]), config.max_context, 1),
        layers=tuple(_require(where, KEYS["dspark_layers"], layer, config.n_layers) for layer in layers),
        noise_id=_require(where, KEYS["dspark_noise_id"], raw.get(KEYS["dspark_noise_id"]), config.vocab_size),
        rank=_require(where, key, raw[key], 1 << 20, 1) if key in raw else entries[table].shape[1],
    )


def _require(where: Path, key: str, value: Any, end: int, first: int = 0) -> int:
    if type(value) is not int or not first <= value < end:
        raise InputError(
            f"{where}: {key}: is {value!r}; the DSpark drafter of these weights needs integers from {first} to {end - 1}"
        )
    return value
