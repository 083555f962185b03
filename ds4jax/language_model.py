"""The public interface of a loaded model: score a sequence, generate, stream."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from flax import nnx

from ds4jax import bounds
from ds4jax.bounds import EXCHANGES, SHIPPED
from ds4jax.decode.drafter import Drafter
from ds4jax.engine import costs, session_state
from ds4jax.engine.generation import Generation
from ds4jax.engine.loaded import Loaded
from ds4jax.engine.options import Options, Result
from ds4jax.engine.prefill import Progress
from ds4jax.engine.session import Session
from ds4jax.engine.session_state import Header
from ds4jax.errors import InputError
from ds4jax.model.mtp import MTP_PARAMETERS
from ds4jax.model.parameters import Value, build
from ds4jax.model.transformer import Transformer
from ds4jax.text.prompt import Prompt

if TYPE_CHECKING:
    from ds4jax.evaluation.check import Report
    from ds4jax.evaluation.trace import Trace
    from ds4jax.loading.checkpoint import Checkpoint
    from ds4jax.loading.placement import Devices


class LanguageModel(Loaded):
    """Weights, configuration and tokenizer of a model. `ds4jax.engine.loaded.Loaded` lists the attributes."""

    def generate(self, prompt: Prompt, **options: Any) -> Result:
        """Continue a prompt, text or token ids, in one call of the compiled loop.

        Args:
            options: fields of `ds4jax.engine.options.Options`, such as `max_new_tokens=64, draft=2`, and `progress` as for
                `stream`.

        Raises:
            InputError: the prompt is empty, longer than the context or outside the vocabulary, or is a text and there is no
                tokenizer; or an option is outside its range.
        """
        generation = self.stream(prompt, **options)
        generation.advance(self.config.max_context)
        return generation.result()

    def stream(self, prompt: Prompt, *, progress: Progress | None = None, **options: Any) -> Generation:
        """Like `generate`, a few tokens at a time. Iterate over the result for lists of new ids; you can stop at any time.

        Args:
            progress: called after each chunk of the prompt with the computed rows and the total.
        """
        chosen = Options(**options)

        def step_costs(capacity: int) -> tuple[float, ...]:
            return self.step_costs(capacity, strict=chosen.strict, drafter=chosen.drafter)

        generation = Generation(self, self.encode(prompt), chosen, costs=step_costs, spell=self.spell, progress=progress)
        generation.prefill()
        return generation

    def check(self, prompt: Prompt | None = None, *, long: bool = False, strict: bool | None = None) -> Report:
        """Test that drafting does not change the output of these weights on this machine, and that calls are reproducible.

        Each depth from 1 to `max_draft` is compared with depth 0: tokens, and fingerprints of the logits. A model without an MTP
        block, or opened with max_draft 0, is only compared with itself. `report.equal` is the verdict.

        Args:
            prompt: the only prompt. By default the first 3, 128 and 500 tokens of the held-out text in the package, or random
                tokens if there is no tokenizer.
            long: use prompts of 1, 3, 127, 128, 129 and 500 tokens, and 256 new tokens each instead of 96.
            strict: the mode to test; None tests both.

        Raises:
            InputError: the prompt cannot be used, or the context is too short for every prompt.
        """
        from ds4jax.evaluation.check import check

        return check(self, prompt, long=long, strict=strict)

    def trace(self, ids: Sequence[int] | np.ndarray, *, only: str | Sequence[str] | None = None) -> Trace:
        """Record attention weights, chosen rows and experts, streams and mixing matrices of every layer, in one program.

        The sequence is scored from position 0 with float32 products, like a prefill.

        Args:
            ids: T token ids.
            only: names or prefixes of names, with `*` as a wildcard: `"layers.3"`, `["*.streams", "mtp"]`. None records all,
                which is large for long sequences: the window's weights of each layer are float32 [T, H, T].

        Returns:
            A mapping from names to numpy arrays. `print` lists them; `ds4jax.evaluation.trace.LAYER` and `MODEL` document them.

        Raises:
            InputError: no recorded array has such a name; otherwise as for `model(ids)`.
        """
        from ds4jax.evaluation.trace import trace

        return trace(self, ids, only=only)

    def with_mtp_of(self, other: Transformer) -> LanguageModel:
        """The same main model, not copied, with the MTP block of another model, such as a trained `float_model`.

        Greedy output does not change, because the MTP block only drafts.

        Raises:
            InputError: one of the models has no MTP block, or the shapes differ.
        """
        if not self.config.n_mtp or other.config != self.config:
            raise InputError("with_mtp_of: both models must have the same shape, with an MTP block")
        graph, _, *rest = nnx.split(nnx.merge(self.graph, self.weights), MTP_PARAMETERS, ...)
        model = nnx.merge(graph, nnx.state(other, MTP_PARAMETERS), *rest)
        return LanguageModel(model, self.tokenizer, self.path, max_draft=self.max_draft, exchange=self.exchange)

    def with_max_draft(self, max_draft: int) -> LanguageModel:
        """The same weights, not copied, with a decode loop for another maximum number of drafts.

        Raises:
            InputError: `max_draft` is more than the drafter can make.
        """
        model = nnx.merge(self.graph, self.weights)
        about: dict[str, Any] = {"no_mtp": self.no_mtp, "drafter": self.drafter_name, "exchange": self.exchange}
        return LanguageModel(model, self.tokenizer, self.path, max_draft=max_draft, **about)

    def step_costs(self, capacity: int, *, strict: bool, drafter: Drafter | None = None) -> tuple[float, ...]:
        """Time (ms) of a decode step at each depth 0 to `max_draft`, from the package's table or measured once per program."""
        return costs.step_costs(self, capacity, strict=strict, drafter=drafter)


