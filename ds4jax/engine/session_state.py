"""Converts a session's state to the tensors of a file, and back.

Of arrays that depend on the capacity only the filled rows, which are the first ones, are written. Reading puts them into arrays
of the saved capacity, because another capacity needs another program.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import ds4jax
from ds4jax.bounds import AND_NGRAM, DRAFTERS, SHIPPED
from ds4jax.decode.drafter import Drafter
from ds4jax.decode.drafters.named import name_of
from ds4jax.decode.loop import DecodeState
from ds4jax.decode.sampling import Sampling
from ds4jax.engine import session_file
from ds4jax.engine.loaded import Loaded
from ds4jax.engine.options import Options, Snapshot, require_draft, require_drafter
from ds4jax.engine.rewind import RewindPoint, rings_of
from ds4jax.engine.session_file import Opened
from ds4jax.errors import InputError

# Metadata of a file that are texts; other metadata are JSON.
_TEXTS = ("ds4jax", "model", "fingerprint", "drafter", "unshown")
_NUMBERS = ("length", "capacity", "max_draft", "given", "mark")


@dataclasses.dataclass(frozen=True)
class Header:
    """Metadata of a saved session.

    Attributes:
        path: the file.
        ds4jax: the version that wrote it.
        model: path of the model's files; empty for the tiny model in the package and for a model made in memory.
        fingerprint: `LanguageModel.fingerprint`.
        drafter: the drafter's name or class; "none" at `max_draft` 0.
        length: rows in the cache.
        capacity: maximum rows of the cache.
        max_draft: the model's `max_draft`.
        given: number of tokens after the prompt that were returned to the caller.
        mark: rows in the cache at the end of the prompt.
        unshown: the end of these tokens' text that the caller has not shown.
        seconds: time in the decode loop.
        config: the fields of the model's `Config`.
        options: the fields of `Options`; `sampling` holds the fields of `Sampling`.
    """

    path: Path
    ds4jax: str
    model: str
    fingerprint: str
    drafter: str
    length: int
    capacity: int
    max_draft: int
    given: int
    mark: int
    unshown: str
    seconds: float
    config: dict[str, Any]
    options: dict[str, Any]

    @classmethod
    def of(cls, file: Opened) -> Header:
        """Read the metadata.

        Raises:
            InputError: a field is missing or invalid.
        """
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls)[1:]:
            try:
                text = file.fields[field.name]
                values[field.name] = text if field.name in _TEXTS else json.loads(text)
                _require(field.name, values[field.name])
            except (KeyError, ValueError, TypeError, RecursionError):
                raise InputError(f"{file.path}: {field.name}: missing or invalid; save the session again") from None
        return cls(file.path, **values)

    @property
    def opened_with(self) -> str:
        """The drafter that the model was opened with, a name for `ds4jax.load`."""
        if self.drafter in DRAFTERS and (self.drafter == "ngram" or self.drafter.endswith(AND_NGRAM)):
            return self.drafter
        return "dspark" if self.config.get("n_dspark") else "mtp" if self.config.get("n_mtp") else "none"

    def texts(self) -> dict[str, str]:
        """The fields as texts, for a file."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)[1:]}
        return {name: value if name in _TEXTS else json.dumps(value) for name, value in values.items()}


def _require(name: str, value: Any) -> None:
    kind = str if name in _TEXTS else dict if name in ("config", "options") else int if name in _NUMBERS else float
    if type(value) is not kind or (isinstance(value, int | float) and not 0 <= value < 1 << 40):
        raise ValueError(name)


def header(path: str | os.PathLike[str]) -> Header:
    """Read the metadata of a saved session, but no tensors.

    Raises:
        InputError: the file is not a saved session, or is not complete.
    """
    with session_file.opened(Path(path)) as file:
        return Header.of(file)


