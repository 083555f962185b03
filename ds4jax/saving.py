"""A session's state as the tensors of a file, and back.

Arrays that grow with the capacity are written as they would be in a cache of as many rows as are filled: rows lie at the
beginning, so that this is cutting them. Reading puts them into arrays of the old capacity, since another one would be another
program.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

import ds4jax
from ds4jax import decode, session_file
from ds4jax.decode import DecodeState
from ds4jax.drafter import Drafter, MTPDrafter
from ds4jax.errors import InputError
from ds4jax.generation import Options, Snapshot
from ds4jax.sampling import Sampling
from ds4jax.session import Mark, Session, rings_of
from ds4jax.session_file import Opened

if TYPE_CHECKING:
    from ds4jax.language_model import LanguageModel

# What a file says beside its tensors; JSON where it is not a text.
_TEXTS = ("ds4jax", "model", "fingerprint", "drafter")
_NUMBERS = ("length", "capacity", "max_draft", "given", "mark")


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file says of its session.

    Attributes:
        path: the file.
        ds4jax: the version that wrote it.
        model: where the model's files are; empty for the one that ships and for one that was made in memory.
        fingerprint: `LanguageModel.fingerprint`.
        drafter: the drafter's class; empty at `max_draft` 0.
        length: rows in the cache.
        capacity: rows that it has room for.
        max_draft: of the model's loop.
        given: tokens after the prompt that their reader has.
        mark: rows in the cache at the end of the prompt.
        seconds: spent in the decode loop.
        config: the model's, by field.
        options: fields of `Options`, those of `Sampling` by name.
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
    seconds: float
    config: dict[str, Any]
    options: dict[str, Any]

    @classmethod
    def of(cls, file: Opened) -> Header:
        """Raises: InputError, a field is missing or is not what it should be."""
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls)[1:]:
            try:
                text = file.fields[field.name]
                values[field.name] = text if field.name in _TEXTS else json.loads(text)
                _require(field.name, values[field.name])
            except (KeyError, ValueError, TypeError, RecursionError):
                raise InputError(f"{file.path}: {field.name}: missing or not what it should be; save the session again") from None
        return cls(file.path, **values)

    def texts(self) -> dict[str, str]:
        """The fields as a file holds them."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)[1:]}
        return {name: value if name in _TEXTS else json.dumps(value) for name, value in values.items()}


def _require(name: str, value: Any) -> None:
    kind = str if name in _TEXTS else dict if name in ("config", "options") else int if name in _NUMBERS else float
    if type(value) is not kind or (isinstance(value, int | float) and not 0 <= value < 1 << 40):
        raise ValueError(name)


def header(path: str | os.PathLike[str]) -> Header:
    """What a file says of its session; its tensors are not read.

    Raises:
        InputError: it is not the file of a session, or not a whole one.
    """
    with session_file.opened(Path(path)) as file:
        return Header.of(file)


def save(path: Path, model: LanguageModel, options: Options, latest: Snapshot, mark: Mark) -> None:
    """Write a session to a file; see `Session.save`."""
    # The file that a link leads to, not the link.
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give the name of a file")
    state, drafter = latest.state, _drafter(model, options.drafter)
    length, capacity = int(state.cache.length[0]), len(state.tokens)
    chosen = dataclasses.asdict(options) | {"drafter": None}
    about = Header(
        path,
        ds4jax.__version__,
        _place(model),
        model.fingerprint,
        _class(drafter),
        length,
        capacity,
        model.max_draft,
        latest.given,
        mark.length,
        float(latest.seconds),
        json.loads(json.dumps(dataclasses.asdict(model.config))),
        chosen,
    )
    arrays = _named(_Saved(state, mark.rings, mark.drafting))
    cut = _named(_shapes(model, max(length, 1), capacity, drafter))

    def part(name: str) -> np.ndarray:
        # Through another array over the same buffer: jax keeps the copy on the host as long as the array that it was asked of.
        whole = np.asarray(arrays[name].addressable_data(0))
        return whole[tuple(map(slice, cut[name].shape))]

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


def _shapes(model: LanguageModel, rows: int, capacity: int, drafter: Drafter | None) -> _Saved:
    """Shapes and types of a session whose cache has room for so many rows.

    Only of the MTP drafter's state is it known that what lies beyond the rows is nothing; another's is as at full capacity.
    """

    def start(rows: int) -> DecodeState:
        return decode.start(model.config, rows, 0, drafter=drafter, max_draft=model.max_draft)

    state = jax.eval_shape(lambda: start(rows))
    if not isinstance(drafter, MTPDrafter | None):
        state = dataclasses.replace(state, drafting=jax.eval_shape(lambda: start(capacity)).drafting)
    return _Saved(state, tuple(map(rings_of, state.cache.layers)), state.drafting)


def _drafter(model: LanguageModel, drafter: Drafter | None) -> Drafter | None:
    return (drafter or MTPDrafter()) if model.max_draft else None


def _class(drafter: Drafter | None) -> str:
    return f"{type(drafter).__module__}.{type(drafter).__qualname__}" if drafter else ""