def load(
    path: str | Path | None = None,
    *,
    drafter_file: str | Path | None = None,
    mtp_file: str | Path | None = None,
    drafter: str = "auto",
    dense: str | None = None,
    qat: bool | None = None,
    cache: str = "float32",
    max_draft: int | None = None,
    devices: Devices = None,
    groups: int = 1,
    exchange: str = EXCHANGES[0],
    progress: Callable[[int, int], None] | None = None,
) -> LanguageModel:
    """Load a GGUF file, whole or split, or a checkpoint directory of the hub, tensor by tensor. Weights keep their stored format.

    Args:
        path: None loads the tiny model in the package.
        drafter_file: a GGUF file with the MTP block or DSpark drafter of a GGUF model; None takes the one in the model, or else
            looks for such a file next to it.
        mtp_file: another name of `drafter_file`.
        drafter: which drafter's weights are read: "dspark", "mtp", or "auto" for DSpark if there is one, else the MTP block.
            "ngram" and "none" read neither. "mtp+ngram" and "dspark+ngram" take n-gram drafts where the text has a long match and
            the first draft is unsure.
        dense: for a checkpoint directory. None converts all weights exactly to float32. "q8_0", "bf16" or "f32" is the type of
            dense matrices, and FP4 experts become MXFP4.
        qat: overrides whether the FP8 and FP4 rounding of published weights is simulated.
        cache: "narrow" stores compressed rows and indexer keys in FP8 and FP4. For models with that rounding these are the same
            values as "float32" in less than a third of the memory.
        max_draft: 0 to 4, the maximum number of drafts per step; by default 2 with an MTP block and 0 without. Plain and
            speculative decode give the same tokens within one such loop. Without drafts, a loop for 0 is the fastest.
        devices: a number of devices, "all", or a list of devices or of their indices; None is the first. The weights are cut over
            them, and on a CPU the output has the same bits on any number.
        groups: divide the devices into so many, each with all weights and its part of an engine's slots. For bits, as above.
        exchange: how several devices exchange outputs in decode steps: by XLA's collectives ("collective") or, on GPUs of one
            process, by direct stores into each other's memory ("mailbox"). "auto" is collectives until mailboxes are measured on
            GPUs. No bit depends on it.
        progress: called after each tensor with the bytes read and the bytes of all tensors.

    Raises:
        InputError: the files, devices or exchange cannot be used, the weights do not fit on the devices, or the model does not
            support the cache. The message is one line. Everything that the headers show is checked before any weight is read.
    """
    from ds4jax.loading import open_checkpoint

    if drafter_file is not None and mtp_file is not None:
        raise InputError(f"{mtp_file}: mtp_file: {drafter_file} was given, too, as drafter_file; give one of the two")
    path, side = Path(path) if path is not None else SHIPPED, drafter_file or mtp_file
    checkpoint = open_checkpoint(path, side, dense=dense, drafter=drafter)
    checkpoint.log_note()
    where: dict[str, Any] = {"devices": devices, "groups": groups, "exchange": exchange}
    return from_checkpoint(checkpoint, qat=qat, cache=cache, max_draft=max_draft, **where, progress=progress)


