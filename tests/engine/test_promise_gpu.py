"""The engine's promise on a GPU: each request has the bits that it has alone."""

from __future__ import annotations

from typing import Any

import pytest
from engines import Case, alone, assert_same, engine, mixed, prompt

from ds4jax.decode.sampling import Sampling

pytestmark = pytest.mark.gpu
REQUESTS: tuple[tuple[int, int, dict[str, Any]], ...] = (
    (0, 40, {"max_new_tokens": 24, "draft": 0}),
    (60, 33, {"max_new_tokens": 30, "sampling": Sampling(0.8, top_p=0.95, seed=3)}),
    (9, 1, {"max_new_tokens": 12, "draft": 2}),
)


@pytest.mark.parametrize("case", ["tiny", ("float32", False), ("narrow", True), "q2", "flash"])
def test_forty_requests_have_the_bits_that_they_have_alone(case: Case) -> None:
    with engine(case) as one:
        mixed(one, case, 40, seed=2)


@pytest.mark.parametrize("slots", [1, 8, 16])
def test_kernels_give_the_same_bits_at_any_number_of_slots(slots: int) -> None:
    """Steps of 3, 24 and 48 rows, beside one of 12."""
    with engine("flash", slots=slots) as one:
        requests = [one.submit(prompt("flash", start, length), ignore_eos=True, **fields) for start, length, fields in REQUESTS]
        for request, (start, length, fields) in zip(requests, REQUESTS, strict=True):
            assert_same(request.result(600), alone("flash", start, length, (*fields.items(), ("ignore_eos", True))))