def _place(model: LanguageModel) -> str:
    from ds4jax.language_model import SHIPPED

    return "" if model.path is None or model.path == SHIPPED else str(model.path.resolve())


def restore(path: str | os.PathLike[str], model: LanguageModel | None = None, **options: Any) -> Session:
    """Go on with a session from the file that `Session.save` wrote: `resume`, or `stream` a longer prompt.

    The restored session has the same cache of the same capacity in the same program, so that what follows is what would have
    followed, to the last bit.

    Args:
        model: the model that it was saved with, opened with the same `max_draft`; None loads it from where it was, which is the
            one that ships for a model made in memory.
        options: fields of `ds4jax.generation.Options` in place of those that were saved; `strict` cannot change.

    Raises:
        InputError: not the file of a session, a truncated or altered one, one of another model or a newer version, or an option
            that cannot be used, in one line that names the field. All of it is checked before anything is allocated.
    """
    file_path = Path(path)
    with session_file.opened(file_path) as file:
        about = Header.of(file)
        chosen = _options(about, options)
        model = model or _load(about)
        drafter = _drafter(model, chosen.drafter)
        _check_model(about, model, drafter)
        wanted = _named(_shapes(model, max(about.length, 1), about.capacity, drafter))
        _check_tensors(file, about, wanted)
        file.check_bytes()
        prompt_ids = _checked_position(file, about, model)
        full = _shapes(model, about.capacity, about.capacity, drafter)
        arrays = {name: _filled(file.read(name), like) for name, like in _named(full).items()}
    saved = jax.tree.unflatten(jax.tree.structure(full), arrays.values())
    snapshot = Snapshot(prompt_ids, saved.state, about.given, about.seconds)
    return Session.of(model, chosen, snapshot, Mark(about.mark, saved.rings, saved.drafting))


def _filled(rows: np.ndarray, like: Any) -> jax.Array:
    if rows.shape != like.shape:
        whole = np.zeros(like.shape, like.dtype)
        whole[tuple(map(slice, rows.shape))] = rows
        rows = whole
    # A copy: the decode loop gives its buffers away, and on a CPU jax would take numpy's.
    return jnp.array(rows)


def _options(about: Header, changed: dict[str, Any]) -> Options:
    path = about.path
    try:
        saved = dict(about.options)
        sampling = Sampling(**saved.pop("sampling"))
        options = Options(**saved | {"sampling": sampling})
    except (TypeError, ValueError, KeyError, AttributeError):
        raise InputError(f"{path}: options: not those of a session; save the session again") from None
    if "strict" in changed and changed["strict"] != options.strict:
        raise InputError(f"{path}: strict: the session was saved with strict {options.strict}, which cannot change; leave it out")
    try:
        return dataclasses.replace(options, **changed)
    except TypeError:
        unknown = min(set(changed) - {field.name for field in dataclasses.fields(Options)}, default="options")
        raise InputError(f"{unknown}: no such option; see ds4jax.generation.Options") from None


def _load(about: Header) -> LanguageModel:
    from ds4jax.language_model import load

    if about.model and not os.path.exists(about.model):
        raise InputError(f"{about.path}: model: {about.model} is not there any more; say where the model is")
    qat, cache = bool(about.config.get("qat")), str(about.config.get("cache", "float32"))
    return load(about.model or None, qat=qat, cache=cache, max_draft=about.max_draft)


_OTHER = "restore with the model it was saved with"


def _check_model(about: Header, model: LanguageModel, drafter: Drafter | None) -> None:
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
    for field, value, least, most in (("capacity", about.capacity, 1, context), ("length", about.length, 0, about.capacity)):
        if not least <= value <= most:
            raise InputError(f"{path}: {field}: {value}, where {least} to {most} are possible; save the session again")
    if about.drafter != _class(drafter):
        raise InputError(f"{path}: drafter: {about.drafter}, and {_class(drafter)} here; give the one it was saved with")
    if about.fingerprint != model.fingerprint:
        raise InputError(f"{path}: fingerprint: not that of {name}, whose weights differ; {_OTHER}")


def _check_tensors(file: Opened, about: Header, wanted: dict[str, Any]) -> None:
    """Every tensor there, with its type and shape."""
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


def _checked_position(file: Opened, about: Header, model: LanguageModel) -> np.ndarray:
    """The prompt. Numbers that stand in two places agree, and tokens are some; only a file that was made by hand has others."""
    prompt_ids, tokens, count = file.read(_PROMPT), file.read("state.tokens"), int(file.read("state.count"))
    length = int(file.read("state.cache.length")[0])
    if not (length == about.length == len(prompt_ids) - 1 + count and 0 <= about.given <= count):
        raise InputError(f"{file.path}: length: {about.length} rows, prompt and tokens do not agree; save the session again")
    try:
        model.checked(np.append(prompt_ids, tokens[:count]))
    except InputError as error:
        raise InputError(f"{file.path}: {_PROMPT}: {error}; save the session again") from None
    return prompt_ids
