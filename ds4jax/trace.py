"""Looking inside: named intermediates of every layer for one sequence, as numpy arrays."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ds4jax.config import Config
from ds4jax.errors import InputError
from ds4jax.model.forward import score
from ds4jax.precision import precise

if TYPE_CHECKING:
    from ds4jax.language_model import LanguageModel

# More rows than any Q8_0 kernel takes, so that every product is a float32 one and a trace has the same path at every length.
WIDTHS = (64, 128, 256)
STEP = 256

# Axes and meaning by name. T are the sequence's rows and S rows that attention sees: positions in the window, blocks of `ratio`
# tokens elsewhere. A dot stands for an inner width without a letter.
WHOLE = {
    "embedded": ("TND", "streams before the first layer, all equal"),
    "logits": ("TV", "logits of the token at t+1"),
    "mtp.0.input": ("TND", "what goes into the MTP block at t: streams at t and embedding of the token at t+1, mixed"),
    "mtp.0.logits": ("TV", "the MTP block's logits of the token at t+2"),
}
LAYER = {
    "streams": ("TND", "streams after the layer"),
    "attn_in": ("TD", "attention's input: the streams' weighted sum, normed"),
    "attn_out": ("TD", "attention's output"),
    "ffn_in": ("TD", "the experts' input, normed"),
    "ffn_out": ("TD", "the experts' output, routed and shared"),
    "hc_attn_pre": ("TN", "share of each stream in the attention's input"),
    "hc_attn_post": ("TN", "what each stream takes of the attention's output"),
    "hc_attn_comb": ("TNN", "mixing matrix around attention, [source stream, target stream], rows and columns sum to 1"),
    "hc_ffn_pre": ("TN", "share of each stream in the experts' input"),
    "hc_ffn_post": ("TN", "what each stream takes of the experts' output"),
    "hc_ffn_comb": ("TNN", "mixing matrix around the experts"),
    "attn.q_low": ("T.", "low-rank queries after their norm"),
    "attn.kv": ("TQ", "the window's row of each token, key and value at once, rotated"),
    "attn.window_weights": ("THS", "attention paid to each position of the window"),
    "attn.compressed_weights": ("THS", "attention paid to each compressed row; 0 for rows that the indexer left out"),
    "attn.sink_weights": ("TH", "attention paid to the sink, which adds nothing: the three sum to 1"),
    "attn.compressor.pooled": ("SQ", "each block's gated mean"),
    "attn.compressor.normed": ("SQ", "the same after its norm"),
    "attn.compressor.rows": ("SQ", "the compressed rows as attention sees them, rotated"),
    "attn.indexer.compressor.pooled": ("S.", "the indexer's own keys, pooled"),
    "attn.indexer.compressor.normed": ("S.", "the same after their norm"),
    "attn.indexer.compressor.rows": ("S.", "the indexer's keys, rotated"),
    "attn.indexer.score": ("TS", "the indexer's score of each compressed row; -inf where it is not closed yet"),
    "attn.indexer.selected": ("TK", "compressed rows that the query attends to, best first, int32; -1 for none"),
    "ffn.scores": ("TE", "the router's score of each expert, without the bias"),
    "ffn.chosen": ("TK", "experts that each token uses, int32"),
    "ffn.weights": ("TK", "and their weights"),
}


def explain(name: str) -> tuple[str, str]:
    """Axes and meaning of a name as a trace has it, such as `layers.3.attn.sink_weights` or `mtp.0.streams`.

    Raises:
        KeyError: no trace has such a name.
    """
    return WHOLE[name] if name in WHOLE else LAYER[name.split(".", 2)[-1]]


@dataclasses.dataclass(frozen=True, repr=False)
class Trace(Mapping[str, np.ndarray]):
    """Named intermediates of one sequence; a mapping from names to arrays, `print(trace)` lists them with their meaning.

    Names are `embedded`, `logits`, `layers.0.streams`, `layers.0.attn.window_weights` and so on, and for the MTP block
    `mtp.0.streams` and its like; `ds4jax.trace.LAYER` and `WHOLE` say what each is. Floats are float32, choices int32.

    Attributes:
        ids: int32 [T], the sequence.
        ratios: tokens in a compressed row of each layer; 0 for layers that have none.
        arrays: all of them by name. T is the sequence's length, one less for the MTP block, whose row t needs the token at t+1.
    """

    ids: np.ndarray
    ratios: tuple[int, ...]
    arrays: dict[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    def layer(self, index: int) -> dict[str, np.ndarray]:
        """One layer's arrays by the rest of their names: `trace.layer(1)["attn.indexer.selected"]`."""
        prefix = f"layers.{index}."
        return {name.removeprefix(prefix): array for name, array in self.arrays.items() if name.startswith(prefix)}

    def over_layers(self, name: str) -> dict[int, np.ndarray]:
        """One kind of array by layer, for the layers that have it: `trace.over_layers("ffn.chosen")`."""
        found = {i: f"layers.{i}.{name}" for i in range(len(self.ratios))}
        return {i: self.arrays[whole] for i, whole in found.items() if whole in self.arrays}

    def __repr__(self) -> str:
        return f"Trace of {len(self.ids)} tokens, {len(self.arrays)} arrays"

    def __str__(self) -> str:
        kinds: dict[str, list[str]] = {}
        for name in self.arrays:
            group, _, rest = name.partition(".")
            index, _, kind = rest.partition(".")
            kinds.setdefault(f"layers.i.{kind}" if group == "layers" else name, []).append(index)
        lines = [repr(self)]
        for kind, layers in kinds.items():
            axes, meaning = explain(kind)
            some = kind.startswith("layers") and len(layers) < len(self.ratios)
            where = f"; layers {', '.join(layers)}" if some else ""
            lines.append(f"{kind:<40} {axes:<4} {meaning}{where}")
        return "\n".join(lines)


