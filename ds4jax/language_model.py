"""A loaded model as its users meet it: score a sequence, generate, stream."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ds4jax import cache as caches
from ds4jax import fingerprint
from ds4jax.buckets import capacity_for, chunks, padded
from ds4jax.config import Config
from ds4jax.drafter import Drafter
from ds4jax.errors import InputError
from ds4jax.generation import MOST_DRAFTS, Generation, Options, Progress, Prompt, Result, nbytes, require_chunk
from ds4jax.model.parameters import Value, build
from ds4jax.model.transformer import Transformer
from ds4jax.prefill_plan import chunk_here
from ds4jax.scoring import extend
from ds4jax.training.mtp import MTP_PARAMETERS
from pallas_kernels.formats import Quantized

if TYPE_CHECKING:
    from ds4jax.check import Report
    from ds4jax.loading import Checkpoint
    from ds4jax.tokenizer import Tokenizer
    from ds4jax.trace import Trace

SHIPPED = Path(__file__).parent / "assets" / "tiny.gguf"
DEFAULT_DRAFTS = 2
TIMED_TOKENS = 12


class LanguageModel:
    """Weights, configuration and tokenizer of one model, ready to run.

    Attributes:
        config, tokenizer, path: what was loaded and from where; the tokenizer is None where the files hold none.
        no_mtp: why there is no MTP block, a phrase for a message that begins with the path; empty where there is one.
        max_draft: the deepest draft that the decode loop is compiled for, 0 to 4; with 0 it is narrow and fastest without drafts.
        graph, weights: the Flax module split into its static and its array part, for jitted functions of your own.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None,
        path: Path | None = None,
        *,
        max_draft: int | None = None,
        no_mtp: str = "these weights have no MTP block",
    ):
        self.config: Config = model.config
        self.tokenizer = tokenizer
        self.path = path
        self.no_mtp = "" if self.config.n_mtp else no_mtp
        self.max_draft = (DEFAULT_DRAFTS if self.config.n_mtp else 0) if max_draft is None else max_draft
        _require_depth(self.max_draft)
        self.graph, self.weights = nnx.split(model)
        self._ahead: dict[Hashable, Future] = {}
        self._step_costs: dict[tuple[int, bool, Drafter | None], tuple[float, ...]] = {}

    @functools.cached_property
    def fingerprint(self) -> str:
        """A digest of the configuration and of every bit of the weights, 64 hexadecimal digits; computed once, on the device."""
        return fingerprint.of_weights(self.config, self.weights)

    def __call__(self, ids: Sequence[int] | np.ndarray) -> Float[Array, "T V"]:
        """Logits float32 [T, V] at every position of a sequence.

        Raises:
            InputError: an empty sequence, one longer than the context, or a token outside the vocabulary.
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
        progress: Progress | None = None,
    ) -> dict[str, np.ndarray]:
        """Score a sequence through prefill and cached decode.

        Args:
            ids: T token ids.
            decode_from: positions from this one on are computed one token at a time, as generation does.
            mtp: also score with the MTP block.
            strict: float32 products without Pallas kernels, also where decode would read Q8_0 weights in int8.
            chunk: tokens that one call takes in at most; None plans it by the device's memory.
            progress: called with the tokens scored and those of the sequence after each call.

        Returns:
            `ids` int32 [T], `logits` float32 [T, V], and with `mtp` `mtp_logits` [T-1, V]: row t uses the streams at t and the
            token at t+1, and predicts the token at t+2.

        Raises:
            InputError: as for `model(ids)`, a `decode_from` outside the sequence, a chunk below 1, or no MTP block in the model.
        """
        ids_T = self.checked(ids)
        total = len(ids_T)
        if decode_from is not None and not 0 <= decode_from <= total:
            raise InputError(f"decode-from is {decode_from}; the sequence has {total} tokens")
        if mtp and not self.config.n_mtp:
            raise InputError(f"{self.path or 'the model'}: mtp: {self.no_mtp}")
        require_chunk(chunk)
        capacity = capacity_for(total, self.config.max_context)
        cache = caches.empty(self.config, capacity)
        mtp_cache = caches.empty_mtp(self.config, capacity) if mtp else None
        most = chunk or chunk_here(self.config, capacity, nbytes((self.weights, cache, mtp_cache)), logits=True)
        logits, mtp_logits = [], []
        for start, width, count in chunks(total, total if decode_from is None else decode_from, most):
            mtp_count = max(min(count, total - 1 - start), 0)
            cache, mtp_cache, chunk, mtp_chunk = extend(
                self.graph,
                self.weights,
                cache,
                mtp_cache,
                padded(ids_T, start, width),
                padded(ids_T, start + 1, width),
                jnp.int32(count),
                jnp.int32(mtp_count),
                strict=strict,
                want_logits=True,
            )
            logits.append(np.asarray(chunk)[:count])
            if mtp:
                mtp_logits.append(np.asarray(mtp_chunk)[:mtp_count])
            if progress:
                progress(start + count, total)
        arrays = {"ids": ids_T, "logits": np.concatenate(logits)}
        return arrays | ({"mtp_logits": np.concatenate(mtp_logits)} if mtp else {})

    def generate(self, prompt: Prompt, **options: Any) -> Result:
        """Continue a prompt, text or token ids, in one call of the compiled loop.

        Args:
            options: fields of `ds4jax.generation.Options`, such as `max_new_tokens=64, draft=2, strict=True`, and `progress` as
                for `stream`.

        Raises:
            InputError: a prompt that is empty, longer than the context or outside the vocabulary, a text without a tokenizer,
                or an option outside its range.
        """
        generation = self.stream(prompt, **options)
        generation.advance(self.config.max_context)
        return generation.result()

    def stream(self, prompt: Prompt, *, progress: Progress | None = None, **options: Any) -> Generation:
        """Like `generate`, a few tokens at a time: iterate over the result for lists of new ids, and stop whenever you like.

        Args:
            progress: called after each chunk of the prompt with the rows that are done and those that there are to do.
        """
        return Generation(self, prompt, Options(**options), progress=progress)

    def check(self, prompt: Prompt | None = None, *, long: bool = False, strict: bool | None = None) -> Report:
        """Test that drafting changes nothing with these weights on this machine, and that the same call gives the same bits.

        Every depth from 1 to `max_draft` is compared with depth 0: tokens, and fingerprints of the logits. A model without an MTP
        block, or opened with max_draft 0, is compared with itself alone. `report.equal` is the verdict.

        Args:
            prompt: the only prompt; by default beginnings of the held-out text that ships, 3, 128 and 500 tokens long, or random
                tokens where there is no tokenizer.
            long: prompts of 1, 3, 127, 128, 129 and 500 tokens with 256 new tokens each instead of 96.
            strict: the mode to test; None tests both.

        Raises:
            InputError: a prompt that cannot be used, or a context with room for none.
        """
        from ds4jax.check import check

        return check(self, prompt, long=long, strict=strict)

    def trace(self, ids: Sequence[int] | np.ndarray, *, only: str | Sequence[str] | None = None) -> Trace:
        """Look inside: attention weights, chosen rows and experts, streams and mixing matrices of every layer, in one program.

        The sequence is scored from position 0 with float32 products, as a prefill is.

        Args:
            ids: T token ids.
            only: names or beginnings of names, `*` for anything: `"layers.3"`, `["*.streams", "mtp"]`. None takes all, which for
                long sequences is large: the window's weights alone are float32 [T, H, T] for each layer.

        Returns:
            A mapping from names to numpy arrays; `print` lists them, `ds4jax.trace.LAYER` and `WHOLE` document them.

        Raises:
            InputError: as for `model(ids)`, or nothing has such a name.
        """
        from ds4jax.trace import trace

        return trace(self, ids, only=only)

    def float_model(self) -> Transformer:
        """The model with every weight as float32, for gradients.

        `ds4jax.model.forward.score(model.float_model(), ids)` is differentiable, and so is `ds4jax.mtp_loss`. Takes four bytes
        a parameter beside the weights that are loaded.
        """
        return nnx.merge(self.graph, jax.tree.map(_as_float, self.weights, is_leaf=lambda leaf: isinstance(leaf, Quantized)))

    def with_mtp_of(self, other: Transformer) -> LanguageModel:
        """The same main model, not copied, with the MTP block of another, such as a `float_model` that was trained.

        What it generates greedily does not change: the MTP block only drafts.

        Raises:
            InputError: there is no MTP block in one of them, or it has another shape.
        """
        if not self.config.n_mtp or other.config != self.config:
            raise InputError("with_mtp_of: both models must have the same shape, with an MTP block")
        graph, _, *rest = nnx.split(nnx.merge(self.graph, self.weights), MTP_PARAMETERS, ...)
        model = nnx.merge(graph, nnx.state(other, MTP_PARAMETERS), *rest)
        return LanguageModel(model, self.tokenizer, self.path, max_draft=self.max_draft)

    def with_max_draft(self, max_draft: int) -> LanguageModel:
        """The same weights, not copied, behind a decode loop for another deepest draft.

        Raises:
            InputError: `max_draft` is outside 0 to 4.
        """
        model = nnx.merge(self.graph, self.weights)
        return LanguageModel(model, self.tokenizer, self.path, max_draft=max_draft, no_mtp=self.no_mtp)

    def ahead(self, key: Hashable, work: Callable[[], None]) -> Future:
        """Begin, once for each key, work that others need later, in a thread of its own: compiling leaves Python free.

        The decode loop compiles while the prompt does. Whoever ends the process early waits for it, as for any compilation.
        """
        if key not in self._ahead:
            pool = ThreadPoolExecutor(1)
            self._ahead[key] = pool.submit(work)
            pool.shutdown(wait=False)
        return self._ahead[key]

    def step_costs(self, capacity: int, *, strict: bool, drafter: Drafter | None = None) -> tuple[float, ...]:
        """Milliseconds of a decode step at each depth 0 to `max_draft`, measured once for each program that is asked about."""
        key = (capacity, strict, drafter)
        if key not in self._step_costs:
            timed = [self._time_steps(capacity, strict, drafter, depth) for depth in (0, *range(1 + self.max_draft))]
            # The first run compiles.
            self._step_costs[key] = tuple(timed[1:])
        return self._step_costs[key]

    def _time_steps(self, capacity: int, strict: bool, drafter: Drafter | None, depth: int) -> float:
        most = min(capacity, self.config.max_context) - 1
        generation = self.stream([0], max_new_tokens=most, ignore_eos=True, strict=strict, draft=depth, drafter=drafter)
        generation.advance(TIMED_TOKENS)
        return generation.result().ms_per_step

    def encode(self, prompt: Prompt) -> np.ndarray:
        """The tokens of a prompt, int32 [T], begin-of-sentence first when it is a text.

        Raises:
            InputError: as for `generate`.
        """
        return encoded(prompt, self.config, self.tokenizer, self.path)

    def checked(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Token ids as int32 [T].

        Raises:
            InputError: not a list of integers, empty, longer than the context, or an id outside the vocabulary.
        """
        return _checked(ids, self.config)


