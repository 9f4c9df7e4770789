"""Stop strings against a naive reference, at every way of cutting the text."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkit.errors import UsageError
from llmkit.text.stream import StopScanner

letters = st.text("ab", max_size=12)


@given(text=letters, stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), cuts=st.lists(st.integers(0, 12), max_size=6))
def test_equals_a_search_in_the_whole_text(text: str, stops: list[str], cuts: list[int]) -> None:
    found = [text.find(stop) for stop in stops if stop in text]
    scanner = StopScanner(stops)
    said, stopped = "", False
    edges = sorted({0, len(text), *(cut for cut in cuts if cut <= len(text))})
    for a, b in itertools.pairwise(edges):
        emit, stopped = scanner.push(text[a:b])
        said += emit
        assert text.startswith(said)
        assert not found or len(said) <= min(found)  # nothing of a stop string is ever shown
        if stopped:
            break
    assert not stopped or found
    said += scanner.flush()
    assert said == (text[: min(found)] if found else text)
    assert scanner.stopped == bool(found)


def test_ordinary_text_is_not_held_back() -> None:
    scanner = StopScanner(["</end>"])
    assert scanner.push("hello <") == ("hello ", False)
    assert scanner.push("b>") == ("<b>", False)
    assert scanner.push("x</en") == ("x", False)
    assert scanner.push("d> more") == ("", True)
    assert scanner.push("again") == ("", True)
    assert scanner.flush() == ""


def test_empty_stop_is_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        StopScanner(["a", ""])
