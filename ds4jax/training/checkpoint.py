"""Saves and loads training runs: the complete state for resuming, and the averaged weights alone in files of moderate size."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors.numpy import save_file

from ds4jax.errors import InputError
from ds4jax.files import open_regular, replacing
from ds4jax.training.data import Vocabulary
from ds4jax.training.loop import TrainState
from ds4jax.training.network import Weights
from ds4jax.training.recipe import Recipe

STATE = "checkpoint.safetensors"
WEIGHTS = "weights-{}-of-{}.safetensors"
LARGEST_FILE = 15_000_000
_KEY = "run"


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's description: everything except its weights.

    Attributes:
        corpus: SHA-256 of the text.
        command: the command line that started the run.
        figures: results measured so far, by name.
    """

    recipe: Recipe
    vocabulary: Vocabulary
    step: int
    corpus: str
    command: str
    figures: dict[str, float] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        """The run as one JSON object."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Run:
        """Read the text that `to_json` wrote. Raises KeyError, TypeError or ValueError for any other text."""
        fields = json.loads(text)
        vocabulary = Vocabulary(tuple(fields["vocabulary"]["tokens"]), tuple(fields["vocabulary"]["merges"]))
        return cls(**fields | {"recipe": Recipe(**fields["recipe"]), "vocabulary": vocabulary})


def save(folder: Path, run: Run, state: TrainState, tables: Weights) -> None:
    """Write the state and the averaged weights. Each file is either complete or unchanged."""
    metadata = {_KEY: run.to_json()}
    names, leaves = _flat(state)
    _write(folder / STATE, dict(zip(names, leaves, strict=True)), metadata)
    weights = {name: np.asarray(value) for name, value in (state.average | tables).items()}
    parts = _parts(weights)
    kept = {WEIGHTS.format(i + 1, len(parts)) for i in range(len(parts))}
    for i, part in enumerate(parts):
        _write(folder / WEIGHTS.format(i + 1, len(parts)), part, metadata)
    for stale in set(folder.glob(WEIGHTS.format("*", "*"))) - {folder / name for name in kept}:
        stale.unlink()


def load_run(folder: Path) -> Run:
    """Read a run's description from its state file or, without one, from its weights.

    Raises:
        InputError: the folder holds no run, or a file was not written by a training run.
    """
    for path in (folder / STATE, *sorted(folder.glob(WEIGHTS.format(1, "*")))):
        if path.exists():
            return _open(path)[0]
    raise InputError(f"{folder}: no {STATE} and no weights here; give the folder of a run")


def load_state(folder: Path, template: TrainState) -> TrainState:
    """Read the state of a run into the structure of `template`, arrays or their shapes.

    Raises:
        InputError: the folder holds no state, or the state of another recipe.
    """
    path = folder / STATE
    if not path.exists():
        raise InputError(f"{path}: no such file; weights alone can be exported (--steps 0), but training cannot resume from them")
    _, arrays = _open(path)
    names, leaves = _flat(template)
    if set(names) != set(arrays) or any(arrays[name].shape != leaf.shape for name, leaf in zip(names, leaves, strict=True)):
        raise InputError(f"{path}: its tensors do not fit this recipe; resume without changing the model or the optimiser")
    values = [jnp.asarray(arrays[name]) for name in names]
    return jax.tree.unflatten(jax.tree.structure(template), values)


def load_weights(folder: Path) -> tuple[Run, dict[str, np.ndarray]]:
    """Read the averaged weights and the tables of a run, by canonical name.

    Raises:
        InputError: files are missing or come from different steps.
    """
    paths = sorted(folder.glob(WEIGHTS.format("*", "*")))
    if not paths:
        raise InputError(f"{folder}: no weights here; give the folder of a run")
    opened = [_open(path) for path in paths]
    run = opened[0][0]
    if len(paths) != int(paths[0].stem.rpartition("-")[2]) or any(other.step != run.step for other, _ in opened):
        raise InputError(f"{folder}: the files {WEIGHTS.format('*', '*')} are not one set; copy all files of one step again")
    return run, {name: value for _, part in opened for name, value in part.items()}


def _flat(state: TrainState) -> tuple[list[str], list[Any]]:
    paths, _ = jax.tree_util.tree_flatten_with_path(state)
    return [jax.tree_util.keystr(path) for path, _ in paths], [leaf for _, leaf in paths]


def _parts(weights: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    parts: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, value in sorted(weights.items()):
        if size and size + value.nbytes > LARGEST_FILE:
            parts.append({})
            size = 0
        parts[-1][name] = value
        size += value.nbytes
    return parts


def _write(path: Path, arrays: dict[str, Any], metadata: dict[str, str]) -> None:
    with replacing(path) as unfinished:
        save_file({name: np.asarray(value, order="C") for name, value in arrays.items()}, unfinished, metadata)


def _open(path: Path) -> tuple[Run, dict[str, np.ndarray]]:
    try:
        with open_regular(path), safetensors.safe_open(path, framework="numpy") as file:
            run = Run.from_json((file.metadata() or {})[_KEY])
            return run, {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a file of a training run: {error}") from None
