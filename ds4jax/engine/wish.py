"""What a request of an engine asks for, checked before it waits for a slot."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ds4jax import bounds
from ds4jax.decode.sampling import Sampling
from ds4jax.decode.scores import TOP
from ds4jax.decode.slots import STOP_IDS
from ds4jax.engine.options import require_draft
from ds4jax.errors import InputError
from ds4jax.text.stops import StopMatcher

if TYPE_CHECKING:
    from ds4jax.engine.loaded import Loaded

Stop = str | int | Sequence[str | int]
# A function of the reply's tokens so far that returns which tokens may follow, as uint32 [ceil(V/32)], see
# `ds4jax.decode.masks.Mask`, or None if all may. It is called in the engine's thread before each step.
Constraint = Callable[[Sequence[int]], np.ndarray | None]
LOGPROBS = bounds.Integers(0, TOP, f"it must be 0 to {TOP}")


@dataclasses.dataclass(frozen=True)
class Wish:
    """What a request asks for, checked.

    Attributes:
        max_new_tokens: maximum number of new tokens.
        sampling: how tokens are chosen; a seed that was not given has been drawn.
        draft: drafts per step, or "auto"; None is the model's `max_draft`.
        stop_texts, stop_ids: what ends the reply, besides the model's end token.
        ignore_eos: continue after the model has ended its text.
        logprobs: number of most likely tokens that are noted with each token, 0 to 20; None notes no probabilities.
        constraint: restricts the next token; None allows all.
    """

    max_new_tokens: int = 128
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    draft: int | str | None = None
    stop_texts: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    constraint: Constraint | None = None

    @classmethod
    def of(cls, model: Loaded, room: int, *, stop: Stop | None = None, **fields: object) -> Wish:
        """Check the options of a request.

        Args:
            room: maximum of new tokens that the context holds.
            stop: texts and token ids that end the reply, or one of them.
            fields: the other attributes.

        Raises:
            InputError: an option is unknown, of another type or outside its range; the message names it.
        """
        stops = [stop] if isinstance(stop, str | int) else list(stop or ())
        texts = tuple(one for one in stops if isinstance(one, str))
        ids = tuple(bounds.POSITION.checked("stop", one) for one in stops if not isinstance(one, str))
        try:
            wish = cls(stop_texts=texts, stop_ids=ids, **fields)  # type: ignore[arg-type]
        except TypeError:
            unknown = min(set(fields) - {field.name for field in dataclasses.fields(cls)}, default="options")
            raise InputError(f"{unknown}: no such option of a request; see ds4jax.Engine.submit") from None
        return wish._checked(model, room)

    def _checked(self, model: Loaded, room: int) -> Wish:
        count = bounds.NEW_TOKENS.checked("max-new-tokens", self.max_new_tokens)
        if not isinstance(self.sampling, Sampling):
            raise InputError(f"sampling is {bounds.shown(self.sampling)}; it must be a ds4jax.Sampling")
        if not (self.draft is None or (isinstance(self.draft, str) and self.draft == "auto")):
            bounds.DRAFT.checked("draft", self.draft)
        require_draft(self.draft, model.max_draft, str(model.path or "the model"))
        if self.stop_texts and model.tokenizer is None:
            raise InputError(f"{model.path or 'the model'}: tokenizer: none in these files; give stop as token ids")
        StopMatcher(self.stop_texts)
        if self.logprobs is not None:
            LOGPROBS.checked("logprobs", self.logprobs)
        if not (self.constraint is None or callable(self.constraint)):
            raise InputError(f"constraint is {bounds.shown(self.constraint)}; it must be a function of the tokens so far")
        ends = self.stop_ids if bounds.flag("ignore-eos", self.ignore_eos) else (model.config.eos_id, *self.stop_ids)
        if len(ends) > STOP_IDS:
            raise InputError(f"stop has {len(self.stop_ids)} token ids; at most {STOP_IDS - 1} are possible")
        return dataclasses.replace(self, max_new_tokens=min(count, room), stop_ids=ends)
