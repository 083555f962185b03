"""Named intermediates of every layer for one sequence, as numpy arrays."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ds4jax.config import Config
from ds4jax.decode.module import Weights, merged, on_devices
from ds4jax.engine.loaded import Loaded
from ds4jax.errors import InputError
from ds4jax.model.forward import score
from ds4jax.precision import precise

# More rows than any Q8_0 kernel takes: every product is in float32, and a trace takes the same path at every length.
WIDTHS = (64, 128, 256)
STEP = 256

# Axes and meaning by name. T: rows of the sequence. S: rows that attention sees, which are positions in the window and blocks of
# `ratio` tokens elsewhere. A dot: an inner width without a letter.
MODEL = {
    "embedded": ("TND", "streams before the first layer, all equal"),
    "logits": ("TV", "logits of the token at t+1"),
    "mtp.0.input": ("TND", "the MTP block's input at t: streams at t mixed with the embedding of the token at t+1"),
    "mtp.0.logits": ("TV", "the MTP block's logits of the token at t+2"),
}
LAYER = {
    "streams": ("TND", "streams after the layer"),
    "attn_in": ("TD", "attention's input: the streams' weighted sum, normed"),
    "attn_out": ("TD", "attention's output"),
    "ffn_in": ("TD", "the experts' input, normed"),
    "ffn_out": ("TD", "the experts' output, routed and shared"),
    "hc_attn_pre": ("TN", "share of each stream in the attention's input"),
    "hc_attn_post": ("TN", "factor of the attention's output in each stream"),
    "hc_attn_comb": ("TNN", "mixing matrix around attention, [source stream, target stream], rows and columns sum to 1"),
    "hc_ffn_pre": ("TN", "share of each stream in the experts' input"),
    "hc_ffn_post": ("TN", "factor of the experts' output in each stream"),
    "hc_ffn_comb": ("TNN", "mixing matrix around the experts"),
    "attn.q_low": ("T.", "low-rank queries after their norm"),
    "attn.kv": ("TQ", "each token's row in the window, rotated; it is both key and value"),
    "attn.window_weights": ("THS", "attention weights on the positions of the window"),
    "attn.compressed_weights": ("THS", "attention weights on the compressed rows; 0 for rows that the indexer did not select"),
    "attn.sink_weights": ("TH", "attention weight on the sink, which has no value; window, compressed and sink sum to 1"),
    "attn.compressor.pooled": ("SQ", "gated mean of each block"),
    "attn.compressor.normed": ("SQ", "gated mean of each block, normed"),
    "attn.compressor.rows": ("SQ", "compressed rows, rotated, as attention sees them"),
    "attn.indexer.compressor.pooled": ("S.", "the indexer's keys: gated mean of each block"),
    "attn.indexer.compressor.normed": ("S.", "the indexer's keys, normed"),
    "attn.indexer.compressor.rows": ("S.", "the indexer's keys, rotated"),
    "attn.indexer.score": ("TS", "the indexer's score of each compressed row; -inf for a block that is not complete yet"),
    "attn.indexer.selected": ("TK", "compressed rows that the query attends to, best first, int32; -1 for none"),
    "ffn.scores": ("TE", "the router's score of each expert, without the bias"),
    "ffn.chosen": ("TK", "chosen experts of each token, int32"),
    "ffn.weights": ("TK", "weights of the chosen experts"),
}


def explain(name: str) -> tuple[str, str]:
    """Axes and meaning of a name in a trace, such as `layers.3.attn.sink_weights` or `mtp.0.streams`.

    Raises:
        KeyError: traces have no such name.
    """
    return MODEL[name] if name in MODEL else LAYER[name.split(".", 2)[-1]]


@dataclasses.dataclass(frozen=True, repr=False)
class Trace(Mapping[str, np.ndarray]):
    """Named intermediates of one sequence: a mapping from names to arrays. `print(trace)` lists them with their meaning.

    Names are for example `embedded`, `logits`, `layers.0.streams`, `layers.0.attn.window_weights`. Names of the MTP block begin
    with `mtp.0.`. `ds4jax.evaluation.trace.LAYER` and `MODEL` document them. Floats are float32, indices int32.

    Attributes:
        ids: int32 [T], the sequence.
        ratios: tokens per compressed row of each layer; 0 for layers without compressed rows.
        arrays: the arrays by name. T is the sequence's length. The MTP block has T - 1 rows: its row t needs the token at t+1.
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
        """One layer's arrays; their names lose the prefix: `trace.layer(1)["attn.indexer.selected"]`."""
        prefix = f"layers.{index}."
        return {name.removeprefix(prefix): array for name, array in self.arrays.items() if name.startswith(prefix)}

    def over_layers(self, name: str) -> dict[int, np.ndarray]:
        """One array of each layer that has it, by layer: `trace.over_layers("ffn.chosen")`."""
        names = {i: f"layers.{i}.{name}" for i in range(len(self.ratios))}
        return {i: self.arrays[full_name] for i, full_name in names.items() if full_name in self.arrays}

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


def trace(model: Loaded, ids: Sequence[int] | np.ndarray, *, only: str | Sequence[str] | None = None) -> Trace:
    """Trace one sequence; `LanguageModel.trace` documents the arguments and errors."""
    ids_T = model.checked(ids)
    patterns = (only,) if isinstance(only, str) else None if only is None else tuple(only)
    count = len(ids_T)
    width = next((width for width in WIDTHS if width >= count), -(-count // STEP) * STEP)
    arrays = _traced(model.graph, model.arrays, jnp.asarray(np.pad(ids_T, (0, width - count))), only=patterns)
    if not arrays:
        raise InputError(f"trace: no name is or begins with {' or '.join(patterns or ())}; see ds4jax.evaluation.trace.LAYER")
    named = {name: _cut(name, array, count, model.config) for name, array in arrays.items()}
    return Trace(ids_T, model.config.layer_ratios, dict(sorted(named.items(), key=lambda item: _order(item[0]))))


@precise
@functools.partial(jax.jit, static_argnames=("graph", "only"))
@on_devices
def _traced(graph: nnx.GraphDef, weights: Weights, ids_T: jax.Array, *, only: tuple[str, ...] | None) -> dict[str, jax.Array]:
    """All wanted names from one program; XLA removes the computations that only other names need."""
    tape: dict[str, jax.Array] = {}
    tape["logits"], mtp_TV = score(merged(graph, weights), ids_T, tape=tape)
    if mtp_TV is not None:
        tape["mtp.0.logits"] = mtp_TV
    return {name: value for name, value in tape.items() if only is None or any(_wanted(name, pattern) for pattern in only)}


def _wanted(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")


def _cut(name: str, array: jax.Array, count: int, config: Config) -> np.ndarray:
    """Remove the padding after the sequence's `count` rows."""
    group, index = name.split(".")[:2] if "." in name else ("", "0")
    rows, ratio = (count - 1, config.mtp_ratio) if group == "mtp" else (count, config.layer_ratios[int(index)])
    held = rows if name.endswith("window_weights") else rows // max(ratio, 1)
    axes, _ = explain(name)
    return np.asarray(array)[tuple(slice({"T": rows, "S": held}.get(axis)) for axis in axes)]


def _order(name: str) -> tuple[int, int]:
    """Sort key: embedding, layers in order, logits, MTP block."""
    group, index = name.split(".")[:2] if "." in name else (name, "0")
    return ("embedded", "layers", "logits", "mtp").index(group), int(index)
