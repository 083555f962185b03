"""Stop texts in streamed text, against a matcher that takes one character at a time."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds4jax.errors import InputError
from ds4jax.text.stops import StopMatcher


def reference(stops: list[str], text: str) -> tuple[str, str | None]:
    """What is shown of a whole text, and the stop that ended it."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


# Few letters, so that stops overlap with each other, with themselves and with the text.
LETTERS = st.text("abé", max_size=24)


@given(st.lists(st.text("abé", min_size=1, max_size=5), max_size=4), LETTERS, st.lists(st.integers(0, 24), max_size=8))
@settings(max_examples=500)
def test_any_cut_into_pieces(stops: list[str], text: str, cuts: list[int]) -> None:
    matcher, shown = StopMatcher(stops), ""
    expected, found = reference(stops, text)
    for start, end in itertools.pairwise([0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]):
        shown += matcher.push(text[start:end])
        assert expected.startswith(shown)
        # Held back is no more than the longest stop could still need.
        if matcher.found is None:
            assert end - len(shown) < max(map(len, stops), default=1)
    assert (shown + matcher.flush(), matcher.found) == (expected, found)


def test_what_may_become_a_stop_is_held_back() -> None:
    matcher = StopMatcher(["\n\nUser:"])
    assert [matcher.push(piece) for piece in ("Yes.\n", "\nUs", "ual", "\n", "\n", "User", ": no", "more")] == [
        "Yes.",
        "",
        "\n\nUsual",
        "",
        "",
        "",
        "",
        "",
    ]
    assert (matcher.found, matcher.flush()) == ("\n\nUser:", "")


def test_what_became_no_stop_comes_at_the_end() -> None:
    matcher = StopMatcher(["END", "\n\n"])
    assert matcher.push("a\n") == "a"
    assert matcher.push("EN") == "\n"
    assert (matcher.flush(), matcher.found) == ("EN", None)


def test_the_first_to_be_complete_counts_and_then_the_longer() -> None:
    for stops in (["abc", "b"], ["b", "abc"]):
        matcher = StopMatcher(stops)
        assert (matcher.push("xabc"), matcher.found) == ("xa", "b")
    for stops in (["b", "ab"], ["ab", "b"]):
        matcher = StopMatcher(stops)
        assert (matcher.push("xab"), matcher.found) == ("x", "ab")


def test_without_stops_text_passes() -> None:
    matcher = StopMatcher([])
    assert (matcher.push("text"), matcher.flush(), matcher.found) == ("text", "", None)


def test_an_empty_stop_is_refused() -> None:
    with pytest.raises(InputError, match="stop: the text is empty"):
        StopMatcher(["a", ""])