def from_checkpoint(
    checkpoint: Checkpoint,
    *,
    qat: bool | None = None,
    cache: str | None = None,
    max_draft: int | None = None,
    devices: Devices = None,
    groups: int = 1,
    exchange: str = EXCHANGES[0],
    progress: Callable[[int, int], None] | None = None,
) -> LanguageModel:
    """Read the weights of an opened model; arguments and errors as for `load`."""
    from ds4jax.loading import mailboxes, placement
    from ds4jax.loading.plan import require_fit

    found = placement.chosen(devices)
    groups = placement.checked_groups(groups, found)
    max_draft = bounds.max_draft_of(checkpoint.opened_with, checkpoint.config, max_draft)
    checkpoint = checkpoint.configured(qat=qat, cache=cache)
    mailboxes.require(exchange, found, lambda: build(checkpoint.config, placement.abstract(checkpoint, found, groups)), groups)
    require_fit(checkpoint, len(found), groups)
    with placement.read(checkpoint, found, groups) as values:
        model = build(checkpoint.config, _named(checkpoint, values, progress))
    way = mailboxes.chosen(exchange, found, model, groups)
    about: dict[str, Any] = {"no_mtp": checkpoint.no_mtp, "drafter": checkpoint.opened_with, "exchange": way}
    return LanguageModel(model, checkpoint.tokenizer, checkpoint.path, max_draft=max_draft, **about)


def _named(
    checkpoint: Checkpoint, read: Iterator[Value], progress: Callable[[int, int], None] | None
) -> Iterator[tuple[str, Value]]:
    """Every tensor with its name. One tensor is converted at a time, while parts of the next are read."""
    done, total = 0, sum(tensor.nbytes for tensor in checkpoint.tensors)
    for tensor, value in zip(checkpoint.tensors, read, strict=True):
        done += tensor.nbytes
        if progress is not None:
            progress(done, total)
        yield tensor.name, value


def generate(model: LanguageModel, prompt: Prompt, **options: Any) -> Result:
    """`model.generate(prompt, **options)` as a function."""
    return model.generate(prompt, **options)


def restore(path: str | os.PathLike[str], model: Loaded | None = None, **options: Any) -> Session:
    """Restore a session from the file that `Session.save` wrote. Then `resume` it, or `stream` a longer prompt.

    The restored session has the same cache, capacity and program, so it continues with the same bits as the saved one.

    Args:
        path: the file.
        model: the model that the session was saved with, opened with the same `max_draft`. None loads it from its path; a session
            of a model without a path gets the tiny model in the package.
        options: fields of `ds4jax.engine.options.Options` that replace the saved ones; `strict` cannot change.

    Raises:
        InputError: the file is not a session, is truncated or altered, or belongs to another model or a newer version; or an
            option cannot be used. The message is one line with the name of the field. Nothing is allocated before the checks.
    """
    return Session.of(*session_state.read(path, lambda about: model or _model_of(about), **options))


def _model_of(about: Header) -> LanguageModel:
    if about.model and not os.path.exists(about.model):
        raise InputError(f"{about.path}: model: {about.model} does not exist; say where the model is")
    qat, cache = bool(about.config.get("qat")), str(about.config.get("cache", "float32"))
    return load(about.model or None, drafter=about.opened_with, qat=qat, cache=cache, max_draft=about.max_draft)
