"""A loaded model for the engine: weights, configuration and tokenizer. Token ids in, logits out."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from ds4jax import bounds
from ds4jax.cache import state as caches
from ds4jax.cache.capacity import capacity_for, chunks, padded
from ds4jax.config import Config
from ds4jax.decode import loop as decode
from ds4jax.decode.drafter import Drafter
from ds4jax.decode.drafters.named import named
from ds4jax.decode.loop import DecodeState
from ds4jax.decode.module import Graph, flat
from ds4jax.decode.scoring import extend
from ds4jax.engine import beginning
from ds4jax.engine.draft_arrays import draft_arrays, draft_positions
from ds4jax.engine.prefill import Progress, buckets_here, chunk_here, nbytes
from ds4jax.errors import InputError
from ds4jax.loading import fingerprint
from ds4jax.loading.mailboxes import COLLECTIVE, Exchange
from ds4jax.loading.placement import everywhere
from ds4jax.model.transformer import Transformer
from ds4jax.text.prompt import Prompt, checked, encoded
from pallas_kernels.formats import Quantized

Arrays = TypeVar("Arrays")

if TYPE_CHECKING:
    from ds4jax.text.tokenizer import Tokenizer


class Loaded:
    """Weights, configuration and tokenizer of one model.

    Attributes:
        config, tokenizer, path: the model's; the tokenizer is None if the files have none, the path if there are no files.
        no_mtp: the reason why there is no MTP block, for an error message; empty with an MTP block.
        drafter_name: the drafter that drafts unless another is passed: "mtp", "dspark", "ngram" or "none".
        max_draft: the maximum number of drafts per step that the loop is compiled for. Without drafts, 0 is the fastest.
        graph, weights: the static part and the arrays of the Flax module, for your own jitted functions.
        arrays: the arrays of `weights` in one tuple, and those of the exchange; calls of compiled programs process it faster than
            the tree.
        exchange: how its devices exchange outputs in a decode step.
        costs: times (ms) of a decode step, by program; see `ds4jax.engine.costs`.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None,
        path: Path | None = None,
        *,
        max_draft: int | None = None,
        no_mtp: str = "these weights have no MTP block",
        drafter: str | None = None,
        exchange: Exchange = COLLECTIVE,
    ):
        self.config: Config = model.config
        self.tokenizer = tokenizer
        self.path = path
        self.no_mtp = "" if self.config.n_mtp else no_mtp
        self.drafter_name = drafter or bounds.own_drafter(self.config)
        self.max_draft = bounds.max_draft_of(self.drafter_name, self.config, max_draft)
        self.exchange = exchange
        self.graph, self.weights = Graph.split(model, words=exchange.words)
        self.arrays = flat(self.weights, exchange.arrays)
        self.costs: dict[tuple[int, bool, Drafter | None], tuple[float, ...]] = {}
        self._shapes: dict[tuple[int, Drafter | None], DecodeState] = {}

    @functools.cached_property
    def fingerprint(self) -> str:
        """A digest of the configuration and all bits of the weights, 64 hexadecimal digits. Computed once, on the device."""
        return fingerprint.of_weights(self.config, self.weights)

    @functools.cached_property
    def shape_key(self) -> str:
        """A digest of the sizes and the types of the weights, 16 hexadecimal digits; see `ds4jax.engine.cost_table`."""
        return fingerprint.of_shape(self.config, self.weights)

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return nbytes(self.arrays)

    def __call__(self, ids: Sequence[int] | np.ndarray) -> Float[Array, "T V"]:
        """Logits float32 [T, V] at every position of a sequence of T token ids.

        Raises:
            InputError: the sequence is empty or longer than the context, or a token is outside the vocabulary.
        """
        return jnp.asarray(self.logits(ids)["logits"])

    def logits(
        self,
        ids: Sequence[int] | np.ndarray,
        *,
        decode_from: int | None = None,
        mtp: bool = False,
        strict: bool = False,
        chunk: int | None = None,
        draft_at: Sequence[int] = (),
        progress: Progress | None = None,
    ) -> dict[str, np.ndarray]:
        """Score a sequence through prefill and cached decode.

        Except in strict mode, a call of at most 32 rows multiplies Q8_0 weights by activations rounded to int8, like a decode
        step. A longer call does not round them. So logits depend on the chunks. If every call has more than 32 rows, other chunks
        change only the last bits. Rows of shorter calls, such as the last one of a sequence, change by the size of the rounding,
        also between two short calls.

        Args:
            ids: T token ids.
            decode_from: positions from this one are computed one token at a time, as in generation.
            mtp: also score with the MTP block.
            strict: float32 products without Pallas kernels, also in decode steps.
            chunk: maximum tokens per call; None chooses it by the device's memory.
            draft_at: A positions; after each, the DSpark block drafts K tokens.
            progress: called after each call with the scored tokens and the total.

        Returns:
            `ids` int32 [T], `logits` float32 [T, V], and with `mtp` also `mtp_logits` float32 [T-1, V]. Row t uses the streams at
            t and the token at t+1, and predicts the token at t+2. With `draft_at` also the arrays of `draft_arrays`.

        Raises:
            InputError: `decode_from` or `draft_at` is outside the sequence, `chunk` is below 1, or the model lacks the block that
                is asked for; otherwise as for `model(ids)`.
        """
        ids_T = self.checked(ids)
        total = len(ids_T)
        decode_from = total if decode_from is None else bounds.POSITION.checked("decode-from", decode_from)
        if decode_from > total:
            raise InputError(f"decode-from is {decode_from}; the sequence has {total} tokens")
        if mtp and not self.config.n_mtp:
            raise InputError(f"{self.path or 'the model'}: mtp: {self.no_mtp}")
        mtp, strict = bounds.flag("mtp", mtp), bounds.flag("strict", strict)
        chunk = None if chunk is None else bounds.CHUNK.checked("chunk", chunk)
        anchors = draft_positions(self.config, str(self.path or "the model"), draft_at, total)
        taps = self.config.dspark_layers if anchors else ()
        logits, mtp_logits, means = [], [], []
        for done, logits_TV, mtp_logits_TV, means_TLD in self._scored(ids_T, decode_from, mtp, strict, chunk, taps):
            logits.append(logits_TV)
            mtp_logits.append(mtp_logits_TV)
            means.append(means_TLD)
            if progress:
                progress(done, total)
        arrays = {"ids": ids_T, "logits": np.concatenate(logits)}
        arrays |= {"mtp_logits": np.concatenate(mtp_logits)} if mtp else {}
        if not anchors:
            return arrays
        of_model = self.graph, self.arrays, self.config.window
        return arrays | draft_arrays(*of_model, arrays, np.concatenate(means), anchors, strict=strict)

    def _scored(
        self, ids_T: np.ndarray, decode_from: int, mtp: bool, strict: bool, chunk: int | None, taps: tuple[int, ...]
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
        """After each call: the number of scored rows, the call's logits of model and MTP block, and the means [T, L, D]."""
        total = len(ids_T)
        capacity = capacity_for(total, self.config.max_context)
        cache = caches.empty(self.config, capacity)
        mtp_cache = caches.empty_mtp(self.config, capacity) if mtp else None
        cache, mtp_cache = self.placed((cache, mtp_cache))
        max_width = chunk or chunk_here(self.config, capacity, self.nbytes + nbytes((cache, mtp_cache)), logits=True)
        for start, width, count in chunks(total, decode_from, max_width, buckets_here()):
            mtp_count = max(min(count, total - 1 - start), 0)
            cache, mtp_cache, logits_TV, mtp_logits_TV, means = extend(
                self.graph, self.arrays, cache, mtp_cache,
                padded(ids_T, start, width), padded(ids_T, start + 1, width), np.int32(count), np.int32(mtp_count),
                strict=strict, want_logits=True, taps=taps,
            )  # fmt: skip
            mtp_rows = np.asarray(mtp_logits_TV)[:mtp_count] if mtp else np.zeros(0, np.float32)
            yield start + count, np.asarray(logits_TV)[:count], mtp_rows, np.stack(means, axis=1)[:count] if taps else mtp_rows

    def float_model(self) -> Transformer:
        """The model with every weight in float32, for gradients.

        `ds4jax.model.forward.score(model.float_model(), ids)` and `ds4jax.mtp_loss` are differentiable. Needs four bytes per
        parameter in addition to the loaded weights.
        """
        return nnx.merge(self.graph, jax.tree.map(_as_float, self.weights, is_leaf=lambda leaf: isinstance(leaf, Quantized)))

    def encode(self, prompt: Prompt) -> np.ndarray:
        """The token ids of a prompt, int32 [T]. A text starts with the begin-of-sentence token.

        Raises:
            InputError: the prompt is empty, longer than the context or outside the vocabulary, or is a text and there is no
                tokenizer.
        """
        return encoded(prompt, self.config, self.tokenizer, self.path)

    def spell(self, ids: Sequence[int]) -> str:
        """Convert token ids to text; empty without a tokenizer."""
        return self.tokenizer.decode(ids) if self.tokenizer else ""

    def checked(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Check token ids and convert them to int32 [T].

        Raises:
            InputError: they are not integers, there are none or more than the context, or an id is outside the vocabulary.
        """
        return checked(ids, self.config)

    def drafter(self, chosen: Drafter | None) -> Drafter | None:
        """The drafter of the decode loop: the chosen one, otherwise that of `drafter_name`; None at max_draft 0."""
        return (chosen or named(self.drafter_name)) if self.max_draft else None

    def program_key(self, capacity: int, drafter: Drafter | None, *, strict: bool) -> tuple[Any, ...]:
        """What the programs over a cache of `capacity` rows depend on. Models of equal shapes share them."""
        return self.graph, self.config, self.max_draft, capacity, strict, drafter

    def state(self, capacity: int, last: int, drafter: Drafter | None) -> DecodeState:
        """A decode state with an empty cache of `capacity` rows, for a prompt with the last token `last`."""
        state = beginning.state(self.config, capacity, [last], drafter=drafter, max_draft=self.max_draft)
        return self.placed(state)

    def placed(self, arrays: Arrays) -> Arrays:
        """The arrays on each of the model's devices; on one device they stay as they are."""
        mesh = self.graph.mesh
        return everywhere(arrays, mesh) if isinstance(mesh, Mesh) else arrays

    def state_shapes(self, capacity: int, drafter: Drafter | None) -> DecodeState:
        """Shapes and types of `state`, without allocating it."""
        key = (capacity, drafter)
        if key not in self._shapes:
            empty = functools.partial(decode.start, self.config, capacity, [0], drafter=drafter, max_draft=self.max_draft)
            self._shapes[key] = jax.eval_shape(empty)
        return self._shapes[key]


def _as_float(leaf: jax.Array | Quantized) -> jax.Array:
    if isinstance(leaf, Quantized):
        return leaf.dequantize()
    return leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
