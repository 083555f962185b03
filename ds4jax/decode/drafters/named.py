"""The drafters that a model can be opened with, by their names in `ds4jax.bounds.DRAFTERS`."""

from __future__ import annotations

from ds4jax.decode.drafter import Drafter
from ds4jax.decode.drafters.dspark import DSparkDrafter
from ds4jax.decode.drafters.mtp import MTPDrafter
from ds4jax.decode.drafters.ngram import NgramDrafter

_DRAFTERS: dict[str, Drafter] = {"mtp": MTPDrafter(), "dspark": DSparkDrafter(), "ngram": NgramDrafter()}


def named(name: str) -> Drafter | None:
    """The drafter of this name; None for "none"."""
    return _DRAFTERS.get(name)


def name_of(drafter: Drafter | None) -> str:
    """The drafter's name, or the class of a drafter that has none; "none" without a drafter."""
    if drafter is None:
        return "none"
    known = next((name for name, one in _DRAFTERS.items() if one == drafter), None)
    return known or f"{type(drafter).__module__}.{type(drafter).__qualname__}"