def _as_float(leaf: jax.Array | Quantized) -> jax.Array:
    if isinstance(leaf, Quantized):
        return leaf.dequantize()
    return leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def encoded(prompt: Prompt, config: Config, tokenizer: Tokenizer | None, path: Path | None) -> np.ndarray:
    """A prompt as int32 [T] for a model of which only the header has been read; as `LanguageModel.encode`."""
    if not isinstance(prompt, str):
        return _checked(prompt, config)
    if tokenizer is None:
        raise InputError(f"{path or 'the model'}: tokenizer: none in these files; give the prompt as token ids")
    if not prompt:
        raise InputError("prompt is empty; give at least one character")
    return _checked([config.bos_id, *tokenizer.encode(prompt)], config)


def _checked(ids: Sequence[int] | np.ndarray, config: Config) -> np.ndarray:
    array = np.asarray(ids)
    if array.size == 0:
        raise InputError("prompt is empty; give at least one token")
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"token ids are {array.dtype}{list(array.shape)}; they must be a list of integers")
    if len(array) > config.max_context:
        raise InputError(f"prompt has {len(array)} tokens; the model's context is {config.max_context}")
    outside = array[(array < 0) | (array >= config.vocab_size)]
    if len(outside):
        raise InputError(f"token id {outside[0]} is outside the vocabulary of {config.vocab_size}")
    return array.astype(np.int32)


