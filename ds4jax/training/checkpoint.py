"""Runs on disk: the whole state to go on from, and the averaged weights alone in files of moderate size."""

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
from ds4jax.files import replacing
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
    """What a run is besides its weights.

    Attributes:
        corpus: SHA-256 of the text.
        command: the command line that began it.
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
        """Read `to_json`'s text. Raises KeyError, TypeError or ValueError when it is something else."""
        fields = json.loads(text)
        vocabulary = Vocabulary(tuple(fields["vocabulary"]["tokens"]), tuple(fields["vocabulary"]["merges"]))
        return cls(**fields | {"recipe": Recipe(**fields["recipe"]), "vocabulary": vocabulary})


def save(folder: Path, run: Run, state: TrainState, tables: Weights) -> None:
    """Write state and averaged weights; each file is there complete or as it was before."""
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
    """Read what a run is, from whichever of its files is there.

    Raises:
        InputError: no run there, or files that are none of ours.
    """
    for path in (folder / STATE, *sorted(folder.glob(WEIGHTS.format(1, "*")))):
        if path.exists():
            return _open(path)[0]
    raise InputError(f"{folder}: no {STATE} and no weights here; give the folder of a run")


def load_state(folder: Path, template: TrainState) -> TrainState:
    """Read the state of a run into the structure of `template`, arrays or their shapes.

    Raises:
        InputError: no state there, or one of another recipe.
    """
    path = folder / STATE
    if not path.exists():
        raise InputError(f"{path}: no such file; weights alone can be exported (--steps 0) but not trained further")
    _, arrays = _open(path)
    names, leaves = _flat(template)
    if set(names) != set(arrays) or any(arrays[name].shape != leaf.shape for name, leaf in zip(names, leaves, strict=True)):
        raise InputError(f"{path}: holds other tensors than this recipe asks for; resume without changing model or optimiser")
    values = [jnp.asarray(arrays[name]) for name in names]
    return jax.tree.unflatten(jax.tree.structure(template), values)


def load_weights(folder: Path) -> tuple[Run, dict[str, np.ndarray]]:
    """Read the averaged weights of a run and its tables.

    Raises:
        InputError: files missing, or of different steps.
    """
    paths = sorted(folder.glob(WEIGHTS.format("*", "*")))
    if not paths:
        raise InputError(f"{folder}: no weights here; give the folder of a run")
    opened = [_open(path) for path in paths]
    run = opened[0][0]
    if len(paths) != int(paths[0].stem.rpartition("-")[2]) or any(other.step != run.step for other, _ in opened):
        raise InputError(f"{folder}: the files {WEIGHTS.format('*', '*')} are not one set; copy them again, all of one step")
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
        with safetensors.safe_open(path, framework="numpy") as file:
            run = Run.from_json((file.metadata() or {})[_KEY])
            return run, {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a file of a training run: {error}") from None