def trace(model: LanguageModel, ids: Sequence[int] | np.ndarray, *, only: str | Sequence[str] | None = None) -> Trace:
    """As `LanguageModel.trace`."""
    ids_T = model.checked(ids)
    patterns = (only,) if isinstance(only, str) else None if only is None else tuple(only)
    count = len(ids_T)
    width = next((width for width in WIDTHS if width >= count), -(-count // STEP) * STEP)
    arrays = _traced(model.graph, model.weights, jnp.asarray(np.pad(ids_T, (0, width - count))), only=patterns)
    if not arrays:
        raise InputError(f"trace: no name is or begins with {' or '.join(patterns or ())}; ds4jax.trace.LAYER lists them")
    named = {name: _cut(name, array, count, model.config) for name, array in arrays.items()}
    return Trace(ids_T, model.config.layer_ratios, dict(sorted(named.items(), key=lambda item: _order(item[0]))))


@precise
@functools.partial(jax.jit, static_argnames=("graph", "only"))
def _traced(graph: nnx.GraphDef, weights: nnx.State, ids_T: jax.Array, *, only: tuple[str, ...] | None) -> dict[str, jax.Array]:
    """One program for all names that are wanted; XLA drops what only the others need."""
    tape: dict[str, jax.Array] = {}
    tape["logits"], mtp_TV = score(nnx.merge(graph, weights), ids_T, tape=tape)
    if mtp_TV is not None:
        tape["mtp.0.logits"] = mtp_TV
    return {name: value for name, value in tape.items() if only is None or any(_wanted(name, pattern) for pattern in only)}


def _wanted(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")


def _cut(name: str, array: jax.Array, count: int, config: Config) -> np.ndarray:
    """Drop what belongs to the padding behind the sequence's `count` rows."""
    group, index = name.split(".")[:2] if "." in name else ("", "0")
    rows, ratio = (count - 1, config.mtp_ratio) if group == "mtp" else (count, config.layer_ratios[int(index)])
    held = rows if name.endswith("window_weights") else rows // max(ratio, 1)
    axes, _ = explain(name)
    return np.asarray(array)[tuple(slice({"T": rows, "S": held}.get(axis)) for axis in axes)]


def _order(name: str) -> tuple[int, int]:
    """Embedding, layers in order, logits, MTP block; by name within each."""
    group, index = name.split(".")[:2] if "." in name else (name, "0")
    return ("embedded", "layers", "logits", "mtp").index(group), int(index)
