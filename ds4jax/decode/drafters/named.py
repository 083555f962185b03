"""The drafters that a model can be opened with, by their names in `ds4jax.bounds.DRAFTERS`."""

from __future__ import annotations

from ds4jax.bounds import AND_NGRAM
from ds4jax.decode.drafter import Drafter
from ds4jax.decode.drafters.dspark import DSparkDrafter
from ds4jax.decode.drafters.mtp import MTPDrafter
from ds4jax.decode.drafters.ngram import NgramDrafter
from ds4jax.decode.drafters.second_opinion import SecondOpinion

_OF_WEIGHTS: dict[str, Drafter] = {"mtp": MTPDrafter(), "dspark": DSparkDrafter()}
_DRAFTERS: dict[str, Drafter] = (
    _OF_WEIGHTS | {"ngram": NgramDrafter()} | {name + AND_NGRAM: SecondOpinion(first) for name, first in _OF_WEIGHTS.items()}
)


def named(name: str) -> Drafter | None:
    """The drafter of this name; None for "none"."""
    return _DRAFTERS.get(name)


def name_of(drafter: Drafter | None) -> str:
    """The drafter's name, or the class of a drafter that has none; "none" without a drafter."""
    if drafter is None:
        return "none"
    known = next((name for name, one in _DRAFTERS.items() if one == drafter), None)
    return known or f"{type(drafter).__module__}.{type(drafter).__qualname__}"