def save(path: Path, model: Loaded, options: Options, latest: Snapshot, mark: RewindPoint, unshown: str = "") -> None:
    """Write a session to a file; see `Session.save`."""
    # Replace the target of a link, not the link.
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give the name of a file")
    state, drafter = latest.state, model.drafter(options.drafter)
    length, capacity = int(state.cache.length[0]), state.tokens.shape[1]
    chosen = dataclasses.asdict(options) | {"drafter": None}
    about = Header(
        path,
        ds4jax.__version__,
        _place(model),
        model.fingerprint,
        name_of(drafter),
        length,
        capacity,
        model.max_draft,
        latest.given,
        mark.length,
        unshown,
        float(latest.seconds),
        json.loads(json.dumps(dataclasses.asdict(model.config))),
        chosen,
    )
    arrays = _named(_Saved(state, mark.rings, mark.drafting))
    cut = _named(_shapes(model, max(length, 1), capacity, drafter))

    def part(name: str) -> np.ndarray:
        # Copy through a temporary array. JAX caches the host copy on the array that it came from, and would keep it alive.
        array = np.asarray(arrays[name].addressable_data(0))
        return array[tuple(map(slice, cut[name].shape))]

    listed: list[tuple[str, Any, Callable[[], np.ndarray]]]
    listed = [(_PROMPT, latest.prompt_ids, lambda: latest.prompt_ids)]
    listed += [(name, like, functools.partial(part, name)) for name, like in cut.items()]
    session_file.write(path, about.texts(), listed)


_PROMPT = "prompt_ids"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Saved:
    """The arrays of a session."""

    state: DecodeState
    rings: Any
    drafting: Any


def _named(tree: _Saved) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _shapes(model: Loaded, rows: int, capacity: int, drafter: Drafter | None) -> _Saved:
    """Shapes and types of a session with a cache of `rows` rows.

    The state of a drafter whose arrays go `by_position` can be cut to `rows`. Another drafter's state is saved at full capacity,
    because its meaning is unknown.
    """
    state = model.state_shapes(rows, drafter)
    if not getattr(drafter, "by_position", drafter is None):
        state = dataclasses.replace(state, drafting=model.state_shapes(capacity, drafter).drafting)
    return _Saved(state, tuple(map(rings_of, state.cache.layers)), state.drafting)


def _place(model: Loaded) -> str:
    return "" if model.path is None or model.path == SHIPPED else str(model.path.resolve())


class Saved(NamedTuple):
    """Result of `read`: all parts of a session."""

    model: Loaded
    options: Options
    latest: Snapshot
    mark: RewindPoint
    unshown: str


def read(path: str | os.PathLike[str], load: Callable[[Header], Loaded], **options: Any) -> Saved:
    """Read the file that `save` wrote; see `ds4jax.restore`.

    Args:
        load: returns the model for the file's metadata.
        options: fields of `Options` that replace the saved ones.
    """
    file_path = Path(path)
    with session_file.opened(file_path) as file:
        about = Header.of(file)
        chosen = _options(about, options)
        require_draft(chosen.draft, about.max_draft, f"the model of {file_path}")
        model = load(about)
        require_drafter(model, chosen)
        drafter = model.drafter(chosen.drafter)
        _check_model(about, model, drafter)
        wanted = _named(_shapes(model, max(about.length, 1), about.capacity, drafter))
        _check_tensors(file, about, wanted)
        file.check_bytes()
        prompt_ids = _checked_position(file, about, model)
        full = _shapes(model, about.capacity, about.capacity, drafter)
        arrays = {name: _filled(file.read(name), like) for name, like in _named(full).items()}
    saved = jax.tree.unflatten(jax.tree.structure(full), arrays.values())
    snapshot = Snapshot(prompt_ids, saved.state, about.given, about.seconds)
    return Saved(model, chosen, snapshot, RewindPoint(about.mark, saved.rings, saved.drafting), about.unshown)


def _filled(rows: np.ndarray, like: Any) -> jax.Array:
    if rows.shape != like.shape:
        padded = np.zeros(like.shape, like.dtype)
        padded[tuple(map(slice, rows.shape))] = rows
        rows = padded
    # Copy, because the decode loop donates its buffers, and on a CPU JAX would share NumPy's.
    return jnp.array(rows)


