"""Options and result of a continuation."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import numpy as np

from ds4jax import bounds
from ds4jax.decode.drafter import Drafter
from ds4jax.decode.loop import DecodeState
from ds4jax.decode.sampling import Sampling
from ds4jax.engine.loaded import Loaded
from ds4jax.errors import InputError

# Functions of a drafter, see `ds4jax.decode.drafter.Drafter`.
DRAFTING = ("init", "draft", "commit")


def digest(fingerprints_n2: np.ndarray) -> str:
    """A digest of the fingerprints uint32 [n, 2] of tokens, 32 hexadecimal digits."""
    return hashlib.sha256(fingerprints_n2.astype("<u4").tobytes()).hexdigest()[:32]


@dataclasses.dataclass(frozen=True)
class Result:
    """Result of `generate`.

    Attributes:
        prompt_ids, ids: the prompt's tokens, and the new tokens without the stop token.
        text: the new tokens as text.
        finish_reason: "stop" (the model ended its text), "length" (maximum of new tokens or of the context) or "interrupted".
        seconds: time from the first prefill to the last token, with compilation.
        tokens_per_second: new tokens per second of `decode_seconds`.
        draft: drafts per step, or "auto".
        drafter: the name of what drafted; "none" for a loop without drafts.
        strict: whether products were float32 without Pallas kernels.
        steps: steps of the decode loop.
        tokens_per_step: committed tokens per step, with the stop token.
        tried: for each depth, the number of drafts whose earlier drafts of the same step were accepted.
        stood: for each depth, how many of these were accepted.
        decode_seconds: time in the decode loop, without the prompt and without waiting for the loop's program.
        fingerprints: uint32 [n, 2], for each new token and the stop token, if any: the sum and exclusive or over the bits of its
            logits.
    """

    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    text: str
    finish_reason: str
    seconds: float
    tokens_per_second: float
    draft: int | str
    drafter: str
    strict: bool
    steps: int
    tokens_per_step: float
    tried: tuple[int, ...]
    stood: tuple[int, ...]
    decode_seconds: float
    fingerprints: np.ndarray = dataclasses.field(repr=False, compare=False)

    @property
    def acceptance(self) -> tuple[float, ...]:
        """For each depth that was tried, the share of accepted drafts among those whose earlier drafts were accepted."""
        return tuple(stood / tried for stood, tried in zip(self.stood, self.tried, strict=True) if tried)

    @property
    def fingerprint(self) -> str:
        """A digest of the fingerprints of all tokens, 32 hexadecimal digits."""
        return digest(self.fingerprints)

    @property
    def ms_per_step(self) -> float:
        """Time (ms) of the decode loop per step."""
        return 1e3 * self.decode_seconds / self.steps if self.steps else 0.0

    def since(self, earlier: Result, text: str) -> Result:
        """What came after an earlier result of the same continuation; `text` is its text. What was said before is prompt."""
        begun, steps, seconds = len(earlier.ids), self.steps - earlier.steps, self.decode_seconds - earlier.decode_seconds
        count = len(self.fingerprints) - len(earlier.fingerprints)
        return dataclasses.replace(
            self,
            prompt_ids=self.prompt_ids + self.ids[:begun],
            ids=self.ids[begun:],
            text=text,
            fingerprints=self.fingerprints[begun:],
            steps=steps,
            tokens_per_step=count / steps if steps else 0.0,
            tried=tuple(now - then for now, then in zip(self.tried, earlier.tried, strict=True)),
            stood=tuple(now - then for now, then in zip(self.stood, earlier.stood, strict=True)),
            decode_seconds=seconds,
            tokens_per_second=count / seconds if seconds else 0.0,
        )


@dataclasses.dataclass(frozen=True)
class Options:
    """How to continue a prompt.

    Attributes:
        max_new_tokens: maximum number of new tokens.
        sampling: how tokens are chosen.
        ignore_eos: continue after the model has ended its text.
        strict: float32 products without Pallas kernels.
        draft: drafts per step, at most the model's `max_draft`. "auto" chooses the fastest depth; None is `max_draft`.
        drafter: the drafter; by default the one that the model was opened with.
        chunk: maximum tokens of the prompt per call; None chooses it by the device's memory. Unless `strict`, calls of at most 32
            rows round activations to int8, so the text may depend on such a chunk size. Longer calls differ in the last bits. See
            `Loaded.logits`.

    Raises:
        InputError: a value has another type or is outside its range; the message names the field.
    """

    max_new_tokens: int = 128
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    ignore_eos: bool = False
    strict: bool = False
    draft: int | str | None = None
    drafter: Drafter | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        # Convert to Python numbers, because saved sessions store them as JSON.
        checked: dict[str, Any] = {"max_new_tokens": bounds.NEW_TOKENS.checked("max-new-tokens", self.max_new_tokens)}
        checked |= {field: bounds.flag(field.replace("_", "-"), getattr(self, field)) for field in ("ignore_eos", "strict")}
        if self.chunk is not None:
            checked["chunk"] = bounds.CHUNK.checked("chunk", self.chunk)
        if not (self.draft is None or (isinstance(self.draft, str) and self.draft == "auto")):
            checked["draft"] = bounds.DRAFT.checked("draft", self.draft)
        for field, value in checked.items():
            object.__setattr__(self, field, value)
        if not isinstance(self.sampling, Sampling):
            raise InputError(f"sampling is {bounds.shown(self.sampling)}; it must be a ds4jax.Sampling")
        if self.drafter is not None and not all(callable(getattr(self.drafter, name, None)) for name in DRAFTING):
            raise InputError(f"drafter is {bounds.shown(self.drafter)}; it must have the functions {', '.join(DRAFTING)}")


def require_draft(draft: int | str | None, max_draft: int, name: str) -> None:
    """Check that `draft` is at most `max_draft`; `name` is the model's name in the message.

    Raises:
        InputError: `draft` is larger.
    """
    if (1 if draft == "auto" else int(draft or 0)) > max_draft:
        raise InputError(f"draft is {draft}, but {name} was opened with max_draft {max_draft}")


def require_drafter(model: Loaded, options: Options) -> None:
    """Check that the model's loop can make the drafts of the options.

    Raises:
        InputError: there is no drafter, or `draft` is larger than the model's `max_draft`.
    """
    name = str(model.path or "the model")
    # A loop that can draft runs the drafter for every token, also at depth 0.
    if (options.draft or model.max_draft) and model.drafter_name == "none" and not options.drafter:
        raise InputError(f"{name}: mtp: {model.no_mtp}; drafting needs that block, so use draft 0 and max_draft 0")
    require_draft(options.draft, model.max_draft, name)


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """State of a continuation between two calls.

    Attributes:
        prompt_ids: int32 [T].
        state: the loop's state, with the tokens after the prompt.
        given: number of these tokens that were returned to the caller.
        seconds: time in the decode loop so far.
    """

    prompt_ids: np.ndarray
    state: DecodeState
    given: int
    seconds: float