def _require_depth(max_draft: int) -> None:
    if not 0 <= max_draft <= MOST_DRAFTS:
        raise InputError(f"max-draft is {max_draft}; it must be 0 to {MOST_DRAFTS}")


def load(
    path: str | Path | None = None,
    *,
    mtp_file: str | Path | None = None,
    dense: str | None = None,
    qat: bool | None = None,
    cache: str = "float32",
    max_draft: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LanguageModel:
    """Load a GGUF file or a checkpoint directory in the hub's form, tensor by tensor, weights as they are stored.

    Args:
        path: None loads the tiny model that ships with the package.
        mtp_file: the GGUF file with the MTP block of a GGUF model that has none; None looks for one beside it.
        dense: for a checkpoint directory: None multiplies everything out to float32, exactly; "q8_0", "bf16" or "f32" keeps FP4
            experts as MXFP4 and makes dense matrices that type.
        qat: overrides whether the FP8 and FP4 rounding of published weights is simulated.
        cache: "narrow" keeps compressed rows and indexer keys in FP8 and FP4: the same values as "float32" in less than a third
            of the memory, for models with that rounding.
        max_draft: 0 to 4, the deepest draft of the decode loop; by default 2 where there is an MTP block and 0 elsewhere. Plain
            and speculative decode say the same within one such loop; a loop for 0 is the fastest without drafts.
        progress: called after each tensor with the bytes of the file that have been read and those of all tensors.

    Raises:
        InputError: anything about the files that keeps them from being used, weights that the device has no room for, or a cache
            that the model cannot have, in one line and before any weight is read where the headers show it.
    """
    from ds4jax.loading import open_checkpoint

    checkpoint = open_checkpoint(Path(path) if path is not None else SHIPPED, mtp_file, dense=dense)
    return from_checkpoint(checkpoint, qat=qat, cache=cache, max_draft=max_draft, progress=progress)


def configured(checkpoint: Checkpoint, *, qat: bool | None = None, cache: str | None = None) -> Checkpoint:
    """An opened model with what its user decides, None for what is decided; arguments as for `load`.

    Raises:
        InputError: a cache that the model cannot have.
    """
    config = checkpoint.config
    try:
        config = dataclasses.replace(config, qat=config.qat if qat is None else qat, cache=cache or config.cache)
    except ValueError as error:
        raise InputError(f"{checkpoint.path}: {error}") from None
    return dataclasses.replace(checkpoint, config=config)


def from_checkpoint(
    checkpoint: Checkpoint,
    *,
    qat: bool | None = None,
    cache: str | None = None,
    max_draft: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LanguageModel:
    """Read the weights of an opened model; arguments and errors as for `load`."""
    from ds4jax.loading.plan import require_fit
    from ds4jax.loading.reading import read_ahead

    _require_depth(max_draft or 0)
    checkpoint = configured(checkpoint, qat=qat, cache=cache)
    require_fit(checkpoint)
    with read_ahead(tuple(tensor.start() for tensor in checkpoint.tensors)) as read:
        model = build(checkpoint.config, _named(checkpoint, read, progress))
    return LanguageModel(model, checkpoint.tokenizer, checkpoint.path, max_draft=max_draft, no_mtp=checkpoint.no_mtp)


def _named(
    checkpoint: Checkpoint, read: Iterator[Value], progress: Callable[[int, int], None] | None
) -> Iterator[tuple[str, Value]]:
    """Every tensor with its name; one at a time is in the making, while pieces of the next are on their way."""
    done, total = 0, sum(tensor.nbytes for tensor in checkpoint.tensors)
    for tensor, value in zip(checkpoint.tensors, read, strict=True):
        done += tensor.nbytes
        if progress is not None:
            progress(done, total)
        yield tensor.name, value


def generate(model: LanguageModel, prompt: Prompt, **options: Any) -> Result:
    """`model.generate(prompt, **options)` as a function."""
    return model.generate(prompt, **options)