def _options(about: Header, changed: dict[str, Any]) -> Options:
    path = about.path
    try:
        saved = dict(about.options)
        sampling = Sampling(**saved.pop("sampling"))
        options = Options(**saved | {"sampling": sampling})
    except (TypeError, ValueError, KeyError, AttributeError):
        raise InputError(f"{path}: options: not valid; save the session again") from None
    if "strict" in changed and changed["strict"] != options.strict:
        raise InputError(f"{path}: strict: the session was saved with strict {options.strict}, which cannot change; leave it out")
    try:
        return dataclasses.replace(options, **changed)
    except TypeError:
        unknown = min(set(changed) - {field.name for field in dataclasses.fields(Options)}, default="options")
        raise InputError(f"{unknown}: no such option; see ds4jax.engine.options.Options") from None


_OTHER = "give the model that it was saved with"


def _check_model(about: Header, model: Loaded, drafter: Drafter | None) -> None:
    path, name = about.path, model.path or "the model"
    config = json.loads(json.dumps(dataclasses.asdict(model.config)))
    for field in sorted(config.keys() | about.config.keys()):
        ours, theirs = config.get(field), about.config.get(field)
        if ours != theirs:
            raise InputError(f"{path}: config: {field} is {theirs}, and {ours} in {name}; {_OTHER}")
    if about.max_draft != model.max_draft:
        advice = f"open the model with max_draft {about.max_draft}"
        raise InputError(f"{path}: max_draft: {about.max_draft}, and {model.max_draft} in {name}; {advice}")
    context = model.config.max_context
    for field, value, minimum, maximum in (("capacity", about.capacity, 1, context), ("length", about.length, 0, about.capacity)):
        if not minimum <= value <= maximum:
            raise InputError(f"{path}: {field}: {value}; it must be {minimum} to {maximum}; save the session again")
    if about.drafter != name_of(drafter):
        raise InputError(f"{path}: drafter: {about.drafter}, and {name_of(drafter)} here; give the one that it was saved with")
    if about.fingerprint != model.fingerprint:
        raise InputError(f"{path}: fingerprint: {name} has other weights; {_OTHER}")


def _check_tensors(file: Opened, about: Header, wanted: dict[str, Any]) -> None:
    """Check that every tensor exists and has the right type and shape."""
    path = file.path
    prompt = jax.ShapeDtypeStruct((about.mark + 1,), jnp.int32)
    wanted = {_PROMPT: prompt} | wanted
    odd = sorted(wanted.keys() ^ file.tensors.keys())
    if odd:
        what = "missing" if odd[0] in wanted else "not part of a session"
        raise InputError(f"{path}: {' '.join(odd[0].split())[:100]}: {what}; save the session again")
    for name, like in wanted.items():
        tensor = file.tensors[name]
        if (tensor.shape, tensor.dtype) != (like.shape, np.dtype(like.dtype)):
            needed, found = (f"{np.dtype(array.dtype)}{list(array.shape)}" for array in (like, tensor))
            raise InputError(f"{path}: {name}: {found}, where {needed} is needed; save the session again")


def _checked_position(file: Opened, about: Header, model: Loaded) -> np.ndarray:
    """Read the prompt, and check lengths and token ids. Only a file that was written by other means can fail here."""
    prompt_ids, tokens, count = file.read(_PROMPT), file.read("state.tokens")[0], int(file.read("state.count")[0])
    length = int(file.read("state.cache.length")[0])
    if not (length == about.length == len(prompt_ids) - 1 + count and 0 <= about.given <= count):
        raise InputError(f"{file.path}: length: {about.length} rows, prompt and tokens do not agree; save the session again")
    try:
        model.checked(np.append(prompt_ids, tokens[:count]))
    except InputError as error:
        raise InputError(f"{file.path}: {_PROMPT}: {error}; save the session again") from None
    return prompt_ids
